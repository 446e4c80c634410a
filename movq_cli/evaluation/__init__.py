"""The figures of the tables: paired, and between distributions."""
