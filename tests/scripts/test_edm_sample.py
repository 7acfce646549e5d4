"""scripts/edm_sample.py: that image i is that of seed i, what is written, what its flags do, how runs go on,
and what is refused.
"""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from edm_pickles import TINY, Call, dumps, network, random_net, snapshot
from helpers import ROOT, call, contents, environment, load_samples, load_script, samples_bytes
from PIL import Image

import guided_diffusion.runs.job
import guided_diffusion.runs.store
from classifiers import load_classifier
from guided_diffusion.edm import EDMPrecond, edm_sampler, load_edm_network
from guided_diffusion.files.pretrained import PRETRAINED_DIR, sha256
from guided_diffusion.flags.parser import parse_flags, parse_numbers
from guided_diffusion.flags.presets import EDM_PRESETS, PRESETS, script_of
from guided_diffusion.guidance import ClassifierGuidance, GuidedDenoiser, released_edm_guidance

script = load_script("edm_sample")
DIGITS = PRETRAINED_DIR / "digits"
QUICK = ("--preset", "digits-edm", "--steps", 2, "--seeds", "0-4", "--batch", 2)
PLAIN = (
    "--network",
    DIGITS / "edm.safetensors",
    "--steps",
    2,
    "--seeds",
    "0-4",
    "--batch",
    2,
)  # no guidance, PNGs
FORMS = {
    "unguided": ("--use_classifier", 0),
    "released": ("--guidance_form", "released"),
    "score": ("--guidance_form", "score", "--classifier_scale", 0.5, "--gamma_factor", 0.3),
}


def sample(folder, *flags, base=QUICK):
    result = call(script.main, [*base, *flags, "--outdir", folder])
    assert result.code == 0, result.err
    return result


def labels_of(folder):
    return dict(json.loads((folder / "dataset.json").read_text())["labels"])


def pixels(path):
    with Image.open(path) as image:
        assert image.mode == "RGB"
        return np.asarray(image)


@pytest.fixture(scope="module")
def guided(tmp_path_factory):
    folder = tmp_path_factory.mktemp("guided")
    sample(folder)
    return folder


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """The PNGs of the same seeds, unguided."""
    folder = tmp_path_factory.mktemp("plain")
    sample(folder, base=PLAIN)
    return folder


# Image i is that of seed i

CASES = [(form, churn) for form in FORMS for churn in (0, 10)]
MIXED = "7,3,11,0-2,99,12-98,4-6,8-10"


def case_flags(form, churn, seeds, batch):
    return [
        "--preset",
        "digits-edm",
        "--steps",
        4,
        "--S_churn",
        churn,
        *FORMS[form],
        "--seeds",
        seeds,
        "--batch",
        batch,
    ]


@pytest.mark.parametrize(("form", "churn"), CASES)
def test_neither_batch_nor_order_changes_label_or_image_of_a_seed(tmp_path, form, churn):
    runs = []
    for seeds, batch in (("0-99", 50), (MIXED, 9), ("5,0-3", 1)):
        folder = tmp_path / str(batch)
        sample(folder, base=case_flags(form, churn, seeds, batch))
        runs.append(dict(zip(parse_numbers(seeds, ""), zip(*load_samples(folder), strict=True), strict=True)))
    whole, *others = runs
    apart = []
    for other in others:
        assert {seed: label for seed, (_, label) in other.items()} == {seed: whole[seed][1] for seed in other}
        apart += [np.abs(image.astype(int) - whole[seed][0]).max() for seed, (image, _) in other.items()]
    assert len(apart) == 105
    # A tie in a max-pooling layer can send one guided image astray.
    assert (np.array(apart) <= 1).mean() >= (1 if form == "unguided" else 0.99)


# Each process goes through all the lines within one process group, so that what starts it is paid for once.
DRIVER = """
import json, runpy, sys
import torch.distributed as dist
leave, dist.destroy_process_group = dist.destroy_process_group, lambda: None
for sys.argv in json.loads(sys.argv[1]):
    runpy.run_path(sys.argv[0], run_name="__main__")
leave()
"""


