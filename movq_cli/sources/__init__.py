"""Where images come from: folders, archives, arrays, prepared sets and named public sets."""
