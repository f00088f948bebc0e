"""Several processes: process group, launcher, signals, gradients."""
