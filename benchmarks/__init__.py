"""Benchmarks: `pytest benchmarks/ --benchmark`. See benchmarks/README.md."""
