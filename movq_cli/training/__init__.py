"""One loop for both stages, and one step each."""
