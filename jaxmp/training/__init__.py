"""One pure step."""
