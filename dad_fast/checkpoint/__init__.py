"""Checkpoints of a run: folder, state, compatibility, writer."""
