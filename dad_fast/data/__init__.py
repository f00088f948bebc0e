"""Data: sources, class lists, augmentation records, loaders. Imports no models and no engine."""
