"""What tests about pictures share: picture files, folders and zips of them, and random weights for the digits
features.
"""

import io
import struct
import zipfile
import zlib
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from evaluation.networks.digits import DigitsFeatures, DigitsNetwork
from guided_diffusion.files.image_sets import open_images

N, H, W = 11, 5, 6
IMAGES = np.random.RandomState(0).randint(0, 256, (N, H, W, 3), dtype=np.uint8)
IN_CLASSES = np.concatenate([IMAGES[0::2], IMAGES[1::2]])  # as they lie in two class folders


def picture(array, form="PNG", mode=None, **options):
    """The bytes of a picture file of (H, W, 3) or (H, W) uint8."""
    file = io.BytesIO()
    image = Image.fromarray(array)
    (image.convert(mode) if mode else image).save(file, format=form, **options)
    return file.getvalue()


def write_pictures(folder, images, name="{:04d}.png"):
    """A folder with a PNG for each image."""
    for index, image in enumerate(images):
        path = Path(folder, name.format(index))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture(image))
    return Path(folder)


def write_zip(path, folder):
    """A zip of the files in a folder, in the reverse of their order."""
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(folder.rglob("*.*"), reverse=True):
            archive.write(file, file.relative_to(folder))
    return path


def digits_weights():
    """Random weights of the digits features, such that features have the size of 1 and logits no bias."""
    generator = torch.Generator().manual_seed(0)
    weights = DigitsNetwork().state_dict()
    for name, tensor in weights.items():
        if tensor.ndim > 1:
            weights[name] = torch.randn(tensor.shape, generator=generator) * (2 / tensor[0].numel()) ** 0.5
    return weights | {"fc.bias": torch.zeros(10)}


class TestNetwork:
    """A feature network that gives these `outputs`: the digits features, and values of pixels as spatial.

    It counts the images that it has seen, and is killed at its call `fail_at`.
    """

    __test__ = False
    name, protocol, batch_size = "test", "test", 4

    def __init__(self, weights=None, outputs=("pool3", "logits", "spatial"), fail_at=None):
        self.digits = DigitsFeatures(weights or digits_weights())
        self.given, self.fail_at, self.calls, self.seen = outputs, fail_at, 0, 0
        self.sha256 = self.digits.sha256

    def __call__(self, images):
        if self.calls == self.fail_at:
            raise RuntimeError("killed")
        self.calls, self.seen = self.calls + 1, self.seen + len(images)
        spatial = images.reshape(len(images), -1)[:, ::40].astype(np.float32)
        features = {**self.digits(images), "spatial": spatial}
        return {key: features[key] for key in self.given}


def write_classes(folder, images=IMAGES):
    """IMAGES by turns in two class folders."""
    for index in (0, 1):
        write_pictures(folder / f"class{index}", images[index::2])
    return folder


def read(path, **options):
    """(pixels of one pass, notes after it)."""
    images = open_images(path, **options)
    return np.concatenate(list(images.batches(4))), images.notes


def built_png(bits, pixels):
    """Built by hand: with 16 bits Pillow cannot write it, and its bytes are those of no library's version."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", W, H, bits, 2, 0, 0, 0)
    rows = b"".join(b"\0" + row for row in pixels)
    chunks = chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(rows, 0)), chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)
