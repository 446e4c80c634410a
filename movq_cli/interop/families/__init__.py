"""One module for each family of public weights; each has a `FAMILY`."""
