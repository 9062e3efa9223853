"""A whole run: config, data, loop, checkpoints, metrics, report.

`run.loop.train(config)` runs an experiment, `run.cli.main()` does so from the command line. Nothing
is imported here, so that a part, such as `jaxmp.run.checkpoint`, does not cost the whole.
"""
