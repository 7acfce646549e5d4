"""Measure how well a classifier is calibrated over the noise levels of a diffusion model, shown the noisy
image x_t and shown the predicted clean image x0, smoothed by several betas and at several temperatures.

    python scripts/calibrate.py --preset digits --plot results/calibration.png
    python scripts/calibrate.py --preset digits-edm --unconditional True --json results/calibration.json

For each of --num_levels timesteps t, even from the noisiest to the cleanest, it adds noise to labelled images
and takes the classifier's accuracy, expected calibration error (ECE: top label, equal bins), negative
log-likelihood (nats) and Brier score. The table has the integral over t with equal weights, which is the mean
over these levels; --json has all levels. The probabilities are softmax(tau1 f): tau1 != tau2 has none. Beside
the ECE stands its noise floor, what so many images would show of probabilities that are right.

--preset, or --system with flags of its sampling script, names the networks. A classifier of noisy images
(--classifier_path without --classifier_type) is shown x_t and t. x_t is that of the variance-preserving
process, of EDM too, whose t are those of the linear process between its --sigma_min and --sigma_max. Latents
are shown through the decoder. --unconditional True asks the network without labels: with them its prediction
tells the class that the classifier is to find.
"""

import math
import sys
from dataclasses import dataclass, field
from pathlib import Path

import _beside  # noqa: F401
import numpy as np
import torch
from calibration_choice import COLUMNS, lines_of, recommendation
from calibration_figure import draw
from calibration_subjects import USED, configured, in_process, load_classifiers, load_subject
from tqdm import tqdm

from evaluation import calibration
from guided_diffusion.dist_util import choose_device
from guided_diffusion.files.atomic import write_json
from guided_diffusion.files.console import print_result
from guided_diffusion.files.figures import plain_style, require_matplotlib, save_figure
from guided_diffusion.files.labelled import read_labelled
from guided_diffusion.files.nonfinite import require_finite
from guided_diffusion.files.pretrained import PRETRAINED_DIR
from guided_diffusion.flags.parser import Parser, parse_floats, run_main
from guided_diffusion.runs.noise import SampleNoise
from guided_diffusion.runs.systems import SYSTEMS, system_of

HELD_OUT = PRETRAINED_DIR / "digits/held_out.npz"
RESAMPLES = 200


@dataclass
class Cell:
    """What was measured of one setting: shown "x_t" or "x0", smoothed by beta (None: by nothing, a classifier
    of noisy images), at one temperature. levels: a dict of numbers for each noise level. resampled: (R,) its
    mean ECE over the levels in each resample of the images.
    """

    shown: str
    beta: float | None
    tau: float
    levels: list = field(default_factory=list)
    resampled: np.ndarray | float = 0.0

    def mean(self, number):
        """The integral over t: equal weights."""
        return float(np.mean([level[number] for level in self.levels]))


def main(argv=None):
    args, rest = create_argparser().parse_known_args(argv)
    betas = positive_numbers(args.softplus_betas or "3,5,10,inf", "--softplus_betas", math.inf)
    temperatures = positive_numbers(args.joint_temperatures, "--joint_temperatures")
    if not args.data_dir and args.preset.startswith("digits"):
        args.data_dir = str(HELD_OUT)
    check_outputs(args)
    system = system_of(args.preset) if args.preset else SYSTEMS[args.system]
    config = configured(system, [*(["--preset", args.preset] if args.preset else []), *rest])
    if args.softplus_betas and config.guided_by_noisy_classifier:
        raise ValueError("--softplus_betas: a classifier of noisy images is not smoothed: drop it")
    device = choose_device(config.device)
    for name in config.without_effect():
        print_result(f"without effect here: --{name}", to_stderr=True)
    subject = load_subject(config, device)
    levels = subject.levels(args.num_levels)
    indices, images, labels = chosen_images(args, subject)
    classifiers = load_classifiers(config, subject, betas, args.seed, device)
    batches = Batches(subject, indices, images, labels, config.batch_size, args.seed, device)
    cells = measure(batches, classifiers, levels, temperatures, args.bins)
    choice = recommendation(cells)
    if args.json:
        write_json(args.json, as_json(args, config, subject, cells, choice, len(labels)))
    if args.plot:
        with plain_style():
            save_figure(draw(cells, choice, levels), args.plot)
    about = f"{len(labels)} images, {len(levels)} noise levels, {args.bins} bins"
    print_result("\n".join([f"{about}; {asked(config, subject)}", "", *lines_of(cells, choice)]))


