"""Images with labels to train on, read into memory: (N, S, S, 3) uint8 and (N,) int64.

| what                     | where the labels are                                                          |
|--------------------------|-------------------------------------------------------------------------------|
| npz                      | arr_1                                                                         |
| zip                      | dataset.json, as EDM's tools write it; else as in a folder                    |
| folder of pictures       | the sub-folder that a picture lies in; else its name before "_"               |
| torchvision's CIFAR10    | in its batches (cifar-10-batches-py): those to train on, or one by its path   |

Pictures are cut as guided-diffusion cuts them: halved by boxes while twice as large, then bicubic, then the
centre. The classes of folders and names are numbered in the order of their names.
"""

import io
import json
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from guided_diffusion.files.archives import ArrayImages
from guided_diffusion.files.cifar_batches import (
    BATCHES,
    TEST_BATCH,
    is_cifar_folder,
    read_batch,
    read_cifar_folder,
)
from guided_diffusion.files.image_sets import archive_kind
from guided_diffusion.files.images import DAMAGED, ENDINGS, FORMATS


@dataclass(frozen=True)
class LabelledImages:
    """images: (N, S, S, 3) uint8. labels: (N,) int64, None where there are none. classes: their names, empty
    where the source gives numbers.
    """

    images: NDArray[np.uint8]
    labels: NDArray[np.int64] | None
    classes: Sequence[str] = ()

    def numbered_as(self, classes: Sequence[str], source: str, other: str) -> "LabelledImages":
        """The same images, their classes numbered as in another set, by name; as they are where one of the
        two has no names. source, other: where the sets come from. Raises ValueError for a class that the
        other lacks.
        """
        if not classes or not self.classes or self.labels is None or list(classes) == list(self.classes):
            return self
        if lacking := sorted(set(self.classes) - set(classes)):
            raise ValueError(
                f"{source} has the class {lacking[0]!r}, which {other} has not ({len(lacking)} such): rename "
                "or remove it"
            )
        numbers = np.array([list(classes).index(name) for name in self.classes], dtype=np.int64)
        return LabelledImages(self.images, numbers[self.labels], tuple(classes))

    def require_labels(self, source: str | Path, num_classes: int, otherwise: str = "") -> NDArray[np.int64]:
        """The labels. Raises ValueError where there are none, or one is not in [0, num_classes). otherwise:
        what a user without labels may do.
        """
        if self.labels is None:
            raise ValueError(
                f"{source} has no labels: sort the pictures into a folder for each class{otherwise}"
            )
        wrong = np.flatnonzero((self.labels < 0) | (self.labels >= num_classes))
        if len(wrong):
            raise ValueError(
                f"{source}: image {wrong[0]} has label {self.labels[wrong[0]]}, and --num_classes "
                f"{num_classes} allows 0 to {num_classes - 1}"
            )
        return self.labels


