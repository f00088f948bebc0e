"""Several runs as one job: every variant with every seed, on worker processes, and one table.

`dad-fast train` with variants or seeds and `dad-fast ablate` both run a `Sweep` (runs.py) with
`run_sweep` (sweep.py).
"""
