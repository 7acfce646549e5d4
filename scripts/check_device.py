"""Check that an accelerator draws what the CPU draws, and how far its precisions are from float32.

    python scripts/check_device.py --device cuda

Every sampler of the digits draws the same images on the CPU and on the device, in float32: labels must be
equal, and no pixel may differ by more than --levels of 255. Networks of the published sizes, with random
weights, compute in each precision; the distance |a - b| / |b| is from float32 on the CPU. The golden numbers
themselves are held on a device by `pytest -n0 --device cuda tests/test_golden_*.py`.
"""

from functools import partial

import _beside  # noqa: F401
import torch
from benchmark_cuda import settled

import classifiers
from classifiers import load_classifier
from guided_diffusion import dist_util
from guided_diffusion.dit import DIT_MODELS
from guided_diffusion.files.pixels import to_uint8
from guided_diffusion.flags.adm import LOOPS
from guided_diffusion.flags.fields import configure
from guided_diffusion.flags.parser import Parser, run_main
from guided_diffusion.flags.presets import PRESETS
from guided_diffusion.guidance import ClassifierGuidance, GuidanceStep
from guided_diffusion.runs import machine
from guided_diffusion.runs.systems import system_of
from guided_diffusion.runs.tally import Tally
from guided_diffusion.script_util import create_from_flags
from guided_diffusion.solvers import SOLVERS

CPU = torch.device("cpu")
IMAGES = 8
SCORE = {"guidance_form": "score", "guidance_strength": "posterior", "classifier_scale": 2.0}
# Under ADM's loops and EDM's sampler the recipes; the same network and rule under every solver.
SAMPLERS = {
    **{f"digits, {name}": ("digits", {"sampler": name}) for name in LOOPS},
    **{
        f"digits-fewstep, {name}": ("digits-fewstep", {"sampler": name, "sigma_max": 5.0}) for name in SOLVERS
    },
    "digits-edm, released": ("digits-edm", {"steps": 10}),
    **{f"digits-edm, {name}": ("digits-edm", {"sampler": name, "steps": 10, **SCORE}) for name in SOLVERS},
}


def main():
    parser = Parser(description=__doc__)
    parser.add_argument("--device", default="cuda", help="such as cuda or cuda:1")
    parser.add_argument("--levels", type=int, default=2, help="most that a pixel may differ by, of 255")
    parser.add_argument("--part", choices=["samplers", "precisions"], help="just this one, by default both")
    args = parser.parse_args()
    device = dist_util.choose_device(args.device)
    print(f"machine: {machine.describe(device)}")
    tf32(False)
    failures = check_samplers(device, args.levels) if args.part != "precisions" else []
    if args.part != "samplers":
        report_precisions(device)
    if failures:
        raise ValueError(f"{device} draws other images than the CPU: {', '.join(failures)}")


def tf32(allowed):
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = allowed


def check_samplers(device, levels):
    """Print a line for each sampler; returns the names of those that differ."""
    failures = []
    for name, (preset, flags) in SAMPLERS.items():
        (expected, y), (found, labels) = (drawn(preset, flags, place) for place in (CPU, device))
        apart = (found.int() - expected.int()).abs()
        share = float((apart > 0).double().mean())
        print(
            f"{name}: labels {'equal' if y.equal(labels) else 'DIFFER'}, pixels at most {apart.max()} of 255 "
            f"apart, {share:.3%} of them apart"
        )
        if not y.equal(labels) or apart.max() > levels:
            failures.append(name)
    return failures


def drawn(preset, flags, device):
    """(levels (N, H, W, C) uint8, labels (N,)) of a preset with these flags, on the CPU."""
    system = system_of(preset)
    given = {"preset": preset, "batch_size": IMAGES, "device": str(device), **flags}
    given |= {"seeds": f"0-{IMAGES - 1}"} if preset == "digits-edm" else {"num_samples": IMAGES}
    job = system.make_job(configure(system.config, system.presets, given), classifiers)
    images, y = job.build(device, Tally(device)).sample(range(IMAGES), lambda: None)
    return to_uint8(images, job.rounding).cpu(), y.cpu()


def report_precisions(device):
    """Print how far each network of a published size is from float32 on the CPU. bfloat16 is autocast's;
    float16 is what the flags make of the network.
    """
    for name, build in NETWORKS.items():
        torch.manual_seed(0)
        network, answer = build()
        expected = answer(network, CPU)
        network.to(device)
        apart = {"float32": distance(answer(network, device), expected)}
        if device.type == "cuda":
            tf32(True)
            apart["TF32"] = distance(answer(network, device), expected)
            tf32(False)
        with torch.autocast(device.type, torch.bfloat16):
            apart["bfloat16"] = distance(answer(network, device), expected)
        getattr(network, "convert_to_fp16", network.half)()
        apart["float16"] = distance(answer(network, device), expected)
        print(f"{name}: {', '.join(f'{key} {value:.1e}' for key, value in apart.items())}", flush=True)


def distance(found, expected):
    found, expected = found.double().cpu(), expected.double()
    return float((found - expected).norm() / expected.norm())


def unet():
    """The network of 128x128 and its answer."""
    model, _ = create_from_flags({**PRESETS["imagenet128-resnet101"], "use_fp16": False})
    x, t, y = torch.randn(2, 3, 128, 128), torch.tensor([200, 700]), torch.tensor([3, 500])

    @torch.no_grad()
    def answer(network, device):
        return network(x.to(device), t.to(device), y.to(device))

    return without_zeros(model), answer


def dit():
    """DiT-XL/2 for 256x256 and its answer."""
    z, t, y = torch.randn(2, 4, 32, 32), torch.tensor([200, 700]), torch.tensor([3, 500])

    @torch.no_grad()
    def answer(network, device):
        return network(z.to(device, network.pos_embed.dtype), t.to(device), y.to(device))

    return without_zeros(DIT_MODELS["DiT-XL/2"]()), answer


def classifier(name):
    """A classifier and guidance's gradient; Softplus of beta 3."""
    x, y = torch.rand(2, 3, 128, 128) * 2 - 1, torch.tensor([3, 500])
    at = GuidanceStep(index=1, num_steps=2, variance=1.0, variance_max=1.0, sigma=1.0, progress=0.0)

    def answer(network, device):
        return ClassifierGuidance(network, marginal_temperature=0.5)(x.to(device), y.to(device), at)

    return settled(load_classifier(name, "random", softplus_beta=3.0, image_size=128), 128), answer


NETWORKS = {
    "U-Net of 128x128": unet,
    "ResNet-50, gradient": partial(classifier, "resnet50"),
    "ResNet-101, gradient": partial(classifier, "resnet101"),
    "DiT-XL/2": dit,
}


@torch.no_grad()
def without_zeros(network):
    """The network in eval mode, with random numbers where it begins with zeros, and would answer with
    them.
    """
    for weight in network.parameters():
        if weight.ndim > 1 and not weight.any():
            weight.normal_(std=weight[0].numel() ** -0.5)
    return network.eval().requires_grad_(False)


if __name__ == "__main__":
    run_main(main)
