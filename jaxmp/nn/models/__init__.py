"""Reference models, written to be read."""
