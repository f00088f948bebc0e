"""Run log, progress, environment."""
