"""Sample an EDM diffusion model, guided by an off-the-shelf classifier or by nothing.

    python scripts/edm_sample.py --preset imagenet64-edm-resnet101 --steps 18 --outdir results/edm18

Writes one PNG per seed and dataset.json with the labels, or with --format npz samples_NxHxWx3.npz (arr_0
uint8 images, arr_1 int64 labels, in the order of --seeds) and grid.png; and run.json. A run that was
interrupted goes on when the same command is given again, on any number of processes (torchrun). The flags are
those of EDM's generate.py and EluCD, and a few more.
"""

import math
from contextlib import closing
from functools import partial
from pathlib import Path

import _beside  # noqa: F401
import torch
import torch.nn.functional as F

from classifiers.input_transform import INPUTS
from classifiers.registry import classifier_files, load_classifier
from guided_diffusion.edm import SCALINGS, SCHEDULES, SOLVERS, edm_sampler, load_edm_network, time_steps
from guided_diffusion.files.checkpoints import existing_file
from guided_diffusion.flags.parser import Parser, parse_flags, parse_interval, parse_numbers, run_main
from guided_diffusion.flags.presets import EDM_FORM_FLAGS, EDM_PRESETS
from guided_diffusion.guidance import (
    ClassifierGuidance,
    GuidedDenoiser,
    released_edm_guidance,
    within_interval,
)
from guided_diffusion.runs.dry_run import dry_run
from guided_diffusion.runs.job import (
    RUN_FLAGS,
    Job,
    Sampler,
    add_run_flags,
    require_numbers,
    run,
    run_options,
)
from guided_diffusion.runs.noise import DRAWN_BY_SEED, DrawnAhead, SeedNoise
from guided_diffusion.schedules import DISCRETIZATIONS, default_levels
from guided_diffusion.script_util import NUM_CLASSES, str2bool

# What a flag needs in order to mean anything.
CHURN_FLAGS = ("S_min", "S_max", "S_noise")
GUIDANCE_FLAGS = (
    *(
        "guidance_form",
        "classifier_type",
        "classifier_path",
        "softplus_beta",
        "joint_temperature",
        "uncond_temperature",
    ),
    *(
        "classifier_input",
        "guidance_interval",
        "on_nonfinite",
        "log_guidance",
        *EDM_FORM_FLAGS["released"],
        *EDM_FORM_FLAGS["score"],
    ),
)
FINITE_FLAGS = (
    *(
        "joint_temperature",
        "uncond_temperature",
        "classifier_scale",
        "gamma_factor",
        "max_guidance",
        "add_factor",
    ),
    *("rho", "S_churn", "S_noise"),
)


def main():
    args = parse_flags(create_argparser(), None, EDM_PRESETS)
    (dry_run if args.dry_run else run)(make_job(args, refuse_contradictions(args)))


def create_argparser():
    parser = Parser(description=__doc__)
    flag = parser.add_argument_group("sampling").add_argument
    flag(
        "--network",
        default="",
        help="EDM's .pkl, or the .safetensors that scripts/convert_checkpoint.py made of one",
    )
    flag(
        "--use_fp16",
        type=str2bool,
        help="the network in float16 (bfloat16 on a CPU); by default as its file says",
    )
    flag("--seeds", default="0-63", help="one image per seed: numbers and ranges such as 1,2,5-10")
    flag(
        "--class", dest="class_idx", type=int, help="every sample is of this class; by default they are drawn"
    )
    flag(
        "--unconditional",
        type=str2bool,
        default=False,
        help="give the network no labels; guidance still wants them",
    )
    flag(
        "--num_classes",
        type=int,
        default=NUM_CLASSES,
        help="of the classifier, where the network itself has no labels",
    )
    flag("--batch", "--batch_size", dest="batch_size", type=int, default=64)
    flag("--steps", type=int, default=18, help="N; Heun asks the network 2 N - 1 times, Euler N times")
    flag("--sigma_min", type=float, help="lowest noise level; by default that of --disc")
    flag("--sigma_max", type=float, help="highest noise level; by default that of --disc")
    flag("--rho", type=float, default=7.0, help="exponent of --disc edm")
    flag("--S_churn", type=float, default=0.0)
    flag("--S_min", type=float, default=0.0)
    flag("--S_max", type=float, default=math.inf)
    flag("--S_noise", type=float, default=1.0)
    flag("--solver", choices=SOLVERS, default="heun")
    flag("--disc", choices=DISCRETIZATIONS, default="edm", help="which noise levels are visited")
    flag("--schedule", choices=SCHEDULES, default="linear", help="sigma(t)")
    flag("--scaling", choices=SCALINGS, default="none", help="s(t)")
    flag = parser.add_argument_group("guidance").add_argument
    flag("--use_classifier", type=str2bool, default=False, help="guide; 0 or False is unguided")
    flag(
        "--guidance_form",
        choices=tuple(EDM_FORM_FLAGS),
        default="released",
        help="released: EluCD's; score: added to the denoised image",
    )
    flag("--classifier_type", default="resnet101", help="a torchvision name, or FILE.py:builder")
    flag("--classifier_path", default="", help="its weights: a file, IMAGENET1K_V2, random")
    flag(
        "--softplus_beta",
        type=float,
        default=5.0,
        help="sharpness of the Softplus in the place of each ReLU; inf keeps ReLU",
    )
    flag("--joint_temperature", type=float, default=1.0, help="tau_1, factor of the wanted class's logit")
    flag(
        "--uncond_temperature",
        type=float,
        default=1.0,
        help="tau_2, the factor inside the logsumexp; not a ratio to tau_1 here",
    )
    flag(
        "--max_guidance",
        type=float,
        default=0.001,
        help="released form: strength at the first step, as a share of the sample's RMS",
    )
    flag("--add_factor", type=float, default=0.0, help="released form: weight of the sine on top")
    flag("--classifier_scale", type=float, default=1.0, help="score form: factor of the gradient")
    flag("--gamma_factor", type=float, default=0.0, help="score form: weight of the sine term")
    flag(
        "--classifier_input",
        choices=INPUTS,
        default="paper",
        help="paper: the raw image; imagenet: resized and normalised",
    )
    flag(
        "--guidance_interval", default="", help="LO,HI: guide only while the noise level sigma is in (LO, HI]"
    )
    add_run_flags(parser, EDM_PRESETS)
    flag = parser.add_argument_group("places").add_argument
    flag("--outdir", "--out", dest="out", default="", help="output folder; by default results/PRESET")
    flag("--format", choices=("png", "npz"), default="png")
    flag("--subdirs", action="store_true", help="PNGs in a folder for every 1000 seeds")
    return parser


