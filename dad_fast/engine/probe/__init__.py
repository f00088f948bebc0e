"""Training of linear probes (LP-CLIP): step, kept features, pseudo-labels."""
