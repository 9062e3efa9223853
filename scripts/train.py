"""Trains the experiment of a config file: `python scripts/train.py configs/NAME.py [--dotted.overrides ...]`.

The run itself is `jaxmp.run.loop`; this file only hands over the command line.
"""

import sys

from jaxmp.run import cli

if __name__ == "__main__":
    sys.exit(cli.main())
