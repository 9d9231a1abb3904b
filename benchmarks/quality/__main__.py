"""How good are the samples of the longer runs? What `fewstep evaluate` stored of them, kept in docs/figures."""

from benchmarks.harness import FIGURES, Row, Study, markdown, read

RUNS = {"Fashion-MNIST, U-Net": "fashion-mnist", "Fashion-MNIST, DiT": "fashion-mnist-dit", "Quickstart": "quickstart"}
HEADS = ("method", "calls", "Fréchet distance", "class accuracy", "precision", "recall")


def line(row: Row) -> tuple[object, ...]:
    """A method with one number of calls."""
    figures = f"{row['accuracy']:.3f}", f"{row['precision']:.2f}", f"{row['recall']:.2f}"
    return (row["method"], row["nfe"] or "–", f"{row['frechet']:.2f}", *figures)


def tables() -> dict[str, str]:
    """A table for each run, with the flow matching that it is compared with."""
    return {name: markdown(HEADS, map(line, read(FIGURES / f"{file}.json"))) for name, file in RUNS.items()}


STUDY = Study("quality", tables)

if __name__ == "__main__":
    STUDY.main()