def refuse_contradictions(args):
    """Raise ValueError for flags that cannot both be meant; returns the seeds."""
    given = args.given
    if not args.network:
        raise ValueError(f"--network is missing: give an EDM network, or --preset {', '.join(EDM_PRESETS)}")
    if not args.use_classifier and (idle := [name for name in GUIDANCE_FLAGS if name in given]):
        raise ValueError(f"--{idle[0]} given without guidance: add --use_classifier 1")
    for form, names in EDM_FORM_FLAGS.items():
        if form != args.guidance_form and (foreign := [name for name in names if name in given]):
            raise ValueError(
                f"--{foreign[0]} belongs to --guidance_form {form}, and this is {args.guidance_form}: drop it"
            )
    if "rho" in given and args.disc != "edm":
        raise ValueError(f"--rho {args.rho} belongs to --disc edm, and this is {args.disc}: drop it")
    if args.subdirs and args.format == "npz":
        raise ValueError("--subdirs is for PNGs: drop it, or --format npz")
    require_numbers(args, at_least_one=("batch_size", "steps", "num_classes"), finite=FINITE_FLAGS)
    if args.S_churn < 0 or args.S_min > args.S_max:
        raise ValueError(
            f"--S_churn must be 0 or more and --S_min at most --S_max, got {args.S_churn}, {args.S_min} and {args.S_max}"
        )
    seeds = parse_numbers(args.seeds, "--seeds")
    if min(seeds) < 0 or len(set(seeds)) < len(seeds):
        raise ValueError(
            f"--seeds {args.seeds} must be different whole numbers from 0 on: each gives one image"
        )
    if "classifier_type" in given and "classifier_path" not in given:
        args.classifier_path = ""  # the preset's belongs to the preset's own classifier
    return seeds


def make_job(args, seeds):
    """What the flags ask for; nothing is loaded."""
    files = {"network": partial(existing_file, args.network)}
    if args.use_classifier:
        files |= classifier_files(args.classifier_type, args.classifier_path)
    return Job(
        folder=Path(args.out or Path("results", args.preset or "edm")),
        not_compared={*RUN_FLAGS, *idle_flags(args)},
        files=files,
        build=partial(build, args, seeds),
        num_samples=len(seeds),
        rounding="edm",
        drawn_by=DRAWN_BY_SEED | ({} if args.class_idx is None else {"labels": f"--class {args.class_idx}"}),
        **run_options(args, {"class_idx": "class"}),
        png_name=partial(png_name, seeds, args.subdirs) if args.format == "png" else None,
        name_of=lambda index: f"{index} (seed {seeds[index]})",
    )


def idle_flags(args):
    """Flags that are without effect in this run; they must not decide whether a folder holds the same
    samples.
    """
    others = [name for form, names in EDM_FORM_FLAGS.items() if form != args.guidance_form for name in names]
    return [*(others if args.use_classifier else GUIDANCE_FLAGS), *([] if args.S_churn else CHURN_FLAGS)]


