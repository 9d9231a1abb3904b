"""From a folder of drawings to decoded samples, with an autoencoder trained on the spot.

    apt-get download openclipart-png && dpkg -x openclipart-png_*.deb clipart
    python -m benchmarks.latents run clipart/usr/share/openclipart/png --classes animals food people plants

Four classes of Debian's public-domain drawings, 256x256. A small autoencoder is trained (no package brings a trained
one), then latents are encoded, a small DiT trained on them, samples drawn and measured.
"""

from pathlib import Path
from typing import Annotated

import torch
from tyro.conf import Positional

from benchmarks.harness import FIGURES, RESULTS, Study, markdown, read, write

STORED = RESULTS / "latents.json"


def tables() -> dict[str, str]:
    """What is stored."""
    found = read(STORED)
    assert isinstance(found, dict)
    images, autoencoder, encoding, training = (found[k] for k in ("images", "autoencoder", "encoding", "training"))
    road = (
        ("images", f"{images['count']:,} of {images['side']}x{images['side']}"),
        ("autoencoder", f"{autoencoder['steps']} steps in {autoencoder['seconds']:.0f} s: {autoencoder['psnr_db']} dB"),
        ("encoding", f"{encoding['images_per_second']} images a second, {encoding['megabytes']} MB"),
        (
            "training",
            f"{training['images']:,} images in {training['seconds']:.0f} s, {training['parameters']:,} weights",
        ),
    )
    rows = [
        (row["method"], str(row["nfe"] or "–"), f"{row['frechet']:.2f}", str(row["samples"])) for row in found["rows"]
    ]
    return {
        "The road": markdown(("part", ""), road),
        "Quality": markdown(("method", "network calls", "Fréchet distance", "samples"), rows),
    }


STUDY = Study("latents", tables)


def run(
    images: Annotated[Path, Positional],
    classes: tuple[str, ...] = (),
    limit: int = 0,
    out: Path = Path("runs/latents"),
    autoencoder_seconds: float = 200.0,
    autoencoder_batch: int = 8,
    train_seconds: float = 150.0,
    results: Path = STORED,
    figure: Path = FIGURES / "latents.png",
) -> None:
    """Walk the road; started again on the same OUT it goes on where it stopped. One core is meant.

    Args:
        images: a folder with a subfolder of images for every class
        classes: subfolders to take; all when not given
        limit: images of a class at most; 0 for all
        out: where everything is kept
        autoencoder_seconds: training of the autoencoder; both limits make the figures depend on the machine
        autoencoder_batch: crops a step
        train_seconds: training of the DiT
        results: JSON file to write
        figure: picture to write
    """
    from benchmarks.latents.road import Road

    torch.set_num_threads(1)
    road = Road(images, classes, limit, out, autoencoder_seconds, autoencoder_batch, train_seconds)
    write(results, road.walk(figure))
    print(f"Written: {results} and {figure}")


if __name__ == "__main__":
    STUDY.main(run=run)
