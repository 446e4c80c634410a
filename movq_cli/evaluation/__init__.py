"""The metrics of reconstructions and samples: of pairs of images, and of two sets as distributions."""
