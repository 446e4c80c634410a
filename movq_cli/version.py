"""The version of movq: a leaf, so that every layer may name it in the files that it writes."""

__version__ = "0.1.0"
