"""What the figures in the README were measured with, one script a figure."""
