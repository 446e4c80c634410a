"""A run as one HTML page that needs nothing else: what it is, its curves, its pictures, its codes."""
