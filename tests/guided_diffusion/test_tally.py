"""What is noted of guidance: the figures of each step by hand, what is added up, and that nothing is counted
twice.
"""

import json
import math

import pytest
import torch

from guided_diffusion.guidance import Observation
from guided_diffusion.runs.tally import Tally

CPU = torch.device("cpu")


def observation(n=2, skipped=(), **changes):
    """n dull images: every figure is known at sight."""
    fields = {
        "index": 7,
        "sigma": 0.5,
        "x": torch.zeros(n, 3, 2, 2),
        "y": torch.zeros(n, dtype=torch.int64),
        "logits": torch.zeros(n, 4),
        "gradient": torch.zeros(n, 3, 2, 2),
        "skipped": torch.tensor([i in skipped for i in range(n)]),
    }
    return Observation(**{**fields, **changes})


def line_of(seen):
    tally = Tally(CPU, log_guidance=True)
    tally.observe(seen)
    (line,) = tally.take_batch()[1]
    return line


def test_a_line_names_the_step_and_holds_plain_numbers():
    line = line_of(observation())
    assert list(line) == ["step", "sigma", "gradient_norm", "confidence", "clipped", "non_finite"]
    assert (line["step"], line["sigma"]) == (7, 0.5)
    assert json.loads(json.dumps(line)) == line


def test_a_noisy_classifier_has_no_noise_level():
    assert line_of(observation(sigma=None))["sigma"] is None


def test_gradient_norm_is_the_mean_over_the_images_of_their_norms():
    gradient = torch.zeros(2, 3, 2, 2)
    gradient[0, 0, 0, 0], gradient[0, 2, 1, 1], gradient[1, 1, 0, 1] = 3, 4, -1
    assert line_of(observation(gradient=gradient))["gradient_norm"] == (5 + 1) / 2


def test_confidence_is_the_mean_probability_of_the_wanted_class():
    nothing = -math.inf
    logits = torch.tensor([[0, math.log(3), nothing, nothing], [nothing, 1, 1, nothing]])
    line = line_of(observation(logits=logits, y=torch.tensor([0, 2])))
    assert line["confidence"] == pytest.approx((1 / 4 + 1 / 2) / 2, rel=1e-6)


def test_clipped_is_the_share_of_values_at_the_ends_of_the_range_or_beyond():
    x = torch.full((2, 3, 2, 2), 0.999)
    x[0, 0, 0, 0], x[0, 1, 1, 0], x[1, 2, 0, 1] = 1, -1, -3
    assert line_of(observation(x=x))["clipped"] == 3 / 24


def test_half_precision_does_not_overflow_in_the_norm():
    gradient = torch.full((2, 3, 8, 8), 1000, dtype=torch.float16)
    assert line_of(observation(gradient=gradient))["gradient_norm"] == pytest.approx(
        1000 * math.sqrt(192), rel=1e-6
    )


def test_skipped_images_are_counted_in_the_line_and_in_the_batch():
    tally = Tally(CPU, log_guidance=True)
    tally.observe(observation(3, skipped=(0, 2)))
    tally.observe(observation(3, skipped=(1,)))
    stats, lines = tally.take_batch()
    assert [line["non_finite"] for line in lines] == [2, 1]
    assert stats["skipped_guidance"] == 3


def test_a_classifier_that_answers_nan_leaves_a_line_of_standard_json():
    """--on_nonfinite skip drops such an image and goes on; what it leaves in metrics.jsonl must stay
    readable.
    """
    logits = torch.zeros(2, 4)
    logits[0] = math.nan
    line = line_of(observation(logits=logits, skipped=(0,)))
    assert line["non_finite"] == 1
    json.dumps(line, allow_nan=False)


def test_take_batch_starts_anew_and_the_sum_stays():
    tally = Tally(CPU, log_guidance=True)
    for skipped in ((0,), (0, 1)):
        tally.observe(observation(skipped=skipped))
    assert len(tally.take_batch()[1]) == 2
    tally.observe(observation(skipped=(1,)))
    stats, lines = tally.take_batch()
    assert (stats["skipped_guidance"], len(lines)) == (1, 1)
    assert tally.take_batch() == ({"guidance_seconds": 0, "skipped_guidance": 0}, [])
    assert tally.skipped == 4


def test_seconds_of_a_batch_are_those_since_the_last_one(monkeypatch):
    clock = iter([0.0, 1.5, 10.0, 10.25, 20.0, 24.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(clock))
    tally = Tally(CPU)
    call = tally.stopwatch.wrap(lambda: None)
    call()
    call()
    assert tally.take_batch()[0]["guidance_seconds"] == 1.75
    call()
    assert tally.take_batch()[0]["guidance_seconds"] == 4


def test_without_the_flag_no_line_is_kept():
    tally = Tally(CPU)
    tally.observe(observation(skipped=(0,)))
    stats, lines = tally.take_batch()
    assert (stats["skipped_guidance"], lines) == (1, [])