def asked(config, subject):
    """How the predictions were made."""
    if config.guided_by_noisy_classifier:
        return "no prediction is asked for"
    if subject.told:
        return "the network is given the true labels, which its predictions tell"
    return "the network is given no labels"


def create_argparser():
    parser = Parser(description=__doc__)
    parser.add_argument("--preset", default="", help="the networks by name, see scripts/presets.py")
    parser.add_argument(
        "--system", choices=("adm", "edm", "dit"), default="adm", help="without --preset: whose flags"
    )
    parser.add_argument(
        "--data_dir", help="labelled images: a folder, zip or npz; of digits the held-out ones"
    )
    parser.add_argument("--num_samples", type=int, help="so many of them, drawn by --seed; by default all")
    parser.add_argument("--num_levels", type=int, default=20, help="noise levels, even in t")
    parser.add_argument("--softplus_betas", help="smoothings, inf is ReLU (default: 3,5,10,inf)")
    parser.add_argument("--joint_temperatures", default="0.5,1,2", help="tau1, factors of the logits")
    parser.add_argument("--bins", type=int, default=calibration.BINS, help="of the confidence")
    parser.add_argument("--seed", type=int, default=0, help="of the noise, of each image its own")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all numbers there")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw curves over t and reliability")
    return parser


def positive_numbers(text, flag, most=sys.float_info.max):
    """ "3,10,inf" as floats. Raises ValueError that names the flag."""
    try:
        numbers = parse_floats(text)
    except ValueError:
        numbers = []
    if not numbers or len(set(numbers)) < len(numbers) or not all(0 < value <= most for value in numbers):
        raise ValueError(f"{flag} {text!r} must be different numbers above 0 with commas between them")
    return numbers


def check_outputs(args):
    """Raise ValueError, before minutes are spent, for what could not be written, and for numbers that cannot
    be.
    """
    if args.plot:
        require_matplotlib("--plot needs")
    for flag, path in (("json", args.json), ("plot", args.plot)):
        if path and (path.is_dir() or not path.absolute().parent.is_dir()):
            raise ValueError(f"--{flag} {path} must be a file in a folder that is there")
    for flag, least in (("bins", 1), ("num_samples", 2)):  # one image has no resamples
        if getattr(args, flag) is not None and getattr(args, flag) < least:
            raise ValueError(f"--{flag} must be at least {least}, got {getattr(args, flag)}")
    if not 0 <= args.seed < 2**32:
        raise ValueError(f"--seed must be from 0 to 2**32 - 1, got {args.seed}")


def chosen_images(args, subject):
    """(their numbers in the set, (n, 3, S, S) float32 in [-1, 1], (n,) int64 labels)."""
    if not args.data_dir:
        raise ValueError("--data_dir is missing: give labelled images that the classifier was not trained on")
    if subject.num_classes < 2:
        raise ValueError(f"{subject.num_classes} class: it takes at least 2 to be calibrated")
    found = read_labelled(args.data_dir, subject.image_size)
    labels = found.require_labels(args.data_dir, subject.num_classes)
    count = len(labels) if args.num_samples is None else args.num_samples
    if count > len(labels):
        raise ValueError(f"--num_samples {count}: {args.data_dir} has {len(labels)} images")
    indices = np.sort(np.random.RandomState(args.seed).permutation(len(labels))[:count])
    images = torch.from_numpy(found.images[indices]).permute(0, 3, 1, 2).float() / 127.5 - 1
    return indices.tolist(), images, labels[indices]


