"""`dad-fast average`."""
