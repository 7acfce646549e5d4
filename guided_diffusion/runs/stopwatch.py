"""Seconds spent inside a function, with the accelerator's queue emptied before each reading."""

import time
from collections.abc import Callable

import torch


class Stopwatch:
    """Adds up `seconds` over all calls of the functions that it wrapped."""

    def __init__(self, device: torch.device):
        self.device, self.seconds = device, 0.0

    def wrap(self, function: Callable) -> Callable:
        """The same function, timed."""

        def timed(*args, **kwargs):
            start = self._now()
            result = function(*args, **kwargs)
            self.seconds += self._now() - start
            return result

        return timed

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()
