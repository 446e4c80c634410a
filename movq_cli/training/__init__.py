"""Training: the loop that both stages share, and the step of each stage."""
