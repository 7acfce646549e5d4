"""What a run writes: images, labels, grid, record, metrics; where, and what it says."""

import json

import numpy as np
import pytest
import torch
from helpers import call, load_samples, samples_bytes, samples_file
from PIL import Image
from samplers import (
    BATCHES,
    DDPM,
    EDM,
    IMAGES,
    PLAIN_EDM,
    RELEASED,
    SCORE,
    levels_apart,
    manifest,
    metrics,
)

from guided_diffusion.files.pixels import ROUNDING
from guided_diffusion.files.pretrained import sha256
from guided_diffusion.files.run_folder import read_metrics

NAME = f"samples_{IMAGES}x16x16x3.npz"


def test_a_finished_folder(sampler, finished):
    folder = finished(sampler)
    names = {path.name for path in folder.iterdir()}
    assert names == {"grid.png", "log.txt", "metrics.jsonl", "run.json", NAME}
    with np.load(samples_file(folder), allow_pickle=False) as file:
        assert sorted(file.files) == ["arr_0", "arr_1"]
        images, labels = file["arr_0"], file["arr_1"]
    assert (images.dtype, images.shape) == (np.uint8, (IMAGES, 16, 16, 3))
    assert (labels.dtype, labels.shape) == (np.int64, (IMAGES,))
    assert set(labels.tolist()) <= set(range(10)) and all(image.std() > 0 for image in images)
    with Image.open(folder / "grid.png") as picture:
        pixels = np.asarray(picture)
    # Cells with a border of one pixel.
    np.testing.assert_array_equal(pixels[1:17, 1:17], images[0])
    np.testing.assert_array_equal(pixels[1:17, 19:35], images[1])


def test_the_record(sampler, finished):
    run, folder = manifest(finished(sampler)), finished(sampler)
    recorded = {**run["settings"], **run["not_compared"]}
    system = sampler.system
    varied = {"timestep_respacing", "steps", "num_samples", "batch_size", "seeds", "uncond_temperature"}
    expected = {key: value for key, value in system.preset.items() if key not in {*varied, *system.files}}
    assert {key: recorded.get(key, "no such flag") for key in expected} == expected
    told = (run["settings"][system.flag], recorded["steps"], recorded["out"])
    assert told == (sampler.choice, 3, str(folder))
    assert f"torch {torch.__version__}" in recorded["device"]
    assert run["settings"]["sha256"] == {key: sha256(path) for key, path in system.files.items()}
    assert run["settings"]["versions"]["torch"] == torch.__version__
    assert run["rounding"] == ROUNDING[system.rounding] and system.noise in run["drawn_by"]["noise"]
    totals = run["totals"]
    assert 0 < totals["guidance_seconds"] < totals["seconds"] and totals["skipped_guidance"] == 0


def test_a_line_for_each_batch_and_call_of_guidance(sampler, finished):
    lines = metrics(finished(sampler))
    calls = list(zip(sampler.steps, sampler.levels, strict=True))
    assert [(line["samples"], line["step"]) for line in lines] == [
        (batch, step) for batch in BATCHES for step, _ in calls
    ]
    assert [line["sigma"] for line in lines[: len(calls)]] == pytest.approx(sampler.levels, rel=2e-4)
    for line in lines:
        assert set(line) == {
            "samples",
            "step",
            "sigma",
            "gradient_norm",
            "confidence",
            "clipped",
            "non_finite",
        }
        assert line["gradient_norm"] > 0 and 0 < line["confidence"] <= 1 and 0 <= line["clipped"] <= 1
        assert line["non_finite"] == 0
    assert list(read_metrics(finished(sampler))) == lines


def test_looking_changes_no_image_and_the_path_is_all_that_stdout_says(sampler, finished, tmp_path):
    result = sampler.run(tmp_path)
    assert samples_bytes(tmp_path) == samples_bytes(finished(sampler))
    assert not (tmp_path / "metrics.jsonl").exists()
    notes = ("noise levels: ", "classifier digits_guide: ")
    said = [line for line in result.err.splitlines() if not line.startswith(notes)]
    assert (result.out, said) == (f"{tmp_path / NAME}\n", [])  # no bar where no terminal is


