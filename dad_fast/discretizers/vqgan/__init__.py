"""VQGAN: model, configuration, exact fusions."""
