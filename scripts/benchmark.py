"""Measure the guided step of a preset: network, guidance and the rest, and the memory that they need.

    python scripts/benchmark.py --preset imagenet128-resnet101

Weights are random where the preset's files are absent: the time of a step does not depend on them. On a CPU
the network's rate is set against that of one plain convolution, and bfloat16 against float32, all in one run.
On CUDA it reports images per second over batch sizes, or with --variants ways to
compute the step (benchmark_cuda.py). Run it with nothing else on the machine; the lines it
prints are meant for docs/benchmarks.md.
For a preset of DiT it is benchmark_dit.py, by parts and decoders. --evaluation and --engine measure what
benchmark_evaluation.py and benchmark_engine.py do.
"""

import statistics
import time
from dataclasses import dataclass, replace
from pathlib import Path

import _beside  # noqa: F401
import benchmark_cuda
import benchmark_dit
import benchmark_engine
import benchmark_evaluation
import torch
from torch.utils.flop_counter import FlopCounterMode

import classifiers
from guided_diffusion import dist_util
from guided_diffusion.files.checkpoints import load_state_dict
from guided_diffusion.files.state_dicts import load_into
from guided_diffusion.flags.adm import ADMFlags
from guided_diffusion.flags.fields import Flags, Need, at_least, configure, flag, parse
from guided_diffusion.flags.parser import parse_numbers, run_main
from guided_diffusion.flags.presets import DIT_PRESETS, PRESETS
from guided_diffusion.guidance import GuidanceStep
from guided_diffusion.layers import memory_format
from guided_diffusion.runs import adm, machine
from guided_diffusion.runs.noise import SampleNoise
from guided_diffusion.runs.stopwatch import Stopwatch
from guided_diffusion.script_util import create_from_flags

# Flags that ask the classifier less often. Of the preset's 250 steps, the interval is some three in five.
EVERY_STEP = "at every step"
CHEAPER = {
    EVERY_STEP: {},
    "--guidance_every 4": {"guidance_every": 4},
    "--guidance_interval 0,5": {"guidance_interval": "0,5"},
    "both": {"guidance_every": 4, "guidance_interval": "0,5"},
}
BATCH = 4  # of the CPU figures; memory is measured at batch 1
ON_CUDA = Need(
    lambda config: config.place.type == "cuda", lambda config: "on the CPU, and is for CUDA: drop it"
)


@dataclass(frozen=True, kw_only=True)
class BenchmarkFlags(Flags):
    """The measurement."""

    preset: str = flag("imagenet128-resnet101", "a preset with an off-the-shelf classifier")
    device: str = flag("", "cpu or cuda; by default CUDA where there is one")
    repeats: int = flag(
        5, "timed steps per figure, after one that is not; the median counts", check=at_least(1)
    )
    batch_sizes: str = flag("1,8,16,32,64", "on CUDA", needs=ON_CUDA)
    variants: bool = flag(
        False, "on CUDA: ways to compute the step, as published, as it runs and compiled", needs=ON_CUDA
    )
    reuse_activations: bool = flag(True, "in-place work in the network where no graph is recorded")
    evaluation: bool = flag(False, "measure scripts/evaluate.py's work instead, on the CPU")
    engine: bool = flag(False, "measure what a run needs around its steps instead, on the CPU")

    @property
    def place(self) -> torch.device:
        """The device that is measured."""
        return dist_util.choose_device(self.device)

    def check(self) -> None:
        super().check()
        if self.preset in DIT_PRESETS:
            if not DIT_PRESETS[self.preset].get("classifier_type"):
                raise ValueError(f"preset {self.preset} has no classifier; choose imagenet256-dit-resnet101")
            if unused := sorted(self.given & {"batch_sizes", "variants", "reuse_activations"}):
                raise ValueError(f"--{unused[0]} is for networks that are not DiT: drop it")
        others = sorted(self.given - {"evaluation", "engine"})
        if (self.evaluation or self.engine) and (others or (self.evaluation and self.engine)):
            raise ValueError(
                f"--{(others or ['engine'])[0]} does not go with --evaluation or --engine: drop it"
            )


def main():
    config = parse(BenchmarkFlags, __doc__, {name: {} for name in (*PRESETS, *DIT_PRESETS)})
    if config.evaluation or config.engine:
        return (benchmark_evaluation if config.evaluation else benchmark_engine).measure()
    device = config.place
    print(f"machine: {machine.describe(device)}")
    if config.preset in DIT_PRESETS:
        return benchmark_dit.measure(config.preset, config.repeats, str(device))
    step = GuidedStep(config, device)
    print(
        f"preset {config.preset}: {step.weights} weights, {step.gflop(1):.1f} GFLOP per image "
        "and forward pass of the network"
    )
    if device.type == "cpu":
        dist_util.keep_freed_memory()
        report_cpu(step, config.repeats)
    else:
        report = benchmark_cuda.compare if config.variants else benchmark_cuda.report
        report(step, parse_numbers(config.batch_sizes, "--batch_sizes"), config.repeats)


