"""--dry_run and scripts/doctor.py: what they say of a run, and that they leave no trace. The checks:
tests of runs/dry_run.py.
"""

import re
import shutil

import pytest
from helpers import call, contents, load_script
from samplers import DDPM, DIGITS, RELEASED, STEPS

from guided_diffusion.files.pretrained import sha256
from guided_diffusion.flags.presets import PRESETS
from guided_diffusion.runs import machine

doctor = load_script("doctor").main
QUICK = ("--steps", 2, "--num_samples", 4, "--batch_size", 2)


def problems(*flags):
    """The text of each problem, by subject, of a call that must end with exit code 1 and their number."""
    result = call(doctor, flags)
    assert result.code == 1 and "ready" not in result.out.splitlines(), result.err
    found = dict(re.findall(r"^(.*?): PROBLEM: (.*)$", result.out, re.MULTILINE))
    assert result.err == f"error: {len(found)} problem{'s' * (len(found) > 1)}: see above\n"
    return found


def test_every_sampler_is_ready_and_no_trace_is_left(sampler, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    out = tmp_path / "out"
    result = sampler.run(out, "--dry_run", True, "--log_guidance", True)
    said = result.out.splitlines()
    assert said[-1] == "ready" and result.err == ""
    for flag, path in sampler.system.files.items():
        start = f"--{flag}: {path}, {path.stat().st_size:,} bytes, sha256 {sha256(path)[:16]}"
        assert [line.startswith(start) for line in said].count(True) == 1
    assert f"folder: {out}, 0 of 4 samples are there" in said
    assert f"for 4 images of {STEPS} steps" in result.out
    assert re.search(
        r"\nsteps: .*; guidance adds \d+% to one that asks the classifier(; after .*)?\n", result.out
    )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("sampler", "flags"),
    [(DDPM, ()), (RELEASED, ("--use_classifier", 0, "--format", "png"))],
    ids=["adm", "edm png"],
)
def test_the_doctor_says_what_the_dry_run_says(tmp_path, monkeypatch, sampler, flags):
    monkeypatch.chdir(tmp_path)
    base = ("--preset", name := "digits" if sampler is DDPM else "digits-edm")
    texts = []
    for main, words in ((doctor, base[1:]), (sampler.main, (*base, "--dry_run", True))):
        result = call(main, [*words, "--steps", 2, *flags])
        assert (result.code, result.err) == (0, "")
        texts.append(re.sub(r"\d+\.\d+ (s|GB|minutes|hours)|\d+%", "", result.out))
    assert texts[0] == texts[1] and f"folder: results/{name}, 0 of 300 samples" in texts[0]
    assert ("guide.safetensors" in texts[0]) == (sampler is DDPM)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("flags", "fragment"),
    [
        (["digits", *QUICK, "--num_channels", 64], "unet.safetensors does not fit the architecture flags"),
        (["digits", *QUICK, "--num_classes", 12], "label_emb.weight is [11, 128] in the file but [13, 128]"),
        (
            ["digits", *QUICK, "--classifier_path", DIGITS / "judge.safetensors"],
            "judge.safetensors does not fit",
        ),
        (["digits-edm", "--class", 10], "--class 10 is out of range"),
        (["digits-edm", "--labels", "3,10"], "--labels 3,10: class 10 is out of range"),
    ],
)
def test_what_does_not_fit_is_a_problem_of_the_networks(tmp_path, flags, fragment):
    found = problems(*flags, "--out", tmp_path / "out")
    assert list(found) == ["networks"] and fragment in found["networks"]
    assert not (tmp_path / "out").exists()


def test_files_that_are_missing_are_all_named_with_the_command_that_fetches_them(tmp_path, monkeypatch):
    names = {"model_path": "128x128_diffusion.pt", "classifier_path": "128x128_classifier.pt"}
    absent = {flag: str(tmp_path / name) for flag, name in names.items()}
    monkeypatch.setitem(PRESETS, "imagenet128-finetuned", {**PRESETS["imagenet128-finetuned"], **absent})
    found = problems("imagenet128-finetuned", "--out", tmp_path / "out")
    assert list(found) == ["--model_path", "--classifier_path"]
    for flag, name in names.items():
        told = (f"no checkpoint at {tmp_path / name}", f"`python scripts/download.py {name}`")
        assert all(word in found[f"--{flag}"] for word in told)


def test_too_little_memory_is_told_before_the_run(tmp_path, monkeypatch):
    resident = [10**9, 2 * 10**9]
    monkeypatch.setattr(machine, "resident_memory", lambda: resident.pop(0))
    monkeypatch.setattr(machine, "available_memory", lambda device: 1)
    found = problems("digits", *QUICK, "--out", tmp_path)
    assert list(found) == ["memory"] and "lower --batch_size" in found["memory"]


def test_half_a_run_is_counted_and_stays_as_it_is(tmp_path, finished):
    folder = tmp_path / "half"
    shutil.copytree(finished(DDPM), folder)
    dry = ("--dry_run", True, "--log_guidance", True)
    assert f"folder: {folder}, 4 of 4 samples are there" in DDPM.run(folder, *dry).out
    before = contents(folder)
    refused = DDPM.call(folder, *dry, "--seed", 1)
    assert refused.code == 1 and "folder: PROBLEM: " in refused.out and "seed 0 -> 1" in refused.out
    assert contents(folder) == before
    assert "0 of 4 samples" in DDPM.run(folder, *dry, "--overwrite", True, "--seed", 1).out
    assert contents(folder) == before


@pytest.mark.parametrize(
    ("flags", "code", "fragments"),
    [
        (["digit"], 1, ["unknown preset 'digit'", "scripts/presets.py"]),
        (["digits", "--preset", "digits-edm"], 2, ["two presets", "digits-edm"]),
        (
            ["digits", "--preset", "imagenet128-unguided"],
            2,
            ["two presets", "digits", "imagenet128-unguided"],
        ),
        ([], 2, ["PRESET"]),
        (["digits", "--num_sampl", 3], 2, ["--num_sampl"]),
        (["digits", "--labels", "10"], 1, ["class 10", "0 to 9"]),
    ],
)
def test_calls_that_mean_nothing_end_in_one_line(tmp_path, flags, code, fragments):
    result = call(doctor, [*flags, *(["--out", tmp_path / "out"] if flags else [])])
    assert (result.code, result.out) == (code, "")
    assert result.err.count("\n") == 1 and all(fragment in result.err for fragment in fragments)
