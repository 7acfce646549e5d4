"""What tests about pictures share: picture files, folders and zips of them, and random weights for the digits
features.
"""

import io
import zipfile
from pathlib import Path

import torch
from PIL import Image

from evaluation.networks.digits import DigitsNetwork


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
