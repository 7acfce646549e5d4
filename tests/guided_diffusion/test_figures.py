"""Pictures whatever the user's matplotlib is told: names as they are, no settings of his."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from guided_diffusion.files.figures import plain_style, plain_text, require_matplotlib, save_figure

ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])}
NAMES = ["$a_{", "$x$", "cost \\$5 and $", "_hidden", "a_b^c", "\\alpha", "\udcff"]


@pytest.mark.parametrize("name", NAMES)
def test_a_name_is_shown_as_it_is(tmp_path, name):
    from matplotlib.figure import Figure

    with plain_style():
        figure = Figure()
        figure.subplots().plot([0, 1], label=plain_text(name))
        legend = figure.legend()
        save_figure(figure, tmp_path / "a.png")
    (text,) = legend.get_texts()
    shown, is_formula = text._preprocess_math(text.get_text())
    assert (shown.strip(), is_formula) == (name.encode("utf-8", "backslashreplace").decode(), False)


DRAW = """
import sys
from matplotlib.figure import Figure
from guided_diffusion.files.figures import *
require_matplotlib("it needs")
with plain_style():
    figure = Figure()
    figure.subplots().set_title("x")
    save_figure(figure, sys.argv[1])
"""


@pytest.mark.parametrize(
    "settings",
    ["text.usetex: True", "backend: gtk4agg", "figure.dpi: 1\nfont.size: 90", "savefig.bbox: tight"],
)
def test_settings_of_the_user_change_nothing(tmp_path, settings):
    def drawn(name, **more):
        command = [sys.executable, "-c", DRAW, name]
        subprocess.run(command, cwd=tmp_path, env={**ENVIRONMENT, **more}, check=True)
        return np.asarray(Image.open(tmp_path / name))

    plain = drawn("plain.png")
    (tmp_path / "matplotlibrc").write_text(settings)
    assert np.array_equal(drawn("styled.png", MATPLOTLIBRC=str(tmp_path)), plain)


def check(tmp_path, **more):
    code = 'from guided_diffusion.files.figures import require_matplotlib\nrequire_matplotlib("it needs")'
    command = [sys.executable, "-c", code]
    return subprocess.run(command, cwd=tmp_path, env={**ENVIRONMENT, **more}, capture_output=True, text=True)


def test_a_backend_that_is_none_is_no_hindrance_and_settings_that_cannot_be_read_are_said_first(tmp_path):
    assert check(tmp_path, MPLBACKEND="nothing").returncode == 0
    (tmp_path / "matplotlibrc").write_bytes(b"\xff\xfe")
    assert "it needs matplotlib, which does not load" in check(tmp_path).stderr


def test_without_matplotlib_one_line_says_what_to_install(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r'^it needs matplotlib, .*pip install -e "\.\[plot\]"$'):
        require_matplotlib("it needs")
