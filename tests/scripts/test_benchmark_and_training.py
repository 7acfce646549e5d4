"""The benchmark prints its figures, and the training script writes files that load."""

import contextlib
import io
import json
import re
import subprocess
import time
from functools import partial

import numpy as np
import pytest
import torch
from forked import Forked
from helpers import call, environment, load_script

from classifiers import load_classifier, load_decoder
from guided_diffusion.dit import DiT, load_dit
from guided_diffusion.edm import load_edm_network
from guided_diffusion.files.checkpoints import load_state_dict
from guided_diffusion.files.pretrained import PRETRAINED_DIR, sha256
from guided_diffusion.files.state_dicts import load_into
from guided_diffusion.flags.fields import configure
from guided_diffusion.flags.presets import PRESETS
from guided_diffusion.script_util import create_from_flags


def test_the_benchmark_prints_its_figures(monkeypatch):
    script = load_script("benchmark")
    monkeypatch.setattr(script, "plain_convolution_rate", partial(script.plain_convolution_rate, size=16))
    monkeypatch.setattr(time, "perf_counter", time.process_time)  # whatever else runs on the machine
    result = call(script.main, ["--preset", "digits", "--device", "cpu", "--repeats", "1"])
    assert result.code == 0, result.err
    for figure in (
        r"network, float32: \d+ GFLOP/s, \d+% of a plain 3x3 convolution's \d+ GFLOP/s",
        r"bfloat16 makes the guided step \d+\.\d\d times as fast",
        r"peak resident memory of the process \d+\.\d\d GB",
        r"guidance takes \d+\.\d% of the float32 step",
    ):
        assert re.search(figure, result.out), result.out
    (added,) = re.findall(r"guidance adds to an unguided float32 step, .*: (.*)", result.out)
    shares = {text.rpartition(" ")[0]: float(text.rpartition(" ")[2][:-1]) for text in added.split(", ")}
    names = ["at every step", "--guidance_every 4", "--guidance_interval 0,5", "both"]
    assert list(shares) == names and shares["both"] < shares["--guidance_every 4"] < shares["at every step"]


def test_the_figures_of_a_gpu(monkeypatch, capsys):
    """Its clock and memory are the CPU's here; what is compiled is left out."""
    for name, value in (
        ("synchronize", None),
        ("reset_peak_memory_stats", None),
        ("max_memory_allocated", 2**30),
    ):
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
    script, cuda = load_script("benchmark"), load_script("benchmark_cuda")
    monkeypatch.setattr(cuda, "kernel_seconds", lambda run: 0.0)
    monkeypatch.setattr(cuda, "matrix_rate", lambda device: 1e12)
    monkeypatch.setattr(cuda, "VARIANTS", dict(list(cuda.VARIANTS.items())[:3]))
    config = configure(script.BenchmarkFlags, {"digits": {}}, {"preset": "digits", "device": "cpu"})
    step = script.GuidedStep(config, torch.device("cpu"))
    cuda.report(step, [1, 2], 1)
    cuda.compare(step, [2], 1)
    first, *lines = capsys.readouterr().out.splitlines()
    assert "1 TFLOP/s" in first and [line[: line.index(",")] for line in lines[:2]] == ["float16 step"] * 2
    for line in lines[:2]:
        assert re.search(
            r"batch \d: 0\.\d+ s a step, [\d.]+ images/s of 25 steps, \d+% of the matrix peak", line
        )
    assert [line.rpartition(", batch 2: ")[0] for line in lines[2:]] == list(cuda.VARIANTS)
    assert "batch 2: 1.00 times as fast" in lines[2]


def test_the_benchmark_of_dit_prints_a_line_for_each_decoder(monkeypatch):
    pytest.importorskip("diffusers")
    script = load_script("benchmark_dit")
    tiny = partial(DiT, hidden_size=32, depth=1, num_heads=2)
    monkeypatch.setattr(script, "DIT_MODELS", {"DiT-XL/2": tiny})
    monkeypatch.setattr(script, "AUTOENCODER", script.AUTOENCODER | {"block_out_channels": (32, 32, 32, 32)})
    monkeypatch.setattr(script, "WAYS", ("vae with checkpointing", "linear"))
    small = {
        **script.DIT_PRESETS["imagenet256-dit-resnet101"],
        "image_size": 64,
        "classifier_type": "resnet18",
    }
    monkeypatch.setitem(script.DIT_PRESETS, "imagenet256-dit-resnet101", small)
    monkeypatch.setattr(script, "in_own_process", script.timed_step)
    with contextlib.redirect_stdout(io.StringIO()) as out:
        script.measure("imagenet256-dit-resnet101", 1, "cpu")
    assert out.getvalue().startswith("preset imagenet256-dit-resnet101: random weights, batch 1, float32; ")
    for line, way in zip(out.getvalue().splitlines()[1:], script.WAYS, strict=True):
        texts = [re.search(rf"{part} (\d+\.\d+) s", line)[1] for part in script.PARTS]
        network, *others = map(float, texts)
        half = 0.5 * 10.0 ** -len(texts[0].partition(".")[2])  # what rounding may have taken from each part
        adds, every = map(
            float, re.search(r"adds ([\d.]+)%, with --guidance_every 8 ([\d.]+)%", line).groups()
        )
        assert line.startswith(f"{way}: ") and "peak memory" in line
        assert all(float(count) >= 0 for count in re.findall(r"\((\S+) GFLOP\)", line))
        least, most = (sum(others) + sign * half * len(others) for sign in (-1, 1))
        assert 100 * least / (network + half) - 1 <= adds <= 100 * most / max(network - half, 1e-9) + 1
        assert every == pytest.approx(adds / 8, abs=0.1)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--variants"], "error: --variants given on the CPU, and is for CUDA: drop it"),
        (["--batch_sizes", "1,2"], "error: --batch_sizes given on the CPU, and is for CUDA: drop it"),
        (["--repeats", "0"], "error: --repeats must be at least 1, got 0"),
        (["--evaluation"], "error: --device does not go with --evaluation or --engine: drop it"),
        (["--preset", "imagenet128-unguided"], "imagenet128-unguided has no off-the-shelf classifier"),
        (["--preset", "imagenet256-dit"], "preset imagenet256-dit has no classifier"),
        (["--preset", "imagenet256-dit-resnet101", "--reuse_activations", "1"], "--reuse_activations is for"),
    ],
)
def test_the_benchmark_refuses_what_it_cannot_measure(flags, message):
    result = call(load_script("benchmark").main, ["--preset", "digits", "--device", "cpu", *flags])
    assert result.code == 1 and message in result.err


