"""The DALI loader."""
