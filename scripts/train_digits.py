"""Train the networks of the `digits` presets on scikit-learn's 1,797 handwritten digits, and write them with
a record of the training.

    pip install -e ".[train]" && python scripts/train_digits.py

Writes unet, edm, guide, judge and features.safetensors, training.json and hashes.json; and the digits
themselves, as images, for the evaluation. They are cut once, with a fixed seed, into 1,437 that all networks
learn from (reference.npz) and 360 that none has seen (held_out.npz).
"""

import copy
import json
import platform
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from tqdm import trange

from classifiers.registry import DIGITS
from evaluation.networks.digits import DigitsNetwork
from guided_diffusion.edm import EDMPrecond
from guided_diffusion.files.atomic import renamed_when_complete, write_json
from guided_diffusion.files.checkpoints import PRETRAINED_DIR, sha256
from guided_diffusion.files.pixels import to_uint8
from guided_diffusion.flags.parser import Parser, run_main
from guided_diffusion.flags.presets import PRESETS
from guided_diffusion.losses import edm_loss
from guided_diffusion.script_util import create_from_flags

NUM_CLASSES = 10
SIZE = 16
EDM_NETWORK = {
    "img_resolution": SIZE,
    "img_channels": 3,
    "label_dim": NUM_CLASSES,
    "model_channels": 32,
    "channel_mult": (1, 2, 2),
    "num_blocks": 1,
    "attn_resolutions": (8, 4),
    "dropout": 0.0,
    "label_dropout": 0.1,
}


def main():
    parser = Parser(description=__doc__)
    parser.add_argument("--out", type=Path, default=PRETRAINED_DIR / "digits", help="folder for the files")
    parser.add_argument(
        "--only",
        choices=["unet", "edm", "guide", "judge", "features"],
        help="train just this one; the record of the others stays",
    )
    parser.add_argument("--iterations", type=int, default=2500, help="steps of batch 64 for the U-Net")
    parser.add_argument(
        "--edm_iterations", type=int, default=1500, help="steps of batch 64 for EDM's network"
    )
    parser.add_argument(
        "--classifier_iterations", type=int, default=1500, help="steps of batch 64 for each classifier"
    )
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    train, test = digits()
    record_file = args.out / "training.json"
    record = json.loads(record_file.read_text()) if record_file.exists() else {}
    guide, judge = (partial(DIGITS[name].build, NUM_CLASSES) for name in ("digits_guide", "digits_judge"))
    jobs = {
        "unet": lambda: train_unet(train, args.iterations, args.seed),
        "edm": lambda: train_edm(train, args.edm_iterations, args.seed + 4),
        "guide": lambda: train_classifier(guide, train, test, args.classifier_iterations, args.seed + 1),
        "judge": lambda: train_classifier(judge, train, test, args.classifier_iterations, args.seed + 2),
        "features": lambda: train_classifier(
            DigitsNetwork, train, test, args.classifier_iterations, args.seed + 3
        ),
    }
    for name, (images, labels) in (("reference", train), ("held_out", test)):
        with renamed_when_complete(args.out / f"{name}.npz") as file:
            np.savez_compressed(file, arr_0=to_uint8(images).numpy(), arr_1=labels.numpy())
    for name in [args.only] if args.only else jobs:
        start = time.time()
        state_dict, figures, *metadata = jobs[name]()
        with renamed_when_complete(args.out / f"{name}.safetensors") as file:
            file.write(save({k: v.contiguous() for k, v in state_dict.items()}, *metadata))
        record[name] = {
            **figures,
            "seconds": round(time.time() - start),
            "torch": torch.__version__,
            "machine": platform.machine(),
        }
        print(name, json.dumps(record[name]))
        write_json(record_file, record)
    # In the layout in which scripts/download.py records what it fetched.
    files = sorted(path for path in args.out.iterdir() if path.suffix in (".npz", ".safetensors"))
    write_json(
        args.out / "hashes.json",
        {path.name: {"sha256": sha256(path), "bytes": path.stat().st_size} for path in files},
    )


def digits():
    """Return (images, labels) for training and for testing: (N, 3, 16, 16) float32 in [-1, 1], (N,) int64."""
    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32)[:, None] / 8 - 1
    images = F.interpolate(images, size=(SIZE, SIZE), mode="bilinear").expand(-1, 3, -1, -1).contiguous()
    labels = torch.tensor(data.target)
    train, test = train_test_split(
        np.arange(len(labels)), test_size=360, random_state=0, stratify=data.target
    )
    return (images[train], labels[train]), (images[test], labels[test])


