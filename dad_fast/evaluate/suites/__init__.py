"""Test sets by name."""
