"""The version, which parts of the package name in what they send."""

__version__ = "0.1.0"
