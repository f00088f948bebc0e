"""Evaluation: suites, corruptions, metrics, and tables that compare runs."""