@pytest.mark.parametrize(("processes", "churn"), [(2, 0), (3, 10)])
def test_several_processes_write_the_bytes_of_one(tmp_path, processes, churn):
    lines = {form: case_flags(form, churn, "7,3,11,0-2,4-6", 2) for form in FORMS}
    (driver := tmp_path / "driver.py").write_text(DRIVER)
    commands = [
        [str(ROOT / "scripts/edm_sample.py"), *map(str, line), f"--outdir={tmp_path / form}"]
        for form, line in lines.items()
    ]
    launcher = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        str(processes),
    ]
    done = subprocess.run(
        [*launcher, driver, json.dumps(commands)],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    for form, line in lines.items():
        sample(tmp_path / f"{form} alone", base=line)
        assert samples_bytes(tmp_path / form) == samples_bytes(tmp_path / f"{form} alone")


class Published:
    """What EDM draws for each seed, by generators that torch seeds; called, the noise of a step."""

    def __init__(self, seeds):
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        self.latents = torch.stack([torch.randn(3, 16, 16, generator=g) for g in self.generators])
        self.labels = torch.stack([torch.randint(10, (), generator=g) for g in self.generators])

    def __call__(self, x):
        return torch.stack([torch.randn(x.shape[1:], dtype=x.dtype, generator=g) for g in self.generators])


@pytest.mark.parametrize("form", FORMS)
def test_it_is_the_public_sampler_with_the_published_noise(tmp_path, form):
    flags = (
        "--S_churn",
        3,
        "--S_noise",
        1.003,
        "--solver",
        "euler",
        "--disc",
        "ve",
        "--schedule",
        "vp",
        "--scaling",
        "vp",
    )
    sample(tmp_path, *flags, *FORMS[form], "--seeds", "9,4,70000", "--batch", 3)
    net, noise = load_edm_network(DIGITS / "edm.safetensors"), Published([9, 4, 70000])
    y, classifier = (
        noise.labels,
        load_classifier("digits_guide", num_classes=10, softplus_beta=5.0, image_size=16),
    )
    temperatures = {"joint_temperature": 1.0, "marginal_temperature": 0.0}
    score = ClassifierGuidance(classifier, classifier_scale=0.5, gamma_factor=0.3, **temperatures)
    released = released_edm_guidance(classifier, max_guidance=0.03, add_factor=0.3, **temperatures)
    options = {"num_steps": 2, "S_churn": 3, "S_noise": 1.003, "sigma_min": 0.02, "sigma_max": 100}
    options |= {"solver": "euler", "disc": "ve", "schedule": "vp", "scaling": "vp"}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    x = edm_sampler(
        GuidedDenoiser(net, score, y) if form == "score" else net,
        *(noise.latents, torch.eye(10)[y], noise),
        guidance=released if form == "released" else None,
        **options,
    )
    torch.set_num_threads(threads)
    images, labels = load_samples(tmp_path)
    np.testing.assert_array_equal(labels, y)
    np.testing.assert_array_equal(images, (x * 127.5 + 128).clip(0, 255).to(torch.uint8).permute(0, 2, 3, 1))


# What is written


def test_npz(guided):
    assert sorted(path.name for path in guided.iterdir()) == [
        "grid.png",
        "log.txt",
        "run.json",
        "samples_5x16x16x3.npz",
    ]
    images, labels = load_samples(guided)
    assert (images.dtype, images.shape, labels.dtype, labels.shape) == (
        np.uint8,
        (5, 16, 16, 3),
        np.int64,
        (5,),
    )
    assert all(image.std() > 0 for image in images)


def test_pngs_and_their_labels(plain, tmp_path):
    names = [f"{seed:06d}.png" for seed in range(5)]
    assert sorted(path.name for path in plain.iterdir()) == [*names, "dataset.json", "log.txt", "run.json"]
    result = sample(tmp_path, "--format", "npz", base=PLAIN)
    assert result.out.strip() == str(tmp_path / "samples_5x16x16x3.npz")
    images, labels = load_samples(tmp_path)
    assert labels_of(plain) == dict(zip(names, labels.tolist(), strict=True))
    for name, image in zip(names, images, strict=True):
        np.testing.assert_array_equal(pixels(plain / name), image)


def test_subdirs_hold_a_thousand_seeds_each(tmp_path, plain):
    result = sample(tmp_path, "--subdirs", "--seeds", "1000,4,999,123456", base=PLAIN)
    names = ["001000/001000.png", "000000/000004.png", "000000/000999.png", "123000/123456.png"]
    assert result.out.strip() == str(tmp_path / "dataset.json")
    assert list(labels_of(tmp_path)) == names  # in the order of --seeds
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.png")) == sorted(names)
    assert np.abs(pixels(tmp_path / names[1]).astype(int) - pixels(plain / "000004.png")).max() <= 1


def test_the_manifest(guided):
    run = json.loads((guided / "run.json").read_text())
    files = {
        "network": sha256(DIGITS / "edm.safetensors"),
        "classifier_path": sha256(DIGITS / "guide.safetensors"),
    }
    assert run["settings"]["sha256"] == files
    assert (run["settings"]["steps"], run["settings"]["seeds"]) == (2, "0-4")
    assert run["not_compared"]["S_max"] == "inf"  # without churn it decides nothing
    assert run["rounding"].startswith("x * 127.5 + 128") and "seed % 2**32" in run["drawn_by"]["noise"]
    assert 0 < run["totals"]["guidance_seconds"] < run["totals"]["seconds"]


# Flags


def test_edms_own_spelling(tmp_path):
    line = f"--network={DIGITS / 'edm.safetensors'} --outdir={tmp_path / 'edm'} --seeds=0-3,7 --batch=2 --steps=3 --S_churn=1 --S_noise=1.003"
    result = call(script.main, line.split())
    assert result.code == 0, result.err
    assert list(labels_of(tmp_path / "edm")) == [f"{seed:06d}.png" for seed in (0, 1, 2, 3, 7)]
    long = (
        "--seeds",
        "0-3,7",
        "--batch_size",
        2,
        "--steps",
        3,
        "--S_churn",
        1,
        "--S_noise",
        1.003,
        "--out",
        tmp_path / "ours",
    )
    assert call(script.main, ["--network", DIGITS / "edm.safetensors", *long]).code == 0
    assert (
        contents(tmp_path / "edm", but="log.txt").keys() == contents(tmp_path / "ours", but="log.txt").keys()
    )
    assert (tmp_path / "edm/000007.png").read_bytes() == (tmp_path / "ours/000007.png").read_bytes()


def test_flags_of_elucd_are_those_of_the_preset(tmp_path, guided):
    line = "--use_classifier 1 --classifier_type digits_guide --softplus_beta 5.0 --joint_temperature 1.0 --uncond_temperature 0.0"
    sample(
        tmp_path, *line.split(), "--max_guidance", 0.03, "--add_factor", 0.3, "--format", "npz", base=PLAIN
    )
    assert samples_bytes(tmp_path) == samples_bytes(guided)


def test_the_preset_of_the_paper_is_the_published_line():
    args = vars(parse_flags(script.create_argparser(), ["--preset", "imagenet64-edm-resnet101"], EDM_PRESETS))
    published = {
        "classifier_type": "resnet101",
        "softplus_beta": 5.0,
        "joint_temperature": 1.0,
        "uncond_temperature": 0.0,
    }
    published |= {
        "max_guidance": 0.004,
        "add_factor": 0.3,
        "steps": 10,
        "S_churn": 0.0,
        "seeds": "0-49999",
        "guidance_form": "released",
    }
    assert {key: args[key] for key in published} == published
    defaults = vars(parse_flags(script.create_argparser(), [], EDM_PRESETS))
    expected = {
        "steps": 18,
        "rho": 7.0,
        "S_churn": 0.0,
        "S_min": 0.0,
        "S_max": float("inf"),
        "S_noise": 1.0,
        "batch_size": 64,
    }
    expected |= {
        "use_classifier": False,
        "softplus_beta": 5.0,
        "uncond_temperature": 1.0,
        "max_guidance": 0.001,
        "add_factor": 0.0,
    }
    assert {key: defaults[key] for key in expected} == expected


def test_one_class_for_all(tmp_path, plain):
    sample(tmp_path, "--class", 3, base=PLAIN)
    assert set(labels_of(tmp_path).values()) == {3}
    assert any(label != 3 for label in labels_of(plain).values())
    # Seed 6 draws a 3 by itself. The label is drawn all the same, so that the noise of the steps stays the
    # seed's.
    for folder, flags in (("drawn", ()), ("given", ("--class", 3))):
        sample(tmp_path / folder, "--seeds", 6, "--S_churn", 2, *flags, base=PLAIN)
    assert (tmp_path / "drawn/000006.png").read_bytes() == (tmp_path / "given/000006.png").read_bytes()


@pytest.mark.parametrize(
    ("form", "label_matters"), [("unguided", False), ("released", True), ("score", True)]
)
def test_unconditional_hides_the_label_from_the_network_but_not_from_guidance(tmp_path, form, label_matters):
    for label in (3, 8):
        sample(tmp_path / str(label), "--unconditional", 1, "--class", label, *FORMS[form])
    images, others = (load_samples(tmp_path / label)[0] for label in "38")
    assert (images != others).any() == label_matters


def test_one_step_is_the_networks_answer_at_sigma_max(tmp_path):
    sample(tmp_path, "--steps", 1, "--batch", 5, "--format", "npz", base=PLAIN)
    noise, net = Published(range(5)), load_edm_network(DIGITS / "edm.safetensors")
    denoised = net(80 * noise.latents.double(), 80, torch.eye(10)[noise.labels])
    levels = (denoised.double() * 127.5 + 128).clip(0, 255).permute(0, 2, 3, 1).numpy()
    assert np.abs(load_samples(tmp_path)[0] + 0.5 - levels).max() < 0.51


def test_an_unconditional_network_is_guided_by_labels_of_the_classifier(tmp_path):
    path = pickled(tmp_path, label_dim=0)
    flags = (
        "--network",
        path,
        "--seeds",
        "0-9",
        "--steps",
        2,
        "--use_classifier",
        1,
        "--classifier_type",
        "digits_guide",
        "--num_classes",
        10,
    )
    for form in ("released", "score"):
        sample(tmp_path / form, "--guidance_form", form, base=flags)
        assert list(labels_of(tmp_path / form).values()) == Published(range(10)).labels.tolist()


@pytest.mark.parametrize(
    "flags",
    [
        *(["--S_churn", 3], ["--sigma_min", 0.1], ["--sigma_max", 40], ["--solver", "euler"]),
        *(
            ["--disc", "vp"],
            ["--disc", "ve"],
            ["--disc", "iddpm"],
            ["--schedule", "vp"],
            ["--schedule", "ve"],
            ["--scaling", "vp"],
        ),
        *(
            ["--softplus_beta", "inf"],
            ["--uncond_temperature", 1],
            ["--max_guidance", 0.1],
            ["--add_factor", 0],
        ),
        *(["--guidance_form", "score"], ["--guidance_interval", "1,100"], ["--classifier_path", "random"]),
    ],
    ids=lambda flags: "=".join(map(str, flags)),
)
def test_every_flag_that_is_accepted_is_used(tmp_path, guided, flags):
    sample(tmp_path, *flags)
    assert samples_bytes(tmp_path) != samples_bytes(guided)


@pytest.mark.parametrize(
    ("base", "flags"),
    [
        *[(["--S_churn", 3], flags) for flags in (["--S_min", 1], ["--S_max", 1], ["--S_noise", 1.1])],
        *[
            (FORMS["score"], flags)
            for flags in (["--joint_temperature", 3], ["--classifier_scale", 2], ["--gamma_factor", 1])
        ],
        (["--steps", 3], ["--rho", 5]),
    ],
    ids=lambda flags: str(flags[0]),
)
def test_flags_are_used_that_count_beside_another(tmp_path, base, flags):
    sample(tmp_path / "without", *base)
    sample(tmp_path / "with", *base, *flags)
    assert samples_bytes(tmp_path / "without") != samples_bytes(tmp_path / "with")


@pytest.mark.parametrize(
    "flags", [("--max_guidance", 0), ("--guidance_form", "score", "--classifier_scale", 0)]
)
def test_strength_0_has_the_bytes_of_an_unguided_run(tmp_path, flags):
    sample(tmp_path / "off", *flags)
    sample(tmp_path / "unguided", "--use_classifier", 0)
    assert samples_bytes(tmp_path / "off") == samples_bytes(tmp_path / "unguided")


@pytest.mark.parametrize(("form", "calls"), [("released", 2), ("score", 3)])
def test_guidance_is_logged_at_every_call(tmp_path, form, calls):
    sample(tmp_path, "--log_guidance", 1, "--guidance_form", form)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["samples"] for line in lines] == [
        pair for pair in ([0, 2], [2, 4], [4, 5]) for _ in range(calls)
    ]
    assert [line["sigma"] for line in lines[:calls]] == pytest.approx([80, 0.002, 0.002][:calls], rel=1e-6)


