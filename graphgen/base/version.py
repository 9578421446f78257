"""The version of graphgen, for those of its modules that say it to others."""

__version__ = "0.1.0"
