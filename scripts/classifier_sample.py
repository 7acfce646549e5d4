"""Sample an ADM diffusion model, guided by an off-the-shelf classifier, by a noisy classifier, or by nothing.

    python scripts/classifier_sample.py --preset imagenet128-resnet101 --num_samples 1000 --out results/resnet101

Writes samples_NxHxWx3.npz (arr_0 uint8 images, arr_1 int64 labels), grid.png and run.json. A run that was
interrupted goes on when the same command is given again. The flags are those of guided-diffusion and EluCD,
and a few more.
"""

import os
from contextlib import closing
from functools import partial
from pathlib import Path

import _beside  # noqa: F401
import torch

from classifiers.input_transform import INPUTS
from classifiers.registry import classifier_files, load_classifier
from guided_diffusion.files.checkpoints import existing_file, load_into, load_state_dict
from guided_diffusion.flags.labels import label_source, labels_file
from guided_diffusion.flags.parser import Parser, parse_flags, parse_interval, run_main
from guided_diffusion.flags.presets import PRESETS
from guided_diffusion.guidance import ClassifierGuidance, noisy_classifier_gradient, within_interval
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
from guided_diffusion.runs.noise import DRAWN_BY_INDEX, DrawnAhead, SampleNoise
from guided_diffusion.script_util import (
    NUM_CLASSES,
    add_dict_to_argparser,
    args_to_dict,
    classifier_defaults,
    create_classifier,
    create_from_flags,
    model_and_diffusion_defaults,
    str2bool,
)

# What a flag needs in order to mean anything; guidance by an off-the-shelf classifier alone reads these.
OFF_THE_SHELF_FLAGS = (
    "softplus_beta",
    "joint_temperature",
    "margin_temperature_discount",
    "gamma_factor",
    "classifier_input",
    "guidance_interval",
    "variance_max",
)
TRAINING_FLAGS = ("use_kl", "rescale_learned_sigmas", "dropout", "use_checkpoint")
NOISY_CLASSIFIER_FLAGS = tuple(
    key for key in classifier_defaults() if key not in ("image_size", "classifier_use_fp16")
)
FINITE_FLAGS = (
    "classifier_scale",
    "joint_temperature",
    "margin_temperature_discount",
    "gamma_factor",
    "dropout",
)


def main():
    args = parse_flags(create_argparser(), None, PRESETS)
    refuse_contradictions(args)
    (dry_run if args.dry_run else run)(make_job(args))


def make_job(args):
    """What the flags ask for. Raises for labels that cannot be; nothing is loaded."""
    files = {
        "model_path": partial(existing_file, args.model_path),
        "labels": partial(labels_file, args.labels),
    }
    if args.classifier_type:
        files |= classifier_files(args.classifier_type, args.classifier_path)
    elif args.classifier_path:
        files["classifier_path"] = partial(existing_file, args.classifier_path)
    return Job(
        folder=Path(
            args.out
            or args.log_dir
            or os.environ.get("OPENAI_LOGDIR")
            or Path("results", args.preset or "samples")
        ),
        not_compared={*RUN_FLAGS, "log_dir", *idle_flags(args)},
        files=files,
        build=partial(build, args, label_source(args.labels, args.seed, args.num_classes)),
        num_samples=args.num_samples,
        rounding="adm",
        drawn_by=DRAWN_BY_INDEX
        | ({} if args.labels == "random" else {"labels": f"--labels {args.labels}, shuffled"}),
        **run_options(args),
    )


def build(args, labels_of, device, tally):
    """Load the networks; returns the Sampler."""
    # For --classifier_path random; the samples' noise has streams of its own.
    torch.manual_seed(args.seed)
    model, diffusion = build_model(args, device)
    conditioning = build_conditioning(args, device, tally)
    loop = diffusion.ddim_sample_loop_progressive if args.use_ddim else diffusion.p_sample_loop_progressive

    def sample(indices, tick):
        labels = torch.from_numpy(labels_of(indices)).to(device)
        shape = (len(indices), 3, args.image_size, args.image_size)
        conditions = {"clip_denoised": args.clip_denoised, "model_kwargs": {"y": labels}, **conditioning}
        with closing(DrawnAhead(SampleNoise(args.seed, indices), shape)) as noise:
            for out in loop(model, shape, device=device, randn_like=noise, **conditions):
                images = out["sample"]
                tick()
        return images, labels

    return Sampler(sample, diffusion.num_timesteps, args.image_size, notes(args, device))