# Going on


@pytest.mark.parametrize(
    ("base", "last"),
    [(QUICK, "samples_5x16x16x3.npz"), ((*PLAIN, "--subdirs"), "000003.png")],
    ids=["npz", "png"],
)
@pytest.mark.parametrize("cut", ["while sampling", "while writing the result"])
def test_an_interrupted_run_goes_on_and_ends_with_the_same_bytes(tmp_path, monkeypatch, base, last, cut):
    sample(tmp_path / "whole", base=base)
    rounded, replace = [], os.replace

    def to_uint8(*args):
        rounded.append(args)
        if len(rounded) == 3:
            raise KeyboardInterrupt
        return guided_diffusion.files.pixels.to_uint8(*args)

    def fails(source, target):
        if str(target).endswith(last):
            raise KeyboardInterrupt
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(
            *(
                (guided_diffusion.runs.job, "to_uint8", to_uint8)
                if cut == "while sampling"
                else (os, "replace", fails)
            )
        )
        result = call(script.main, [*base, "--outdir", tmp_path / "cut"])
    assert result.code == 130 and result.err.rstrip().endswith("the same command goes on from there")
    assert not (tmp_path / "cut/dataset.json").exists() and not list((tmp_path / "cut").glob("*.npz"))
    drawn = []
    with monkeypatch.context() as patch:
        patch.setattr(
            guided_diffusion.runs.job,
            "to_uint8",
            lambda *args: drawn.append(args) or guided_diffusion.files.pixels.to_uint8(*args),
        )
        sample(tmp_path / "cut", base=base)
    assert len(drawn) == (1 if cut == "while sampling" else 0)
    whole, cut = (contents(tmp_path / name) for name in ("whole", "cut"))
    assert whole.keys() == cut.keys()
    assert all(cut[path] == whole[path] for path in whole if path.name not in ("run.json", "log.txt"))


