"""Measure the guided step of a DiT preset: seconds and operations of the transformer, of the decoder forward
and backward, and of the classifier, and the memory, for each way to decode.

    python scripts/benchmark.py --preset imagenet256-dit-resnet101

Weights are random: times do not depend on them. Each way is measured in a process of its own, since peak
memory is one's. Operations are by PyTorch's FlopCounterMode, which counts products of matrices and
convolutions, two for a multiplication with its addition. Run it with nothing else on the machine; its lines
are meant for docs/benchmarks.md.
"""

import json
import statistics
import subprocess
import sys
from pathlib import Path

import _beside  # noqa: F401
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import classifiers
from classifiers.decoders import AutoencoderDecoder, LinearDecoder, public_map, require_diffusers
from guided_diffusion import dist_util
from guided_diffusion.dit import DIT_MODELS
from guided_diffusion.flags.dit import DiTFlags
from guided_diffusion.flags.fields import configure
from guided_diffusion.flags.parser import Parser, run_main
from guided_diffusion.flags.presets import DIT_PRESETS
from guided_diffusion.mixed_denoisers import in_one_batch
from guided_diffusion.runs import machine
from guided_diffusion.runs.stopwatch import Stopwatch

# The architecture of Stable Diffusion's autoencoder; AutoencoderTiny's own defaults are taesd's.
AUTOENCODER = {
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "latent_channels": 4,
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
}
WAYS = ("vae", "vae with checkpointing", "tiny", "linear")
PARTS = ("transformer", "decoder forward", "decoder backward", "classifier")
ON_AN_ACCELERATOR = 16  # images at once
EVERY = 8  # for the line about --guidance_every


def main():
    parser = Parser(description=__doc__)
    parser.add_argument("--call", required=True, help="what scripts/benchmark.py hands over")
    args = parser.parse_args()
    print(json.dumps(timed_step(*json.loads(args.call))))


def measure(preset, repeats, device):
    """Print a line for each way to decode."""
    require_diffusers()
    batch_size = 1 if torch.device(device).type == "cpu" else ON_AN_ACCELERATOR
    print(
        f"preset {preset}: random weights, batch {batch_size}, float32; a step evaluates with labels and "
        "without; on CUDA products of matrices are in TF32"
    )
    for way in WAYS:
        print(line_of(way, in_own_process(way, preset, repeats, device, batch_size)))


def in_own_process(*arguments):
    command = [sys.executable, str(Path(__file__).resolve()), "--call", json.dumps(arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise ValueError(
            f"{arguments[0]} could not be measured: {(done.stderr.splitlines() or ['it was killed'])[-1]}"
        )
    return json.loads(done.stdout.splitlines()[-1])


def line_of(way, measured):
    parts = ", ".join(
        f"{name} {measured[name]:.3f} s ({measured['flops'][name] / 1e9:.3g} GFLOP)" for name in PARTS
    )
    share = sum(measured[name] for name in PARTS[1:]) / measured["transformer"]
    rate = measured["batch_size"] / sum(measured[name] for name in PARTS)
    return (
        f"{way}: {parts}; guidance adds {share:.1%}, with --guidance_every {EVERY} {share / EVERY:.1%}; "
        f"{rate:.3g} images a second and step; peak memory {measured['memory'] / 1e9:.2f} GB"
    )


def timed_step(way, preset, repeats, device, batch_size=1):
    """{part of a step: its median seconds}, its operations by part, and the process's peak memory in bytes,
    on CUDA the device's.
    """
    device, config = torch.device(device), configure(DiTFlags, DIT_PRESETS, {"preset": preset})
    if device.type == "cpu":
        dist_util.keep_freed_memory()
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = config.tf32
    with torch.device(device):
        net = DIT_MODELS[config.model](input_size=config.image_size // 8).eval().requires_grad_(False)
    network = in_one_batch(net, net.num_classes, config.cfg_scale, config.cfg_channels)
    decoder = decoder_of(way, config.image_size).to(device).eval().requires_grad_(False)
    classifier = classifiers.load_classifier(
        config.classifier_type, "random", softplus_beta=config.softplus_beta, image_size=config.image_size
    ).to(device)
    z = torch.randn(batch_size, net.in_channels, net.input_size, net.input_size, device=device)
    shown = (z, *(torch.full((batch_size,), value, device=device) for value in (500, 3)))

    def step(meters, z, t, y):
        with torch.no_grad():
            meters["transformer"].wrap(network)(z, t, y)
        # Copies: the counter of operations cannot follow a leaf into a module.
        leaf = z.clone().requires_grad_()
        image = meters["decoder forward"].wrap(decoder)(leaf.clone())
        seen, gradient = image.detach().requires_grad_(), torch.autograd.grad
        (g,) = meters["classifier"].wrap(lambda: gradient(classifier(seen.clone())[:, 3].sum(), seen))()
        meters["decoder backward"].wrap(gradient)(image, leaf, g)
        return meters

    times = [step({part: Stopwatch(device) for part in PARTS}, *shown) for _ in range(repeats + 1)][1:]
    memory = torch.cuda.max_memory_allocated() if device.type == "cuda" else machine.peak_memory()
    seconds = {part: statistics.median(each[part].seconds for each in times) for part in PARTS}
    for module in (net, decoder, classifier):
        module.to("meta")  # where nothing is computed
    counts = step({part: Operations() for part in PARTS}, *(tensor.to("meta") for tensor in shown))
    return seconds | {
        "batch_size": batch_size,
        "memory": memory,
        "flops": {part: count.flops for part, count in counts.items()},
    }


class Operations:
    """Counts the operations of the function that it wraps, as a Stopwatch its seconds."""

    def wrap(self, function):
        def counted(*args):
            # Attention as products of matrices: the counter does not know all of its fused forms.
            with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
                result = function(*args)
            self.flops = counter.get_total_flops()
            return result

        return counted


def decoder_of(way, image_size):
    """A decoder of random weights."""
    if way == "linear":
        return LinearDecoder(**public_map(), size=image_size)
    diffusers = require_diffusers()
    network = diffusers.AutoencoderTiny() if way == "tiny" else diffusers.AutoencoderKL(**AUTOENCODER)
    return AutoencoderDecoder(network, checkpointing="checkpointing" in way)


if __name__ == "__main__":
    run_main(main)