def create_argparser():
    parser = Parser(
        description=__doc__,
        epilog="Taken from guided-diffusion's command lines but without effect on sampling: "
        f"{_names(TRAINING_FLAGS)}; with --classifier_type also {_names(NOISY_CLASSIFIER_FLAGS)}.\nThe start names those that you wrote.",
    )
    add_dict_to_argparser(parser, {**model_and_diffusion_defaults(), **classifier_defaults()})
    sampling = {
        "clip_denoised": True,
        "num_samples": 10000,
        "batch_size": 16,
        "use_ddim": False,
        "model_path": "",
    }
    add_dict_to_argparser(parser, sampling)
    flag = parser.add_argument_group("guidance").add_argument
    flag(
        "--classifier_path",
        default="",
        help="weights of a noisy classifier, or of --classifier_type: a file, IMAGENET1K_V2, random",
    )
    flag(
        "--classifier_type",
        default="",
        help="off-the-shelf classifier: a torchvision name, or FILE.py:builder",
    )
    flag("--classifier_scale", type=float, default=1.0, help="factor of the gradient; 0 is unguided")
    flag(
        "--softplus_beta",
        type=float,
        default=float("inf"),
        help="sharpness of the Softplus in the place of each ReLU; inf keeps ReLU",
    )
    flag("--joint_temperature", type=float, default=1.0, help="tau_1, factor of the wanted class's logit")
    flag(
        "--margin_temperature_discount",
        type=float,
        default=1.0,
        help="tau_2 / tau_1, tau_2 the factor inside the logsumexp",
    )
    flag("--gamma_factor", type=float, default=0.0, help="weight of the sine term in the strength of a step")
    flag(
        "--classifier_input",
        choices=INPUTS,
        default="paper",
        help="paper: the raw image; imagenet: resized and normalised",
    )
    flag(
        "--guidance_interval", default="", help="LO,HI: guide only while the noise level sigma is in (LO, HI]"
    )
    flag(
        "--variance_max",
        choices=("schedule", "first_pixel"),
        default="schedule",
        help="first_pixel is EluCD's, where batches matter",
    )
    add_run_flags(parser, PRESETS)
    flag = parser.add_argument_group("labels and places").add_argument
    flag(
        "--labels",
        default="random",
        help="random, balanced, a list such as 1,2,5-10, or a file of classes; stored shuffled",
    )
    flag("--fix_class", type=str2bool, default=False, help="every sample is of class --fix_class_index")
    flag("--fix_class_index", type=int, default=0)
    flag("--num_classes", type=int, default=NUM_CLASSES)
    flag(
        "--null_class",
        type=str2bool,
        default=False,
        help="the network was trained with one label more, num_classes, for no class",
    )
    flag(
        "--unconditional",
        type=str2bool,
        default=False,
        help="give the network the null class; guidance still wants the labels",
    )
    flag("--seed", type=int, default=0)
    flag("--out", default="", help="output folder; by default --log_dir, $OPENAI_LOGDIR or results/PRESET")
    flag("--log_dir", default="", help="the same under EluCD's name")
    return parser


def refuse_contradictions(args):
    """Raise ValueError for flags that cannot both be meant, and resolve those that are two names of one
    thing.
    """
    given = args.given
    if not args.model_path:
        raise ValueError(
            f"--model_path is missing: give the U-Net's checkpoint, or --preset {', '.join(PRESETS)}"
        )
    without_meaning = [f for f in OFF_THE_SHELF_FLAGS if f in given and not args.classifier_type]
    if without_meaning:
        raise ValueError(
            f"{_names(without_meaning)} given without an off-the-shelf classifier: add --classifier_type, for example resnet101"
        )
    for name in {"classifier_scale", "on_nonfinite", "log_guidance"} & given:
        if getattr(args, name) != 0 and not (args.classifier_type or args.classifier_path):
            raise ValueError(
                f"--{name} {getattr(args, name)} needs a classifier: add --classifier_type or --classifier_path"
            )
    if args.fix_class and "labels" in given:
        raise ValueError(f"--fix_class True and --labels {args.labels} contradict each other: keep one")
    if "fix_class_index" in given and not args.fix_class:
        raise ValueError(f"--fix_class_index {args.fix_class_index} needs --fix_class True")
    if args.out and args.log_dir and args.out != args.log_dir:
        raise ValueError(
            f"--out {args.out} and --log_dir {args.log_dir} are two names of one folder: keep one"
        )
    if args.null_class and not args.class_cond:
        raise ValueError("--null_class True needs a class-conditional network: add --class_cond True")
    if args.unconditional and args.class_cond and not args.null_class:
        raise ValueError(
            "--unconditional True needs a network with a null class: add --null_class True if it has one"
        )
    if args.use_ddim and args.variance_max != "schedule":
        raise ValueError(
            f"--variance_max {args.variance_max} belongs to the ancestral sampler: drop it or --use_ddim"
        )
    require_numbers(args, at_least_one=("num_samples", "batch_size", "num_classes"), finite=FINITE_FLAGS)
    if not 0 <= args.seed < 2**63:
        raise ValueError(f"--seed must be from 0 to 2**63 - 1, got {args.seed}")
    if "classifier_type" in given and "classifier_path" not in given:
        args.classifier_path = ""  # the preset's belongs to the preset's own classifier
    if args.fix_class:
        args.labels = str(args.fix_class_index)


