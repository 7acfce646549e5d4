"""The wheel, used from a folder that is no checkout."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("guided_diffusion", "classifiers", "evaluation", "pretrained_models")
LOAD = "from classifiers import load_classifier; load_classifier({name!r}, num_classes={classes})"


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A folder with what `pip install` of the wheel puts into site-packages."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in PACKAGES:
        shutil.copytree(ROOT / name, folder / "source" / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.py", "pyproject.toml", "LICENSE"):
        shutil.copy(ROOT / name, folder / "source")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
    build = ["wheel", ".", "--no-deps", "--no-build-isolation", "--no-index", "-w", folder / "wheels"]
    subprocess.run([*pip, *build], cwd=folder / "source", check=True, timeout=300)
    (wheel,) = (folder / "wheels").iterdir()
    subprocess.run(
        [*pip, "install", "--no-deps", "--no-index", "--target", folder / "site", wheel], check=True
    )
    return folder / "site"


def run(code, site, cwd):
    """A process that has the installed packages in the place of this checkout's."""
    environment = {**os.environ, "PYTHONPATH": str(site), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-c", code]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=120)


def test_small_networks_load_from_another_folder(installed, tmp_path):
    where = "; import classifiers; print(classifiers.__file__)"
    done = run(LOAD.format(name="digits_guide", classes=10) + where, installed, tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(str(installed))


def test_what_is_not_there_is_named_with_its_place(installed, tmp_path):
    done = run(LOAD.format(name="resnet50", classes=1000), installed, tmp_path)
    message = done.stderr.splitlines()[-1]
    assert message.startswith("FileNotFoundError: ")
    assert str(installed / "pretrained_models" / "resnet50-11ad3fa6.pth") in message
    assert "https://download.pytorch.org/models/resnet50-11ad3fa6.pth" in message


def test_every_committed_file_is_in_it(installed):
    shipped = {path.relative_to(installed) for path in (installed / "pretrained_models").rglob("*")}
    folders = ("digits", "digits_dit", "digits_dit/vae", "digits_dit/tiny")
    committed = [path for name in folders for path in (ROOT / "pretrained_models" / name).glob("*.*")]
    committed += [ROOT / "pretrained_models/files.json"]
    assert {path.relative_to(ROOT) for path in committed} <= shipped
    assert list(installed.glob("elucd-*.dist-info/licenses/LICENSE"))
