"""What does self-distillation converge to without its anchor, and with a weak one?

First the expected updates on Gaussian data: are they zero at the data's flow map and at others, which eigenvalues have
their Jacobians there, how much anchor does stability need? Then small networks, trained by the library's objectives
with both of their terms, with the distillation alone, and with each term normalised by its own loss.
"""

from benchmarks.degeneracy.expected import fixed_points, slopes, thresholds
from benchmarks.degeneracy.figure import Maps, draw
from benchmarks.degeneracy.networks import DIGITS, LOSSES, OBJECTIVES, PLAN, SEEDS, Truth, on_digits, train
from benchmarks.degeneracy.tables import STORED, matrices, tables
from benchmarks.harness import FIGURES, Row, Study, chosen, read, write

STUDY = Study("degeneracy", tables)


def run(digits: bool = False) -> None:
    """Compute the updates, train the networks, draw the figure: three minutes.

    Args:
        digits: train on digits too, a minute more; without it the rows of an earlier run are kept
    """
    expected = [*fixed_points(), *thresholds(), *slopes()]
    truth = Truth.draw()
    trained, maps = networks(truth)
    draw([*expected, *trained], maps, truth, FIGURES / "degeneracy.png")
    seen = chosen(read(STORED), kind="digits")
    if digits:
        seen = [{"kind": "digits", "loss": loss, "lr": lr} | on_digits(loss, lr) for loss, lr in DIGITS]
    write(STORED, [{k: v for k, v in row.items() if k != "curve"} for row in (*expected, *trained, *seen)])
    print(matrices(), STUDY.text(), sep="\n\n")


def networks(truth: Truth) -> tuple[list[Row], Maps]:
    """Every run of the plan: a row for each seed, and the maps."""
    rows, maps = [], {}
    for name, loss, start in PLAN:
        flow_map, before = train(OBJECTIVES[name], LOSSES[loss], start, truth)
        maps[name, loss, start] = flow_map
        after = truth.measure(flow_map)
        for seed in range(SEEDS):
            found = {key: values[seed] for key, values in after.items()}
            first = {f"{key}_before": values[seed] for key, values in before.items()}
            row = {"kind": "network", "objective": name, "loss": loss, "start": start, "seed": seed}
            rows.append(row | found | first)
    return rows, maps


if __name__ == "__main__":
    STUDY.main(run=run)