@pytest.mark.parametrize("base", [QUICK, PLAIN], ids=["npz", "png"])
def test_a_complete_run_is_left_alone_and_another_flag_refused_until_overwrite(tmp_path, base):
    sample(tmp_path, base=base)
    before = contents(tmp_path, but="log.txt")
    again = sample(tmp_path, base=base)
    assert "complete, nothing to do" in again.err
    refused(
        tmp_path,
        ["--S_churn", 1],
        "another run's output",
        "S_churn 0.0 -> 1.0",
        "--overwrite True",
        base=base,
    )
    assert contents(tmp_path, but="log.txt") == before
    (tmp_path / "notes.txt").write_text("mine")
    sample(tmp_path, "--seeds", "5-6", "--overwrite", 1, base=base)
    files = (
        ["000005.png", "000006.png", "dataset.json"]
        if base is PLAIN
        else ["grid.png", "samples_2x16x16x3.npz"]
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        [*files, "log.txt", "notes.txt", "run.json"]
    )


def test_flags_without_effect_do_not_make_another_run(tmp_path):
    sample(tmp_path)
    for flags in (["--preset", "digits-edm", "--device", "cpu"], ["--guidance_form", "released"]):
        assert "complete, nothing to do" in sample(tmp_path, *flags).err


# What is refused


