"""Judging a model: suites, metrics, corruptions and the table that compares runs."""
