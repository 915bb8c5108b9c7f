"""The version of tl_fastload."""

__version__ = "0.1.0"
