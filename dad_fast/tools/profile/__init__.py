"""`dad-fast profile`."""