def idle_flags(args):
    """Flags that are without effect in this run."""
    idle = [
        *TRAINING_FLAGS,
        *([] if args.classifier_path and not args.classifier_type else NOISY_CLASSIFIER_FLAGS),
    ]
    return idle if args.classifier_type or args.classifier_path else [*idle, "classifier_use_fp16"]


def notes(args, device):
    """What the log should say at the start: flags without effect, and precisions that are not what they are
    called.
    """
    idle, lines = idle_flags(args), []
    if written := [flag for flag in idle if flag in args.given]:
        lines.append(f"without effect in this run: {_names(written)}")
    if device.type == "cpu" and args.use_fp16:
        lines.append("--use_fp16 on a CPU: the U-Net runs in bfloat16")
    if device.type == "cpu" and args.classifier_use_fp16 and "classifier_use_fp16" not in idle:
        lines.append(
            "--classifier_use_fp16 on a CPU: the classifier stays in float32, bfloat16 gradients are off by over 10%"
        )
    return lines


def build_model(args, device):
    """Return the network as a function (x, t, y) -> output, and the diffusion."""
    with torch.device("meta"):
        model, diffusion = create_from_flags(vars(args))
    load_into(model, load_state_dict(args.model_path), args.model_path)
    # The file's tensors took the place of the network's own, and with it their memory format.
    model.to(device, memory_format=torch.channels_last).eval()
    if args.use_fp16:
        model.convert_to_fp16()

    def network(x, t, y):
        if not args.class_cond:
            return model(x, t)
        return model(x, t, torch.full_like(y, args.num_classes) if args.unconditional else y)

    return network, diffusion


def build_conditioning(args, device, tally):
    """Return what the loops are to be given: guidance, cond_fn, or nothing."""
    if args.classifier_type:
        guidance = build_guidance(args, device, tally.observe)
        return {"guidance": tally.stopwatch.wrap(guidance), "variance_max": args.variance_max}
    if args.classifier_path and args.classifier_scale != 0:
        classifier = build_noisy_classifier(args, device)
        gradient = noisy_classifier_gradient(
            classifier, args.classifier_scale, args.on_nonfinite, tally.observe
        )
        return {"cond_fn": tally.stopwatch.wrap(gradient)}
    return {}


def build_guidance(args, device, observe):
    classifier = load_classifier(
        args.classifier_type,
        args.classifier_path or None,
        num_classes=args.num_classes,
        softplus_beta=args.softplus_beta,
        classifier_input=args.classifier_input,
        image_size=args.image_size,
    ).to(device)
    if args.classifier_use_fp16 and device.type != "cpu":
        classifier.half()
    guidance = ClassifierGuidance(
        classifier,
        joint_temperature=args.joint_temperature,
        marginal_temperature=args.joint_temperature * args.margin_temperature_discount,
        classifier_scale=args.classifier_scale,
        gamma_factor=args.gamma_factor,
        on_nonfinite=args.on_nonfinite,
        observe=observe,
    )
    return (
        within_interval(guidance, *parse_interval(args.guidance_interval, "--guidance_interval"))
        if args.guidance_interval
        else guidance
    )


def build_noisy_classifier(args, device):
    half = args.classifier_use_fp16 and device.type != "cpu"
    flags = {**args_to_dict(args, classifier_defaults().keys()), "classifier_use_fp16": half}
    with torch.device("meta"):
        classifier = create_classifier(**flags, num_classes=args.num_classes)
    load_into(classifier, load_state_dict(args.classifier_path), args.classifier_path)
    classifier.to(device, memory_format=torch.channels_last).eval().requires_grad_(False)
    if half:
        classifier.convert_to_fp16()
    return classifier


def _names(flags):
    return ", ".join(f"--{flag}" for flag in flags)


if __name__ == "__main__":
    run_main(main, resumable=True)
