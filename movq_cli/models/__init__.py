"""The models and their decoding loops; nothing here knows files or the command line."""
