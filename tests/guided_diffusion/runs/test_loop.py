"""The loop over batches: what is drawn, what is told, and what failures are called."""

import json

import numpy as np
import pytest
import torch

from guided_diffusion.files.nonfinite import NonFiniteError
from guided_diffusion.guidance import Observation
from guided_diffusion.runs.loop import sample_missing
from guided_diffusion.runs.store import SampleStore
from guided_diffusion.runs.tally import Tally

CPU = torch.device("cpu")
pytestmark = pytest.mark.usefixtures("one_process", "log")


def draw(indices):
    images = torch.stack([torch.full((2, 2, 3), i, dtype=torch.uint8) for i in indices])
    return images, torch.tensor(list(indices))


def seen(skipped=(False, False, False)):
    x = torch.zeros(3, 1, 2, 2)
    return Observation(
        5, None, x, torch.zeros(3, dtype=torch.int64), torch.zeros(3, 10), x, torch.tensor(skipped)
    )


def test_only_missing_batches_are_drawn(tmp_path, log):
    store, drawn, ticks = SampleStore(tmp_path / "out", {}, 7, 3), [], []
    store.write(
        range(3, 6), *draw(range(3, 6)), {"seconds": 1.0, "guidance_seconds": 0, "skipped_guidance": 0}
    )

    def sample(indices, tick):
        drawn.append(indices)
        ticks.extend(tick() for _ in range(2))
        return draw(indices)

    sample_missing(store, sample, 2, Tally(CPU))
    assert drawn == [range(0, 3), range(6, 7)] and len(ticks) == 4
    with np.load(store.finish()) as npz:
        assert npz["arr_1"].tolist() == npz["arr_0"][:, 0, 0, 0].tolist() == list(range(7))
    sample_missing(store, sample, 2, Tally(CPU))
    assert len(drawn) == 2 and "nothing to do" in log.read_text()


def test_guidance_that_was_dropped_is_counted_and_told(tmp_path, log):
    store, tally = SampleStore(tmp_path / "out", {}, 6, 3), Tally(CPU)

    def sample(indices, tick):
        tally.observe(seen(skipped=(True, False, True)))
        return draw(indices)

    sample_missing(store, sample, 1, tally)
    store.finish()
    assert "dropped 4 times for non-finite" in log.read_text()
    assert json.loads((tmp_path / "out/run.json").read_text())["totals"]["skipped_guidance"] == 4


@pytest.mark.parametrize(
    ("what", "guided", "told", "kept_quiet"),
    [
        ("guidance gradient", True, "--on_nonfinite skip", "use_fp16"),
        ("network output", False, "float16, try --use_fp16 False", "classifier_scale"),
        # --classifier_scale 1e30: float16 is not the reason.
        ("network output", True, "lower --classifier_scale", "float16"),
        ("pixels", True, "lower --classifier_scale", "float16"),
    ],
)
def test_numbers_that_are_not_finite_are_named_by_step_and_sample_with_a_fix(
    tmp_path, what, guided, told, kept_quiet
):
    store, tally = SampleStore(tmp_path / "out", {}, 6, 3), Tally(CPU)

    def sample(indices, tick):
        if indices.start == 3:
            if guided:
                tally.observe(seen())
            raise NonFiniteError(what, [0, 2], 17)
        return draw(indices)

    with pytest.raises(FloatingPointError, match=f"{what} at step 17 for sample 3, 5;") as caught:
        sample_missing(store, sample, 1, tally)
    assert told in str(caught.value) and kept_quiet not in str(caught.value)
    assert store.missing() == [range(3, 6)]


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("no room"), MemoryError()])
def test_want_of_memory_names_the_batch_size(tmp_path, error):
    def sample(indices, tick):
        raise error

    with pytest.raises(ValueError, match="out of memory with batches of 3 images: lower --batch_size"):
        sample_missing(SampleStore(tmp_path / "out", {}, 6, 3), sample, 1, Tally(CPU))
