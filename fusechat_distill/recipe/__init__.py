"""The YAML recipe: its keys, their checks and their documentation."""
