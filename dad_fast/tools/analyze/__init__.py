"""`dad-fast analyze`."""
