"""Train an autoencoder of the digits, two cheaper decoders for it, and a small DiT on its latents, and write
them with a record of the training.

    pip install -e ".[train,dit]" && python scripts/train_digits_dit.py

Writes vae/ and tiny/ in diffusers' layout, linear.safetensors, dit.safetensors and training.json, and in each
folder hashes.json. All learn from the 1,437 digits that the other networks learned from. Of DiT and the
autoencoders the weights are rounded to float16.
"""

import json
import time
from pathlib import Path

import _beside  # noqa: F401
import torch
import torch.nn.functional as F
from safetensors.torch import save
from train_digits import BATCH_SIZE, NUM_CLASSES, SIZE, digits, rounded, train_denoiser, write_hashes

from classifiers.decoders import (
    AutoencoderDecoder,
    LinearDecoder,
    fit_linear,
    load_autoencoder,
    require_diffusers,
)
from guided_diffusion import dist_util
from guided_diffusion.dit import DIT_MODELS
from guided_diffusion.files.atomic import renamed_when_complete, write_json
from guided_diffusion.files.pretrained import PRETRAINED_DIR
from guided_diffusion.flags.parser import Parser, run_main
from guided_diffusion.runs import machine
from guided_diffusion.script_util import create_gaussian_diffusion
from guided_diffusion.training import Optimization, random_batches, train

AUTOENCODER = {
    "block_out_channels": (16, 32),
    "layers_per_block": 1,
    "latent_channels": 4,
    "norm_num_groups": 8,
    "sample_size": SIZE,
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
}
TINY = {
    "encoder_block_out_channels": (8, 8),
    "decoder_block_out_channels": (16, 16),
    "num_encoder_blocks": (1, 1),
    "num_decoder_blocks": (1, 1),
}
KL_WEIGHT = 1e-4  # of the latents' divergence from N(0, I), beside the error of a pixel
NETWORKS = {"vae": 5, "tiny": 6, "dit": 7}  # what is added to --seed


def main():
    args = parse_args()
    require_diffusers()
    args.out.mkdir(parents=True, exist_ok=True)
    device = dist_util.dev()
    images, labels = (part.to(device) for part in digits()[0])
    record_file = args.out / "training.json"
    record = json.loads(record_file.read_text()) if record_file.exists() else {}
    for name in [args.only] if args.only else NETWORKS:
        start, seed = time.time(), args.seed + NETWORKS[name]
        torch.manual_seed(seed)
        iterations = getattr(args, f"{name}_iterations")
        figures = TRAINED[name](args.out, images, labels, iterations)
        about = {
            "seconds": round(time.time() - start),
            "torch": torch.__version__,
            "machine": machine.describe(device),
        }
        record[name] = {"seed": seed, "batch_size": BATCH_SIZE, **figures, **about}
        print(name, json.dumps(record[name]))
        write_json(record_file, record)
    for folder in sorted({path.parent for path in args.out.rglob("*.safetensors")}):
        write_hashes(folder)


def parse_args():
    parser = Parser(description=__doc__)
    parser.add_argument(
        "--out", type=Path, default=PRETRAINED_DIR / "digits_dit", help="folder for the files"
    )
    parser.add_argument(
        "--only", choices=list(NETWORKS), help="train just this one, beside those that are there"
    )
    for name, iterations in (("vae", 3000), ("tiny", 1500), ("dit", 6000)):
        parser.add_argument(
            f"--{name}_iterations", type=int, default=iterations, help=f"steps of batch {BATCH_SIZE}"
        )
    parser.add_argument(
        "--seed", type=int, default=0, help="of the weights and the batches; each has its own"
    )
    args = parser.parse_args()
    for name in NETWORKS:
        if getattr(args, f"{name}_iterations") < 1:
            raise ValueError(f"--{name}_iterations must be at least 1")
    return args


def train_vae(out, images, labels, iterations):
    """The autoencoder by error and divergence; its scale makes the latents' standard deviation 1. Then the
    linear decoder, by least squares.
    """
    network = require_diffusers().AutoencoderKL(**AUTOENCODER).to(images.device)

    def losses_of(x, _):
        latent = network.encode(x).latent_dist
        error = (network.decode(latent.sample()).sample - x).square().flatten(1).mean(dim=1)
        divergence = latent.kl() / latent.mean[0].numel()
        return {"loss": error + KL_WEIGHT * divergence, "mse": error, "kl": divergence}

    batches = random_batches(images, labels, BATCH_SIZE)
    figures = train(network, losses_of, batches, Optimization(iterations, learning_rate=2e-3), name="vae")
    network.half().float().eval()
    with torch.no_grad():
        latents = network.encode(images).latent_dist.mode()
        network.register_to_config(scaling_factor=float(1 / latents.std()))
        write_folder(network, out / "vae")
        latents = latents * network.config.scaling_factor
        small = F.interpolate(images, size=latents.shape[-2:], mode="area")
        weights = fit_linear(latents, small)
        explained = 1 - float((small - LinearDecoder(**weights)(latents)).square().mean() / small.var())
    write(out / "linear.safetensors", weights)
    return {
        **figures,
        "scaling_factor": network.config.scaling_factor,
        "linear_explains": round(explained, 4),
    }


def train_tiny(out, images, labels, iterations):
    """A small decoder that answers as the autoencoder does."""
    teacher, latents = encoded(out, images)
    network = require_diffusers().AutoencoderTiny(**TINY).to(images.device)
    network.encoder.requires_grad_(False)
    student = AutoencoderDecoder(network)

    def losses_of(z, _):
        z = z + 0.1 * torch.randn_like(z)  # a predicted latent is not quite one of an image
        with torch.no_grad():
            image = teacher(z)
        return {"loss": (student(z) - image).square()}

    batches = random_batches(latents, labels, BATCH_SIZE)
    figures = train(network, losses_of, batches, Optimization(iterations, learning_rate=2e-3), name="tiny")
    write_folder(network, out / "tiny")
    return figures


def train_dit(out, images, labels, iterations):
    """DiT on the latents' means, as the autoencoder scales them. The network drops labels itself."""
    _, latents = encoded(out, images)
    net = DIT_MODELS["DiT-T/2"](input_size=latents.shape[-1], num_classes=NUM_CLASSES)
    net.to(images.device)
    diffusion = create_gaussian_diffusion(learn_sigma=True, rescale_learned_sigmas=True)

    def losses_of(z, y):
        t = torch.randint(diffusion.num_timesteps, (len(y),), device=y.device)
        return diffusion.training_losses(net, z, t, {"y": y})

    weights, figures = train_denoiser(net, losses_of, (latents, labels), iterations)
    write(out / "dit.safetensors", rounded(weights))
    return figures


TRAINED = {"vae": train_vae, "tiny": train_tiny, "dit": train_dit}


def encoded(out, images):
    """(decoder of scaled latents, latents of the images) of the autoencoder that is there."""
    network = load_autoencoder(out / "vae").to(images.device)
    with torch.no_grad():
        latents = network.encode(images).latent_dist.mode() * network.config.scaling_factor
    return AutoencoderDecoder(network), latents


def write_folder(network, folder):
    """An autoencoder in diffusers' layout, its weights rounded to float16."""
    folder.mkdir(parents=True, exist_ok=True)
    network.save_config(folder)
    write(folder / "diffusion_pytorch_model.safetensors", rounded(network.state_dict()))


def write(path, state_dict):
    with renamed_when_complete(path) as file:
        file.write(save({name: tensor.cpu().contiguous() for name, tensor in state_dict.items()}))


if __name__ == "__main__":
    run_main(main)
