"""Scans learning rates: `python scripts/lr_scan.py configs/NAME.py [--rates ...] [--seeds ...] [overrides]`.

Trains: any shipped config at five rates (by default from a tenth of its own to ten times it) with two
    seeds, all with one compiled step.
Command: python scripts/lr_scan.py configs/digits_mlp_float32.py
Hardware and time: ten times the config's own; for the digits' MLP two CPU cores and half a minute.
Writes: lr_scan.png and lr_scan.json to runs/NAME-lr-scan or --workdir; prints a table.
Expected: final training loss and held-out metric at each rate, and the learning-rate sensitivity (Wortsman
    et al. 2023, arXiv 2309.14322): how far the loss lies above the best one on average over the rates.

The scan itself is `jaxmp.run.scan`; this file only hands over the command line.
"""

import sys

from jaxmp.run import scan

if __name__ == "__main__":
    sys.exit(scan.main())
