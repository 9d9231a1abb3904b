"""`python -m fewstep`, and what `torchrun -m fewstep` and `accelerate launch -m fewstep` start.

On CPUs accelerate launches one process whatever is asked for: take torchrun for several.
"""

import sys

from fewstep.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
