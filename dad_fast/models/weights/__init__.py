"""Weight files: formats, key filters, hardened pickles, fingerprints."""