def test_the_scale_is_part_of_the_gradient_that_is_told(finished, tmp_path):
    DDPM.run(tmp_path, "--classifier_scale", 8, "--log_guidance", True)
    # The first step sees the same images, whatever is added to them.
    norms = [metrics(folder)[0]["gradient_norm"] for folder in (tmp_path, finished(DDPM))]
    assert norms[0] == pytest.approx(4 * norms[1], rel=1e-5)


# PNGs


def pixels(path):
    with Image.open(path) as image:
        assert image.mode == "RGB"
        return np.asarray(image)


def test_pngs_and_their_labels(tmp_path, unguided):
    names = [f"{seed:06d}.png" for seed in range(IMAGES)]
    result = RELEASED.run(tmp_path, base=PLAIN_EDM)
    assert result.out == f"{tmp_path / 'dataset.json'}\n"
    assert {path.name for path in tmp_path.iterdir()} == {*names, "dataset.json", "log.txt", "run.json"}
    images, labels = load_samples(unguided(RELEASED))
    listed = json.loads((tmp_path / "dataset.json").read_text())["labels"]
    assert listed == [[name, label] for name, label in zip(names, labels.tolist(), strict=True)]
    for name, image in zip(names, images, strict=True):
        np.testing.assert_array_equal(pixels(tmp_path / name), image)


def test_subdirs_hold_a_thousand_seeds_each_in_the_order_of_the_seeds(tmp_path, unguided):
    RELEASED.run(tmp_path, "--subdirs", "--seeds", "1000,3,999,123456", base=PLAIN_EDM)
    names = ["001000/001000.png", "000000/000003.png", "000000/000999.png", "123000/123456.png"]
    assert [name for name, _ in json.loads((tmp_path / "dataset.json").read_text())["labels"]] == names
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.png")) == sorted(names)
    image = load_samples(unguided(RELEASED))[0][3]
    assert np.abs(pixels(tmp_path / names[1]).astype(int) - image).max() <= 1


# Where


@pytest.mark.parametrize(
    ("flags", "variable", "expected"),
    [
        ([], None, "results/digits"),
        (["--log_dir", "logs"], None, "logs"),
        ([], "from_environment", "from_environment"),
        (["--out", "here"], "from_environment", "here"),
    ],
)
def test_the_output_folder(tmp_path, monkeypatch, flags, variable, expected):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("OPENAI_LOGDIR", raising=False)
    if variable:
        monkeypatch.setenv("OPENAI_LOGDIR", variable)
    result = call(DDPM.main, [*DDPM.flags, "--num_samples", 1, "--steps", 1, *flags])
    assert result.code == 0, result.err
    assert load_samples(tmp_path / expected)[0].shape == (1, 16, 16, 3)


# Labels


@pytest.mark.parametrize(
    ("flags", "counts"),
    [
        (["--labels", "balanced", "--num_samples", 20], dict.fromkeys(range(10), 2)),
        (["--labels", "3,5-7", "--num_samples", 8], {3: 2, 5: 2, 6: 2, 7: 2}),
        (["--fix_class", "True", "--fix_class_index", 7], {7: 4}),
        (["--fix_class"], {0: 4}),
        (["--labels", "{folder}/labels.txt", "--num_samples", 4], {9: 2, 1: 1, 4: 1}),
        (["--labels", "{folder}/labels.npy", "--num_samples", 4], {9: 2, 1: 1, 4: 1}),
    ],
)
def test_labels_by_flag(tmp_path, flags, counts):
    (tmp_path / "labels.txt").write_text("9 9\n1 4\n")
    np.save(tmp_path / "labels.npy", np.array([9, 9, 1, 4]))
    flags = [str(flag).format(folder=tmp_path) for flag in flags]
    DDPM.run(tmp_path / "out", "--steps", 1, *DDPM.scale_0, *flags)
    labels = load_samples(tmp_path / "out")[1]
    assert dict(zip(*np.unique(labels, return_counts=True), strict=True)) == counts


