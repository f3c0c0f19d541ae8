"""All that knows mergekit's classes: the methods as its plugin, units, loading."""

# Importing the registry has the plugin imported (see `_autoload`): that must happen before a
# module of this folder is half imported, or the plugin would find it incomplete.
import mergekit.merge_methods.registry  # noqa: F401
