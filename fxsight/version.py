"""The version of this package, for itself: files that are kept name it."""

__version__ = "0.1.0"
