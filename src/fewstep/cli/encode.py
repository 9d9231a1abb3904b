"""`fewstep encode FOLDER`: images into latents, and their captions into embeddings."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from fewstep.data.latents.encode import EncodingWork, encode_folder, summary
from fewstep.data.latents.shards import EncodingSettings
from fewstep.data.latents.target import TeacherSettings
from fewstep.data.pictures import find_pictures
from fewstep.data.rows import Columns
from fewstep.utils.text import listed, quoted


@dataclass(frozen=True)
class Options:
    """Encode a folder of images into latents, in shards, or go on where it was stopped: the same files come out.

    For a teacher of text, captions become embeddings beside them. Repeat the same command to go on; batch size, device
    and where the autoencoder and the teacher lie may change.
    """

    folder: Annotated[Path, tyro.conf.Positional]
    """Folder of images, whose first-level subfolders, if it has any, are the classes; a .tar of WebDataset, or a folder
    of those; or a Hugging Face dataset: a parquet file, a folder of those, or OWNER/NAME on the Hub."""
    out: Path
    """Folder for the latents, which `fewstep train RECIPE --data.source latents --data.root OUT` reads."""
    autoencoder: Path | None = None
    """Folder of an autoencoder of diffusers (config.json and safetensors); nothing is downloaded."""
    target: Annotated[TeacherSettings, tyro.conf.arg(name="")] = TeacherSettings()
    columns: Annotated[Columns, tyro.conf.arg(name="")] = Columns()
    settings: Annotated[EncodingSettings, tyro.conf.arg(name="")] = EncodingSettings()
    std: float = 1.0
    """Standard deviation that each channel is given when it is read; may be changed later by the same command."""
    work: Annotated[EncodingWork, tyro.conf.arg(name="")] = EncodingWork()


def run(options: Options) -> None:
    """Run the command; raises what it calls raises."""
    where = options.folder, options.autoencoder, options.out
    manifest = encode_folder(*where, options.settings, options.std, options.work, options.target, options.columns)
    print(f"{options.out}: {summary(manifest)}")
    left_out = find_pictures(options.folder, options.columns).left_out
    if manifest.prompts is not None:  # those were read
        left_out = tuple(each for each in left_out if not each.endswith((" .txt", " .jsonl")))
    if left_out:
        print(f"Left out: {listed(left_out)}")
    teacher = options.target.teacher
    recipe = f"distil-diffusers --teacher {quoted(teacher)}" if teacher else "RECIPE"
    print(f"Next: fewstep train {recipe} --data.source latents --data.root {quoted(options.out)}")
