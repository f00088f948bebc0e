"""Optional commands."""