@pytest.fixture
def evaluation_benchmark(monkeypatch):
    """The script with sizes that take seconds; its child processes find this checkout."""
    script = load_script("benchmark_evaluation")
    sizes = {"DIMENSION": 64, "FEW": 20, "REFERENCE": 300, "SAMPLES": 200, "PICTURES": 2, "FURTHER": 100}
    for name, size in {**sizes, "REAL_BATCHES": 50, "REPEATS": 1}.items():
        monkeypatch.setattr(script, name, size)
    for name, value in environment().items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(subprocess, "Popen", Forked)
    return script


def test_the_evaluation_benchmark_prints_its_four_figures(evaluation_benchmark):
    result = call(evaluation_benchmark.main, [])
    assert result.code == 0, result.err
    machine, frechet, manifolds, extraction, memory = result.out.splitlines()
    assert machine.startswith("machine: ")
    difference = re.search(
        r"[\d.]+% of the [\d.]+ s of scipy.linalg.sqrtm .* relative difference (\S+);", frechet
    )[1]
    assert float(difference) < 1e-6
    assert float(re.search(r"20 images each, singular covariances: (\S+) in", frechet)[1]) > 0
    assert re.search(r"\d+% of the [\d.]+ GFLOP/s of a plain matrix product", manifolds), manifolds
    assert re.search(r"[\d.]+ images/s, \d+% of the bare Inception network's [\d.]+ images/s", extraction), (
        extraction
    )
    for line in (manifolds, memory):
        assert 0.1 < float(re.search(r"peak resident memory of the process (\S+) GB", line)[1]) < 2.5
    assert re.search(r"-?[\d.]+ KB for each of the last 100 images", memory), memory


def test_training_writes_networks_that_load_and_a_record(tmp_path):
    iterations = [f"--{kind}iterations=3" for kind in ("", "edm_", "classifier_")]
    result = call(load_script("train_digits").main, ["--out", str(tmp_path), *iterations])
    assert result.code == 0, result.err
    record = json.loads((tmp_path / "training.json").read_text())
    assert set(record) == {"unet", "edm", "guide", "judge", "features"} and record["unet"]["iterations"] == 3
    hashes = json.loads((tmp_path / "hashes.json").read_text())
    assert set(hashes) == {*(f"{name}.safetensors" for name in record), "reference.npz", "held_out.npz"}
    assert all(entry["sha256"] == sha256(tmp_path / name) for name, entry in hashes.items())
    assert load_edm_network(tmp_path / "edm.safetensors").label_dim == 10
    model, _ = create_from_flags(PRESETS["digits"])
    load_into(model, load_state_dict(tmp_path / "unet.safetensors"), "unet")
    for name in ("guide", "judge"):
        load_classifier(f"digits_{name}", tmp_path / f"{name}.safetensors", num_classes=10)
        assert 0 <= record[name]["accuracy"]["test"] <= 1


def test_training_writes_a_dit_of_the_digits_with_its_decoders(tmp_path):
    pytest.importorskip("diffusers")
    script, few = (
        load_script("train_digits_dit"),
        [f"--{name}_iterations=2" for name in ("vae", "tiny", "dit")],
    )
    result = call(script.main, ["--out", str(tmp_path), *few])
    assert result.code == 0, result.err
    for path in tmp_path.rglob("*.safetensors"):
        assert json.loads(path.with_name("hashes.json").read_text())[path.name]["sha256"] == sha256(path)
    record, net = json.loads((tmp_path / "training.json").read_text()), load_dit(tmp_path / "dit.safetensors")
    assert set(record) == {"vae", "tiny", "dit"} and record["dit"]["iterations"] == 2
    assert (net.num_classes, net.input_size, net.in_channels, net.learn_sigma) == (10, 8, 4, True)
    z = torch.randn(2, 4, 8, 8)
    for kind, name in (("vae", "vae"), ("tiny", "tiny"), ("linear", "linear.safetensors")):
        assert load_decoder(kind, tmp_path / name, size=16)(z).shape == (2, 3, 16, 16)
    decoder = load_decoder("vae", tmp_path / "vae")
    with np.load(PRETRAINED_DIR / "digits/reference.npz") as file:
        images = torch.from_numpy(file["arr_0"]).permute(0, 3, 1, 2) / 127.5 - 1
    with torch.no_grad():
        latents = decoder.network.encode(images).latent_dist.mode() * decoder.scale
    assert float(latents.std()) == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize("flag", ["--iterations", "--edm_iterations", "--classifier_iterations"])
def test_training_needs_iterations(tmp_path, flag):
    result = call(load_script("train_digits").main, ["--out", str(tmp_path / "out"), flag, "0"])
    assert (result.code, result.err.strip()) == (1, f"error: {flag} must be at least 1, got 0")
    assert not (tmp_path / "out").exists()
