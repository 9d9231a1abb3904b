"""What does self-distillation converge to without its anchor, and with a weak one?

First the expected updates on Gaussian data: are they zero at the data's flow map and at others, which eigenvalues have
their Jacobians there, how much anchor does stability need? Then small networks, trained by the library's objectives
with both of their terms, with the distillation alone, and with each term normalised by its own loss.
"""

from benchmarks.degeneracy.expected import fixed_points, slopes, thresholds
from benchmarks.degeneracy.figure import draw
from benchmarks.degeneracy.networks import DIGITS, PLAN, Truth, on_digits, train
from benchmarks.degeneracy.tables import STORED, tables
from benchmarks.harness import FIGURES, Study, chosen, read, write

STUDY = Study("degeneracy", tables)


def run(digits: bool = False) -> None:
    """Compute the updates, train the networks, draw the figure: three minutes.

    Args:
        digits: train on digits too, a minute more; without it the rows of an earlier run are kept
    """
    rows, maps, truth = [*fixed_points(), *thresholds(), *slopes()], {}, Truth.draw()
    for cell in PLAN:
        maps[cell], found = train(*cell, truth)
        rows += found
    draw(rows, maps, truth, FIGURES / "degeneracy.png")
    rows += [on_digits(*cell) for cell in DIGITS] if digits else chosen(read(STORED), kind="digits")
    write(STORED, [{key: value for key, value in row.items() if key != "curve"} for row in rows])
    print(STUDY.text())


if __name__ == "__main__":
    STUDY.main(run=run)
