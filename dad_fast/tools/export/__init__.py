"""`dad-fast export`."""