def read_labelled(path: str | Path, image_size: int) -> LabelledImages:
    """Read a set of images, each cut to image_size x image_size.

    Raises FileNotFoundError, and ValueError for what is no such set, and for damaged pictures, by name.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"there is nothing at {path}; give a folder, zip or npz of images")
    if path.is_dir():
        if is_cifar_folder(path):
            return _resized(LabelledImages(*read_cifar_folder(path)), image_size)
        return _of_folder(path, image_size)
    if path.name in (*BATCHES, TEST_BATCH):
        return _resized(LabelledImages(*read_batch(path)), image_size)
    kind = archive_kind(path)
    if kind == "npz":
        return _resized(_of_npz(path), image_size)
    if kind == "zip":
        return _of_zip(path, image_size)
    raise ValueError(f"cannot read images from {path}: give a folder, a zip or an npz")


def picture_files(folder: str | Path) -> list[str]:
    """The relative paths of the pictures in a folder and below it, sorted. Raises ValueError for none."""
    folder = Path(folder)
    names = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return _pictures(sorted(names), folder)


def classes_of(names: Sequence[str]) -> tuple[list[str], NDArray[np.int64]]:
    """(names of the classes, (N,) labels) of pictures by their relative paths: the folders that they lie in,
    or, where all lie in one, what their names begin with before "_", as in guided-diffusion.
    """
    paths = [PurePosixPath(name) for name in names]
    in_folders = len({path.parent for path in paths}) > 1
    of_each = [path.parent.as_posix() if in_folders else path.name.split("_")[0] for path in paths]
    classes = sorted(set(of_each))
    number = {name: i for i, name in enumerate(classes)}
    return classes, np.array([number[name] for name in of_each], dtype=np.int64)


def open_picture(data: bytes) -> Image.Image:
    """The bytes of a picture, converted to RGB. Raises what DAMAGED lists."""
    with Image.open(io.BytesIO(data), formats=FORMATS) as picture:
        return picture.convert("RGB")


def centre_crop(picture: Image.Image, image_size: int) -> NDArray[np.uint8]:
    """(image_size, image_size, 3): the picture's centre, its shorter side scaled to image_size."""
    while min(picture.size) >= 2 * image_size:
        picture = picture.resize((picture.width // 2, picture.height // 2), Image.Resampling.BOX)
    scale = image_size / min(picture.size)
    size = (round(picture.width * scale), round(picture.height * scale))
    array = np.asarray(picture.resize(size, Image.Resampling.BICUBIC) if size != picture.size else picture)
    top, left = (array.shape[0] - image_size) // 2, (array.shape[1] - image_size) // 2
    return array[top : top + image_size, left : left + image_size]


def _of_folder(folder, image_size):
    names = picture_files(folder)
    images = _read_all(folder, names, lambda name: (folder / name).read_bytes(), image_size)
    classes, labels = classes_of(names)
    return LabelledImages(images, labels, classes)


def _of_zip(path, image_size):
    try:
        with zipfile.ZipFile(path) as archive:
            names = _pictures(sorted(archive.namelist()), path)
            images = _read_all(path, names, archive.read, image_size)
            listed = "dataset.json" in archive.namelist()
            known = json.loads(archive.read("dataset.json")).get("labels") if listed else None
    except zipfile.BadZipFile as error:
        raise ValueError(f"{path} is truncated or not a zip file ({error})") from error
    if not listed:
        classes, labels = classes_of(names)
        return LabelledImages(images, labels, classes)
    if known is None:
        return LabelledImages(images, None)
    by_name = dict(known)
    if missing := [name for name in names if not isinstance(by_name.get(name), int)]:
        raise ValueError(f"{path}: dataset.json has no class number for {missing[0]} ({len(missing)} such)")
    return LabelledImages(images, np.array([by_name[name] for name in names], dtype=np.int64))


def _pictures(names, source):
    pictures = [name for name in names if name.lower().endswith(ENDINGS) and not _hidden(name)]
    if not pictures:
        raise ValueError(f"{source} holds no pictures: no file in it ends in {' '.join(ENDINGS)}")
    return pictures


def _hidden(name):
    return any(part.startswith(".") for part in PurePosixPath(name).parts)


def _read_all(source, names, read: Callable[[str], bytes], image_size):
    images = np.empty((len(names), image_size, image_size, 3), dtype=np.uint8)
    for i, name in enumerate(names):
        try:
            images[i] = centre_crop(open_picture(read(name)), image_size)
        except DAMAGED as error:
            raise ValueError(
                f"{Path(source) / name} cannot be read as a picture ({error}): mend or remove it"
            ) from error
    return images


def _of_npz(path):
    ArrayImages(path, [path])  # refuses what is no npz of images, and says why
    with np.load(path, allow_pickle=False) as file:
        images = file["arr_0"]
        try:
            labels = file["arr_1"] if "arr_1" in file.files else None
        except ValueError as error:
            raise ValueError(
                f"{path}: arr_1 holds Python objects, which are refused; save numbers"
            ) from error
    if labels is not None and (labels.shape != (len(images),) or labels.dtype.kind not in "iu"):
        raise ValueError(
            f"{path}: arr_1 is {labels.dtype} {labels.shape}; needed are {len(images)} whole numbers"
        )
    return LabelledImages(images, None if labels is None else labels.astype(np.int64))


def _resized(found, image_size):
    """The images of an array cut to this size, which most have."""
    if found.images.shape[1:3] == (image_size, image_size):
        return found
    cut = [centre_crop(Image.fromarray(image), image_size) for image in found.images]
    return LabelledImages(np.stack(cut), found.labels, found.classes)
