"""Merge methods as pure tensor math: they know neither files nor mergekit."""
