"""One door to every kind of set of images: npz and zip files, folders, and the output folders of this
project.
"""

import zipfile
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from guided_diffusion.files.archives import ArrayImages, ZipImages
from guided_diffusion.files.images import FolderImages, Images
from guided_diffusion.files.run_folder import finished_files, read_run, shard_files


def open_images(path: str | Path, *, skip_unreadable: bool = False) -> Images:
    """Open an npz (`arr_0`: uint8 NHWC), a zip or folder of pictures, or an output folder of this project.

    Folders are read recursively, links followed, in the order of the relative paths; hidden files are
    ignored, others that are no pictures are counted in a note. Of an output folder only the samples are read:
    samples_*.npz, or the shards of an unfinished run in the order of their indices. With skip_unreadable,
    damaged pictures are skipped and counted, not refused. Raises FileNotFoundError, and ValueError for
    anything that is not such a set.
    """
    path = Path(path)
    if path.is_dir():
        return _open_folder(path, skip_unreadable)
    if not path.exists():
        raise FileNotFoundError(f"there is nothing at {path}; give an npz, a zip or a folder of images")
    kind = archive_kind(path)
    if kind == "npz":
        return ArrayImages(path, [path])
    if kind == "zip":
        return ZipImages(path, skip_unreadable)
    raise ValueError(f"cannot read images from {path}: give an npz, a zip or a folder of pictures")


def archive_kind(path: Path) -> str:
    """ "npz" or "zip", by the ending in any case, else by the content; "" for another file."""
    if path.suffix.lower() in (".npz", ".zip"):
        return path.suffix.lower()[1:]
    try:
        with zipfile.ZipFile(path) as archive:
            return "npz" if all(name.endswith(".npy") for name in archive.namelist()) else "zip"
    except (OSError, zipfile.BadZipFile):
        return ""


def pick_images(images: Images, count: int, seed: int = 0) -> NDArray[np.uint8]:
    """(count, H, W, 3) random images of a set, in its order; fewer where it has fewer, or where some are
    unreadable and skipped.
    """
    return images.pick(np.sort(np.random.RandomState(seed).permutation(images.entries)[:count]))


def _open_folder(folder, skip_unreadable):
    finished = finished_files(folder)
    if finished and finished[0].suffix == ".json":
        return FolderImages(folder, skip_unreadable)
    if len(finished) > 1:
        names = f"{finished[0].name}, {finished[1].name}, ..."
        raise ValueError(f"{folder} holds {len(finished)} sample files ({names}): give one of them")
    if finished:
        return ArrayImages(folder, finished)
    if shards := shard_files(folder):
        images = ArrayImages(folder, shards)
        wanted = read_run(folder)["settings"].get("num_samples")
        images.standing_notes.append(f"unfinished run: {images.entries} of {wanted} images")
        return images
    if (folder / "run.json").is_file():
        raise ValueError(f"{folder} holds 0 images: its run has not completed a shard yet")
    return FolderImages(folder, skip_unreadable)
