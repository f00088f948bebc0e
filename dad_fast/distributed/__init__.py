"""Process group, launcher, signals and shared gradients."""
