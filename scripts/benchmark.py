"""Measure the guided step of a preset: network, guidance and the rest, and the memory that they need.

    python scripts/benchmark.py --preset imagenet128-resnet101

Weights are random where the preset's files are absent: the time of a step does not depend on them. On a CPU
the network's rate is set against that of one plain convolution, and bfloat16 against float32, all in one run.
On CUDA it reports images per second over batch sizes. Run it with nothing else on the machine; the lines it
prints are meant for docs/benchmarks.md.
--evaluation hands over to scripts/benchmark_evaluation.py, --engine to scripts/benchmark_engine.py.
"""

import runpy
import statistics
import sys
import time
from pathlib import Path

import _beside  # noqa: F401
import torch
from torch.utils.flop_counter import FlopCounterMode

from classifiers.registry import load_classifier, weights_path
from guided_diffusion import dist_util
from guided_diffusion.files.checkpoints import load_into, load_state_dict
from guided_diffusion.flags.parser import Parser, parse_flags, parse_numbers, run_main
from guided_diffusion.flags.presets import PRESETS
from guided_diffusion.guidance import ClassifierGuidance
from guided_diffusion.runs import machine
from guided_diffusion.runs.noise import SampleNoise
from guided_diffusion.runs.stopwatch import Stopwatch
from guided_diffusion.script_util import create_from_flags

BATCH = 4  # of the CPU figures; memory is measured at batch 1


def main():
    args = parse_flags(create_argparser(), None, PRESETS)
    for other in ("evaluation", "engine"):
        if getattr(args, other):
            return hand_over(other, args)
    device = dist_util.choose_device(args.device)
    refuse_contradictions(args, device)
    print(f"machine: {machine.describe(device)}")
    step = GuidedStep(args, device)
    print(
        f"preset {args.preset}: {step.weights} weights, {step.gflop(1):.1f} GFLOP per image and forward pass of the network"
    )
    if device.type == "cpu":
        dist_util.keep_freed_memory()
        report_cpu(step, args.repeats)
    else:
        report_cuda(step, parse_numbers(args.batch_sizes, "--batch_sizes"), args.repeats)


def create_argparser():
    parser = Parser(description=__doc__)
    parser.add_argument(
        "--preset", default="imagenet128-resnet101", help="a preset with an off-the-shelf classifier"
    )
    parser.add_argument("--device", default="", help="cpu or cuda; by default CUDA where there is one")
    parser.add_argument(
        "--repeats",
        type=int,
        default=5,
        help="timed steps per figure, after one that is not; the median counts",
    )
    parser.add_argument("--batch_sizes", default="1,8,16,32,64", help="on CUDA")
    parser.add_argument("--compile", action="store_true", help="on CUDA: torch.compile the network")
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument(
        "--evaluation", action="store_true", help="measure scripts/evaluate.py's work instead, on the CPU"
    )
    instead.add_argument(
        "--engine", action="store_true", help="measure what a run needs around its steps instead, on the CPU"
    )
    return parser


def hand_over(other, args):
    """Run scripts/benchmark_evaluation.py or benchmark_engine.py, which take none of the flags here."""
    flags = sorted(args.given - {other})
    if flags:
        raise ValueError(f"--{flags[0]} is about sampling: drop it or --{other}")
    sys.argv = sys.argv[:1]
    runpy.run_path(str(Path(__file__).with_name(f"benchmark_{other}.py")), run_name="__main__")


def refuse_contradictions(args, device):
    for flag in ("compile", "batch_sizes"):
        if device.type == "cpu" and flag in args.given:
            raise ValueError(f"--{flag} is for CUDA, and this runs on the CPU: drop it")
    if args.repeats < 1:
        raise ValueError(f"--repeats must be at least 1, got {args.repeats}")


