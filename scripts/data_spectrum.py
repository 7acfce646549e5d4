"""Measure how the variance of images spreads over frequencies, for --posterior frequency.

    cd pretrained_models/digits && python ../../scripts/data_spectrum.py reference.npz spectrum.npz

IMAGES is an npz, a folder or a zip of images of one size. The npz that is written holds spectrum, (C, H, W)
float32: the variance of each coefficient of the orthonormal cosine transform over height, width and channels,
of images in [-1, 1]; and count, how many images there were.

Where IMAGES is an npz with labels (arr_1), it also prints the standard deviation along the directions in
which the means of the classes differ most, of all images and within a class. A classifier's gradient lies
along such directions, so these, and not the far smaller one of a pixel, are a scalar posterior's
--sigma_data: the first for a network without labels.
"""

from pathlib import Path

import _beside  # noqa: F401
import numpy as np
import torch

from guided_diffusion.files.atomic import renamed_when_complete
from guided_diffusion.files.console import print_result
from guided_diffusion.files.image_sets import archive_kind, open_images
from guided_diffusion.flags.parser import Parser, run_main
from guided_diffusion.guidance.frequency import dct

BATCH_SIZE = 100


def main():
    parser = Parser(description=__doc__)
    parser.add_argument("images", metavar="IMAGES", help="an npz, folder or zip of images")
    parser.add_argument("out", metavar="OUT.npz", type=Path)
    parser.add_argument("--skip_unreadable", action="store_true", help="skip and count damaged pictures")
    parser.add_argument("--overwrite", action="store_true", help="replace OUT.npz")
    args = parser.parse_args()
    if args.out.suffix != ".npz" or (args.out.exists() and not args.overwrite):
        raise ValueError(f"{args.out} must end in .npz, and be new or be replaced with --overwrite")
    if not args.out.parent.is_dir():
        raise FileNotFoundError(f"there is no folder {args.out.parent} to write into: make it first")
    images = open_images(args.images, skip_unreadable=args.skip_unreadable)
    spectrum, count = measure(images.batches(BATCH_SIZE))
    with renamed_when_complete(args.out) as file:
        np.savez(file, spectrum=spectrum.float().numpy(), count=np.array(count))
    for note in images.notes:
        print_result(f"note: {note}", to_stderr=True)
    deviation = float(spectrum.mean()) ** 0.5
    labels = labels_in(args.images)
    print_result(f"{args.out}: {count} images {tuple(spectrum.shape)}, standard deviation {deviation:.3f}")
    if labels is not None and len(labels) == count > len(np.unique(labels)):
        whole, within = (", ".join(f"{value:.2f}" for value in row) for row in along_classes(images, labels))
        print_result(f"along differences of classes: {whole}; within a class: {within}")


def labels_in(path):
    """The labels in an npz; None where there are none, or a single class."""
    if not Path(path).is_file() or archive_kind(Path(path)) != "npz":
        return None
    with np.load(path, allow_pickle=False) as file:
        labels = file["arr_1"] if "arr_1" in file.files else np.zeros(0)
    return labels if len(np.unique(labels)) > 1 else None


def along_classes(images, labels, most=3):
    """Two rows, at most so many numbers each: standard deviations of all images along the principal
    directions of the means of the classes, and within a class.
    """
    classes, index = np.unique(labels, return_inverse=True)
    means = sum(np.eye(len(classes))[index[i : i + len(x)]].T @ x for i, x in flat_batches(images))
    means = means / np.bincount(index)[:, None]
    directions = np.linalg.svd(means - means.mean(axis=0), full_matrices=False)[2][
        : min(most, len(classes) - 1)
    ]
    places = np.concatenate([x @ directions.T for _, x in flat_batches(images)])  # (images, directions)
    within = places - (means @ directions.T)[index]
    return places.std(axis=0, ddof=1), within.std(axis=0, ddof=len(classes))


def flat_batches(images):
    """(index of the first, (n, 3 H W) float64 in [-1, 1])."""
    start = 0
    for batch in images.batches(BATCH_SIZE):
        yield start, batch.reshape(len(batch), -1) / 127.5 - 1
        start += len(batch)


def measure(batches):
    """((C, H, W) float64 variances, the number of images) of (n, H, W, 3) uint8 batches. Raises ValueError
    for fewer than two images.
    """
    count, mean, squares = 0, 0.0, 0.0
    for batch in batches:
        coefficients = dct(torch.from_numpy(batch).permute(0, 3, 1, 2).double() / 127.5 - 1)
        # Chan's update: the difference of two large sums would lose digits.
        n = count + len(batch)
        own = coefficients.mean(dim=0)
        squares = (
            squares + ((coefficients - own) ** 2).sum(dim=0) + (own - mean) ** 2 * (count * len(batch) / n)
        )
        mean, count = mean + (own - mean) * (len(batch) / n), n
    if count < 2:
        raise ValueError(f"a variance needs two images, and there are {count}")
    return squares / (count - 1), count


if __name__ == "__main__":
    run_main(main)
