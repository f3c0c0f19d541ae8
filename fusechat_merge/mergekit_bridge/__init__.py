"""All that knows mergekit's classes: the methods as its plugin, units, loading."""
