"""What is wrong with a run, with the evidence and a remedy."""
