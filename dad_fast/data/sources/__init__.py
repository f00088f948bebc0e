"""Where images lie: folders, tar shards, embedded data."""
