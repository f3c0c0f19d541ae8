"""What both programs share: errors, how commands end, files, and system calls."""
