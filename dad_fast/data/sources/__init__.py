"""Sources of images: folders, tar shards, embedded data, and those of other packages."""
