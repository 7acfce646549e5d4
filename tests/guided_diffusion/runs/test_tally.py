"""What is noted of guidance: the figures of each step by hand, what is added up, and that nothing is counted
twice.
"""

import json
import math
import time

import pytest
import torch

from guided_diffusion.guidance import Observation
from guided_diffusion.runs.stopwatch import Stopwatch
from guided_diffusion.runs.tally import Tally

CPU = torch.device("cpu")
NEVER = -math.inf


def observation(n=2, skipped=(), **changes):
    """n dull images: every figure is known at sight."""
    zeros = torch.zeros(n, 3, 2, 2)
    fields = {"index": 7, "sigma": 0.5, "x": zeros, "y": torch.zeros(n, dtype=torch.int64)}
    fields |= {"logits": torch.zeros(n, 4), "gradient": zeros}
    return Observation(**{**fields, "skipped": torch.tensor([i in skipped for i in range(n)]), **changes})


def line_of(seen):
    tally = Tally(CPU, log_guidance=True)
    tally.observe(seen)
    (line,) = tally.take_batch()[1]
    assert json.loads(json.dumps(line, allow_nan=False)) == line
    return line


def filled(shape, fill, points, dtype=torch.float32):
    x = torch.full(shape, fill, dtype=dtype)
    for position, value in points.items():
        x[position] = value
    return x


GRADIENT = filled((2, 3, 2, 2), 0, {(0, 0, 0, 0): 3, (0, 2, 1, 1): 4, (1, 1, 0, 1): -1})
HALF = torch.full((2, 3, 8, 8), 1000, dtype=torch.float16)  # its squares overflow
X = filled((2, 3, 2, 2), 0.999, {(0, 0, 0, 0): 1, (0, 1, 1, 0): -1, (1, 2, 0, 1): -3})
LOGITS = torch.tensor([[0, math.log(3), NEVER, NEVER], [NEVER, 1, 1, NEVER]])


@pytest.mark.parametrize(
    ("changes", "key", "expected"),
    [
        ({}, "step", 7),
        ({}, "sigma", 0.5),
        ({"sigma": None}, "sigma", None),  # a noisy classifier has none
        ({"gradient": GRADIENT}, "gradient_norm", (5 + 1) / 2),
        ({"gradient": HALF}, "gradient_norm", 1000 * math.sqrt(192)),
        ({"logits": LOGITS, "y": torch.tensor([0, 2])}, "confidence", (1 / 4 + 1 / 2) / 2),
        ({"x": X}, "clipped", 3 / 24),
        ({}, "non_finite", 0),
        ({"skipped": (0,)}, "non_finite", 1),
        # A classifier that answers NaN; what is left must be standard JSON.
        ({"skipped": (0,), "logits": filled((2, 4), 0, {0: math.nan})}, "non_finite", 1),
        ({"skipped": (0, 1)}, "confidence", None),
    ],
)
def test_the_figures_of_a_step(changes, key, expected):
    line = line_of(observation(**changes))
    assert list(line) == ["step", "sigma", "gradient_norm", "confidence", "clipped", "non_finite"]
    assert line[key] == (expected if expected is None else pytest.approx(expected, rel=1e-6))


@pytest.mark.parametrize("log_guidance", [True, False])
def test_a_batch_is_taken_once_and_the_sum_stays(log_guidance):
    tally = Tally(CPU, log_guidance)
    assert not tally.guided
    for skipped in ((0,), (0, 1)):
        tally.observe(observation(skipped=skipped))
    assert tally.guided
    stats, lines = tally.take_batch()
    assert stats["skipped_guidance"] == 3
    assert [line["non_finite"] for line in lines] == ([1, 2] if log_guidance else [])
    assert not tally.guided
    tally.observe(observation(skipped=(1,)))
    assert tally.take_batch()[0]["skipped_guidance"] == 1
    assert tally.take_batch() == ({"guidance_seconds": 0, "skipped_guidance": 0}, [])
    assert tally.skipped == 4


def test_seconds_are_those_of_what_is_wrapped_in_this_batch():
    tally = Tally(CPU)
    nap = tally.stopwatch.wrap(lambda seconds, result=0: time.sleep(seconds) or result)
    assert nap(0.05, result=3) == 3
    nap(0.05)
    time.sleep(0.2)
    first = tally.take_batch()[0]["guidance_seconds"]
    nap(0.01)
    second = tally.take_batch()[0]["guidance_seconds"]
    assert 0.1 <= first < 0.25 and 0.01 <= second < 0.1
    assert Stopwatch(CPU).seconds == 0


def test_images_are_counted_by_what_they_were_shown_to():
    tally, network, guide = Tally(CPU), torch.nn.Identity(), torch.nn.Identity()
    tally.count("network_evaluations", network)
    tally.count("network_evaluations", another := torch.nn.Identity())
    tally.count("classifier_passes", guide)
    for shown, images in ((network, 2), (network, 3), (another, 4)):
        shown(torch.zeros(images, 1))
    stats = tally.take_batch()[0]
    assert (stats["network_evaluations"], stats["classifier_passes"]) == (9, 0)
    guide(torch.zeros(5, 1))
    stats = tally.take_batch()[0]
    assert (stats["network_evaluations"], stats["classifier_passes"]) == (0, 5)
