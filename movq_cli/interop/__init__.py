"""Weights of other projects: reading their files without running code, and their names in terms of ours and back."""
