"""Loaders: they execute augmentation records."""
