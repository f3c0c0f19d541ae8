"""Fine-tunes the pivot into one target checkpoint per source."""
