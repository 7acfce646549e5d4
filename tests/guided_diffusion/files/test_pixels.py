"""From floats to the bytes that are kept, and the grid that shows them."""

import math

import numpy as np
import pytest
import torch
from goldens_util import load_golden
from PIL import Image

from guided_diffusion.files.grid import save_grid
from guided_diffusion.files.pixels import to_uint8

H, W = 5, 6


def test_to_uint8_is_adms_rule():
    values = torch.linspace(-1.1, 1.1, 3001, dtype=torch.float64).repeat(3, 1).view(1, 3, 1, -1)
    expected = np.clip((values.numpy() + 1) * 127.5, 0, 255).astype(np.uint8).transpose(0, 2, 3, 1)
    got = to_uint8(values)
    assert got.dtype == torch.uint8 and got.is_contiguous() and np.array_equal(got.numpy(), expected)


def test_to_uint8_is_edms_rule_on_the_golden_values():
    x = load_golden("E_tables")[1]["quantise/x"].astype(np.float64)
    expected = [min(max(math.floor(value * 127.5 + 128), 0), 255) for value in x.tolist()]
    got = to_uint8(torch.from_numpy(x).reshape(1, 3, 1, -1), "edm")
    assert got.permute(0, 3, 1, 2).flatten().tolist() == expected
    assert {0, 255} <= set(expected) and min(x) * 127.5 + 128 < 0 and max(x) * 127.5 + 128 > 256


@pytest.mark.parametrize(
    ("x", "adm", "edm"),
    [
        *((-3, 0, 0), (-1, 0, 0), (-0.999, 0, 0), (0, 127, 128), (0.003, 127, 128), (0.0078, 128, 128)),
        *((0.0079, 128, 129), (1, 255, 255), (3, 255, 255)),
    ],
)
def test_the_two_rules_clamp_and_differ_by_half_a_level(x, adm, edm):
    values = torch.full((1, 3, 1, 1), float(x), dtype=torch.float64)
    assert (to_uint8(values, "adm") == adm).all() and (to_uint8(values, "edm") == edm).all()


def test_to_uint8_puts_channels_last():
    x = torch.arange(24.0).view(1, 3, 2, 4) / 12 - 1
    assert to_uint8(x)[0, 1, 3].tolist() == [int((float(v) + 1) * 127.5) for v in x[0, :, 1, 3]]


@pytest.mark.parametrize("fault", [math.nan, math.inf, -math.inf])
def test_to_uint8_refuses_what_is_not_finite(fault):
    x = torch.zeros(4, 3, 2, 2)
    x[1, 0, 0, 0] = x[3, 2, 1, 1] = fault
    with pytest.raises(FloatingPointError, match=r"non-finite.*\[1, 3\]"):
        to_uint8(x)


# The grid


def images(n):
    """(n, H, W, 3) uint8, another one for each index."""
    return np.stack([np.random.RandomState(i).randint(0, 256, (H, W, 3), dtype=np.uint8) for i in range(n)])


def pixels_of(path):
    with Image.open(path) as picture:
        assert (picture.format, picture.mode) == ("PNG", "RGB")
        return np.asarray(picture)


@pytest.mark.parametrize(("count", "columns", "rows"), [(1, 1, 1), (10, 4, 3), (64, 8, 8)])
def test_a_grid_is_as_square_as_it_gets(tmp_path, count, columns, rows):
    save_grid(tmp_path / "grid.png", [images(count)])
    pixels = pixels_of(tmp_path / "grid.png")
    assert pixels.shape == (rows * (H + 2), columns * (W + 2), 3)
    for i in (0, count - 1):
        top, left = i // columns * (H + 2) + 1, i % columns * (W + 2) + 1
        assert np.array_equal(pixels[top : top + H, left : left + W], images(count)[i])


def test_a_grid_of_groups(tmp_path):
    save_grid(tmp_path / "grid.png", [images(5), images(2)], scale=3, columns=4)
    pixels = pixels_of(tmp_path / "grid.png")
    assert pixels.shape == ((2 + 1) * (H + 2) * 3, 4 * (W + 2) * 3, 3)
    assert np.array_equal(pixels[2 * (H + 2) * 3 + 3 :: 3, 3::3][:H, :W], images(1)[0])


def test_grid_titles_stand_to_the_left(tmp_path):
    groups = [images(4)] * 2
    save_grid(tmp_path / "plain.png", groups, scale=4)
    save_grid(tmp_path / "titled.png", groups, scale=4, titles=["unguided", "guided"])
    plain, titled = pixels_of(tmp_path / "plain.png"), pixels_of(tmp_path / "titled.png")
    margin = titled.shape[1] - plain.shape[1]
    assert margin > 0 and np.array_equal(titled[:, margin:], plain)
    assert (titled[:, :margin] < 128).any()
