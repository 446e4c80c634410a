"""The kinds of sources, one file each; `open_source` finds the constant `KIND` of every file in this folder."""
