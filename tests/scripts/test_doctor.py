"""scripts/doctor.py and --dry_run: what they say of a preset's run, and that they leave no trace. The checks:
test_preflight.py.
"""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import ROOT, call, contents, environment, load_script

import guided_diffusion.runs.job
from guided_diffusion.files.pretrained import PRETRAINED_DIR, sha256
from guided_diffusion.flags.presets import EDM_PRESETS, PRESETS
from guided_diffusion.runs import machine

doctor = load_script("doctor")
script = load_script("classifier_sample")
DIGITS = PRETRAINED_DIR / "digits"
QUICK = ("--timestep_respacing", 3, "--num_samples", 4, "--batch_size", 2)


def problems(*flags):
    """The text of each problem, by subject, of a call that must end with exit code 1 and their number."""
    result = call(doctor.main, flags)
    assert result.code == 1 and "ready" not in result.out.splitlines(), result.err
    found = dict(re.findall(r"^(.*?): PROBLEM: (.*)$", result.out, re.MULTILINE))
    assert result.err == f"error: {len(found)} problem{'s' * (len(found) > 1)}: see above\n"
    return found


def test_in_a_shell_the_digits_are_ready_and_no_trace_is_left(tmp_path):
    command = [sys.executable, ROOT / "scripts/doctor.py", "digits", *QUICK, "--dry_run", "False"]
    result = subprocess.run(
        list(map(str, command)), env=environment(), cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert (result.returncode, result.stderr) == (0, "")
    said = result.stdout.splitlines()
    assert said[-1] == "ready"
    for flag, name in (("model_path", "unet"), ("classifier_path", "guide")):
        path = DIGITS / f"{name}.safetensors"
        (line,) = (
            line for line in said if line.startswith(f"--{flag}: {path}, {path.stat().st_size:,} bytes")
        )
        assert sha256(path)[:16] in line
    (folder,) = (line for line in said if line.startswith("folder: "))
    assert folder.startswith("folder: results/digits, 0 of 4 samples are there")
    assert list(tmp_path.iterdir()) == []


def test_dry_run_of_the_script_says_the_same(tmp_path):
    texts = []
    for main, flags in ((doctor.main, ["digits"]), (script.main, ["--preset", "digits", "--dry_run", True])):
        result = call(main, [*flags, *QUICK, "--log_guidance", True, "--out", tmp_path / "out"])
        assert (result.code, result.err) == (0, "")
        texts.append(re.sub(r"\d+\.\d+ (s|GB)", "", result.out))
    assert texts[0] == texts[1] and texts[0].endswith("ready\n")
    assert not (tmp_path / "out").exists()


def test_a_preset_is_examined_by_the_script_that_samples_it(tmp_path):
    flags = ["--steps", 3, "--seeds", "5-8", "--outdir", tmp_path / "out"]
    result = call(doctor.main, ["digits-edm", *flags])
    assert (result.code, result.err) == (0, "") and result.out.endswith("ready\n")
    assert (
        f"--network: {DIGITS / 'edm.safetensors'}, " in result.out and "for 4 images of 3 steps" in result.out
    )
    assert not (tmp_path / "out").exists()
    assert "--class 10 is out of range" in problems("digits-edm", *flags, "--class", 10)["networks"]


@pytest.mark.parametrize(
    ("flags", "fragment"),
    [
        (["--num_channels", 64], "unet.safetensors does not fit the architecture flags"),
        (["--num_classes", 12], "label_emb.weight is [11, 128] in the file but [13, 128]"),
        (["--classifier_path", DIGITS / "judge.safetensors"], "judge.safetensors does not fit"),
    ],
)
def test_weights_that_do_not_fit_the_flags(tmp_path, flags, fragment):
    found = problems("digits", *QUICK, *flags, "--out", tmp_path / "out")
    assert list(found) == ["networks"] and fragment in found["networks"]


def test_files_that_are_missing_are_all_named_with_the_command_that_fetches_them(tmp_path, monkeypatch):
    changed = {
        "model_path": str(tmp_path / "128x128_diffusion.pt"),
        "classifier_path": str(tmp_path / "128x128_classifier.pt"),
    }
    monkeypatch.setitem(PRESETS, "imagenet128-finetuned", {**PRESETS["imagenet128-finetuned"], **changed})
    found = problems("imagenet128-finetuned", "--out", tmp_path / "out")
    assert list(found) == ["--model_path", "--classifier_path"]
    for flag, path in changed.items():
        assert (
            f"no checkpoint at {path}; fetch it with `python scripts/download.py {Path(path).name}`"
            == found[f"--{flag}"]
        )


def test_too_little_memory_is_told_before_the_run(tmp_path, monkeypatch):
    resident = [10**9, 2 * 10**9]
    monkeypatch.setattr(machine, "resident_memory", lambda: resident.pop(0))
    monkeypatch.setattr(machine, "available_memory", lambda device: 1)
    found = problems("digits", *QUICK, "--out", tmp_path)
    assert list(found) == ["memory"] and "lower --batch_size" in found["memory"]


def test_a_run_that_is_half_done_stays_so_and_goes_on_afterwards(tmp_path, monkeypatch):
    flags, folder = [*QUICK, "--out", tmp_path / "out"], tmp_path / "out"
    rounded = []

    def second_fails(*args):
        rounded.append(args)
        if len(rounded) == 2:
            raise KeyboardInterrupt
        return guided_diffusion.runs.store.to_uint8(*args)

    with monkeypatch.context() as patch:
        patch.setattr(guided_diffusion.runs.job, "to_uint8", second_fails)
        assert call(script.main, ["--preset", "digits", *flags]).code == 130
    before = contents(folder)
    result = call(doctor.main, ["digits", *flags])
    assert result.code == 0 and f"folder: {folder}, 2 of 4 samples are there" in result.out
    assert "seed 0 -> 1" in problems("digits", *flags, "--seed", 1)["folder"]
    assert contents(folder) == before
    assert call(script.main, ["--preset", "digits", *flags]).code == 0
    assert f"folder: {folder}, 4 of 4 samples are there" in call(doctor.main, ["digits", *flags]).out


@pytest.mark.parametrize(
    ("flags", "code", "fragments"),
    [
        (["digit"], 1, ["unknown preset 'digit'", *PRESETS, *EDM_PRESETS]),
        ([], 2, ["PRESET"]),
        (["digits", "--num_sampl", 3], 2, ["--num_sampl"]),
        (["digits", "--labels", "10"], 1, ["class 10", "0 to 9"]),
    ],
)
def test_calls_that_mean_nothing_end_in_one_line(tmp_path, flags, code, fragments):
    result = call(doctor.main, [*flags, *(["--out", tmp_path / "out"] if flags else [])])
    assert (result.code, result.out) == (code, "")
    assert result.err.count("\n") == 1 and all(fragment in result.err for fragment in fragments)