class Batches:
    """The images in batches, with noise: `at(sigma, both)` goes through them."""

    def __init__(self, subject, indices, images, labels, size, seed, device):
        self.subject, self.labels, self.device = subject, labels, device
        parts = [slice(start, start + size) for start in range(0, len(labels), size)]
        # By the image's number, so that neither the batch size nor the other images change its noise.
        noises = [SampleNoise(seed, indices[part]) for part in parts]
        with torch.no_grad():
            clean = [subject.encode(images[part].to(device)).cpu() for part in parts]
        y = [torch.from_numpy(labels[part]) for part in parts]
        self._parts = list(zip(clean, y, noises, strict=True))

    @torch.no_grad()
    def at(self, sigma, both):
        """For each batch {"x_t": images} that the classifier is shown, with "x0" too where both are asked
        for; the next draw of the noise.
        """
        for clean, y, noise in self._parts:
            clean, y = clean.to(self.device).double(), y.to(self.device)
            x = clean + sigma * noise(clean)
            shown = {"x_t": self.subject.show(in_process(x, sigma).float())}
            if both:
                shown["x0"] = self.subject.show(self.subject.denoiser_of(y)(x, sigma).float())
            yield shown


def measure(batches, classifiers, levels, temperatures, bins):
    """The cells. Each image is denoised once at each level, and each classifier sees each picture once."""
    inputs = ("x_t",) if None in classifiers else ("x0", "x_t")
    cells = [Cell(shown, beta, tau) for shown in inputs for beta in classifiers for tau in temperatures]
    count = len(batches.labels)
    weights = np.random.default_rng(0).multinomial(count, np.full(count, 1 / count), RESAMPLES)
    every = 0.1 if sys.stderr.isatty() else 30  # seconds: a bar would fill a log
    with tqdm(total=count * len(levels), unit="image", mininterval=every) as bar:
        for t, sigma in levels:
            logits = logits_at(batches, classifiers, inputs, t, sigma, bar)
            for cell in cells:
                probs = (cell.tau * logits[cell.shown, cell.beta].double()).softmax(dim=1).numpy()
                cell.levels.append({"t": t, "sigma": sigma, **numbers(probs, batches.labels, bins)})
                errors = calibration.resampled_errors(probs, batches.labels, weights, bins)
                cell.resampled = cell.resampled + errors / len(levels)
    return cells


@torch.no_grad()
def logits_at(batches, classifiers, inputs, t, sigma, bar):
    """{(shown, beta): (n, K) float32 on the CPU}."""
    logits = {(shown, beta): [] for shown in inputs for beta in classifiers}
    for views in batches.at(sigma, both="x0" in inputs):
        for (shown, beta), parts in logits.items():
            x = views[shown]
            answer = classifiers[beta](x, torch.full((len(x),), t, device=x.device))
            require_finite(answer, "classifier logits", t, sigma)
            parts.append(answer.float().cpu())
        bar.update(len(x))
    return {key: torch.cat(parts) for key, parts in logits.items()}


def numbers(probs, y, bins):
    """One level of one cell."""
    diagram = calibration.reliability(probs, y, bins)
    return {
        "accuracy": calibration.accuracy(probs, y),
        "ece": calibration.expected_calibration_error(probs, y, bins),
        "noise_floor": calibration.noise_floor(probs, bins),
        "nll": calibration.negative_log_likelihood(probs, y),
        "brier": calibration.brier_score(probs, y),
        "reliability": {
            "confidence": [value if math.isfinite(value) else None for value in diagram.confidence.tolist()],
            "accuracy": [value if math.isfinite(value) else None for value in diagram.accuracy.tolist()],
            "counts": diagram.counts.tolist(),
        },
    }


def as_json(args, config, subject, cells, choice, count):
    """All that was measured, without infinities and NaN, which JSON has not."""
    flags = {name: value for name, value in config.record().items() if name in USED}
    flags |= {name: str(value) for name, value in vars(args).items() if value is not None}
    return {
        "flags": flags,
        "images": count,
        "network_told_the_labels": subject.told,
        "integral": "mean over the levels, which are even in t",
        "cells": [
            {**setting(cell), "means": {name: cell.mean(name) for name in COLUMNS}, "levels": cell.levels}
            for cell in cells
        ],
        "recommended": {**setting(choice.cell), "reasons": choice.reasons},
    }


def setting(cell):
    beta = str(cell.beta) if cell.beta == math.inf else cell.beta
    return {"shown": cell.shown, "softplus_beta": beta, "joint_temperature": cell.tau}


if __name__ == "__main__":
    run_main(main)
