"""What scripts/reproduce.py will take, before anything is drawn: files and where they are, the room on the
disk, the hours. It is no script of its own.

The hours come from one evaluation of each network with weights of zero, which take as long as the trained
ones; so they are known before the files are.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import _beside  # noqa: F401
import torch
from problems import Problem
from sweep_cells import Cell, flags_of

import classifiers
from evaluation.networks import feature_network
from guided_diffusion.dist_util import choose_device
from guided_diffusion.files.console import print_result
from guided_diffusion.files.pretrained import existing_file, find_pretrained
from guided_diffusion.flags.adm import ADMFlags
from guided_diffusion.flags.fields import configure, defaults_of
from guided_diffusion.flags.networks import NoisyClassifierFlags, UNetFlags
from guided_diffusion.layers import memory_format
from guided_diffusion.preconditioning import load_edm_network
from guided_diffusion.respace import space_timesteps
from guided_diffusion.runs import edm, machine
from guided_diffusion.runs.discrete import load_off_the_shelf
from guided_diffusion.runs.store import required_bytes
from guided_diffusion.runs.systems import system_of
from guided_diffusion.runs.tally import Tally
from guided_diffusion.script_util import create_classifier, create_from_flags

TRIAL_PIXELS = 128**2  # of a trial on a CPU, which gains nothing by more


def dry_run(problem: Problem, cells: Sequence[Cell], seeds: int, args: Any) -> None:
    """Print what is needed. Raises ValueError where files are missing, after everything is printed."""
    configs = [configure((s := system_of(c.preset)).config, s.presets, flags_of(s, c)) for c in cells]
    device = choose_device("")
    missing = 0
    for text, found in files(problem, configs, args):
        missing += not found
        print_result(text)
    distinct = list({drawn_by(config): config for config in configs}.values())
    images = seeds * args.num_samples
    size = image_size(distinct[0])
    needed = len(distinct) * seeds * required_bytes(args.num_samples, args.num_samples, 3 * size**2, False)
    print_result(f"disk: {needed / 1e9:,.1f} GB for {len(distinct)} cells of {images:,} images")
    clock = Clock(device)
    seconds = sum(clock.per_image(config) for config in distinct) * images
    amount = f"{seconds / 3600:,.1f} hours" if seconds >= 3600 else f"{seconds / 60:.1f} minutes"
    print_result(f"time: some {amount} of one process like this ({machine.describe(device)}), to sample")
    if missing:
        raise ValueError(f"{missing} file{'s are' if missing > 1 else ' is'} missing: see above")


def drawn_by(config: Any) -> str:
    """What decides about the images, as text."""
    flags = {key: str(value) for key, value in config.record().items() if key not in config.not_compared()}
    return str(sorted(flags.items()))


def files(problem: Problem, configs: Sequence[Any], args: Any) -> list[tuple[str, bool]]:
    """(line, whether it is there) of each file that the cells, the judge and the metrics read."""
    wanted: list[Callable[[], Path | None]] = []
    for config in configs:
        system = system_of(config.preset)
        wanted += system.make_job(config, classifiers).files.values()
    judge = None if args.judge else problem.judge_weights
    wanted += classifiers.classifier_files(args.judge or problem.judge, judge).values()
    wanted += [partial(feature_file, problem.network), partial(reference_file, problem, problem.network)]
    second = [partial(feature_file, problem.second), partial(reference_file, problem, problem.second)]
    of_second = [
        (f"{line} (of the second network, optional)", True) for line, _ in filter(None, map(told, second))
    ]
    return list(dict.fromkeys([*filter(None, map(told, wanted)), *of_second]))


def told(find: Callable[[], Path | None]) -> tuple[str, bool] | None:
    """The line of a file; None where there is none to read."""
    try:
        path = find()
    except (FileNotFoundError, ValueError) as error:
        return f"missing: {' '.join(str(error).split())}", False
    return (f"found: {path}, {path.stat().st_size:,} bytes", True) if path else None


def feature_file(network: str) -> None:
    """Raises FileNotFoundError that says which weights of a feature network to put where."""
    feature_network(network)


def reference_file(problem: Problem, network: str) -> Path:
    """Its reference. Raises FileNotFoundError that says how to get it."""
    path = problem.reference_for(network)
    return find_pretrained(path.name) if path.name == problem.images else existing_file(path)


# Hours


@dataclass
class Clock:
    """Seconds for each image of one evaluation of a network, and of one gradient of a classifier; each is
    timed once.
    """

    device: torch.device
    known: dict[tuple, float] = field(default_factory=dict)

    def per_image(self, config: Any) -> float:
        """Of sampling."""
        steps = number_of_steps(config)
        evaluations = 2 * steps - 1 if config.sampler in ("edm", "heun") else steps
        evaluations *= 2 if config.mixes else 1  # of a smaller second network that is too much
        seconds = evaluations * self._once(network_key(config), evaluation, config)
        if key := guide_key(config):
            seconds += steps * self._once(key, gradient, config)
        return seconds

    def _once(self, key, make, config):
        if key not in self.known:
            most = math.ceil(TRIAL_PIXELS / image_size(config) ** 2)
            n = min(config.batch_size, most) if self.device.type == "cpu" else config.batch_size
            self.known[key] = timed(make(config, self.device, n)) / n
        return self.known[key]


def timed(call: Callable[[], Any]) -> float:
    """Seconds of a call, the second time."""
    seconds = 0.0
    for _ in range(2):
        begun = time.monotonic()
        call()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds = time.monotonic() - begun
    return seconds


def number_of_steps(config: Any) -> int:
    if not isinstance(config, ADMFlags):
        return config.steps
    return len(space_timesteps(config.diffusion_steps, config.timestep_respacing or [config.diffusion_steps]))


def image_size(config: Any) -> int:
    """Of the samples; EDM's networks say it themselves."""
    if isinstance(config, ADMFlags):
        return config.image_size
    return load_edm_network(config.network).img_resolution


