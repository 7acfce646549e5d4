"""What every training script sets up: processes, device, data, optimizer, compilation, folder."""

import platform
import shlex
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from guided_diffusion import dist_util, logger
from guided_diffusion.files.atomic import write_json
from guided_diffusion.files.figures import has_matplotlib
from guided_diffusion.files.labelled import LabelledImages, read_labelled
from guided_diffusion.runs.launchers import find_place
from guided_diffusion.runs.lock import locked
from guided_diffusion.training.checkpoints import Checkpoints, step_of
from guided_diffusion.training.data import EpochBatches
from guided_diffusion.training.loop import Loop, Precision
from guided_diffusion.training.randomness import StepGenerator
from guided_diffusion.training.resume import FILE, describe_data, read_record, require_same
from guided_diffusion.training.run import Intervals, Run, Schedule

SHARE_OF_MEMORY = 0.25  # of what an accelerator has free, that the images may take


class Session:
    """One training's surroundings. `config` is one of flags/training.py's. As a context it keeps the folder
    to this training.

    device; folder; precision; processes and rank; part: this process's images of a whole batch; generator:
    of the random numbers of a step; classes: the names of the data's classes, where they have some. Raises
    ValueError for flags that cannot be met here, and for a folder that another run writes into.
    """

    def __init__(self, config: Any):
        self.config, self.folder = config, config.folder
        if find_place().size > 1:
            dist_util.setup_dist()
        self.processes = dist.get_world_size() if dist.is_initialized() else 1
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        self.device = dist_util.choose_device(config.device)
        if config.max_seconds and self.processes > 1:
            raise ValueError(
                "--max_seconds with several processes, whose clocks differ: give the number of steps"
            )
        # The shapes of a training stay as they are: cuDNN tries its algorithms once.
        torch.backends.cudnn.benchmark = self.device.type == "cuda"
        self.precision = Precision(config.dtype_on(self.device), config.fp16_scale_growth)
        self.microbatch = max(config.microbatch, 0)
        self.whole_batch = config.batch_size * self.processes
        self.part = slice(self.rank * config.batch_size, (self.rank + 1) * config.batch_size)
        self.generator = StepGenerator(config.seed, self.device, self.rank)
        self.classes: Sequence[str] = ()
        self._data, self._begun_from = "", ""
        self._exit = ExitStack()

    def __enter__(self) -> "Session":
        if self.rank == 0:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._exit.enter_context(locked(self.folder))
            logger.configure(self.folder)
        for flag in self.config.without_effect():
            self.say(f"note: --{flag} has no effect here")
        return self

    def __exit__(self, *error: object) -> None:
        self._exit.close()

    def say(self, text: str) -> None:
        """A line of the first process."""
        if self.rank == 0:
            logger.log(text)

    def batches(self, labelled: bool) -> EpochBatches:
        """The images of --data_dir, in memory: the device's where they take a small part of it. Labels are
        zeros where none are wanted.
        """
        found = read_labelled(self.config.data_dir, self.config.image_size)
        images, labels = self.placed(found, labelled, self.config.data_dir)
        self.classes, self._data = found.classes, describe_data(images, labels)
        mib = images.numel() / 2**20
        self.say(f"{self.config.data_dir}: {len(images)} images, {mib:.0f} MiB on {images.device}")
        return EpochBatches(images, labels, self.whole_batch, self.config.seed)

    def placed(self, found: LabelledImages, labelled: bool, source: str) -> tuple[Tensor, Tensor]:
        """The images and labels as tensors, where they are to stay."""
        images = torch.from_numpy(found.images)
        labels = torch.zeros(len(images), dtype=torch.int64)
        if labelled:
            otherwise = ", or train without --class_cond" if hasattr(self.config, "class_cond") else ""
            labels = torch.from_numpy(found.require_labels(source, self.config.num_classes, otherwise))
        if self.device.type == "cuda" and images.numel() < SHARE_OF_MEMORY * torch.cuda.mem_get_info()[0]:
            images, labels = images.to(self.device), labels.to(self.device)
        return images, labels

    def compiled(self, network: nn.Module) -> Any:
        """The network as it trains: compiled, if --compile asks for it."""
        if not self.config.compile:
            return network
        return torch.compile(network, dynamic=False)

    def optimizer(self, network: nn.Module, kind: str = "adamw") -> torch.optim.Optimizer:
        """AdamW, or SGD with Nesterov's momentum, of the network's parameters."""
        fused = True if self.device.type == "cuda" else None  # None: what torch thinks best
        common = {"lr": self.config.lr, "weight_decay": self.config.weight_decay, "fused": fused}
        if kind == "sgd":
            return torch.optim.SGD(network.parameters(), momentum=0.9, nesterov=True, **common)
        return torch.optim.AdamW(network.parameters(), **common)

    def run(
        self, loop: Loop, batch_of: Callable[[int], tuple[Tensor, ...]], schedule: Schedule, **more: Any
    ) -> Run:
        """The run of a loop with the flags' intervals, in the folder."""
        parameters = sum(p.numel() for p in loop.parameters)
        self.say(f"{type(loop.model).__name__}: {parameters / 1e6:.2f} M parameters; {self.describe()}")
        intervals = Intervals(self.config.log_interval, self.config.save_interval)
        checkpoints = Checkpoints(self.folder, self.config.keep)
        run = Run(loop, batch_of, schedule, intervals, checkpoints, batch_size=self.whole_batch, **more)
        run.on_save.append(partial(self._record, run))
        if has_matplotlib():
            run.on_save.append(lambda step: run.record.draw(self.folder / "loss.png"))
        else:
            self.say("note: no loss.png, as matplotlib is not installed")
        return run

    def begin(self, run: Run) -> None:
        """Let the run begin at the latest checkpoint in its folder, if there is one, else at
        --resume_checkpoint.

        Raises ValueError where the folder holds a training with other flags or data, and where it has later
        checkpoints than the flag names and did not begin there.
        """
        path, steps = self.config.resume_checkpoint, run.checkpoints.steps()
        record = read_record(self.folder) if steps else {}
        require_same(self.folder, record, self.config, self._data, self.processes)
        begun_from = record.get("begun_from", "")
        if path and _same_file(path, begun_from):  # the same command again
            path = ""
        if path and steps and steps[-1] > step_of(path):
            raise ValueError(
                f"--resume_checkpoint {path} is followed by the checkpoint of step {steps[-1]} in "
                f"{self.folder}: choose another --out, or leave the flag out to go on from step {steps[-1]}"
            )
        self._begun_from = str(Path(path).resolve()) if path else begun_from
        run.begin(path or run.checkpoints.latest())
        if self.rank == 0:
            self._record(run, run.loop.step)

    def describe(self) -> str:
        """The device, the number of processes and what the network computes in."""
        name = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else platform.machine()
        return f"{name}, {self.processes} process(es), {str(self.precision.dtype).removeprefix('torch.')}"

    def _record(self, run, step):
        """training.json: the command, where it runs, how far it is and how long that took."""
        about = {"command": shlex.join(sys.argv), "device": self.describe(), "torch": torch.__version__}
        about |= {"processes": self.processes, "data": self._data, "begun_from": self._begun_from}
        about |= {"step": step, "seconds": round(run.seconds, 1), "flags": self.config.record()}
        write_json(self.folder / FILE, about)


def _same_file(path, other):
    return bool(other) and Path(path).resolve() == Path(other).resolve()