def refused(folder, flags, *fragments, code=1, base=QUICK):
    """The script must end with one line that holds the fragments, and change nothing in the folder."""
    before = contents(folder, but="log.txt")
    result = call(script.main, [*base, "--outdir", folder, *flags])
    assert (result.code, result.out) == (code, ""), result.err
    last = result.err.strip().splitlines()[-1]
    assert last.startswith("error: " if code == 1 else "script.py: error: ")
    assert code == 2 or result.err.strip() == last
    assert [fragment for fragment in map(str, fragments) if fragment not in last] == [], last
    assert contents(folder, but="log.txt") == before
    return last


def pickled(folder, **options):
    """A tiny network for 16x16 images in EDM's own format."""
    arguments = {**TINY, "img_resolution": 16, "label_dim": 10, **options}
    path = folder / "edm.pkl"
    path.write_bytes(dumps(snapshot(random_net(EDMPrecond, arguments), arguments)))
    return path


UNGUIDED = ("--use_classifier", 0)


@pytest.mark.parametrize(
    ("flags", "fragments"),
    [
        (["--network", ""], ["--network is missing", "--preset digits-edm"]),
        (["--network", "absent.pkl"], ["no checkpoint at absent.pkl", "scripts/download.py"]),
        (
            ["--network", "edm-imagenet-64x64-cond-adm.pkl"],
            ["python scripts/download.py edm-imagenet-64x64-cond-adm.pkl"],
        ),
        (["--network", DIGITS / "unet.safetensors"], ["unet.safetensors", "scripts/convert_checkpoint.py"]),
        (["--network", DIGITS / "reference.npz"], ["reference.npz is no EDM network", ".pkl"]),
        ([*UNGUIDED, "--max_guidance", 0.1], ["--max_guidance", "--use_classifier 1"]),
        ([*UNGUIDED, "--classifier_scale", 2], ["--classifier_scale", "--use_classifier 1"]),
        ([*UNGUIDED, "--log_guidance", 1], ["--log_guidance", "--use_classifier 1"]),
        (["--classifier_scale", 2], ["--classifier_scale", "score", "released"]),
        (["--gamma_factor", 2], ["--gamma_factor", "score", "released"]),
        (["--guidance_form", "score", "--max_guidance", 0.1], ["--max_guidance", "score", "released"]),
        (["--guidance_form", "score", "--add_factor", 0.1], ["--add_factor", "score", "released"]),
        (["--seeds", "1,0-3"], ["--seeds 1,0-3", "different"]),
        (["--seeds=-1"], ["--seeds -1", "from 0 on"]),
        (["--seeds", "3-1"], ["--seeds '3-1'", "1,2,5-10"]),
        (["--seeds", "1;2"], ["--seeds '1;2'", "1,2,5-10"]),
        (["--seeds", ""], ["--seeds ''", "1,2,5-10"]),
        (["--class", 10], ["--class 10", "0 to 9"]),
        (["--class=-1"], ["--class -1", "0 to 9"]),
        (["--subdirs"], ["--subdirs", "npz"]),
        (["--disc", "ve", "--rho", 5], ["--rho 5.0", "--disc edm", "ve"]),
        (["--batch", 0], ["--batch_size", "0"]),
        (["--steps", 0], ["--steps", "0"]),
        (["--steps", -3], ["--steps", "-3"]),
        (["--num_classes", 0], ["--num_classes", "0"]),
        (["--max_guidance=-1"], ["max_guidance", "-1"]),
        (["--max_guidance", "inf"], ["--max_guidance", "inf"]),
        (["--sigma_min", "nan"], ["--sigma_min", "nan"]),
        (["--S_churn", "inf"], ["--S_churn", "inf"]),
        (["--guidance_interval", "5"], ["--guidance_interval '5'", "LO,HI"]),
        (["--guidance_interval", "5,1"], ["interval", "5.0,1.0"]),
        (["--softplus_beta", 0], ["softplus_beta", "0"]),
        (["--classifier_type", "resnet34"], ["resnet34-"]),
        (["--classifier_input", "imagenet"], ["digits_guide", "paper"]),
        (["--device", "graphics"], ["--device graphics"]),
    ],
    ids=lambda value: " ".join(map(str, value)) if value and str(value[0]).startswith("--") else "",
)
def test_in_one_line(guided, flags, fragments):
    last = refused(guided, flags, *fragments)
    assert "another run's output" not in last


