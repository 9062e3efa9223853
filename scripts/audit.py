"""Audits an experiment: `python scripts/audit.py configs/NAME.py [--checkpoint [N]] [overrides]`.

Looks at: one batch of training at the start of the experiment or at a checkpoint; nothing is trained.
Hardware and time: a minute or two for the shipped configs on two CPU cores.
Writes: WORKDIR/audit/report.html and its pictures: magnitudes against number formats and the policy they
    call for, gradients by depth, singular values of blocks, attention entropy, loss scale and skips.

The audit itself is `jaxmp.run.audit`; this file only hands over the command line.
"""

import sys

from jaxmp.run import audit

if __name__ == "__main__":
    sys.exit(audit.main())
