"""The version of this package, in a file of its own that imports nothing."""

__version__ = "0.1.0"
