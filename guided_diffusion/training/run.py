"""One training from its beginning or its last checkpoint to its end."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from guided_diffusion import logger
from guided_diffusion.files.nonfinite import NonFiniteError
from guided_diffusion.training.checkpoints import Checkpoints, load_checkpoint, step_of
from guided_diffusion.training.ema import Average
from guided_diffusion.training.loop import Loop, add_figures
from guided_diffusion.training.record import Pace, Record, duration, means_of
from guided_diffusion.training.resume import load_optimizer


@dataclass(frozen=True)
class Schedule:
    """The rate at a step, and where training ends.

    steps: their number, 0 for no end. seconds: how long, in all attempts together, 0 for no limit. The rate
    rises to `rate` over `warmup` steps; with `anneal` it falls in a line to 0 at the end, whichever of the
    two comes first.
    """

    rate: float
    steps: int = 0
    seconds: float = 0.0
    warmup: int = 0
    anneal: bool = True

    def share(self, step: int, seconds: float) -> float:
        """How much of the training is over, from 0 to 1."""
        by_step = step / self.steps if self.steps else 0.0
        by_time = seconds / self.seconds if self.seconds else 0.0
        return min(max(by_step, by_time), 1.0)

    def rate_at(self, step: int, seconds: float) -> float:
        """The rate of the step that follows `step` others."""
        rise = min((step + 1) / (self.warmup + 1), 1.0)
        return self.rate * rise * (1 - self.share(step, seconds) if self.anneal else 1.0)


@dataclass(frozen=True)
class Intervals:
    """Steps between two rows of the log, and between two checkpoints."""

    log: int
    save: int


class Run:
    """A loop with its batches, its record and its checkpoints; `run` takes it to its end.

    batch_of: step -> this process's part of the batch. averages: rate, as it was written, -> average, those
    of the loop. on_save: called with the step after each checkpoint, and `every`: (interval, call), after so
    many steps, both in the first process. learner: what else learns, and has state_dict and load_state_dict.
    batch_size: of all processes together.
    """

    def __init__(
        self,
        loop: Loop,
        batch_of: Callable[[int], tuple[Tensor, ...]],
        schedule: Schedule,
        intervals: Intervals,
        checkpoints: Checkpoints,
        *,
        averages: Mapping[str, Average],
        batch_size: int,
        learner: Any = None,
    ):
        self.loop, self.batch_of, self.schedule, self.intervals = loop, batch_of, schedule, intervals
        self.checkpoints, self.averages, self.batch_size = checkpoints, averages, batch_size
        self.learner = learner
        self.record = Record(checkpoints.folder / "progress.csv")
        self.on_save: list[Callable[[int], None]] = []
        self.every: list[tuple[int, Callable[[int], None]]] = []
        self.is_first = not dist.is_initialized() or dist.get_rank() == 0
        self._totals: dict[str, Tensor] = {}
        self._seconds_before, self._start = 0.0, time.monotonic()

    # From its beginning, or from a checkpoint

    def begin(self, path: str | Path | None) -> None:
        """Begin where this model file ends, or at step 0."""
        if path:
            networks = {rate: average.module for rate, average in self.averages.items()}
            rest = load_checkpoint(path, self.loop.model, networks)
            self.loop.step = step_of(path)
            self._take(rest if isinstance(rest, Mapping) else {}, path)
            self._say(f"resumed from {path}, {self.loop.step} steps")
        if self.is_first:
            self.checkpoints.remove_unfinished()
            self.record.resume_at(self.loop.step)

    def _take(self, rest, path):
        """What is missing starts anew; guided-diffusion's file is the optimizer's state alone."""
        if not load_optimizer(self.loop.optimizer, rest.get("optimizer", rest)):
            self._say(f"{path} has no fitting optimizer's state beside it: the optimizer starts anew")
        if rest.get("scaler") and self.loop.scaler.is_enabled():
            self.loop.scaler.load_state_dict(rest["scaler"])
        if rest.get("learner") and self.learner is not None:
            self.learner.load_state_dict(rest["learner"])
        if self.is_first:  # the sums of all processes: they must count once
            totals = rest.get("totals", {})
            self._totals = {name: pair.to(self.loop.device) for name, pair in totals.items()}
        self._seconds_before = rest.get("seconds", 0.0)

    # To its end

    @property
    def seconds(self) -> float:
        """How long training took, the attempts before a resume included."""
        return self._seconds_before + time.monotonic() - self._start

    def run(self) -> None:
        """Train until the schedule ends. Raises FloatingPointError for a loss or a gradient that is not
        finite; the last checkpoint is from before.
        """
        self._start = time.monotonic()
        if self.loop.step:
            self._call_saved(self.loop.step)  # which a killed process may not have reached
        self.loop.model.train()
        pace = Pace(self.loop.step)
        done = self.schedule.share(self.loop.step, self.seconds) >= 1
        while not done:
            step = self.loop.step
            rate = self.schedule.rate_at(step, self.seconds)
            for group in self.loop.optimizer.param_groups:
                group["lr"] = rate
            add_figures(self._totals, self.loop.advance(self.batch_of(step)))
            step = self.loop.step
            done = self.schedule.share(step, self.seconds) >= 1
            if step % self.intervals.log == 0 or done:
                self._look(step, rate, pace)
            if self.is_first:
                self._call_due(step)
            if step % self.intervals.save == 0 or done:
                self._save(step)
                pace = Pace(step)  # the time of checkpoints and pictures is not that of steps
        if self.loop.processes > 1:
            dist.barrier()  # nobody leaves while the first process still writes

    def _look(self, step, rate, pace):
        """A row of progress.csv, and a line."""
        self._require_finite()
        means = means_of(self._reduced())
        self._totals = {}
        if not self.is_first:
            return
        self.record.add({"step": step, "samples": step * self.batch_size, "lr": rate, **means})
        speed = pace.since_last(step)
        self._say(f"step {step}{self._of_all(step, speed)}: {_line(means)}; {speed:.3g} steps/s")

    def _of_all(self, step, speed):
        share = self.schedule.share(step, self.seconds)
        if not share:
            return ""
        by_steps = (self.schedule.steps - step) / speed if self.schedule.steps else float("inf")
        by_time = self.schedule.seconds - self.seconds if self.schedule.seconds else float("inf")
        return f" ({share:.0%}, {duration(max(min(by_steps, by_time), 0))} left)"

    def _save(self, step):
        self._require_finite()
        totals = self._reduced()
        if not self.is_first:
            return
        rest = {
            "optimizer": self.loop.optimizer.state_dict(),
            "scaler": self.loop.scaler.state_dict(),
            "learner": self.learner.state_dict() if self.learner is not None else {},
            "totals": totals,
            "seconds": self.seconds,
        }
        networks = {rate: average.module for rate, average in self.averages.items()}
        self.checkpoints.save(step, self.loop.model, networks, rest)
        self._call_saved(step)

    def _call_saved(self, step):
        for call in self.on_save if self.is_first else ():
            call(step)

    def _call_due(self, step):
        for interval, call in self.every:
            if step % interval == 0:
                call(step)

    def _require_finite(self):
        try:
            self.loop.require_finite()
        except NonFiniteError as error:
            steps = self.checkpoints.steps()
            kept = f"the checkpoint of step {steps[-1]} is good" if steps else "there is no checkpoint yet"
            raise FloatingPointError(f"{error}; {kept}: resume there with a lower --lr") from error

    def _reduced(self):
        """The sums of all processes."""
        totals = {name: pair.clone() for name, pair in self._totals.items()}
        if self.loop.processes > 1 and totals:
            names = sorted(totals)
            table = torch.stack([totals[name] for name in names])
            dist.all_reduce(table)
            totals = dict(zip(names, table, strict=True))
        return totals

    def _say(self, text):
        if self.is_first:
            logger.log(text)


def _line(means):
    """The losses, then their quarters, in few digits."""
    quarters = [f"{means[name]:.4f}" for name in sorted(means) if name.startswith("loss_q")]
    others = {name: value for name, value in means.items() if not name.startswith(("loss_q", "grad"))}
    text = ", ".join(f"{name} {value:.4f}" for name, value in others.items())
    return f"{text} (by quarter {' '.join(quarters)})" if quarters else text
