"""Pack images with labels into one file to train on: any source that the training scripts read.

    python scripts/make_dataset.py photos photos64.npz --image_size 64
    python scripts/make_dataset.py cifar-10-batches-py cifar10.zip --image_size 32

OUT.npz holds arr_0, uint8 (N, S, S, 3), and arr_1, the labels; OUT.zip a PNG for each image and dataset.json,
as EDM's tools write it. The classes of folders and of file names are numbered in the order of their names,
which are printed.
"""

import io
import json
import zipfile
from pathlib import Path

import _beside  # noqa: F401
import numpy as np
from PIL import Image

from guided_diffusion.files.atomic import renamed_when_complete
from guided_diffusion.files.console import print_result
from guided_diffusion.files.labelled import read_labelled
from guided_diffusion.flags.parser import Parser, run_main


def main():
    args = parse_args()
    found = read_labelled(args.source, args.image_size)
    write = {".npz": write_npz, ".zip": write_zip}[args.out.suffix]
    with renamed_when_complete(args.out) as file:
        write(file, found.images, found.labels)
    counts = "without labels" if found.labels is None else f"{len(np.unique(found.labels))} classes"
    print_result(f"{args.out}: {len(found.images)} images of {args.image_size} pixels, {counts}")
    for number, name in enumerate(found.classes):
        print_result(f"{number} {name}")


def parse_args():
    parser = Parser(description=__doc__)
    parser.add_argument("source", metavar="IMAGES", help="a folder, zip or npz, or CIFAR10's folder")
    parser.add_argument("out", metavar="OUT", type=Path, help="OUT.npz or OUT.zip")
    parser.add_argument("--image_size", type=int, required=True, help="pixels that each picture is cut to")
    parser.add_switch("--overwrite", help="replace OUT")
    args = parser.parse_args()
    if args.out.suffix not in (".npz", ".zip"):
        raise ValueError(f"{args.out} must end in .npz or .zip")
    if args.out.exists() and not args.overwrite:
        raise ValueError(f"{args.out} exists: choose another name, or pass --overwrite")
    if not args.out.resolve().parent.is_dir():
        raise FileNotFoundError(f"there is no folder {args.out.parent} to write into: make it first")
    if args.image_size < 1:
        raise ValueError(f"--image_size must be at least 1, got {args.image_size}")
    return args


def write_npz(file, images, labels):
    """arr_0 and, where there are labels, arr_1."""
    np.savez_compressed(file, arr_0=images, **({} if labels is None else {"arr_1": labels}))


def write_zip(file, images, labels):
    """NNNNNNNN.png for each image, and dataset.json with their labels, or null."""
    names = [f"{i:08d}.png" for i in range(len(images))]
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        for name, image in zip(names, images, strict=True):
            buffer = io.BytesIO()
            Image.fromarray(image).save(buffer, format="PNG")
            archive.writestr(name, buffer.getvalue())
        listed = None if labels is None else [[n, int(y)] for n, y in zip(names, labels, strict=True)]
        archive.writestr("dataset.json", json.dumps({"labels": listed}))


if __name__ == "__main__":
    run_main(main)
