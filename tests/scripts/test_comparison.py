"""Tables over kinds of runs: means and spreads, the judge's count, the metrics by the digits features, the
digits held out.
"""

import math
import statistics
from pathlib import Path

import numpy as np
import pytest
import torch
from comparison import judge, spread, summaries, with_error
from problems import PROBLEMS, Problem, Quality, hold_out

from evaluation.frechet import frechet_distance
from evaluation.networks import feature_network

DIGITS = PROBLEMS["digits"]


def test_spread_is_the_mean_the_sample_deviation_and_the_values():
    cell = spread([1.0, 2.0, 6.0])
    assert cell == {"mean": 3.0, "std": pytest.approx(math.sqrt((4 + 1 + 9) / 2)), "runs": [1.0, 2.0, 6.0]}
    assert spread([0.25]) == {"mean": 0.25, "std": None, "runs": [0.25]}
    assert spread((5, 5)) == {"mean": 5.0, "std": 0.0, "runs": [5, 5]}


def test_with_error_writes_both_numbers_in_one_form_and_no_deviation_of_a_single_run():
    assert with_error({"mean": 0.95, "std": 0.0125}, ".1%") == "95.0% ± 1.2%"
    assert with_error({"mean": 21.456, "std": 0.0}, ".2f") == "21.46 ± 0.00"
    assert with_error({"mean": 21.456, "std": None}, ".2f") == "21.46"


def test_summaries_are_one_row_per_kind_of_run_in_their_order_with_what_was_measured_of_each():
    hits = {"a": 0.5, "b": 0.7, "c": 0.1, "d": 0.3}
    runs = {("plain", 5): [Path("a"), Path("b")], ("guided", 10): [Path("c"), Path("d")]}
    rows = summaries(runs, ("network", "steps"), lambda out: {"hit": hits[out.name], "length": len(out.name)})
    assert [list(row) for row in rows] == [["network", "steps", "hit", "length"]] * 2
    assert [(row["network"], row["steps"]) for row in rows] == [("plain", 5), ("guided", 10)]
    assert [row["hit"]["runs"] for row in rows] == [[0.5, 0.7], [0.1, 0.3]]
    assert rows[0]["hit"]["mean"] == pytest.approx(0.6) and rows[1]["hit"]["std"] == pytest.approx(
        statistics.stdev([0.1, 0.3])
    )
    assert rows[0]["length"] == {"mean": 1.0, "std": 0.0, "runs": [1, 1]}


def test_summaries_want_a_name_for_each_part_of_the_key():
    with pytest.raises(ValueError, match="zip"):
        summaries({("plain", 5): [Path("a")]}, ("network",), lambda out: {"hit": 1.0})


def write_run(folder, images, labels):
    folder.mkdir(exist_ok=True)
    n, height, width, _ = images.shape
    np.savez(folder / f"samples_{n}x{height}x{width}x3.npz", arr_0=images, arr_1=np.array(labels, np.int64))
    return folder


def colours(x):
    """A classifier of 3 classes whose logits are twice the mean of each channel, between -2 and 2."""
    return 2 * x.mean(dim=(2, 3))


def test_the_judge_counts_the_wanted_class_and_takes_its_log_probability_in_nats(tmp_path):
    red, green, grey = (
        (255, 0, 0),
        (0, 255, 0),
        (51, 51, 51),
    )  # -> logits (2, -2, -2), (-2, 2, -2) and three alike
    images = np.array([np.full((2, 2, 3), colour) for colour in (red, red, green, grey)], np.uint8)
    said = judge(write_run(tmp_path, images, [0, 1, 1, 2]), colours)
    total = math.log(math.exp(2) + 2 * math.exp(-2))
    assert said == {
        "hit": 0.5,
        "log_prob": pytest.approx(((2 - total) + (-2 - total) + (2 - total) - math.log(3)) / 4),
    }


