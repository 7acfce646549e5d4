"""Numbers that are not finite stop a run and are named by step and sample, or are dropped and counted;
folders that no run can use; and what a shell sees.
"""

import re
import subprocess
import sys

import pytest
import torch
from bad_files import write_classifiers
from helpers import ROOT, TINY_64, TINY_NOISY, call, environment, flags_of
from safetensors import safe_open
from safetensors.torch import save_file
from samplers import ADM_SAMPLERS, DDPM, DIGITS, levels_apart, manifest, metrics

from guided_diffusion.files.checkpoints import load_state_dict


def fails(sampler, folder, *flags, base=None):
    """The one line that the run must end with, nothing complete being left."""
    result = sampler.call(folder, *flags, base=base)
    assert (result.code, result.out) == (1, "")
    assert not [*folder.glob("samples_*.npz"), *folder.glob("dataset.json")]
    return result.err.strip().splitlines()[-1]


# Two batches, of samples 0 and 1, and of 2 and 3.
@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_a_gradient_stops_and_names_step_and_sample(sampler, tmp_path, value):
    calls = len(sampler.levels)
    faulty = write_classifiers(tmp_path / "own.py", calls + 2, 1, value)  # in the second batch's second call
    line = fails(sampler, tmp_path / "out", *faulty)
    step, sigma = sampler.steps[1], sampler.levels[1]
    assert re.search(
        rf"non-finite guidance gradient at step {step} \(sigma {sigma:.1f}.*for sample 3\b", line
    )
    assert "--on_nonfinite skip" in line
    assert len(list((tmp_path / "out").glob("shards/*.npz"))) == 1


def test_skip_drops_that_guidance_alone_and_counts_it(sampler, tmp_path):
    skip = ("--on_nonfinite", "skip", "--log_guidance", True)
    sampler.run(tmp_path / "sound", *write_classifiers(tmp_path / "own.py"), *skip)
    faulty = write_classifiers(tmp_path / "own.py", len(sampler.levels) + 2, 1, "nan")
    result = sampler.run(tmp_path / "faulty", *faulty, *skip)
    assert "dropped 1 times" in result.err
    totals = [manifest(tmp_path / name)["totals"]["skipped_guidance"] for name in ("sound", "faulty")]
    assert totals == [0, 1]
    counted = [line["non_finite"] for line in metrics(tmp_path / "faulty")]
    assert counted == [int(i == len(sampler.levels) + 1) for i in range(2 * len(sampler.levels))]
    assert not levels_apart(tmp_path / "sound", tmp_path / "faulty")[[0, 1, 2]].any()


@pytest.fixture
def noisy(files):
    """A run guided by a noisy classifier that answers NaN."""
    flags = flags_of({**TINY_64, **TINY_NOISY, "timestep_respacing": 2})
    return (*flags, "--model_path", files / "tiny64.pt", "--classifier_path", files / "nan_noisy.pt")


@pytest.mark.parametrize("sampler", ADM_SAMPLERS[:2], ids=lambda sampler: sampler.name)
def test_a_noisy_classifier_names_its_timestep_or_is_dropped(sampler, noisy, tmp_path):
    flags = ("--sampler", sampler.name, "--num_samples", 1)
    assert "at step 999 for sample 0;" in fails(sampler, tmp_path / "stop", *flags, base=noisy)
    DDPM.run(tmp_path / "skip", *flags, "--on_nonfinite", "skip", base=noisy)
    assert manifest(tmp_path / "skip")["totals"]["skipped_guidance"] == 2


def infinite_network(tmp_path, sampler):
    """The sampler's network, which answers infinity for a colour; a clamp would make it black."""
    flag = f"--{sampler.system.network}"
    if sampler.script != "edm_sample":
        state = load_state_dict(sampler.system.files[sampler.system.network])
        bias = "out.2.bias" if sampler.script == "classifier_sample" else "final_layer.linear.bias"
        state[bias][0] = float("inf")
        torch.save(state, tmp_path / "network.pt")
        return flag, tmp_path / "network.pt"
    with safe_open(DIGITS / "edm.safetensors", "pt") as file:
        state, about = {key: file.get_tensor(key) for key in file.keys()}, file.metadata()  # noqa: SIM118
    state["model.out_conv.bias"][0] = float("inf")
    save_file(state, tmp_path / "edm.safetensors", about)
    return flag, tmp_path / "edm.safetensors"


def test_a_network_that_answers_infinity_makes_no_black_image(sampler, tmp_path):
    line = fails(sampler, tmp_path / "out", *infinite_network(tmp_path, sampler))
    assert re.search(r"non-finite network output at step \d+", line) and "for sample 0" in line, line


# Output folders


@pytest.mark.parametrize("flag", ["--out", "--log_dir"])
@pytest.mark.parametrize("place", ["{file}", "{file}/below", "/proc/elsewhere", "/dev/null/below"])
def test_an_unwritable_output_folder(tmp_path, flag, place):
    (file := tmp_path / "file").write_text("mine")
    folder = place.format(file=file)
    result = call(DDPM.main, [*DDPM.flags, flag, folder])
    assert result.code == 1
    assert (
        f"cannot write to the output folder {folder}" in result.err and "choose another --out" in result.err
    )
    assert file.read_text() == "mine"


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"foo": 1}', '{"settings": 3}'])
def test_a_folder_with_a_manifest_of_something_else(tmp_path, content):
    (tmp_path / "run.json").write_text(content)
    line = fails(DDPM, tmp_path)
    assert "run.json" in line and str(tmp_path) in line and "--out" in line
    assert (tmp_path / "run.json").read_text() == content


@pytest.mark.parametrize(
    ("name", "fix"),
    [("samples_4x16x16x3.npz", "or pass --overwrite True"), ("dataset.json", "choose another --out")],
)
def test_a_folder_of_samples_without_a_manifest(tmp_path, name, fix):
    (tmp_path / name).write_bytes(b"somebody's")
    result = DDPM.call(tmp_path)
    told = (str(tmp_path), "no run.json", "choose another --out", fix)
    assert result.code == 1 and [word for word in told if word not in result.err] == []
    assert (tmp_path / name).read_bytes() == b"somebody's"


# In a shell


def test_the_shell_sees_one_line_and_the_exit_code(tmp_path):
    command = [
        sys.executable,
        ROOT / "scripts/edm_sample.py",
        "--preset",
        "digits-edm",
        "--network",
        "absent.pkl",
    ]
    done = subprocess.run(
        command, env=environment(), cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, done.stdout) == (1, "") and done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: --network: no checkpoint at absent.pkl")
    assert not list(tmp_path.rglob("*.npz"))
