"""The diagnosis of a run: rules that find its problems, each with the evidence and a remedy."""