def png_name(seeds, subdirs, index):
    seed = seeds[index]
    return f"{seed - seed % 1000:06d}/{seed:06d}.png" if subdirs else f"{seed:06d}.png"


def build(args, seeds, device, tally):
    """Load the networks; returns the Sampler."""
    torch.manual_seed(0)  # for --classifier_path random; the samples' noise has generators of its own
    net = load_edm_network(args.network).to(device)
    if args.use_fp16 is not None:
        net.use_fp16 = args.use_fp16
    refuse_for_network(args, net)
    num_classes = net.label_dim or args.num_classes
    if args.class_idx is not None and not 0 <= args.class_idx < num_classes:
        raise ValueError(f"--class {args.class_idx} is out of range, the classes are 0 to {num_classes - 1}")
    guidance = build_guidance(args, net, num_classes, device, tally) if args.use_classifier else None
    released = guidance if args.guidance_form == "released" else None
    low, high = default_levels(args.disc)
    times = {
        **{name: getattr(args, name) for name in ("rho", "disc", "schedule", "scaling")},
        "num_steps": args.steps,
        "sigma_min": low if args.sigma_min is None else args.sigma_min,
        "sigma_max": high if args.sigma_max is None else args.sigma_max,
    }
    time_steps(net, **times)  # raises for what cannot be before the folder is this run's
    options = {
        **times,
        **{name: getattr(args, name) for name in ("S_churn", "S_min", "S_max", "S_noise", "solver")},
    }

    def sample(indices, tick):
        noise = SeedNoise([seeds[i] for i in indices])
        shape = (len(indices), net.img_channels, net.img_resolution, net.img_resolution)
        latents = noise.randn(shape).to(device)
        y = (
            noise.randint(num_classes).to(device)
            if net.label_dim or guidance
            else torch.zeros(len(indices), dtype=torch.int64)
        )
        y = y if args.class_idx is None else torch.full_like(y, args.class_idx)
        class_labels = (
            F.one_hot(y, net.label_dim).float() if net.label_dim and not args.unconditional else None
        )
        denoiser = GuidedDenoiser(net, guidance, y) if guidance and not released else net
        with closing(DrawnAhead(noise, shape, dtype=torch.float64)) as ahead:
            conditions = {"guidance": released, "y": y, "on_step": lambda i, x: tick()}
            images = edm_sampler(denoiser, latents, class_labels, ahead, **conditions, **options)
        return images, y

    return Sampler(sample, args.steps, net.img_resolution, notes(args, net, device))


def refuse_for_network(args, net):
    """Raise ValueError for a network that is not for pictures, and for flags that mean nothing to it."""
    if net.img_channels != 3:
        raise ValueError(
            f"{args.network} has img_channels {net.img_channels}, and only images of 3 channels can be written"
        )
    if net.label_dim and "num_classes" in args.given:
        raise ValueError(
            f"--num_classes {args.num_classes} is for networks without labels, and this has {net.label_dim}: drop it"
        )
    if not net.label_dim and args.unconditional:
        raise ValueError(f"--unconditional True: {args.network} has no labels in any case, drop it")
    if not net.label_dim and args.class_idx is not None and not args.use_classifier:
        raise ValueError(
            f"--class {args.class_idx} needs a network with labels or a classifier: add --use_classifier 1"
        )


def build_guidance(args, net, num_classes, device, tally):
    classifier = load_classifier(
        args.classifier_type,
        args.classifier_path or None,
        num_classes=num_classes,
        softplus_beta=args.softplus_beta,
        classifier_input=args.classifier_input,
        image_size=net.img_resolution,
    ).to(device)
    common = {
        "joint_temperature": args.joint_temperature,
        "marginal_temperature": args.uncond_temperature,
        "on_nonfinite": args.on_nonfinite,
        "observe": tally.observe,
    }
    if args.guidance_form == "released":
        guidance = released_edm_guidance(
            classifier, max_guidance=args.max_guidance, add_factor=args.add_factor, **common
        )
    else:
        guidance = ClassifierGuidance(
            classifier, classifier_scale=args.classifier_scale, gamma_factor=args.gamma_factor, **common
        )
    if args.guidance_interval:
        guidance = within_interval(guidance, *parse_interval(args.guidance_interval, "--guidance_interval"))
    return tally.stopwatch.wrap(guidance)


def notes(args, net, device):
    """What the log should say at the start: flags without effect, and a precision that is not what it is
    called.
    """
    lines = []
    if written := [f"--{name}" for name in CHURN_FLAGS if name in args.given and not args.S_churn]:
        lines.append(f"without effect at --S_churn 0: {', '.join(written)}")
    if net.use_fp16 and device.type == "cpu":
        lines.append(
            "the network is to run in float16: on a CPU that is bfloat16, and --use_fp16 False is float32"
        )
    return lines


if __name__ == "__main__":
    run_main(main, resumable=True)
