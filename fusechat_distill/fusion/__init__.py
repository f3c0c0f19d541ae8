"""Which model's distribution a target learns from at each position."""
