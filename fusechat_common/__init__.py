"""What both programs share: errors, the command line's manners, files, and system calls."""
