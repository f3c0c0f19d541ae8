"""Bits per byte, answers and intervals: which checkpoint is better, and how surely."""
