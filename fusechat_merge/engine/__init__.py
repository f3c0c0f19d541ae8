"""Carries a plan out, piece by piece: reading, threads, saving, resuming, verifying."""
