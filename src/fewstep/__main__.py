"""`python -m fewstep`, and what `torchrun -m fewstep` and `accelerate launch -m fewstep` start.

On CPUs accelerate launches one process whatever is asked for: take torchrun for several.
"""

import sys


def main() -> int:
    """The command line; an interrupt is one line from the very first, while it is still being imported."""
    try:
        from fewstep.cli.main import main as command_line

        return command_line()
    except KeyboardInterrupt:
        sys.stderr.write("fewstep: interrupted\n")
        return 130


if __name__ == "__main__":
    sys.exit(main())
