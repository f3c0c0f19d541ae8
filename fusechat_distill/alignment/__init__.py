"""A source's distributions brought to the pivot's positions and vocabulary."""