@pytest.mark.parametrize(
    ("flags", "fragments"),
    [
        (["--rho", 0], ["rho", "0.0"]),
        (["--rho", "inf"], ["rho", "inf"]),
        (["--rho", 0.001], ["rho", "0.001"]),
        (["--sigma_min", 90], ["90.0", "80.0"]),
        (["--sigma_min", 0], ["sigma_min", "0.0"]),
        (["--sigma_max", "inf"], ["sigma_max", "inf"]),
        (["--sigma_max", 1e200], ["sigma_max", "1e+200"]),
        (["--S_churn=-1"], ["S_churn", "-1"]),
        (["--S_noise", "inf"], ["S_noise", "inf"]),
        (["--disc", "iddpm", "--steps", 2000], ["992 levels", "2000 steps"]),
        (["--disc", "vp", "--sigma_min", 1], ["vp", "1"]),
    ],
    ids=lambda value: " ".join(map(str, value)) if str(value[0]).startswith("--") else "",
)
def test_numbers_that_cannot_be_are_told_before_the_folder_becomes_this_runs(guided, flags, fragments):
    last = refused(guided, flags, *fragments)
    assert "another run's output" not in last


def test_a_network_of_other_channels_is_told_before_sampling(tmp_path):
    path = pickled(tmp_path, img_channels=1)
    (tmp_path / "out").mkdir()
    refused(tmp_path / "out", ["--network", path, *UNGUIDED], "edm.pkl", "img_channels", "1")


