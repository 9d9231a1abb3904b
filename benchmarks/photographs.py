"""A set of photographs to try the tutorial on: 600 crops of 40 photographs that packages ship, in three classes.

`python benchmarks/photographs.py cut FOLDER` writes FOLDER/{garden,landscape,things}/NAME-NN.png, 64x64, from

    apt-get install plasma-workspace-wallpapers mate-backgrounds lomiri-wallpapers-16.04 lomiri-wallpapers-20.04
    pip install scikit-learn

`python benchmarks/photographs.py apart FOLDER` writes 6,300 crops at 32x32 of those and 23 more, of `opencv-doc`, into
FOLDER/train and FOLDER/heldout, which have no photograph in common: those of the study `skip`.

`python benchmarks/photographs.py picture RUN FILE.png` draws what a run on them gives in one and in two calls, above
photographs that it has not seen.

Each crop is a square with 0.6 to 1 times the shorter side, anywhere in the photograph, always the same ones.
"""

import importlib.util
import random
from pathlib import Path

import torch
import tyro
from PIL import Image
from tyro.conf import Positional

import fewstep as fs
from fewstep.data.draws import even_draw
from fewstep.sampling.images import save_grid
from fewstep.utils.errors import DataError

PLASMA, MATE, LOMIRI = (
    "wallpapers/{}/contents/images/2560x1600.jpg",
    "backgrounds/mate/nature/{}.jpg",
    "backgrounds/{}.jpg",
)
SKLEARN = "{}.jpg"
PHOTOGRAPHS = {
    "garden": {
        PLASMA: ("FallenLeaf", "OneStandsOut"),
        MATE: (
            "Blinds", "FreshFlower", "Garden", "GreenMeadow", "LadyBird", "RainDrops", "TwoWings", "YellowFlower",
        ),
        LOMIRI: ("Dragonfly_by_Bolly", "seeding_by_Clements_Engelhardt"),
        SKLEARN: ("flower",),
    },
    "landscape": {
        PLASMA: ("Autumn", "BytheWater", "ColdRipple", "DarkestHour", "EveningGlow", "Path", "summer_1am"),
        MATE: ("Dune", "Storm"),
        LOMIRI: (
            "Bridge_by_Sander_Klootwijk", "aitzgorri_by_Aitzol_Berasategi", "life_by_Aitzol_Berasategi",
            "picosdeeuropa_by_Aitzol_Berasategi", "sunset_by_Aitzol_Berasategi",
        ),
    },
    "things": {
        PLASMA: ("ColorfulCups", "Grey", "Kite"),
        MATE: ("Aqua", "Wood"),
        LOMIRI: (
            "Picture_0B_by_freespace", "Picture_1A_by_freespace", "Wine_by_Jakkub_Mede", "free_by_Peter_Nerlich",
            "friends_by_Aitzol_Berasategi", "greentock_by_Peter_Nerlich", "Kleiber_by_Lukas_Baubkus",
        ),
        SKLEARN: ("china",),
    },
}  # fmt: skip
"""Photographs of each class by where they lie below /usr/share, or in scikit-learn."""
OPENCV = "doc/opencv-doc/examples/{}"
MORE = (
    "alphamat/input_images/plant.jpg", "data/aero1.jpg", "data/aloeL.jpg", "data/apple.jpg", "data/baboon.jpg",
    "data/board.jpg", "data/building.jpg", "data/butterfly.jpg", "data/chicky_512.png", "data/fruits.jpg",
    "data/graf1.png", "data/leuvenA.jpg", "data/orange.jpg", "data/rubberwhale1.png", "data/squirrel_cls.jpg",
    "data/home.jpg", "data/licenseplate_motion.jpg", "data/stuff.jpg", "hfs/data/000.jpg", "text/scenetext01.jpg",
    "text/scenetext03.jpg", "dnn_superres/butterfly.png", "reg/home.png",
)  # fmt: skip
"""Further photographs, of Debian's package opencv-doc."""


def photographs(share: Path) -> dict[str, list[Path]]:
    """The files of each class; raises DataError where one is missing."""
    spec = importlib.util.find_spec("sklearn.datasets")
    sklearn = Path(spec.origin).parent / "images" if spec and spec.origin else share
    found = {
        name: [
            (sklearn if place == SKLEARN else share) / place.format(each) for place, all in of.items() for each in all
        ]
        for name, of in PHOTOGRAPHS.items()
    }
    if missing := [str(file) for files in found.values() for file in files if not file.is_file()]:
        raise DataError(f"{len(missing)} photographs are missing, such as {missing[0]}: install what is named above")
    return found


def crop(image: Image.Image, side: int, draw: random.Random) -> Image.Image:
    """A square of 0.6 to 1 times the shorter side, resized."""
    width, height = image.size
    size = round(min(width, height) * draw.uniform(0.6, 1.0))
    left, top = draw.randint(0, width - size), draw.randint(0, height - size)
    return image.resize((side, side), Image.Resampling.LANCZOS, (left, top, left + size, top + size))


def cut(out: Positional[Path], share: Path = Path("/usr/share"), side: int = 64, crops: int = 15) -> None:
    """Cut `crops` squares of `side` pixels out of every photograph; share: where packages put theirs."""
    draw, count = random.Random(0), 0
    for name, files in photographs(share).items():
        (out / name).mkdir(parents=True, exist_ok=True)
        for file in files:
            image = Image.open(file).convert("RGB")
            stem = file.parts[-4] if "contents" in file.parts else file.stem
            for number in range(crops):
                crop(image, side, draw).save(out / name / f"{stem}-{number:02d}.png")
                count += 1
    print(f"{out}: {count} crops of {sum(map(len, photographs(share).values()))} photographs")


def apart(out: Positional[Path], share: Path = Path("/usr/share"), side: int = 32, crops: int = 100) -> None:
    """Cut `crops` squares out of each of 63 photographs, a folder of each; every fourth photograph is held out."""
    draw = random.Random(0)
    known = [file for files in photographs(share).values() for file in files]
    more = [share / OPENCV.format(place) for place in MORE]
    if missing := [str(file) for file in more if not file.is_file()]:
        raise DataError(f"{len(missing)} photographs are missing, such as {missing[0]}: apt-get install opencv-doc")
    for index, file in enumerate([*known, *more]):
        name = f"{index:02d}-{file.parts[-4] if 'contents' in file.parts else file.stem}"
        folder = out / ("heldout" if index % 4 == 3 else "train") / name
        folder.mkdir(parents=True, exist_ok=True)
        image = Image.open(file).convert("RGB")
        for number in range(crops):
            crop(image, side, draw).save(folder / f"{number:03d}.png")
    print(f"{out}: {crops * (len(known) + len(more)):,} crops of {len(known) + len(more)} photographs")


def picture(run: Positional[Path], out: Positional[Path], columns: int = 12) -> None:
    """Two rows in one call, two in two from the same noise, and two of held-out photographs; classes in turn."""
    pipeline, folder = fs.load(run), fs.RunFolder(run)
    _, dataset = folder.load_data()
    rows = [pipeline.generate(2 * columns, steps=steps).samples for steps in (1, 2)]
    shown = even_draw(dataset.heldout, 2 * columns, 0)
    save_grid(torch.cat([*rows, dataset.heldout.fetch(shown)[0]]), out, columns=columns, data_range=(-1.0, 1.0))
    print(out)


if __name__ == "__main__":
    tyro.extras.subcommand_cli_from_dict({"cut": cut, "apart": apart, "picture": picture}, description=__doc__)
