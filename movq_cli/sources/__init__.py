"""Sources of images: folders, archives, arrays, prepared sets and public data sets, all read in the same way."""
