"""Train the networks of the `digits` presets on scikit-learn's 1,797 handwritten digits, and write them with
a record of the training.

    pip install -e ".[train]" && python scripts/train_digits.py

Writes unet, edm, guide, judge and features.safetensors, training.json and hashes.json; and the digits
themselves, as images, for the evaluation. They are cut once, with a fixed seed, into 1,437 that all networks
learn from (reference.npz) and 360 that none has seen (held_out.npz).
"""

import json
import platform
import time
from functools import partial
from pathlib import Path

import _beside  # noqa: F401
import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save

from classifiers.registry import DIGITS
from evaluation.networks.digits import DigitsNetwork
from guided_diffusion.edm import EDMPrecond
from guided_diffusion.files.atomic import renamed_when_complete, write_json
from guided_diffusion.files.pixels import to_uint8
from guided_diffusion.files.pretrained import PRETRAINED_DIR, sha256
from guided_diffusion.flags.parser import Parser, run_main
from guided_diffusion.flags.presets import PRESETS
from guided_diffusion.losses import edm_loss
from guided_diffusion.script_util import create_from_flags
from guided_diffusion.training import Average, Optimization, drop_labels, random_batches, train

NUM_CLASSES = 10
SIZE = 16
BATCH_SIZE = 64
EMA_RATE = 0.998
LABEL_DROPOUT = 0.1  # so that the networks also sample without a label
EDM_NETWORK = {
    "img_resolution": SIZE,
    "img_channels": 3,
    "label_dim": NUM_CLASSES,
    "model_channels": 32,
    "channel_mult": (1, 2, 2),
    "num_blocks": 1,
    "attn_resolutions": (8, 4),
    "dropout": 0.0,
    "label_dropout": LABEL_DROPOUT,
}
# Name -> the flag that says how long it is trained, and what is added to --seed.
NETWORKS = {
    "unet": ("iterations", 0),
    "edm": ("edm_iterations", 4),
    "guide": ("classifier_iterations", 1),
    "judge": ("classifier_iterations", 2),
    "features": ("classifier_iterations", 3),
}


def main():
    args = parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    training, held_out = digits()
    for name, (images, labels) in (("reference", training), ("held_out", held_out)):
        with renamed_when_complete(args.out / f"{name}.npz") as file:
            np.savez_compressed(file, arr_0=to_uint8(images).numpy(), arr_1=labels.numpy())
    record_file = args.out / "training.json"
    record = json.loads(record_file.read_text()) if record_file.exists() else {}
    for name in [args.only] if args.only else NETWORKS:
        record[name] = train_and_write(name, args, training, held_out)
        print(name, json.dumps(record[name]))
        write_json(record_file, record)
    write_hashes(args.out)


def parse_args():
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("--out", type=Path, default=PRETRAINED_DIR / "digits", help="folder for the files")
    add("--only", choices=list(NETWORKS), help="train just this one; the record of the others stays")
    add("--iterations", type=int, default=2500, help=f"steps of batch {BATCH_SIZE} for the U-Net")
    add("--edm_iterations", type=int, default=1500, help=f"steps of batch {BATCH_SIZE} for EDM's network")
    add(
        "--classifier_iterations",
        type=int,
        default=1500,
        help=f"steps of batch {BATCH_SIZE} for each classifier",
    )
    add("--seed", type=int, default=0, help="of the weights and the batches; each network has its own")
    args = parser.parse_args()
    for name in dict.fromkeys(flag for flag, _ in NETWORKS.values()):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name} must be at least 1, got {getattr(args, name)}")
    return args


def digits():
    """Return (images, labels) to train on and to test with: (N, 3, 16, 16) float32 in [-1, 1], (N,) int64."""
    try:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    except ImportError:
        raise ValueError('the digits come with scikit-learn: pip install -e ".[train]"') from None
    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32)[:, None] / 8 - 1
    images = F.interpolate(images, size=(SIZE, SIZE), mode="bilinear").expand(-1, 3, -1, -1).contiguous()
    labels = torch.tensor(data.target)
    parts = train_test_split(np.arange(len(labels)), test_size=360, random_state=0, stratify=data.target)
    return tuple((images[part], labels[part]) for part in parts)