def train_unet(train, iterations, seed):
    """Return the averaged weights and the losses. One label in ten is dropped to the null class, for
    unconditional sampling.
    """
    torch.manual_seed(seed)
    model, diffusion = create_from_flags(
        PRESETS["digits"] | {"timestep_respacing": "", "rescale_learned_sigmas": True}
    )

    def losses(images, labels):
        y = torch.where(torch.rand(len(labels)) < 0.1, NUM_CLASSES, labels)
        t = torch.randint(diffusion.num_timesteps, (len(labels),))
        return diffusion.training_losses(model, images, t, {"y": y})

    averaged, figures = train_denoiser(model, losses, train, iterations)
    return averaged, {"seed": seed, **figures}


def train_edm(train, iterations, seed):
    """Return the averaged weights, rounded to float16, the losses and what it takes to build the network.
    Labels are dropped as above.
    """
    torch.manual_seed(seed)
    net = EDMPrecond(**EDM_NETWORK)

    def losses(images, labels):
        return {"loss": edm_loss(net, images, F.one_hot(labels, NUM_CLASSES).float())}

    averaged, figures = train_denoiser(net, losses, train, iterations)
    weights = {name: tensor.half() for name, tensor in averaged.items()}
    return (
        weights,
        {"seed": seed, **figures},
        {"class_name": "EDMPrecond", "arguments": json.dumps(EDM_NETWORK)},
    )


def train_denoiser(model, losses_of, train, iterations, batch_size=64, learning_rate=1e-3, ema_rate=0.998):
    """Train a diffusion network by the "loss" among `losses_of(images, labels)`; returns the averaged weights
    and figures to record.
    """
    averaged = copy.deepcopy(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, learning_rate, total_steps=iterations, pct_start=0.1
    )
    losses = []
    images, labels = train
    for _ in (progress := trange(iterations, desc=type(model).__name__)):
        pick = torch.randint(len(images), (batch_size,))
        terms = losses_of(images[pick], labels[pick])
        optimizer.zero_grad()
        terms["loss"].mean().backward()
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            torch._foreach_lerp_(list(averaged.parameters()), list(model.parameters()), 1 - ema_rate)
        losses.append({name: value.mean().item() for name, value in terms.items()})
        progress.set_postfix(loss=f"{losses[-1]['loss']:.4f}")
    last = {name: round(float(np.mean([x[name] for x in losses[-200:]])), 5) for name in losses[0]}
    parameters = sum(p.numel() for p in model.parameters())
    figures = {
        "iterations": iterations,
        "batch_size": batch_size,
        "parameters": parameters,
        "loss_of_last_200": last,
    }
    return averaged.state_dict(), figures


def train_classifier(build, train, test, iterations, seed, batch_size=64, learning_rate=2e-3):
    """Return the weights, rounded to float16, and loss and accuracy. The only augmentation: each batch is
    shifted by up to a pixel.
    """
    torch.manual_seed(seed)
    model = build().to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=iterations)
    images, labels = train
    losses = []
    for _ in trange(iterations, desc=f"classifier, seed {seed}"):
        pick = torch.randint(len(images), (batch_size,))
        shift = tuple(torch.randint(-1, 2, (2,)).tolist())
        loss = F.cross_entropy(model(torch.roll(images[pick], shift, dims=(2, 3))), labels[pick])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    state_dict = {k: v.half() if v.is_floating_point() else v for k, v in model.state_dict().items()}
    model.load_state_dict(state_dict)
    model.eval()
    with torch.no_grad():
        accuracy = {
            part: float((model(x).argmax(1) == y).float().mean())
            for part, (x, y) in (("train", train), ("test", test))
        }
    parameters = sum(p.numel() for p in model.parameters())
    figures = {"seed": seed, "iterations": iterations, "batch_size": batch_size, "parameters": parameters}
    return state_dict, {
        **figures,
        "loss_of_last_200": round(float(np.mean(losses[-200:])), 5),
        "accuracy": accuracy,
    }


if __name__ == "__main__":
    run_main(main)