class GuidedStep:
    """One ancestral step of a preset with guidance, and how long its parts took; float32 until `halve` is
    called.
    """

    def __init__(self, args, device):
        flags = PRESETS[args.preset]
        self.size = flags["image_size"]
        if "classifier_type" not in flags:
            raise ValueError(
                f"preset {args.preset} has no off-the-shelf classifier; choose one that has, such as imagenet128-resnet101"
            )
        classes = flags.get("num_classes", 1000)
        self.weights = "trained" if Path(flags["model_path"]).is_file() else "random"
        with torch.device("meta" if self.weights == "trained" else "cpu"):
            self.model, self.diffusion = create_from_flags(flags)
        if self.weights == "trained":
            load_into(self.model, load_state_dict(flags["model_path"]), flags["model_path"])
        self.device = device
        self.model.to(device, memory_format=torch.channels_last).eval().convert_to_fp32()
        self.classifier = load_classifier(
            flags["classifier_type"],
            "random" if self.weights == "random" else weights_path(flags["classifier_type"], None),
            num_classes=classes,
            softplus_beta=flags["softplus_beta"],
        ).to(device)
        self.guidance = ClassifierGuidance(
            self.classifier,
            marginal_temperature=flags["margin_temperature_discount"],
            classifier_scale=flags["classifier_scale"],
            gamma_factor=flags["gamma_factor"],
        )
        self.network = torch.compile(self.model, dynamic=False) if args.compile else self.model

    def halve(self):
        self.model.convert_to_fp16()
        if self.device.type != "cpu":
            self.classifier.half()

    def gflop(self, batch_size):
        x, t, y = self._inputs(batch_size)
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            self.model(x, t, y)
        return counter.get_total_flops() / 1e9

    def time(self, batch_size, repeats):
        """Return the median seconds of the whole step, of the network, of guidance and of the rest, the noise
        among it.
        """
        x, t, y = self._inputs(batch_size)
        draw = SampleNoise(0, range(batch_size))
        rows = []
        for _ in range(repeats + 1):
            whole, network, guidance = (Stopwatch(self.device) for _ in range(3))
            model, rule = network.wrap(self.network), guidance.wrap(self.guidance)

            def step(model=model, rule=rule):
                self.diffusion.p_sample(model, x, t, model_kwargs={"y": y}, guidance=rule, noise=draw(x))

            whole.wrap(step)()
            rest = whole.seconds - network.seconds - guidance.seconds
            rows.append((whole.seconds, network.seconds, guidance.seconds, rest))
        return tuple(statistics.median(column) for column in zip(*rows[1:], strict=True))

    def _inputs(self, batch_size):
        x = torch.randn(batch_size, 3, self.size, self.size, device=self.device)
        t = torch.full((batch_size,), self.diffusion.num_timesteps // 2, device=self.device)
        return x, t, torch.zeros(batch_size, dtype=torch.int64, device=self.device)


def report_cpu(step, repeats):
    single = step.time(1, repeats)
    memory = machine.peak_memory() / 1e9
    plain = plain_convolution_rate(BATCH, repeats)
    full = step.time(BATCH, repeats)
    step.halve()
    half = step.time(BATCH, repeats)
    rate = BATCH * step.gflop(1) / full[1]
    print(f"float32 step, batch 1:  {parts(*single)}; peak resident memory of the process {memory:.2f} GB")
    print(f"float32 step, batch {BATCH}:  {parts(*full)}")
    print(f"bfloat16 step, batch {BATCH}: {parts(*half)}")
    print(
        f"network, float32: {rate:.0f} GFLOP/s, {rate / plain:.0%} of a plain 3x3 convolution's {plain:.0f} GFLOP/s"
    )
    print(f"bfloat16 makes the guided step {full[0] / half[0]:.2f} times as fast")
    print(f"guidance takes {full[2] / full[0]:.1%} of the float32 step")


def report_cuda(step, batch_sizes, repeats):
    step.halve()
    for batch_size in batch_sizes:
        torch.cuda.reset_peak_memory_stats()
        times = step.time(batch_size, repeats)
        memory = torch.cuda.max_memory_allocated() / 2**30
        rate = batch_size / times[0] / step.diffusion.num_timesteps
        print(
            f"float16 step, batch {batch_size}: {parts(*times)}; {rate:.2f} images/s; peak memory {memory:.2f} GiB"
        )


def plain_convolution_rate(batch_size, repeats, channels=256, size=128):
    """GFLOP/s of a 3x3 convolution on channels-last float32 images: about the best that the network's kernels
    could do.
    """
    convolution = torch.nn.Conv2d(channels, channels, 3, padding=1).to(memory_format=torch.channels_last)
    x = torch.randn(batch_size, channels, size, size).to(memory_format=torch.channels_last)
    times = []
    with torch.no_grad():
        for _ in range(10 * repeats):
            start = time.perf_counter()
            convolution(x)
            times.append(time.perf_counter() - start)
    return batch_size * 2 * 9 * channels**2 * size**2 / statistics.median(times) / 1e9


def parts(whole, network, guidance, rest):
    return f"{whole:.3f} s (network {network:.3f}, guidance {guidance:.3f}, rest {rest:.3f})"


if __name__ == "__main__":
    run_main(main)