def test_labels_are_shuffled_by_the_seed_and_random_ones_depend_on_the_index_alone(tmp_path):
    def labels(name, *flags):
        DDPM.run(tmp_path / name, "--steps", 1, *DDPM.scale_0, "--batch_size", 30, *flags)
        return load_samples(tmp_path / name)[1]

    balanced = labels("balanced", "--num_samples", 30)
    assert (np.diff(balanced) < 0).any()
    assert (labels("seed", "--num_samples", 30, "--seed", 1) != balanced).any()
    few, many = (labels(str(n), "--num_samples", n, "--labels", "random") for n in (5, 60))
    np.testing.assert_array_equal(many[:5], few)
    assert set(many) <= set(range(10)) and len(set(many)) > 5


def test_label_files_are_compared_by_what_they_hold_wherever_they_lie(tmp_path):
    one, other = tmp_path / "labels.txt", tmp_path / "elsewhere.txt"
    for path in (one, other):
        path.write_text("3 1 4 1 5")
    quick = ("--steps", 1, *DDPM.scale_0, "--labels")
    DDPM.run(tmp_path / "out", *quick, one)
    assert manifest(tmp_path / "out")["settings"]["sha256"]["labels"] == sha256(one)
    assert "nothing to do" in DDPM.run(tmp_path / "out", *quick, other).err
    other.write_text("3 1 4 1 6")
    result = DDPM.call(tmp_path / "out", *quick, other)
    assert result.code == 1 and "another run's output (sha256 " in result.err


def test_one_class_for_all_seeds_leaves_the_noise_alone(tmp_path):
    # Seed 6 draws a 3 by itself. The label is drawn all the same: the noise of the steps stays the seed's.
    for folder, flags in (("drawn", ()), ("given", ("--class", 3))):
        SCORE.run(tmp_path / folder, "--seeds", 6, "--S_churn", 2, *flags)
    assert samples_bytes(tmp_path / "drawn") == samples_bytes(tmp_path / "given")
    SCORE.run(tmp_path / "many", "--class", 3)
    assert load_samples(tmp_path / "many")[1].tolist() == [3] * IMAGES


CASES = [
    *((DDPM, ("--unconditional", unconditional, "--classifier_scale", scale), "--labels", matters)
      for unconditional, scale, matters in ((True, 0, False), (True, 4, True), (False, 0, True))),
    *((sampler, ("--unconditional", 1), "--class", True) for sampler in (RELEASED, SCORE)),
    (RELEASED, ("--unconditional", 1, *RELEASED.scale_0), "--class", False),
]  # fmt: skip


@pytest.mark.parametrize(("sampler", "flags", "label", "matters"), CASES)
def test_unconditional_hides_the_label_from_the_network_but_not_from_guidance(
    tmp_path, sampler, flags, label, matters
):
    for number in ("3", "8"):
        sampler.run(tmp_path / number, *flags, label, number)
    assert (levels_apart(tmp_path / "3", tmp_path / "8").max() > 0) == matters


def test_an_unconditional_edm_network_is_guided_by_labels_of_the_classifier(tmp_path, files):
    network = ("--network", files / "unconditional.pkl", "--num_classes", 10)
    base = (*EDM, *network)
    for sampler in (RELEASED, SCORE):
        sampler.run(tmp_path / sampler.name, "--guidance_form", sampler.name, base=base)
    drawn = [torch.Generator().manual_seed(seed) for seed in range(IMAGES)]
    expected = [
        (torch.randn(3, 16, 16, generator=g), int(torch.randint(10, (), generator=g)))[1] for g in drawn
    ]
    assert load_samples(tmp_path / "released")[1].tolist() == expected
    assert levels_apart(tmp_path / "released", tmp_path / "score").max() > 0