def network_key(config: Any) -> tuple:
    """What decides about the time of one evaluation."""
    if not isinstance(config, ADMFlags):
        return "network", config.network, config.use_fp16
    return "network", *(getattr(config, name) for name in defaults_of(UNetFlags))


def guide_key(config: Any) -> tuple | None:
    """What decides about the time of one gradient; None where no classifier guides."""
    if config.classifier_scale == 0 or not (config.guided_off_the_shelf or config.guided_by_noisy_classifier):
        return None
    return "guide", config.classifier_type, config.softplus_beta < math.inf, config.classifier_input


def evaluation(config: Any, device: torch.device, n: int) -> Callable[[], Any]:
    """One evaluation of the network for n images; ADM's has weights of zero."""
    if isinstance(config, ADMFlags):
        net, size = zeros(create_from_flags, config.record(), device), config.image_size
        labels = torch.zeros(n, dtype=torch.long, device=device)
        more = (labels, labels) if config.class_cond else (labels,)
    else:
        net = edm.load_network(config, config.network, device, Tally(device))
        size = net.img_resolution
        more = (1.0, torch.zeros(n, net.label_dim, device=device) if net.label_dim else None)
    if isinstance(config, ADMFlags) and config.use_fp16:
        net.convert_to_fp16()
    x = torch.zeros(n, 3, size, size, device=device)
    return torch.no_grad()(lambda: net(x, *more))


def gradient(config: Any, device: torch.device, n: int) -> Callable[[], Any]:
    """One gradient of the classifier for n images."""
    size = image_size(config)
    if config.guided_off_the_shelf:
        random = replace(config, classifier_path="random", classifier_checkpoint_key="")
        network = load_off_the_shelf(random, classifiers, config.num_classes, size).to(device)
    else:
        flags = {name: getattr(config, name) for name in defaults_of(NoisyClassifierFlags)}
        flags |= {"image_size": size, "classifier_use_fp16": False, "num_classes": config.num_classes}
        noisy = zeros(lambda flags: [create_classifier(**flags)], flags, device)
        network = partial(noisy, timesteps=torch.zeros(n, device=device))
    x = torch.zeros(n, 3, size, size, device=device, requires_grad=True)
    return lambda: torch.autograd.grad(network(x).sum(), x)


def zeros(create: Callable[[Any], Sequence[Any]], flags: Any, device: torch.device) -> Any:
    """The first of what is created, a network, with weights of zero: nothing is drawn or read."""
    with torch.device("meta"):
        net = create(flags)[0]
    net = net.to_empty(device=device).eval().requires_grad_(False)
    for tensor in (*net.parameters(), *net.buffers()):
        tensor.zero_()
    return net.to(memory_format=memory_format(device))