class GuidedStep:
    """One ancestral step of a preset with guidance, and how long its parts took; float32 until `halve` is
    called.
    """

    def __init__(self, benchmark, device):
        preset = PRESETS[benchmark.preset]
        self.weights = "trained" if Path(preset["model_path"]).is_file() else "random"
        given = {"preset": benchmark.preset}
        if self.weights == "random":
            given["classifier_path"] = "random"
        config = configure(ADMFlags, PRESETS, given)
        if not config.guided_off_the_shelf:
            raise ValueError(
                f"preset {benchmark.preset} has no off-the-shelf classifier; "
                "choose one that has, such as imagenet128-resnet101"
            )
        config = replace(config, use_fp16=False, classifier_use_fp16=False)
        self.device, self.size = device, config.image_size
        with torch.device("meta" if self.weights == "trained" else "cpu"):
            self.model, self.diffusion = create_from_flags(config.record())
        if self.weights == "trained":
            load_into(self.model, load_state_dict(config.model_path), config.model_path)
        self.model.to(device, memory_format=memory_format(device)).eval()
        self.model.reuse_activations(benchmark.reuse_activations)
        self.classifier = adm.load_guide(config, classifiers, device)
        if self.weights == "random":
            benchmark_cuda.settled(self.classifier, self.size)
        self.guided = {
            text: replace(config, **flags).build_guidance(self.classifier, None)
            for text, flags in CHEAPER.items()
        }
        self.network = self.model

    def halve(self):
        self.model.convert_to_fp16()
        if self.device.type != "cpu":
            self.classifier.half()

    def gflop(self, batch_size):
        x, t, y = self._inputs(batch_size)
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            self.model(x, t, y)
        return counter.get_total_flops() / 1e9

    def one(self, batch_size, draw, *, network=None, guidance=None):
        """A function that takes a guided step with the noise draw(x), by default as the flags say."""
        x, t, y = self._inputs(batch_size)
        network, guidance = network or self.network, guidance or self.guided[EVERY_STEP]

        def step():
            self.diffusion.p_sample(network, x, t, model_kwargs={"y": y}, guidance=guidance, noise=draw(x))

        return step

    def time(self, batch_size, repeats):
        """Return the median seconds of the whole step, of the network, of guidance and of the rest, the noise
        among it.
        """
        draw, rows = SampleNoise(0, range(batch_size)), []
        for _ in range(repeats + 1):
            whole, network, guidance = (Stopwatch(self.device) for _ in range(3))
            model, rule = network.wrap(self.network), guidance.wrap(self.guided[EVERY_STEP])

            whole.wrap(self.one(batch_size, draw, network=model, guidance=rule))()
            rest = whole.seconds - network.seconds - guidance.seconds
            rows.append((whole.seconds, network.seconds, guidance.seconds, rest))
        return tuple(statistics.median(column) for column in zip(*rows[1:], strict=True))

    def time_guidance(self, batch_size, steps=20):
        """Return, by the texts of CHEAPER, the seconds that guidance takes per step, over a run of so many
        steps at evenly spaced timesteps.
        """
        x, _, y = self._inputs(batch_size)
        seconds = {}
        for text, guidance in self.guided.items():
            clock, memory = Stopwatch(self.device), {}
            timed = clock.wrap(guidance)
            for index in range(steps - 1, -1, -1):
                sigma = self.diffusion.sigma(index * self.diffusion.num_timesteps // steps)
                timed(x, y, GuidanceStep.counting_down(index, steps, 1.0, 1.0, sigma, memory=memory))
            seconds[text] = clock.seconds / steps
        return seconds

    def _inputs(self, batch_size):
        x = torch.randn(batch_size, 3, self.size, self.size, device=self.device)
        t = torch.full((batch_size,), self.diffusion.num_timesteps // 2, device=self.device)
        return x, t, torch.zeros(batch_size, dtype=torch.int64, device=self.device)


def report_cpu(step, repeats):
    single = step.time(1, repeats)
    memory = machine.peak_memory() / 1e9
    plain = plain_convolution_rate(BATCH, repeats)
    full = step.time(BATCH, repeats)
    guidance = step.time_guidance(BATCH)
    step.halve()
    half = step.time(BATCH, repeats)
    rate = BATCH * step.gflop(1) / full[1]
    print(f"float32 step, batch 1:  {parts(*single)}; peak resident memory of the process {memory:.2f} GB")
    print(f"float32 step, batch {BATCH}:  {parts(*full)}")
    print(f"bfloat16 step, batch {BATCH}: {parts(*half)}")
    print(
        f"network, float32: {rate:.0f} GFLOP/s, {rate / plain:.0%} of a plain 3x3 convolution's "
        f"{plain:.0f} GFLOP/s"
    )
    print(f"bfloat16 makes the guided step {full[0] / half[0]:.2f} times as fast")
    print(f"guidance takes {full[2] / full[0]:.1%} of the float32 step")
    unguided = full[0] - full[2]
    added = ", ".join(f"{text} {seconds / unguided:.2%}" for text, seconds in guidance.items())
    print(f"guidance adds to an unguided float32 step, on average over a run: {added}")


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
