"""Run log, log sinks, progress and environment."""
