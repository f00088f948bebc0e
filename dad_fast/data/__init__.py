"""Data: sources, class lists, augmentation records, loaders. A leaf of the import tree: nothing here knows models or engines."""
