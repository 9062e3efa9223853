"""Plans a config's step for absent hardware: `python scripts/plan.py configs/NAME.py --target gpu-h100`.

The plan itself is `jaxmp.run.planning`; this file only hands over the command line.
"""

import sys

from jaxmp.run import planning

if __name__ == "__main__":
    sys.exit(planning.main())
