"""`dad-fast fit-discretizer`."""
