"""Measure how the variance of images spreads over frequencies, for --posterior frequency.

    cd pretrained_models/digits && python ../../scripts/data_spectrum.py reference.npz spectrum.npz

IMAGES is an npz, a folder or a zip of images of one size. The npz that is written holds spectrum, (C, H, W)
float32: the variance of each coefficient of the orthonormal cosine transform over height, width and channels,
of images in [-1, 1]; and count, how many images there were.
"""

from pathlib import Path

import _beside  # noqa: F401
import numpy as np
import torch

from guided_diffusion.files.atomic import renamed_when_complete
from guided_diffusion.files.console import print_result
from guided_diffusion.files.image_sets import open_images
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
    images = open_images(args.images, skip_unreadable=args.skip_unreadable)
    spectrum, count = measure(images.batches(BATCH_SIZE))
    with renamed_when_complete(args.out) as file:
        np.savez(file, spectrum=spectrum.float().numpy(), count=np.array(count))
    for note in images.notes:
        print_result(f"note: {note}", to_stderr=True)
    deviation = float(spectrum.mean()) ** 0.5
    print_result(f"{args.out}: {count} images {tuple(spectrum.shape)}, standard deviation {deviation:.3f}")


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
