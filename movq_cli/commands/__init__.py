"""What each command does, top to bottom."""
