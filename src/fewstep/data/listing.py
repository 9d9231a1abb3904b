"""A folder of any number of images, listed once: the listing is kept, and holds while its folders do not change."""

import os
import warnings
from pathlib import Path

import torch

from fewstep.data.base import source_path
from fewstep.data.folder import Listing, list_images
from fewstep.data.kept import Kept, keep, now, place, read_kept, settled, times_of
from fewstep.data.names import Files, Names
from fewstep.utils.errors import FewstepWarning


def kept_listing(root: str) -> Listing:
    """As `list_images`; the one of an earlier start where no folder below `root` has been changed since.

    A FewstepWarning says where one has.
    """
    folder = source_path(root)
    if not root or not folder.is_dir():
        return list_images(root)  # which says what is wrong
    folder, start = folder.resolve(), now()
    file = place("listing", str(folder))
    if kept := read_kept(file):
        if found := _listing(folder, kept):
            return found
        warnings.warn(f"'{folder}' has changed since it was listed: it is listed anew", FewstepWarning, stacklevel=3)
    listing = list_images(root)
    times = times_of(listing.folders)
    names = Names.of(os.path.relpath(path, folder) for path in listing.files)
    if settled(times, start):
        folders = Names.of(map(str, listing.folders))
        labels = torch.tensor(listing.labels or (), dtype=torch.int64)
        tensors = {"letters": names.letters, "ends": names.ends, "labels": labels, "times": times}
        tensors |= {"folder_letters": folders.letters, "folder_ends": folders.ends}
        note = {
            "class_names": listing.class_names,
            "left_out": listing.left_out,
            "labelled": listing.labels is not None,
        }
        keep(file, Kept(tensors, note))
    return Listing(folder, Files(folder, names), listing.labels, listing.class_names, listing.left_out, listing.folders)


def _listing(folder: Path, kept: Kept) -> Listing | None:
    """What is kept, unless a folder has been changed."""
    tensors, note = kept.tensors, kept.note
    folders = tuple(map(Path, Names(tensors["folder_letters"], tensors["folder_ends"]).all()))
    if not torch.equal(times_of(folders), tensors["times"]):
        return None
    files = Files(folder, Names(tensors["letters"], tensors["ends"]))
    labels = tuple(tensors["labels"].tolist()) if note["labelled"] else None
    return Listing(folder, files, labels, tuple(note["class_names"]), tuple(note["left_out"]), folders)
