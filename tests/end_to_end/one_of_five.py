"""One of several processes that keep their figures in one folder: `one_of_five.py FOLDER NUMBER TIMES`."""

import sys
from pathlib import Path

from fewstep.evaluation.actions import write_actions
from fewstep.evaluation.figures import write_figures
from fewstep.policies.figures import write_rollouts


def main(folder: Path, name: str, times: int) -> None:
    """Rows of this process, one after another, into each of the files."""
    measured = {"method": name, "seed": 0, "samples": 8}
    for count in range(1, times + 1):
        write_figures([measured | {"nfe": count, "frechet": 1.0, "extractor": "e", "reference": "r"}], folder)
        write_actions([measured | {"steps": count, "error": 1.0, "errors": [1.0]}], folder)
        acted = {"task": "t", "sampler": "map", "first_seed": 0, "episodes": 1, "successes": 1, "routes": {}}
        shares = dict.fromkeys(("success", "low", "high", "mean_steps", "score"), 1.0)
        write_rollouts([measured | acted | shares | {"steps": count, "errors": [], "latency_ms": None}], folder)


if __name__ == "__main__":
    main(Path(sys.argv[1]), f"process {sys.argv[2]}", int(sys.argv[3]))
