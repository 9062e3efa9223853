"""A whole run: config, data, loop, checkpoints, metrics, report."""
