"""Augmentation: records, their policy and execution, mixing."""
