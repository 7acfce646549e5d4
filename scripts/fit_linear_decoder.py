"""Fit the linear map from an autoencoder's latents to images by least squares, for --latent_decoder linear.

    python scripts/fit_linear_decoder.py /data/imagenet256 pretrained_models/linear.safetensors \
      --vae pretrained_models/sd-vae-ft-ema

IMAGES is an npz, a folder or a zip of images of one size. They are encoded (the mean of the autoencoder's
Gaussian, scaled), and shrunk to the latents' sides; the map is the best one from a latent's channels to red,
green and blue at the same place. Prints which share of the variance it explains. It needs pip install -e
".[dit]".
"""

from pathlib import Path

import _beside  # noqa: F401
import torch
import torch.nn.functional as F
from safetensors.torch import save
from tqdm import tqdm

from classifiers.decoders import LinearDecoder, fit_linear, load_autoencoder
from guided_diffusion.dist_util import choose_device
from guided_diffusion.files.atomic import renamed_when_complete
from guided_diffusion.files.console import print_result
from guided_diffusion.files.image_sets import open_images
from guided_diffusion.flags.parser import Parser, run_main


def main():
    parser = Parser(description=__doc__)
    parser.add_argument("images", metavar="IMAGES", help="an npz, folder or zip of images")
    parser.add_argument("out", metavar="OUT.safetensors", type=Path)
    parser.add_argument("--vae", type=Path, required=True, help="diffusers' folder of the autoencoder")
    parser.add_argument("--num_images", type=int, default=1000, help="the first so many, at most")
    parser.add_argument("--batch_size", type=int, default=8, help="images at a time")
    parser.add_argument("--device", default="", help="cpu or cuda; by default CUDA where there is one")
    parser.add_switch("--overwrite", help="replace OUT.safetensors")
    args = parser.parse_args()
    if args.out.suffix != ".safetensors" or (args.out.exists() and not args.overwrite):
        raise ValueError(f"{args.out} must end in .safetensors, and be new or be replaced with --overwrite")
    if not args.out.parent.is_dir():
        raise FileNotFoundError(f"there is no folder {args.out.parent} to write into: make it first")
    if min(args.num_images, args.batch_size) < 1:
        raise ValueError("--num_images and --batch_size must be at least 1")
    device = choose_device(args.device)
    latents, images = encoded(load_autoencoder(args.vae).to(device), args, device)
    weights = fit_linear(latents, images)
    residual = images - LinearDecoder(**weights)(latents)
    explained = 1 - float(residual.square().mean() / images.var(dim=(0, 2, 3), correction=0).mean())
    with renamed_when_complete(args.out) as file:
        file.write(save(dict(weights)))
    print_result(
        f"{args.out}: {len(images)} images, {explained:.1%} of the variance of their pixels explained"
    )


def encoded(autoencoder, args, device):
    """(latents, images shrunk to their sides), float32 on the CPU."""
    opened, latents, images = open_images(args.images), [], []
    config, left = autoencoder.config, min(args.num_images, opened.entries)
    with tqdm(total=left, unit="image", disable=None) as bar, torch.no_grad():
        for batch in opened.batches(args.batch_size):
            x = torch.from_numpy(batch[:left]).permute(0, 3, 1, 2).float() / 127.5 - 1
            z = autoencoder.encode(x.to(device)).latent_dist.mode()
            z = (z - (getattr(config, "shift_factor", None) or 0)) * config.scaling_factor
            latents.append(z.float().cpu())
            images.append(F.interpolate(x, size=z.shape[-2:], mode="area"))
            left -= len(x)
            bar.update(len(x))
            if left == 0:
                break
    return torch.cat(latents), torch.cat(images)


if __name__ == "__main__":
    run_main(main)
