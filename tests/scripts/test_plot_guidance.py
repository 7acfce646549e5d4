"""The plot of what guidance did: its numbers, its axis, and what it says where there is nothing to draw."""

import matplotlib
import numpy as np
import pytest
import torch
from helpers import call, load_script
from PIL import Image

from guided_diffusion.runs.store import SampleStore

script = load_script("plot_guidance")


def line(step, sigma, norm=1.0, confidence=0.5, non_finite=0):
    return {
        "step": step,
        "sigma": sigma,
        "gradient_norm": norm,
        "confidence": confidence,
        "clipped": 0.25,
        "non_finite": non_finite,
    }


def make_run(folder, batches, finished=True, png_name=None):
    """A run of four images in shards of three, of one pixel each, with these lines for each shard."""
    store = SampleStore(folder, {}, 4, 3, png_name=png_name)
    for indices, lines in zip(store.missing(), batches, strict=False):
        shape = (len(indices), 1, 1, 3)
        store.write(
            indices,
            torch.zeros(shape, dtype=torch.uint8),
            torch.zeros(len(indices), dtype=torch.int64),
            {},
            lines,
        )
    if finished:
        store.finish()
    return folder


TWO_BATCHES = [[line(1, 8.0, 2.0), line(0, 0.5, 1.0)], [line(1, 8.0, 6.0), line(0, 0.5, 1.0)]]


def test_a_line_is_the_mean_over_images_and_its_band_spans_the_batches(tmp_path):
    lines = script.read_lines(make_run(tmp_path, TWO_BATCHES))
    places, values = script.curves(lines, "sigma")
    assert places == [0.5, 8.0]
    mean, lowest, highest = values["gradient_norm"]
    assert (
        mean.tolist() == [1.0, (3 * 2 + 1 * 6) / 4]
        and lowest.tolist() == [1.0, 2.0]
        and highest.tolist() == [1.0, 6.0]
    )


def test_skipped_images_become_a_share_and_count_in_no_other_mean(tmp_path):
    lines = script.read_lines(
        make_run(
            tmp_path,
            [[line(0, 1.0, 2.0, non_finite=2), line(1, 2.0, None, non_finite=3)], [line(0, 1.0, 6.0)]],
        )
    )
    places, values = script.curves(lines, "sigma")
    assert places == [1.0, 2.0] and values["non_finite"].T.tolist() == [[2 / 4, 0, 2 / 3], [1, 1, 1]]
    assert (
        values["gradient_norm"][:, 0].tolist() == [4, 2, 6] and np.isnan(values["gradient_norm"][:, 1]).all()
    )


def test_a_run_that_is_not_finished_is_drawn_as_far_as_it_is(tmp_path):
    folder = make_run(tmp_path / "run", TWO_BATCHES[:1], finished=False)
    result = call(script.main, [folder])
    assert (result.code, result.out) == (0, f"{folder / 'guidance.png'}\n"), result.err
    with Image.open(folder / "guidance.png") as picture:
        colours = np.unique(np.asarray(picture.convert("RGB")).reshape(-1, 3), axis=0)
    assert [31, 119, 180] in colours.tolist()  # the first line's


@pytest.mark.parametrize(
    ("batches", "axis", "scale", "left"),
    [(TWO_BATCHES, "sigma", "log", 8.0), ([[line(999, None), line(3, None)]] * 2, "step", "linear", 999)],
)
def test_noise_is_on_the_left(tmp_path, monkeypatch, batches, axis, scale, left):
    figures = []
    monkeypatch.setattr(
        "matplotlib.figure.Figure.savefig", lambda figure, file, **kwargs: figures.append(figure)
    )
    runs = [make_run(tmp_path / name / "run", batches) for name in "ab"]
    assert script.common_axis(runs, [script.read_lines(run) for run in runs]) == axis
    assert call(script.main, [*runs, "--out", tmp_path / "out.png"]).code == 0
    for axes in figures[0].axes:
        start, end = axes.get_xlim()
        assert axes.get_xscale() == scale and start >= left > end
    assert [text.get_text() for text in figures[0].legends[0].get_texts()] == [str(run) for run in runs]


def test_names_and_settings_that_matplotlib_would_trip_over(tmp_path, monkeypatch):
    runs = [make_run(tmp_path / name, TWO_BATCHES) for name in ("$a_{", "$b$", "_c")]
    assert call(script.main, [*runs, "--out", tmp_path / "plain.png"]).code == 0
    for key, value in {"text.usetex": True, "font.size": 500, "lines.linewidth": 50}.items():
        monkeypatch.setitem(matplotlib.rcParams, key, value)
    assert call(script.main, [*runs, "--out", tmp_path / "styled.png"]).code == 0
    plain, styled = (np.asarray(Image.open(tmp_path / f"{name}.png")) for name in ("plain", "styled"))
    assert np.array_equal(plain, styled)


def test_what_cannot_be_drawn_is_said_in_one_line(tmp_path):
    drawn, silent = make_run(tmp_path / "drawn", TWO_BATCHES), make_run(tmp_path / "silent", [[], []])
    noisy = make_run(tmp_path / "noisy", [[line(5, None)]] * 2)
    pictures = make_run(tmp_path / "pictures", TWO_BATCHES, png_name=lambda index: f"{index:06d}.png")
    for folders, message in (
        ([drawn, silent], f"error: {silent} has no record of its guidance: run with --log_guidance True"),
        ([tmp_path / "none"], f"error: there is no folder {tmp_path / 'none'}"),
        ([drawn, noisy], f"error: {noisy} was guided by a noisy classifier"),
        (
            [pictures],
            f"error: {pictures} holds a PNG for every sample, and guidance.png would count as one: ",
        ),
    ):
        result = call(script.main, folders)
        assert result.code == 1 and result.err.startswith(message) and len(result.err.splitlines()) == 1, (
            result.err
        )
    assert not list(tmp_path.glob("*/guidance.png"))


def test_without_matplotlib_one_line_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    result = call(script.main, [tmp_path])
    assert (result.code, result.err) == (
        1,
        'error: the plot needs matplotlib, which is not installed: pip install -e ".[plot]"\n',
    )
