"""`python -m fewstep`, and what `accelerate launch -m fewstep` starts."""

import sys

from fewstep.cli import main

if __name__ == "__main__":
    sys.exit(main())
