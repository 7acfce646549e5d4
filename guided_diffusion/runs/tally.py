"""What a run took, and what guidance did in it: how many images the networks saw, how long guidance took, how
often it was dropped, and, on request, its figures step by step.
"""

import math
from collections import Counter

import torch
from torch import nn

from guided_diffusion.guidance import Guidance, Observation, wrapper
from guided_diffusion.guidance.step import name_of
from guided_diffusion.runs.stopwatch import Stopwatch

NETWORK, CLASSIFIER = "network_evaluations", "classifier_passes"  # of images, in the record of a run


class Tally:
    """Keeps count over the batches of a run. Hand `observe` to the guidance, and sample with the rule
    that `timed` returns.

    log_guidance: keep the figures of every step too. skipped: how often an image's guidance was dropped, in
    all batches. guided: whether guidance was observed in the batch that is being drawn.
    """

    def __init__(self, device: torch.device, log_guidance: bool = False):
        self.stopwatch, self.skipped, self.guided = Stopwatch(device), 0, False
        self._log_guidance = log_guidance
        self._new_skipped = torch.zeros((), dtype=torch.int64, device=device)
        self._lines: list[dict] = []
        self._seconds_before = 0.0
        self._seen: Counter[str] = Counter()

    def count(self, what: str, network: nn.Module) -> None:
        """Count the images that a network is shown, from now on; `what` names them in the record."""
        self._seen[what] += 0
        network.register_forward_pre_hook(lambda _, args: self._seen.update({what: len(args[0])}))

    def seen(self, what: str) -> int:
        """How many images there were in the batch that is being drawn, by the name that `count` has."""
        return self._seen[what]

    def observe(self, seen: Observation) -> None:
        """Take note of one step. Nothing is fetched from the accelerator before the batch is over."""
        self.guided = True
        self._new_skipped = self._new_skipped + seen.skipped.sum()
        if self._log_guidance:
            self._lines.append({"step": seen.index, "sigma": seen.sigma, **_figures(seen)})

    def timed(self, guidance: Guidance) -> Guidance:
        """The same rule, its seconds added up."""
        rule = wrapper(self.stopwatch.wrap)(guidance)
        rule.__name__ = name_of(guidance)
        return rule

    def take_batch(self) -> tuple[dict[str, float], list[dict]]:
        """What there is to record of the batch that was just drawn: numbers to be added up, and one line per
        call of the guidance.
        """
        skipped, seconds = int(self._new_skipped), self.stopwatch.seconds
        stats = {"guidance_seconds": seconds - self._seconds_before, "skipped_guidance": skipped}
        stats |= self._seen
        lines = [{key: _plain(value) for key, value in line.items()} for line in self._lines]
        self.skipped += skipped
        self._new_skipped, self._seconds_before = torch.zeros_like(self._new_skipped), seconds
        self._lines, self.guided = [], False
        self._seen = Counter(dict.fromkeys(self._seen, 0))
        return stats, lines


def _figures(seen):
    """Means over the images that were not skipped; a pixel value is clipped where it is at the end of [-1, 1]
    or beyond.
    """
    confidence = seen.logits.float().softmax(dim=1).gather(1, seen.y[:, None])[:, 0]
    norm = seen.gradient.float().flatten(1).norm(dim=1)
    clipped = (seen.x.abs() >= 1).float().flatten(1).mean(dim=1)
    figures = {"gradient_norm": norm, "confidence": confidence, "clipped": clipped}
    means = {name: torch.where(seen.skipped, torch.nan, values).nanmean() for name, values in figures.items()}
    return {**means, "non_finite": seen.skipped.sum()}


def _plain(value):
    """A number for JSON, which has none that is not finite."""
    value = value.item() if isinstance(value, torch.Tensor) else value
    return None if isinstance(value, float) and not math.isfinite(value) else value
