"""Make a reference for the evaluation out of images, in guided-diffusion's layout.

    python scripts/make_reference.py /data/imagenet128 pretrained_models/my_reference.npz

The npz holds the mean and covariance of the features of all images (mu, sigma; mu_s, sigma_s of spatial
features, which Inception has); a random subset of the images in their order (arr_0), from which precision and
recall are computed; and of what the statistics are (protocol, features, weights_sha256, count). Where images
must not be passed on, --features_only keeps the features of the subset (pool3, float16) in their place.
"""

from pathlib import Path

import _beside  # noqa: F401
import numpy as np
from network_flags import add_network_flags, network_of

from evaluation.features import extract
from evaluation.moments import moments_of
from evaluation.reference import some_rows
from evaluation.sets import DENSITY_NEIGHBOURS, require_enough
from guided_diffusion.files.atomic import renamed_when_complete
from guided_diffusion.files.console import print_result
from guided_diffusion.files.image_sets import open_images, pick_images
from guided_diffusion.flags.parser import Parser, run_main


def main():
    parser = Parser(description=__doc__)
    parser.add_argument("images", metavar="IMAGES", help="an npz, folder or zip of real images")
    parser.add_argument("out", metavar="OUT.npz", type=Path)
    add_network_flags(parser)
    parser.add_argument("--num_images", type=int, default=10_000, help="size of the subset, at most")
    parser.add_argument("--seed", type=int, default=0, help="of the subset")
    parser.add_switch("--features_only", help="keep the features of the subset, not its images")
    parser.add_switch("--skip_unreadable", help="skip and count damaged pictures")
    parser.add_switch("--overwrite", help="replace OUT.npz")
    args = parser.parse_args()
    check_flags(args)
    images = open_images(args.images, skip_unreadable=args.skip_unreadable)
    require_enough(args.images, images.entries)
    network = network_of(args)
    features = extract(images, network, batch_size=args.batch_size, cache=args.cache)
    for note in features.provenance["notes"]:
        print_result(f"note: {note}", to_stderr=True)
    arrays = {
        **statistics_of(features),
        **(features_of_subset if args.features_only else images_of_subset)(images, features, args),
        "protocol": np.array(network.protocol),
        "features": np.array(network.name),
        "weights_sha256": np.array(network.sha256),
        "count": np.array(features.count),
    }
    with renamed_when_complete(args.out) as file:
        np.savez(file, **arrays)
    inside = min(features.count, args.num_images)
    print_result(f"{args.out}: statistics of {features.count} images, {inside} of them inside")


def statistics_of(features):
    """mu and sigma of the pooled features; mu_s and sigma_s where the network has spatial ones."""
    pool = moments_of(features.pool3).gaussian()
    statistics = {"mu": pool.mu, "sigma": pool.sigma}
    if features.spatial:
        spatial = features.spatial.gaussian()
        statistics |= {"mu_s": spatial.mu, "sigma_s": spatial.sigma}
    return statistics


def images_of_subset(images, features, args):
    return {"arr_0": pick_images(images, args.num_images, args.seed)}


def features_of_subset(images, features, args):
    subset = some_rows(features.pool3, min(args.num_images, features.count), args.seed)
    if (largest := np.abs(subset).max()) > np.finfo(np.float16).max:
        raise ValueError(f"--features_only keeps float16, and a feature is {largest:.3g}: keep the images")
    return {"pool3": subset.astype(np.float16), "resolution": np.array(images.resolution)}


def check_flags(args):
    """Raise ValueError for what would only fail after the extraction."""
    if args.out.suffix != ".npz":
        raise ValueError(f"{args.out} must end in .npz, as a reference is one")
    if args.out.exists() and not args.overwrite:
        raise ValueError(f"{args.out} exists: choose another name, or pass --overwrite")
    if not args.out.resolve().parent.is_dir():
        raise ValueError(f"{args.out}: there is no such folder; create it first")
    if not 0 <= args.seed < 2**32:
        raise ValueError(f"--seed {args.seed} must be between 0 and {2**32 - 1}")
    if args.num_images <= DENSITY_NEIGHBOURS:
        raise ValueError(
            f"--num_images {args.num_images}: the metrics need at least {DENSITY_NEIGHBOURS + 1}"
        )


if __name__ == "__main__":
    run_main(main)