def train_and_write(name, args, training, held_out):
    """Train one network, write its file, and return what to record of it."""
    start = time.time()
    flag, offset = NETWORKS[name]
    iterations, seed = getattr(args, flag), args.seed + offset
    torch.manual_seed(seed)
    metadata = None
    if name == "unet":
        state_dict, figures = train_unet(training, iterations)
    elif name == "edm":
        state_dict, figures = train_edm(training, iterations)
        metadata = {"class_name": "EDMPrecond", "arguments": json.dumps(EDM_NETWORK)}
    else:
        state_dict, figures = train_classifier(name, training, held_out, iterations)
    with renamed_when_complete(args.out / f"{name}.safetensors") as file:
        file.write(save({key: tensor.contiguous() for key, tensor in state_dict.items()}, metadata))
    return {
        "seed": seed,
        "batch_size": BATCH_SIZE,
        **figures,
        "seconds": round(time.time() - start),
        "torch": torch.__version__,
        "machine": platform.machine(),
    }


def train_unet(data, iterations):
    """Return the averaged weights and the figures."""
    model, diffusion = create_from_flags(
        PRESETS["digits"] | {"timestep_respacing": "", "rescale_learned_sigmas": True}
    )

    def losses_of(images, labels):
        y = drop_labels(labels, NUM_CLASSES, LABEL_DROPOUT)
        t = torch.randint(diffusion.num_timesteps, (len(labels),))
        return diffusion.training_losses(model, images, t, {"y": y})

    return train_denoiser(model, losses_of, data, iterations)


def train_edm(data, iterations):
    """Return the averaged weights, rounded to float16, and the figures. The network drops labels itself."""
    net = EDMPrecond(**EDM_NETWORK)

    def losses_of(images, labels):
        return {"loss": edm_loss(net, images, F.one_hot(labels, NUM_CLASSES).float())}

    weights, figures = train_denoiser(net, losses_of, data, iterations)
    return rounded(weights), figures


def train_denoiser(model, losses_of, data, iterations):
    average = Average(model, EMA_RATE)
    batches = random_batches(*data, BATCH_SIZE)
    figures = train(
        model, losses_of, batches, Optimization(iterations), average=average, name=type(model).__name__
    )
    return average.module.state_dict(), figures


def train_classifier(name, training, held_out, iterations):
    """Return the weights, rounded to float16, and the figures with the accuracy of those rounded weights. The
    only augmentation: each batch is shifted by up to a pixel.
    """
    build = DigitsNetwork if name == "features" else partial(DIGITS[f"digits_{name}"].build, NUM_CLASSES)
    model = build().to(memory_format=torch.channels_last)

    def losses_of(images, labels):
        shift = tuple(torch.randint(-1, 2, (2,)).tolist())
        logits = model(torch.roll(images, shift, dims=(2, 3)))
        return {"loss": F.cross_entropy(logits, labels, reduction="none")}

    optimization = Optimization(iterations, learning_rate=2e-3, weight_decay=0.05, warmup=0.3)
    figures = train(model, losses_of, random_batches(*training, BATCH_SIZE), optimization, name=name)
    figures["loss_of_last_200"] = figures["loss_of_last_200"]["loss"]
    weights = rounded(model.state_dict())
    model.load_state_dict(weights)
    model.eval()
    with torch.no_grad():
        figures["accuracy"] = {
            part: float((model(x).argmax(1) == y).float().mean())
            for part, (x, y) in (("train", training), ("test", held_out))
        }
    return weights, figures


def write_hashes(folder):
    """Write the folder's hashes.json, in the layout in which scripts/download.py records what it fetched."""
    files = sorted(path for path in folder.iterdir() if path.suffix in (".npz", ".safetensors"))
    write_json(
        folder / "hashes.json",
        {path.name: {"sha256": sha256(path), "bytes": path.stat().st_size} for path in files},
    )


def rounded(state_dict):
    return {name: value.half() if value.is_floating_point() else value for name, value in state_dict.items()}


if __name__ == "__main__":
    run_main(main)
