"""Images in: any file to pixels, the prepared set, the code cache, the order of an epoch."""
