"""Shards on disk, resumable stages and the processes that share them."""
