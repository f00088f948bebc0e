"""`dad-fast doctor`."""
