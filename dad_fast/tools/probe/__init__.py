"""Measurements of linear probes."""
