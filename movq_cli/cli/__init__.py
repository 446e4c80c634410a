"""The options of the commands, one file for each command. These modules do not import torch."""
