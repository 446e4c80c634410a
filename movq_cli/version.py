"""The version of movq; this module imports nothing, so every layer can write it to its files."""

__version__ = "0.1.0"
