"""scripts/classifier_sample.py: what it writes, what its flags do, that runs repeat, and that interrupted
ones go on.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import (
    DIGITS_NETWORK,
    ROOT,
    TINY,
    TINY_64,
    TINY_NOISY,
    call,
    contents,
    environment,
    flags_of,
    load_samples,
    load_script,
    make_noisy_classifier,
    make_unet,
    samples_bytes,
    samples_file,
    save_random,
    save_unet,
)
from PIL import Image

import guided_diffusion.runs.job
import guided_diffusion.runs.store
from guided_diffusion.files.checkpoints import load_state_dict
from guided_diffusion.files.pretrained import PRETRAINED_DIR, sha256
from guided_diffusion.flags.parser import parse_flags
from guided_diffusion.flags.presets import PRESETS
from guided_diffusion.runs.noise import SampleNoise
from guided_diffusion.script_util import classifier_defaults

script = load_script("classifier_sample")
QUICK = ("--preset", "digits", "--num_samples", 4, "--timestep_respacing", 5)
UNGUIDED = (
    *flags_of(
        {
            **DIGITS_NETWORK,
            "num_classes": 10,
            "null_class": True,
            "model_path": PRETRAINED_DIR / "digits/unet.safetensors",
        }
    ),
    *("--labels", "balanced", "--num_samples", 4, "--timestep_respacing", 5),
)
LINEAR_CLASSIFIER = """
import torch

def builder(num_classes):
    linear = torch.nn.Linear(3 * 16 * 16, num_classes)
    with torch.no_grad():
        linear.weight.normal_(generator=torch.Generator().manual_seed(1))
        linear.bias.zero_()
    return torch.nn.Sequential(torch.nn.Flatten(), linear)
