"""The wheel, used from a folder that is no checkout."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("guided_diffusion", "classifiers", "evaluation", "pretrained_models")
LOAD = """
import classifiers
print(classifiers.__file__)
classifiers.load_classifier("digits_guide", num_classes=10)
print("loaded")
classifiers.load_classifier("resnet50")
"""


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


def test_small_networks_load_from_another_folder_and_what_is_not_there_is_named_with_its_place(
    installed, tmp_path
):
    variables = {"PYTHONPATH": str(installed), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command, environment = [sys.executable, "-c", LOAD], {**os.environ, **variables}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    place, loaded = done.stdout.splitlines()
    assert place.startswith(str(installed)) and loaded == "loaded"
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
