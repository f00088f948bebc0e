"""The commands of `dad-fast`: one file a command, with its options, its help and one call. Imports neither torch nor numpy."""