@pytest.mark.parametrize(
    "flags",
    [
        ["--solver", "rk4"],
        ["--disc", "ddim"],
        ["--scaling", "ve"],
        ["--format", "jpg"],
        ["--step", 3],
        ["--preset", "digits"],
    ],
)
def test_unknown_words(guided, flags):
    refused(guided, flags, flags[0 if flags[0] == "--step" else 1], code=2)


def test_a_classifier_of_another_number_of_classes(guided, tmp_path):
    source = "import torch\ndef builder(n):\n    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(768, 7))\n"
    (tmp_path / "own.py").write_text(source)
    refused(
        guided,
        ["--classifier_type", f"{tmp_path / 'own.py'}:builder", "--softplus_beta", "inf"],
        "own.py:builder",
        "10",
        "7",
    )


def test_a_missing_network_of_the_preset_names_the_command_that_fetches_it(guided, tmp_path, monkeypatch):
    absent = str(tmp_path / "edm-imagenet-64x64-cond-adm.pkl")
    monkeypatch.setitem(
        EDM_PRESETS,
        "imagenet64-edm-resnet101",
        {**EDM_PRESETS["imagenet64-edm-resnet101"], "network": absent},
    )
    refused(
        guided,
        [],
        absent,
        "python scripts/download.py",
        base=("--preset", "imagenet64-edm-resnet101", "--classifier_path", "random"),
    )


# Pickles


@pytest.mark.parametrize("function", [os.system, eval], ids=["os.system", "eval"])
def test_a_hostile_pickle_is_refused_by_name_with_nothing_executed(guided, tmp_path, function):
    canary, path = tmp_path / "canary", tmp_path / "edm.pkl"
    action = f"touch {canary}" if function is os.system else f"open({str(canary)!r}, 'w').close()"
    path.write_bytes(dumps({**network(), "loss_fn": Call(function, action)}))
    refused(guided, ["--network", path], path, f"{function.__module__}.{function.__name__}")
    assert not canary.exists()


@pytest.mark.parametrize("half", [False, True], ids=["float32 weights", "float16 weights"])
def test_a_float16_pickle_samples_directly(tmp_path, half):
    path, arguments = tmp_path / "edm.pkl", {**TINY, "img_resolution": 16, "label_dim": 10, "use_fp16": True}
    net = random_net(EDMPrecond, arguments)
    path.write_bytes(
        dumps(snapshot(net.half() if half else net, arguments, source="raise SystemExit('executed')"))
    )
    result = sample(tmp_path / "out", "--network", path, "--device", "cpu")
    assert "on a CPU that is bfloat16" in result.err
    images, labels = load_samples(tmp_path / "out")
    assert all(image.std() > 0 for image in images)
    np.testing.assert_array_equal(labels, Published(range(5)).labels)


# Presets


def test_script_of_every_preset():
    assert {name: script_of(name) for name in PRESETS} == dict.fromkeys(PRESETS, "classifier_sample.py")
    assert {name: script_of(name) for name in EDM_PRESETS} == dict.fromkeys(EDM_PRESETS, "edm_sample.py")
    assert not PRESETS.keys() & EDM_PRESETS.keys()
    with pytest.raises(ValueError, match=r"unknown preset 'edm'; choose digits, .*digits-edm"):
        script_of("edm")


@pytest.mark.parametrize(
    "flags", [(), ("--guidance_form", "score"), ("--use_classifier", 0, "--format", "png")]
)
def test_doctor_says_ready(tmp_path, monkeypatch, flags):
    monkeypatch.chdir(tmp_path)
    result = call(load_script("doctor").main, ["digits-edm", *flags])
    assert result.code == 0 and result.out.splitlines()[-1] == "ready", result.out
    assert "results/digits-edm, 0 of 300 samples" in result.out
    assert ("guide.safetensors" in result.out) == (flags[:1] != ("--use_classifier",))
    assert list(tmp_path.iterdir()) == []
