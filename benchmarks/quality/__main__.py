"""How good are the samples of the longer runs? What `fewstep evaluate` stored of them, kept in docs/figures."""

from benchmarks.harness import FIGURES, Study, markdown, read

RUNS = {
    "Fashion-MNIST, U-Net": "fashion-mnist",
    "Fashion-MNIST, DiT": "fashion-mnist-dit",
    "Quickstart": "quickstart",
    "Photographs": "photos",
}
HEADS = ("method", "calls", "Fréchet distance", "class accuracy", "precision", "recall")
FORM = "{method}|{nfe}|{frechet:.2f}|{accuracy:.3f}|{precision:.2f}|{recall:.2f}"


def tables() -> dict[str, str]:
    """A table for each run, with the flow matching that it is compared with."""
    rows = {name: read(FIGURES / f"{file}.json") for name, file in RUNS.items()}
    return {name: markdown(HEADS, [FORM.format(**row).split("|") for row in own]) for name, own in rows.items()}


STUDY = Study("quality", tables)

if __name__ == "__main__":
    STUDY.main()
