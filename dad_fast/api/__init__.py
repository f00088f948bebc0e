"""Functions of `import dad_fast as df` that run the commands' code from Python. See docs/api.md."""
