"""Corruptions of ImageNet-C."""
