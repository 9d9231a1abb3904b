"""What stands behind the computed preconditioning: how far the network must move with it, and are its l and s right?"""

from pathlib import Path
from typing import Annotated

from tyro.conf import Positional

from benchmarks.harness import Study, read, write
from benchmarks.preconditioning import gap as gaps
from benchmarks.preconditioning import statistics as check

SHOWN = {"mixture, closed form": "mixture", "edm-digits": "digits"}
OTHERS = {name: name for name in ("edm-mixture", "edm-digits, class-conditional")}


def tables() -> dict[str, str]:
    return {
        "Are l and s right": check.table(read(check.CHECKED)),
        "How far N must move": gaps.table(read(gaps.GAP), SHOWN),
        "How far N must move, other teachers": gaps.table(read(gaps.GAP), OTHERS),
    }


STUDY = Study("preconditioning", tables)


def gap(teachers: Annotated[tuple[Path, ...], Positional] = (), closed_form: bool = False, samples: int = 256) -> None:
    """Measure the gap of trained teachers.

    Args:
        teachers: run folders
        closed_form: of the mixture's exact denoiser too
        samples: training samples behind the statistics
    """
    for rows in (
        *(gaps.of_run(folder, samples) for folder in teachers),
        *([gaps.of_closed_form(samples)] if closed_form else []),
    ):
        gaps.store(rows)
        print(gaps.table(rows, {rows[0]["teacher"]: rows[0]["teacher"]}))


def statistics(
    seeds: tuple[int, ...] = (0, 1, 2), samples: int = 4096, reference_samples: int = 262_144, out: Path = check.CHECKED
) -> None:
    """Check l and s of the mixture against an estimate of another kind, for the estimates of several seeds.

    Args:
        seeds: of the estimates that are checked
        samples: of each estimate
        reference_samples: of what they are checked against
        out: JSON file to write
    """
    rows = check.checked(seeds, samples, reference_samples)
    print(check.table(rows))
    write(out, rows)


if __name__ == "__main__":
    STUDY.main(gap=gap, statistics=statistics)
