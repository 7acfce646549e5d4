"""guided_sample.sh: which script it starts, by which interpreter, wherever and however it is called."""

import os
import shutil
import subprocess
import sys

import pytest
from helpers import ROOT, call, load_script

from guided_diffusion.flags.presets import DIT_PRESETS, EDM_PRESETS, PRESETS

SCRIPT_OF = {
    **dict.fromkeys(PRESETS, "classifier_sample.py"),
    **dict.fromkeys(EDM_PRESETS, "edm_sample.py"),
    **dict.fromkeys(DIT_PRESETS, "dit_sample.py"),
    "digits": "compare_guidance.py",
    "digits-fewstep": "compare_fewstep.py",
    "digits-edm": "compare_edm.py",
    "digits-dit": "compare_dit.py",
    "cifar10": "compare_cifar10.py",
}
ASKED = "'{copy}/scripts/presets.py {preset}') echo {script}; exit;;\n"
RUN = f"""'{{copy}}/scripts/presets.py '*) exec {sys.executable} "$@";;\n"""


@pytest.fixture
def copy(tmp_path):
    """A folder with a copy of the script beside the packages, and an interpreter that tells its arguments."""
    folder = tmp_path / "a copy"
    folder.mkdir()
    shutil.copy(ROOT / "guided_sample.sh", folder)
    for name in ("guided_diffusion", "classifiers", "evaluation", "scripts"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    install(tmp_path / "python", folder)
    return folder


def install(path, copy, runs_presets=False):
    """An interpreter that writes what it was asked to run. It runs the copy's presets.py, or knows the
    answers, since a start takes seconds.
    """
    known = "".join(ASKED.format(copy=copy, preset=name, script=SCRIPT_OF[name]) for name in SCRIPT_OF)
    answers = RUN.format(copy=copy) if runs_presets else known
    version = f'[ "$1" = -c ] && exec {sys.executable} "$@"'
    path.parent.mkdir(exist_ok=True)
    path.write_text(f'#!/bin/sh\n{version}\ncase "$*" in\n{answers}esac\necho "$0" "$@"\n')
    path.chmod(0o755)


def shell(script, *words, redirect="", **changes):
    variables = {**os.environ, "PYTHON": str(script.parents[1] / "python"), **changes}
    variables = {key: value for key, value in variables.items() if value is not None}
    command = ["/bin/sh", "-c", f'exec "$0" "$@" {redirect}', script, *words]
    return subprocess.run(command, env=variables, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("preset", SCRIPT_OF)
def test_every_preset_has_its_script(preset):
    result = call(load_script("presets").main, [preset])
    assert (result.code, result.out) == (0, f"{SCRIPT_OF[preset]}\n")


def test_presets_are_listed_with_their_scripts():
    result = call(load_script("presets").main, [])
    assert dict(line.split() for line in result.out.splitlines()) == SCRIPT_OF


def test_the_default_is_digits_while_the_imagenet_files_are_absent(copy):
    result = shell(copy / "guided_sample.sh", "--seeds", "0-2")
    assert result.stdout.endswith(f"{copy}/scripts/compare_guidance.py --preset digits --seeds 0-2\n")
    assert "preset: digits" in result.stderr and "scripts/download.py imagenet128-resnet101" in result.stderr


@pytest.mark.parametrize("classifier", ["resnet101-cd907fc2.pth", "resnet101_weight_V2.pth"])
def test_the_default_is_imagenet_when_its_files_are_there(copy, classifier):
    (copy / "pretrained_models").mkdir()
    (copy / "pretrained_models/128x128_diffusion.pt").touch()
    assert "preset: digits" in shell(copy / "guided_sample.sh").stderr  # the classifier is not
    (copy / "pretrained_models" / classifier).touch()
    result = shell(copy / "guided_sample.sh")
    assert result.stdout.endswith("scripts/classifier_sample.py --preset imagenet128-resnet101\n")
    assert "preset: imagenet128-resnet101" in result.stderr


@pytest.mark.parametrize("words", [["--preset", "digits"], ["--seed", "1", "--preset=digits"]])
def test_a_preset_that_is_written_as_a_flag_is_refused(copy, words):
    result = shell(copy / "guided_sample.sh", *words)
    assert (result.returncode, result.stdout, result.stderr.count("\n")) == (2, "", 1)
    assert result.stderr.startswith("error: write the preset's name first")


def test_an_unknown_preset_lists_the_choices(tmp_path, copy):
    install(tmp_path / "python", copy, runs_presets=True)
    result = shell(copy / "guided_sample.sh", "digit")
    assert (result.returncode, result.stdout) == (2, "") and "Traceback" not in result.stderr
    last = result.stderr.splitlines()[-1]
    assert [part for part in ("unknown preset 'digit'", *SCRIPT_OF) if part not in last] == []


@pytest.mark.parametrize(
    ("how", "changes"),
    [
        ("by its path", {}),
        ("through a link", {}),
        ("through a chain of relative links", {}),
        ("by its path", {"CDPATH": "/:/tmp"}),
        ("by a relative path", {"CDPATH": ".:/tmp"}),
    ],
)
def test_it_finds_its_place_however_it_is_called(tmp_path, copy, monkeypatch, how, changes):
    script = copy / "guided_sample.sh"
    python = str(tmp_path / "python")
    monkeypatch.chdir(tmp_path)
    if "link" in how:
        (tmp_path / "bin").mkdir()
        (tmp_path / "bin/one").symlink_to("../a copy/guided_sample.sh" if "chain" in how else script)
        (tmp_path / "two").symlink_to("bin/one")
        script = tmp_path / "two"
    elif "relative" in how:
        script = os.path.relpath(script)
    command = ["/bin/sh", "-c", 'exec "$0" "$@"', script if "/" in str(script) else f"./{script}"]
    variables = {**os.environ, "PYTHON": python, **changes}
    words = ["digits-edm", "--out", "with a blank"]
    result = subprocess.run([*command, *words], env=variables, capture_output=True, text=True, timeout=120)
    expected = f"{python} {copy}/scripts/compare_edm.py --preset digits-edm --out with a blank\n"
    assert (result.returncode, result.stdout, result.stderr) == (0, expected, "")


OLD = "#!/bin/sh\nexit 1\n"  # an interpreter of Python 2, as far as this script sees it


@pytest.mark.parametrize(
    ("there", "old", "used"),
    [
        (["python", "python3"], [], "python"),
        (["python3"], [], "python3"),
        (["python3"], ["python"], "python3"),
        ([], [], None),
    ],
)
def test_the_interpreter_is_python_or_python3_as_the_machine_has_it(tmp_path, copy, there, old, used):
    for name in there:
        install(tmp_path / "bin" / name, copy)
    (tmp_path / "bin").mkdir(exist_ok=True)
    for name in old:
        (tmp_path / "bin" / name).write_text(OLD)
        (tmp_path / "bin" / name).chmod(0o755)
    for name in ("bash", "dirname", "env"):
        (tmp_path / "bin" / name).symlink_to(shutil.which(name))
    result = shell(copy / "guided_sample.sh", "digits", PYTHON=None, PATH=str(tmp_path / "bin"))
    if used:
        assert result.stdout.startswith(f"{tmp_path}/bin/{used} ") or result.stdout.startswith(f"{used} ")
    else:
        assert result.returncode == 1 and "set PYTHON to an interpreter" in result.stderr


@pytest.mark.parametrize("redirect", ["2>&-", ">&-", ">&- 2>&-", "<&- >&- 2>&-"])
def test_a_closed_stream_is_no_error(tmp_path, copy, redirect):
    install(tmp_path / "python", copy, runs_presets=True)
    result = shell(copy / "guided_sample.sh", redirect=redirect)
    assert result.returncode == 0
    assert ("compare_guidance.py" in result.stdout) == (redirect == "2>&-")
