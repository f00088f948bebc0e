"""Test sets, by name."""
