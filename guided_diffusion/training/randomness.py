"""Random numbers as a function of the seed and the step, so that a resumed training draws what an undisturbed
one does, and the processes of one training draw for the whole batch what a single one would.
"""

import numpy as np
import torch

STREAMS = ("epoch", "step", "network")


def seed_of(seed: int, index: int, *, stream: str, rank: int = 0) -> int:
    """The seed, in [0, 2^63), of a generator: of what (`STREAMS`), which step or epoch, in which process."""
    words = np.random.SeedSequence((seed, STREAMS.index(stream), index, rank)).generate_state(1, np.uint64)
    return int(words[0] >> np.uint64(1))


class StepGenerator:
    """torch's generator of a device, set anew at each step: for what is drawn for the whole batch."""

    def __init__(self, seed: int, device: torch.device, rank: int = 0):
        self.seed, self.rank = seed, rank
        self.generator = torch.Generator(device)

    def at(self, step: int) -> torch.Generator:
        """The generator at the beginning of this step. torch's global ones, which dropout draws from, are set
        as well, differently in every process.
        """
        torch.manual_seed(seed_of(self.seed, step, stream="network", rank=self.rank))
        return self.generator.manual_seed(seed_of(self.seed, step, stream="step"))
