"""The loop over batches that every sampling script shares: which samples are missing, progress, timing, and what went wrong where."""

import time
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm.auto import tqdm

from guided_diffusion import logger
from guided_diffusion.gaussian_diffusion import NonFiniteOutputError
from guided_diffusion.guidance import NonFiniteGradientError
from guided_diffusion.sample_store import NonFinitePixelsError, SampleStore
from guided_diffusion.stopwatch import Stopwatch


class Tally:
    """What a run keeps count of: the seconds that guidance took, and how often it was dropped for one image at one step."""

    def __init__(self, device: torch.device):
        self.stopwatch, self.skipped = Stopwatch(device), 0


def sample_missing(
    store: SampleStore,
    sample: Callable[[range, Callable[[], None]], tuple[Tensor, Tensor]],
    num_steps: int,
    tally: Tally,
) -> None:
    """Draw this rank's share of the batches that are not in the store yet.

    sample(indices, tick) -> ((n, H, W, 3) uint8 images, (n,) int64 labels); it calls tick() after each of `num_steps` steps.
    Raises FloatingPointError that names step and sample where the network or the guidance is not finite.
    """
    rank = dist.get_rank()
    # One look for all: a shared file system may show each rank something else.
    shared = [store.missing() if rank == 0 else None]
    dist.broadcast_object_list(shared)
    missing: list[range] = shared[0] or []
    if not missing and rank == 0:
        logger.log(f"{store.folder}: complete, nothing to do")
    mine = missing[rank :: dist.get_world_size()]
    with tqdm(total=len(mine) * num_steps, unit="step", disable=not mine or rank != 0) as bar:
        for indices in mine:
            bar.set_description(f"samples {indices.start}-{indices.stop - 1} of {store.num_samples}")
            start, guided_before, skipped_before = time.perf_counter(), tally.stopwatch.seconds, tally.skipped
            images, labels = _named_failure(sample, indices, bar.update)
            stats = {
                "seconds": time.perf_counter() - start,
                "guidance_seconds": tally.stopwatch.seconds - guided_before,
                "skipped_guidance": tally.skipped - skipped_before,
            }
            store.write(indices, images, labels, stats)
    if tally.skipped:
        logger.log(f"guidance was dropped {tally.skipped} times for non-finite gradients")
    dist.barrier()


def _named_failure(sample, indices, tick):
    """Call `sample`; batch positions in its errors become sample indices."""
    try:
        return sample(indices, tick)
    except NonFiniteGradientError as error:
        raise FloatingPointError(
            f"non-finite guidance gradient at step {error.step_index} for sample {_at(error, indices)}; "
            "--on_nonfinite skip drops that guidance and goes on"
        ) from error
    except NonFiniteOutputError as error:
        raise FloatingPointError(
            f"the network answered NaN or infinity at step {error.step_index} for sample {_at(error, indices)}; "
            "if it runs in float16, try --use_fp16 False"
        ) from error
    except NonFinitePixelsError as error:
        raise FloatingPointError(f"non-finite pixels in sample {_at(error, indices)}") from error


def _at(error, indices):
    return ", ".join(str(indices[i]) for i in error.positions)
