"""`dad-fast train --dry-run`: parameters, FLOP, memory and time of a run, from shapes alone."""