def test_the_judge_sees_every_image_upright_in_its_range_and_in_its_place_without_gradients(tmp_path):
    images = np.random.RandomState(0).randint(0, 256, (230, 4, 5, 3), dtype=np.uint8)
    wanted = np.random.RandomState(1).randint(0, 3, 230)
    seen = []

    def classifier(x):
        assert not torch.is_grad_enabled()
        seen.append(x)
        return colours(x)

    said = judge(write_run(tmp_path, images, wanted), classifier)
    assert torch.equal(torch.cat(seen), torch.tensor(images.transpose(0, 3, 1, 2) / np.float32(127.5) - 1))
    logits = 2 * (images / 127.5 - 1).mean(axis=(1, 2))
    log_probs = logits[np.arange(230), wanted] - np.log(np.exp(logits).sum(axis=1))
    assert said == {
        "hit": pytest.approx((logits.argmax(1) == wanted).mean()),
        "log_prob": pytest.approx(log_probs.mean(), abs=1e-5),
    }


def test_a_run_that_is_not_finished_is_not_judged(tmp_path):
    with pytest.raises(FileNotFoundError, match="not complete"):
        judge(tmp_path, colours)


@pytest.fixture
def numbered(tmp_path, monkeypatch):
    """In the place of the held-out digits, 20 images that are their own number all over."""
    images = np.broadcast_to(np.arange(20, dtype=np.uint8)[:, None, None, None], (20, 16, 16, 3))
    np.savez(tmp_path / "numbered.npz", arr_0=images)
    monkeypatch.setattr(Problem, "held_out", tmp_path / "numbered.npz")

    def numbers(count, seed):
        path = hold_out(DIGITS, tmp_path, count, seed)
        assert path == tmp_path / "held_out.npz"
        with np.load(path, allow_pickle=False) as file:
            assert file.files == ["arr_0"]
            kept = file["arr_0"]
        assert kept.dtype == np.uint8 and np.array_equal(
            kept, np.broadcast_to(kept[:, :1, :1, :1], (len(kept), 16, 16, 3))
        )
        return kept[:, 0, 0, 0].tolist()

    return numbers


def test_as_many_of_the_held_out_digits_as_asked_none_of_them_twice_and_others_for_each_seed(numbered):
    first = numbered(8, 0)
    assert len(first) == len(set(first)) == 8
    assert numbered(8, 0) == first
    assert set(numbered(8, 1)) != set(first)
    assert numbered(5, 0) == first[:5]


def test_all_of_them_where_more_are_asked_for(numbered):
    assert sorted(numbered(21, 3)) == sorted(numbered(20, 4)) == list(range(20))


def test_the_quality_is_the_distance_and_its_neighbours_to_the_digits_that_the_networks_learned_from(
    tmp_path,
):
    path = hold_out(DIGITS, tmp_path, 40, 2)
    numbers = Quality(DIGITS)(path)
    network, gaussians = feature_network("digits"), []
    for file in (DIGITS.reference, path):
        with np.load(file, allow_pickle=False) as archive:
            pool = network(archive["arr_0"])["pool3"].astype(np.float64)
        gaussians += [pool.mean(axis=0), np.cov(pool, rowvar=False)]
    assert numbers["fd_digits"] == pytest.approx(frechet_distance(*gaussians), rel=1e-4)
    assert set(numbers) == {
        "fd_digits",
        "precision",
        "recall",
        "density",
        "coverage",
        "resampled_std",
        "images",
    }
    assert numbers["images"] == 40 and 0 < numbers["resampled_std"] < numbers["fd_digits"]


def test_the_digits_learned_from_are_next_to_themselves_and_no_held_out_one_is_among_them():
    numbers = Quality(DIGITS)(DIGITS.reference)
    assert abs(numbers["fd_digits"]) < 1e-3
    assert (numbers["precision"], numbers["recall"], numbers["coverage"]) == (1, 1, 1)
    digits = []
    for path in (DIGITS.reference, DIGITS.held_out):
        with np.load(path, allow_pickle=False) as file:
            digits.append({image.tobytes() for image in file["arr_0"]})
    assert not digits[0] & digits[1]
