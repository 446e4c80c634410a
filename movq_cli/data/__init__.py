"""Images on their way to the models: decoding, prepared sets, batches, the order of training, cached codes."""