"""


def sample(folder, *flags, base=QUICK):
    result = call(script.main, [*base, *flags, "--out", folder])
    assert result.code == 0, result.err
    return result


@pytest.fixture(scope="module")
def guided(tmp_path_factory):
    """A finished run of the QUICK flags."""
    folder = tmp_path_factory.mktemp("guided")
    sample(folder)
    return folder


@pytest.fixture(scope="module")
def unguided(tmp_path_factory):
    """The same network without any classifier flag."""
    folder = tmp_path_factory.mktemp("unguided")
    sample(folder, base=UNGUIDED)
    return folder


# What is written


def test_a_finished_folder_holds_samples_grid_manifest_and_log_only(tmp_path):
    result = sample(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "grid.png",
        "log.txt",
        "run.json",
        "samples_4x16x16x3.npz",
    ]
    assert result.out.strip() == str(tmp_path / "samples_4x16x16x3.npz")
    with np.load(samples_file(tmp_path), allow_pickle=False) as file:
        assert sorted(file.files) == ["arr_0", "arr_1"]
        assert (file["arr_0"].dtype, file["arr_0"].shape) == (np.uint8, (4, 16, 16, 3))
        assert (file["arr_1"].dtype, file["arr_1"].shape) == (np.int64, (4,))
        assert all(image.std() > 0 for image in file["arr_0"])
    assert result.err == ""  # no bar where no terminal is


def test_the_grid_shows_the_images(guided):
    images, _ = load_samples(guided)
    with Image.open(guided / "grid.png") as picture:
        pixels = np.asarray(picture)
    # Two by two cells with a border of one pixel.
    assert pixels.shape == (36, 36, 3)
    np.testing.assert_array_equal(pixels[1:17, 1:17], images[0])
    np.testing.assert_array_equal(pixels[19:35, 1:17], images[2])


def test_the_manifest_holds_settings_hashes_versions_and_totals(guided):
    run = json.loads((guided / "run.json").read_text())
    expected = {**PRESETS["digits"], "num_samples": 4, "timestep_respacing": "5", "seed": 0}
    recorded = {**run["settings"], **run["not_compared"]}
    assert {key: recorded[key] for key in expected} == expected
    assert recorded["device"].endswith(f"torch {torch.__version__}") and recorded["out"] == str(guided)
    digits = PRETRAINED_DIR / "digits"
    assert run["settings"]["sha256"] == {
        "model_path": sha256(digits / "unet.safetensors"),
        "classifier_path": sha256(digits / "guide.safetensors"),
    }
    assert run["settings"]["versions"]["torch"] == torch.__version__
    totals = run["totals"]
    assert 0 < totals["guidance_seconds"] < totals["seconds"]
    assert totals["skipped_guidance"] == 0


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
    result = call(script.main, [*QUICK, "--num_samples", 1, *flags])
    assert result.code == 0, result.err
    assert load_samples(tmp_path / expected)[0].shape == (1, 16, 16, 3)


# Repeating


def test_the_seed_reproduces_the_bytes_and_another_seed_does_not(guided, tmp_path):
    sample(tmp_path / "same", "--seed", 0)
    sample(tmp_path / "other", "--seed", 1)
    assert samples_bytes(tmp_path / "same") == samples_bytes(guided)
    images, others = load_samples(guided)[0], load_samples(tmp_path / "other")[0]
    assert all((a != b).any() for a, b in zip(images, others, strict=True))


def test_scale_0_has_the_bytes_of_a_run_without_classifier(guided, unguided, tmp_path):
    sample(tmp_path, "--classifier_scale", 0)
    assert samples_bytes(tmp_path) == samples_bytes(unguided)
    assert samples_bytes(tmp_path) != samples_bytes(guided)


def levels_apart(folder, other):
    """The largest difference of a pixel for each image."""
    return np.abs(load_samples(folder)[0].astype(int) - load_samples(other)[0]).max(axis=(1, 2, 3))


def test_the_batch_size_changes_no_label_no_noise_and_hardly_a_pixel(tmp_path):
    for guidance in ("unguided", "guided"):
        for size in (1, 16):
            scale = () if guidance == "guided" else ("--classifier_scale", 0)
            sample(tmp_path / f"{guidance}{size}", "--num_samples", 100, "--batch_size", size, *scale)
    for guidance in ("unguided", "guided"):
        np.testing.assert_array_equal(
            load_samples(tmp_path / f"{guidance}1")[1], load_samples(tmp_path / f"{guidance}16")[1]
        )
    assert levels_apart(tmp_path / "unguided1", tmp_path / "unguided16").max() <= 1
    # A tie in a max-pooling layer can send one image astray.
    assert (levels_apart(tmp_path / "guided1", tmp_path / "guided16") <= 1).mean() >= 0.99


def test_random_weights_repeat_with_the_seed(tmp_path):
    flags = ("--classifier_path", "random", "--classifier_scale", 100)
    sample(tmp_path / "a", *flags)
    sample(tmp_path / "b", *flags)
    assert samples_bytes(tmp_path / "a") == samples_bytes(tmp_path / "b")


# Going on


def interrupted_while_sampling(patch):
    calls = []

    def third_fails(*args):
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return guided_diffusion.files.pixels.to_uint8(*args)

    patch.setattr(guided_diffusion.runs.job, "to_uint8", third_fails)


def interrupted_before_the_final_name(patch):
    replace = os.replace

    def fails(source, target):
        if str(target).endswith("3.npz"):
            raise KeyboardInterrupt
        replace(source, target)

    patch.setattr(os, "replace", fails)


def interrupted_while_clearing_up(patch):
    def fails(*args, **kwargs):
        raise KeyboardInterrupt

    patch.setattr(guided_diffusion.runs.store, "_remove_shards", fails)


@pytest.mark.parametrize(
    ("interrupt", "finished", "drawn_later"),
    [
        (interrupted_while_sampling, False, 2),
        (interrupted_before_the_final_name, False, 0),
        (interrupted_while_clearing_up, True, 0),
    ],
)
def test_an_interrupted_run_goes_on_and_ends_with_the_same_bytes(tmp_path, interrupt, finished, drawn_later):
    flags = ("--num_samples", 7, "--batch_size", 2)
    sample(tmp_path / "whole", *flags)
    with pytest.MonkeyPatch.context() as patch:
        interrupt(patch)
        result = call(script.main, [*QUICK, *flags, "--out", tmp_path / "cut"])
    assert result.code == 130
    assert "the same command goes on" in result.err
    assert "Traceback" not in result.err
    assert len(list((tmp_path / "cut").glob("samples_*.npz"))) == finished
    drawn = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            guided_diffusion.runs.job,
            "to_uint8",
            lambda *args: drawn.append(args) or guided_diffusion.files.pixels.to_uint8(*args),
        )
        sample(tmp_path / "cut", *flags)
    assert len(drawn) == drawn_later
    assert samples_bytes(tmp_path / "cut") == samples_bytes(tmp_path / "whole")
    assert sorted(p.name for p in (tmp_path / "cut").iterdir()) == sorted(
        p.name for p in (tmp_path / "whole").iterdir()
    )


def test_ctrl_c_in_a_shell_ends_with_130_and_keeps_what_is_finished(tmp_path):
    flags = [*QUICK, "--num_samples", 8, "--batch_size", 1, "--timestep_respacing", 25]
    command = [sys.executable, ROOT / "scripts/classifier_sample.py", *map(str, flags), "--out", tmp_path]
    with subprocess.Popen(
        command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        deadline = time.monotonic() + 120
        while not (first := list(tmp_path.glob("shards/*.npz"))):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.005)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate()
    assert process.returncode == 130
    assert (
        out == "" and "Traceback" not in err and err.rstrip().endswith("the same command goes on from there")
    )
    before = first[0].read_bytes()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(guided_diffusion.runs.store, "_remove_shards", lambda folder: None)
        sample(tmp_path, base=flags)
    assert first[0].read_bytes() == before
    assert load_samples(tmp_path)[0].shape == (8, 16, 16, 3)


def test_a_complete_run_says_so_and_is_left_alone(tmp_path):
    sample(tmp_path)
    before, when = contents(tmp_path, but="log.txt"), samples_file(tmp_path).stat().st_mtime_ns
    result = sample(tmp_path)
    assert "complete, nothing to do" in result.err
    assert result.out.strip() == str(samples_file(tmp_path))
    assert contents(tmp_path, but="log.txt") == before
    assert samples_file(tmp_path).stat().st_mtime_ns == when


def test_overwrite_removes_the_other_run_and_nothing_else(tmp_path, guided):
    sample(tmp_path, "--num_samples", 2, "--seed", 5)
    (tmp_path / "notes.txt").write_text("mine")
    sample(tmp_path, "--overwrite", True)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "grid.png",
        "log.txt",
        "notes.txt",
        "run.json",
        "samples_4x16x16x3.npz",
    ]
    assert samples_bytes(tmp_path) == samples_bytes(guided)


def test_two_ranks_write_what_one_process_writes(tmp_path):
    flags = [*QUICK, "--num_samples", 7, "--batch_size", 2]
    sample(tmp_path / "one", base=flags)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        sys.executable,
        ROOT / "scripts/classifier_sample.py",
        *map(str, flags),
        "--out",
        tmp_path / "two",
    ]
    group = {**environment(), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    ranks = [
        subprocess.Popen(
            command,
            env={**group, "RANK": rank, "LOCAL_RANK": rank},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in "01"
    ]
    outputs = [rank.communicate(timeout=120) for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], outputs
    assert [out.strip() for out, _ in outputs] == [str(samples_file(tmp_path / "two")), ""]
    np.testing.assert_array_equal(load_samples(tmp_path / "two")[1], load_samples(tmp_path / "one")[1])
    assert levels_apart(tmp_path / "two", tmp_path / "one").max() == 0
    assert not (tmp_path / "two" / "shards").exists()


# Labels


@pytest.mark.parametrize(
    ("flags", "counts"),
    [
        (["--labels", "balanced", "--num_samples", 20], dict.fromkeys(range(10), 2)),
        (["--labels", "3,5-7", "--num_samples", 8], {3: 2, 5: 2, 6: 2, 7: 2}),
        (["--labels", "3", "--num_samples", 3], {3: 3}),
        (["--fix_class", "True", "--fix_class_index", 7], {7: 4}),
        (["--fix_class", "True"], {0: 4}),
    ],
)
def test_labels_by_flag(tmp_path, flags, counts):
    sample(tmp_path, "--timestep_respacing", 1, *flags)
    labels = load_samples(tmp_path)[1]
    assert dict(zip(*np.unique(labels, return_counts=True), strict=True)) == counts


@pytest.mark.parametrize("name", ["labels.txt", "labels.npy"])
def test_labels_from_a_file(tmp_path, name):
    if name.endswith("npy"):
        np.save(tmp_path / name, np.array([9, 9, 1, 4]))
    else:
        (tmp_path / name).write_text("9 9\n1 4\n")
    sample(tmp_path / "out", "--timestep_respacing", 1, "--labels", tmp_path / name)
    assert sorted(load_samples(tmp_path / "out")[1]) == [1, 4, 9, 9]


def test_labels_are_shuffled_by_the_seed_and_random_ones_depend_on_the_index_alone(tmp_path):
    quick = ("--timestep_respacing", 1, "--classifier_scale", 0)
    sample(tmp_path / "balanced", *quick, "--num_samples", 30)
    labels = load_samples(tmp_path / "balanced")[1]
    assert (np.diff(labels) < 0).any()
    sample(tmp_path / "seed", *quick, "--num_samples", 30, "--seed", 1)
    assert (load_samples(tmp_path / "seed")[1] != labels).any()
    sample(tmp_path / "few", *quick, "--num_samples", 5, "--labels", "random")
    sample(tmp_path / "many", *quick, "--num_samples", 60, "--labels", "random")
    few, many = load_samples(tmp_path / "few")[1], load_samples(tmp_path / "many")[1]
    np.testing.assert_array_equal(many[:5], few)
    assert set(many) <= set(range(10)) and len(set(many)) > 5


@pytest.mark.parametrize(
    ("unconditional", "scale", "label_matters"), [(True, 0, False), (True, 4, True), (False, 0, True)]
)
def test_unconditional_hides_the_label_from_the_network_but_not_from_guidance(
    tmp_path, unconditional, scale, label_matters
):
    for label in (3, 8):
        sample(
            tmp_path / str(label),
            "--unconditional",
            unconditional,
            "--classifier_scale",
            scale,
            "--labels",
            label,
        )
    assert (levels_apart(tmp_path / "3", tmp_path / "8").max() > 0) == label_matters


# Samplers and classifiers


@pytest.mark.parametrize(
    ("interval", "like"), [("100000,200000", "unguided"), ("0,100000", "guided"), ("0.5,20", None)]
)
def test_the_guidance_interval(tmp_path, guided, unguided, interval, like):
    sample(tmp_path, "--guidance_interval", interval)
    same = {
        name: samples_bytes(tmp_path) == samples_bytes(folder)
        for name, folder in {"guided": guided, "unguided": unguided}.items()
    }
    assert same == {"guided": like == "guided", "unguided": like == "unguided"}


def reference(settings, checkpoint, loop, num_classes=1000, labels=None, cond_fn=None):
    """uint8 images of one batch of two, by the public names and with the noise of seed 0."""
    model, diffusion = make_unet(settings, num_classes)
    model.load_state_dict(load_state_dict(checkpoint))
    kwargs = {} if labels is None else {"model_kwargs": {"y": labels}}
    shape = (2, 3, settings["image_size"], settings["image_size"])
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    x = getattr(diffusion, loop)(
        model.eval(), shape, randn_like=SampleNoise(0, range(2)), cond_fn=cond_fn, **kwargs
    )
    torch.set_num_threads(threads)
    return ((x + 1) * 127.5).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).numpy()


@pytest.mark.parametrize("respacing", ["5", "ddim5", "2,3"])
@pytest.mark.parametrize("use_ddim", [False, True])
def test_without_guidance_the_loop_is_the_public_one(tmp_path, respacing, use_ddim):
    sample(
        tmp_path, "--num_samples", 2, "--use_ddim", use_ddim, "--timestep_respacing", respacing, base=UNGUIDED
    )
    images, labels = load_samples(tmp_path)
    settings = {**DIGITS_NETWORK, "timestep_respacing": respacing}
    loop = "ddim_sample_loop" if use_ddim else "p_sample_loop"
    expected = reference(
        settings, PRETRAINED_DIR / "digits/unet.safetensors", loop, 11, torch.from_numpy(labels)
    )
    np.testing.assert_array_equal(images, expected)


def test_ddim_is_guided_too(tmp_path):
    sample(tmp_path / "guided", "--use_ddim", True)
    sample(tmp_path / "unguided", "--use_ddim", True, "--classifier_scale", 0)
    assert levels_apart(tmp_path / "guided", tmp_path / "unguided").min() > 0


@pytest.mark.parametrize("use_ddim", [False, True])
def test_classifier_path_alone_is_a_noisy_classifier(tmp_path, use_ddim):
    unet = save_unet(tmp_path / "unet.pt", TINY_64)
    classifier = make_noisy_classifier(num_classes=10)
    noisy = save_random(tmp_path / "noisy.pt", classifier)
    flags = [
        *flags_of({**TINY_64, **TINY_NOISY}),
        "--num_classes",
        10,
        "--num_samples",
        2,
        "--timestep_respacing",
        5,
    ]
    flags += ["--model_path", unet, "--use_ddim", use_ddim]
    guided = [*flags, "--classifier_path", noisy, "--classifier_scale", 100_000]
    sample(tmp_path / "unguided", base=flags)
    sample(tmp_path / "scale0", base=[*guided, "--classifier_scale", 0])
    sample(tmp_path / "guided", base=guided)
    assert levels_apart(tmp_path / "scale0", tmp_path / "unguided").max() == 0
    assert levels_apart(tmp_path / "guided", tmp_path / "unguided").min() > 1

    classifier.load_state_dict(load_state_dict(noisy))
    classifier.eval()
    labels = torch.from_numpy(load_samples(tmp_path / "guided")[1])

    def cond_fn(x, t):
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            selected = F.log_softmax(classifier(x, t), dim=-1)[range(len(x)), labels]
            return torch.autograd.grad(selected.sum(), x)[0] * 100_000

    loop = "ddim_sample_loop" if use_ddim else "p_sample_loop"
    expected = reference({**TINY_64, "timestep_respacing": "5"}, unet, loop, cond_fn=cond_fn)
    assert np.abs(load_samples(tmp_path / "guided")[0].astype(int) - expected).max() <= 1


def test_classifier_type_with_a_path_reads_that_classifiers_weights(tmp_path, guided):
    sample(tmp_path, "--classifier_path", PRETRAINED_DIR / "digits/guide.safetensors")
    assert samples_bytes(tmp_path) == samples_bytes(guided)


@pytest.mark.parametrize("classifier_input", ["paper", "imagenet"])
def test_a_torchvision_network_with_random_weights(tmp_path, unguided, classifier_input):
    flags = (
        "--classifier_type",
        "resnet18",
        "--classifier_path",
        "random",
        "--classifier_input",
        classifier_input,
    )
    sample(tmp_path, "--classifier_scale", 1000, "--timestep_respacing", 5, "--batch_size", 4, *flags)
    assert levels_apart(tmp_path, unguided).min() > 0


def test_ones_own_classifier(tmp_path, unguided):
    (tmp_path / "own.py").write_text(LINEAR_CLASSIFIER)
    sample(tmp_path / "out", "--classifier_type", f"{tmp_path / 'own.py'}:builder", "--softplus_beta", "inf")
    assert levels_apart(tmp_path / "out", unguided).min() > 0


@pytest.mark.parametrize(
    "flags",
    [
        ["--softplus_beta", "inf"],
        ["--joint_temperature", "2"],
        ["--margin_temperature_discount", "1"],
        ["--gamma_factor", "0"],
        ["--classifier_scale", "1"],
        ["--clip_denoised", "False"],
        ["--noise_schedule", "cosine"],
        ["--rescale_timesteps", "True", "--diffusion_steps", "500"],
        ["--use_new_attention_order", "True"],
        ["--variance_max", "first_pixel"],
    ],
    ids=lambda flags: flags[0],
)
def test_every_flag_that_is_accepted_is_used(tmp_path, guided, flags):
    sample(tmp_path, *flags)
    assert samples_bytes(tmp_path) != samples_bytes(guided)


# Half precision on a CPU


def test_use_fp16_on_a_cpu_is_bfloat16_and_says_so(tmp_path, unguided):
    flags = ("--use_fp16", True, "--device", "cpu")
    result = sample(tmp_path, *flags, base=UNGUIDED)
    assert "--use_fp16 on a CPU: the U-Net runs in bfloat16" in result.err
    assert levels_apart(tmp_path, unguided).max() > 0
    assert np.abs(load_samples(tmp_path)[0].astype(int) - load_samples(unguided)[0]).mean() < 5


def test_classifier_use_fp16_on_a_cpu_stays_in_float32_and_says_so(tmp_path, guided):
    result = sample(tmp_path, "--classifier_use_fp16", True, "--device", "cpu")
    assert "--classifier_use_fp16 on a CPU: the classifier stays in float32" in result.err
    assert samples_bytes(tmp_path) == samples_bytes(guided)


def test_classifier_use_fp16_on_a_cpu_leaves_a_noisy_classifier_in_float32(tmp_path):
    unet = save_unet(tmp_path / "unet.pt", TINY_64)
    noisy = save_random(tmp_path / "noisy.pt", make_noisy_classifier())
    flags = [*flags_of({**TINY_64, **TINY_NOISY}), "--num_samples", 1, "--timestep_respacing", 2]
    flags += ["--model_path", unet, "--classifier_path", noisy, "--device", "cpu"]
    sample(tmp_path / "single", base=flags)
    result = sample(tmp_path / "half", "--classifier_use_fp16", True, base=flags)
    assert "the classifier stays in float32" in result.err
    assert samples_bytes(tmp_path / "half") == samples_bytes(tmp_path / "single")


def test_no_word_about_half_precision_where_nobody_asked(tmp_path):
    assert "float" not in sample(tmp_path, "--timestep_respacing", 1).err


# Flags


ADM_LINE = (
    "--attention_resolutions 32,16,8 --class_cond True --image_size 128 --learn_sigma True --num_channels 256 --num_heads 4 "
    "--num_res_blocks 2 --resblock_updown True --use_fp16 True --use_scale_shift_norm True"
)
ELUCD_LINE = (
    "--image_size 128 --classifier_attention_resolutions 32,16,8 --classifier_depth 2 --classifier_width 128 --classifier_pool attention "
    "--classifier_resblock_updown True --classifier_use_scale_shift_norm True --classifier_type resnet101 --classifier_scale 1.0 "
    "--softplus_beta 3.0 --joint_temperature 1.0 --margin_temperature_discount 0.5 --gamma_factor 0.3 --classifier_use_fp16 True"
)
ADM_VALUES = {
    "attention_resolutions": "32,16,8",
    "class_cond": True,
    "image_size": 128,
    "learn_sigma": True,
    "num_channels": 256,
    "num_heads": 4,
    "num_res_blocks": 2,
    "resblock_updown": True,
    "use_fp16": True,
    "use_scale_shift_norm": True,
}
ELUCD_VALUES = {
    "image_size": 128,
    "classifier_attention_resolutions": "32,16,8",
    "classifier_depth": 2,
    "classifier_width": 128,
    "classifier_pool": "attention",
    "classifier_resblock_updown": True,
    "classifier_use_scale_shift_norm": True,
    "classifier_type": "resnet101",
    "classifier_scale": 1.0,
    "softplus_beta": 3.0,
    "joint_temperature": 1.0,
    "margin_temperature_discount": 0.5,
    "gamma_factor": 0.3,
    "classifier_use_fp16": True,
}
DEFAULTS = {
    **{
        "image_size": 64,
        "num_channels": 128,
        "num_res_blocks": 2,
        "num_heads": 4,
        "num_heads_upsample": -1,
        "num_head_channels": -1,
    },
    **{
        "attention_resolutions": "16,8",
        "channel_mult": "",
        "dropout": 0.0,
        "class_cond": False,
        "use_checkpoint": False,
    },
    **{
        "use_scale_shift_norm": True,
        "resblock_updown": False,
        "use_fp16": False,
        "use_new_attention_order": False,
    },
    **{
        "learn_sigma": False,
        "diffusion_steps": 1000,
        "noise_schedule": "linear",
        "timestep_respacing": "",
        "use_kl": False,
    },
    **{"predict_xstart": False, "rescale_timesteps": False, "rescale_learned_sigmas": False},
    **{
        "classifier_use_fp16": False,
        "classifier_width": 128,
        "classifier_depth": 2,
        "classifier_attention_resolutions": "32,16,8",
    },
    **{
        "classifier_use_scale_shift_norm": True,
        "classifier_resblock_updown": True,
        "classifier_pool": "attention",
    },
    **{
        "clip_denoised": True,
        "num_samples": 10000,
        "batch_size": 16,
        "use_ddim": False,
        "model_path": "",
        "classifier_path": "",
    },
    **{
        "classifier_scale": 1.0,
        "log_dir": "",
        "fix_class": False,
        "fix_class_index": 0,
        "classifier_type": "",
    },
    **{
        "softplus_beta": float("inf"),
        "joint_temperature": 1.0,
        "margin_temperature_discount": 1.0,
        "gamma_factor": 0.0,
    },
    **{
        "seed": 0,
        "labels": "random",
        "out": "",
        "classifier_input": "paper",
        "guidance_interval": "",
        "preset": "",
        "device": "",
    },
    **{"on_nonfinite": "stop"},
}


def parse(*words):
    return parse_flags(script.create_argparser(), list(words), PRESETS)


def test_every_flag_exists_with_its_default():
    args = vars(parse())
    assert {key: args.get(key, "no such flag") for key in DEFAULTS} == DEFAULTS
    assert {key: type(args[key]) for key in DEFAULTS} == {key: type(value) for key, value in DEFAULTS.items()}


@pytest.mark.parametrize(
    ("line", "values"),
    [
        (ADM_LINE, ADM_VALUES),
        (ELUCD_LINE, ELUCD_VALUES),
        (f"{ADM_LINE} {ELUCD_LINE}", {**ADM_VALUES, **ELUCD_VALUES}),
    ],
    ids=["adm", "elucd", "both"],
)
def test_the_published_lines_parse(line, values):
    assert vars(parse(*line.split())) == {**vars(parse()), **values, "given": set(values)}


@pytest.mark.parametrize("word", ["True", "true", "yes", "y", "1"])
def test_booleans_are_written_in_several_ways(word):
    opposite = {"True": "False", "true": "false", "yes": "no", "y": "n", "1": "0"}[word]
    assert parse("--use_ddim", word).use_ddim is True
    assert parse("--clip_denoised", opposite).clip_denoised is False


def test_the_preset_of_the_paper_is_the_published_lines():
    args = vars(parse("--preset", "imagenet128-resnet101"))
    expected = {**ADM_VALUES, **ELUCD_VALUES, "timestep_respacing": "250"}
    assert {key: args[key] for key in expected} == expected


def test_flags_that_are_written_win_over_the_preset():
    args = parse("--preset", "digits", "--classifier_scale", "2", "--num_classes", "1000")
    assert (args.classifier_scale, args.num_classes, args.image_size) == (2.0, 1000, 16)
    assert args.given == {"preset", "classifier_scale", "num_classes"}


def test_the_published_classifier_line_runs_with_another_network(tmp_path):
    network = {**TINY, "image_size": 128, "channel_mult": "1,1,1,1,1"}
    checkpoint = save_unet(tmp_path / "unet.pt", network)
    flags = [
        *ELUCD_LINE.split(),
        *flags_of(network),
        "--model_path",
        checkpoint,
        "--classifier_path",
        "random",
    ]
    result = sample(
        tmp_path / "out", base=[*flags, "--num_samples", 1, "--timestep_respacing", 1, "--device", "cpu"]
    )
    assert load_samples(tmp_path / "out")[0].shape == (1, 128, 128, 3)
    (line,) = [line for line in result.err.splitlines() if "without effect" in line]
    named = {word.strip(",") for word in line.split() if word.startswith("--")}
    assert named == {
        f"--{name}" for name in classifier_defaults() if name not in ("image_size", "classifier_use_fp16")
    }


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ([], None),
        (["--use_kl", "False", "--dropout", "0.1"], "--use_kl, --dropout"),
        (
            ["--classifier_width", "64", "--rescale_learned_sigmas", "True"],
            "--rescale_learned_sigmas, --classifier_width",
        ),
        (["--use_checkpoint", "True"], "--use_checkpoint"),
    ],
)
def test_flags_without_effect_are_listed_once_and_have_none(tmp_path, guided, flags, named):
    result = sample(tmp_path, *flags)
    lines = [line for line in result.err.splitlines() if "without effect" in line]
    assert lines == ([f"without effect in this run: {named}"] if named else [])
    assert samples_bytes(tmp_path) == samples_bytes(guided)


def test_without_a_classifier_its_flags_are_listed(tmp_path, unguided):
    result = sample(tmp_path, "--classifier_use_fp16", True, "--classifier_depth", 4, base=UNGUIDED)
    assert "without effect in this run: --classifier_depth, --classifier_use_fp16" in result.err
    assert samples_bytes(tmp_path) == samples_bytes(unguided)


def test_help_names_every_flag_and_those_without_effect():
    result = call(script.main, ["--help"])
    assert result.code == 0
    assert all(f"--{flag} " in result.out for flag in DEFAULTS)
    note = result.out[result.out.index("without effect") :]
    idle = "use_kl rescale_learned_sigmas dropout use_checkpoint classifier_width classifier_depth classifier_attention_resolutions"
    idle += " classifier_use_scale_shift_norm classifier_resblock_updown classifier_pool"
    assert [flag for flag in idle.split() if f"--{flag}" not in note] == []
