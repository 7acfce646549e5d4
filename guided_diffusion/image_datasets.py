"""Batches of images from disk without end, under the name and arguments of openai/guided-diffusion."""

import math
import random

import numpy as np
import torch.distributed as dist
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from guided_diffusion.files.images import DAMAGED
from guided_diffusion.files.labelled import centre_crop, classes_of, open_picture, picture_files


def load_data(
    *,
    data_dir,
    batch_size,
    image_size,
    class_cond=False,
    deterministic=False,
    random_crop=False,
    random_flip=True,
):
    """Yield (images, {"y": labels}) for ever: (batch_size, 3, image_size, image_size) float32 in [-1, 1] and
    (batch_size,) int64, which are only there with class_cond.

    data_dir: a folder, searched recursively; labels: `files.labelled.classes_of`. deterministic: in the order
    of the names, else shuffled by torch's generator. random_crop: a random part, at least 0.8 of the shorter
    side, in the place of the centre. Several processes share the files. Raises ValueError for a folder
    without pictures, for less than a batch, and for a damaged picture, by name.
    """
    if not data_dir:
        raise ValueError("data_dir is missing: give a folder of images")
    names = picture_files(data_dir)
    labels = classes_of(names)[1] if class_cond else None
    rank, processes = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    share = slice(rank, None, processes)
    pictures = Pictures(
        [f"{data_dir}/{name}" for name in names[share]],
        image_size,
        None if labels is None else labels[share],
        random_crop,
        random_flip,
    )
    if len(pictures) < batch_size:
        raise ValueError(
            f"{data_dir} has {len(pictures)} pictures for this process, less than a batch of {batch_size}"
        )
    loader = DataLoader(pictures, batch_size, shuffle=not deterministic, num_workers=1, drop_last=True)
    return _without_end(loader)


def _without_end(loader):
    while True:
        yield from loader


class Pictures(Dataset):
    """(image (3, S, S) float32 array in [-1, 1], {"y": label}) of picture files."""

    def __init__(self, paths, image_size, labels, random_crop, random_flip):
        self.paths, self.image_size, self.labels = paths, image_size, labels
        self.random_crop, self.random_flip = random_crop, random_flip

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, index):
        path = self.paths[index]
        try:
            with open(path, "rb") as file:
                picture = open_picture(file.read())
            cut = random_part if self.random_crop else centre_crop
            pixels = cut(picture, self.image_size)
        except DAMAGED as error:
            raise ValueError(f"{path} cannot be read as a picture ({error}): mend or remove it") from error
        if self.random_flip and random.random() < 0.5:
            pixels = pixels[:, ::-1]
        image = np.ascontiguousarray(pixels.transpose(2, 0, 1), dtype=np.float32) / 127.5 - 1
        return image, {} if self.labels is None else {"y": np.int64(self.labels[index])}


def random_part(picture, image_size, min_crop_frac=0.8, max_crop_frac=1.0):
    """(S, S, 3) uint8: a random square of the picture, whose shorter side is first scaled so that the square
    is between these parts of it.
    """
    side = random.randint(math.ceil(image_size / max_crop_frac), math.ceil(image_size / min_crop_frac))
    while min(picture.size) >= 2 * side:
        picture = picture.resize((picture.width // 2, picture.height // 2), Image.Resampling.BOX)
    scale = side / min(picture.size)
    picture = picture.resize(
        (round(picture.width * scale), round(picture.height * scale)), Image.Resampling.BICUBIC
    )
    pixels = np.asarray(picture)
    top = random.randrange(pixels.shape[0] - image_size + 1)
    left = random.randrange(pixels.shape[1] - image_size + 1)
    return pixels[top : top + image_size, left : left + image_size]
