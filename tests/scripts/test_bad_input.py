"""Bad input to scripts/classifier_sample.py: one line that says what was wrong and what to do, an exit code,
and nothing lost.
"""

import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
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
    save_random,
    save_unet,
)

from guided_diffusion.files.checkpoints import load_state_dict
from guided_diffusion.files.pretrained import PRETRAINED_DIR
from guided_diffusion.flags.presets import PRESETS
from guided_diffusion.runs.lock import locked

script = load_script("classifier_sample")
DIGITS_UNET = PRETRAINED_DIR / "digits/unet.safetensors"
QUICK = ("--preset", "digits", "--num_samples", 4, "--batch_size", 2, "--timestep_respacing", 5)
NETWORK = ("--model_path", DIGITS_UNET, *flags_of(DIGITS_NETWORK), "--num_classes", 10, "--num_samples", 4)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a run that is complete; bad input must leave it as it is."""
    folder = tmp_path_factory.mktemp("finished")
    assert call(script.main, [*QUICK, "--out", folder]).code == 0
    return folder


def refused(flags, *fragments, code=1, at_once=False):
    """Call the script, and check that it ends with one line that holds all the fragments; return that line.

    at_once: nothing else may be written, but for argparse's usage.
    """
    result = call(script.main, flags)
    assert result.code == code, result.err
    assert result.out == ""
    last = result.err.strip().splitlines()[-1]
    assert last.startswith("error: " if code == 1 else "script.py: error: ")
    assert [fragment for fragment in map(str, fragments) if fragment not in last] == [], last
    assert not at_once or code == 2 or result.err.strip() == last
    return last


def refused_at_once(finished, flags, *fragments, code=1, base=QUICK):
    """The same for an error that is found before sampling, with a finished folder as output, which must stay
    as it is.
    """
    before = contents(finished, but="log.txt")
    last = refused([*base, "--out", finished, *flags], *fragments, code=code, at_once=True)
    assert ("another run's output" in last) == ("another run's output" in fragments)
    assert contents(finished, but="log.txt") == before
    return last


# Checkpoints


@pytest.mark.parametrize("flag", ["--model_path", "--classifier_path"])
def test_missing_checkpoint(finished, tmp_path, flag):
    refused_at_once(
        finished,
        [flag, tmp_path / "absent.pt"],
        f"no checkpoint at {tmp_path / 'absent.pt'}",
        "scripts/download.py",
    )


def test_missing_checkpoint_of_a_preset(finished, tmp_path, monkeypatch):
    single = ("--preset", "imagenet128-resnet50", "--use_fp16", "False", "--classifier_use_fp16", "False")
    monkeypatch.setitem(
        PRESETS,
        "imagenet128-resnet50",
        {**PRESETS["imagenet128-resnet50"], "model_path": str(tmp_path / "128x128_diffusion.pt")},
    )
    refused_at_once(
        finished, [], "no checkpoint at", "128x128_diffusion.pt", "scripts/download.py", base=single
    )


@pytest.mark.parametrize("flag", ["--model_path", "--classifier_path"])
@pytest.mark.parametrize("ending", [".safetensors", ".pt", ".pth"])
@pytest.mark.parametrize("kept", [0, 11, 0.5, -1], ids=["empty", "head", "half", "without_last_byte"])
def test_truncated_checkpoint(finished, tmp_path, flag, ending, kept):
    whole = tmp_path / f"whole{ending}"
    if ending == ".safetensors":
        whole.write_bytes(DIGITS_UNET.read_bytes())
    else:
        torch.save(load_state_dict(DIGITS_UNET), whole)
    content = whole.read_bytes()
    kept = int(kept * len(content)) if 0 < kept < 1 else kept % len(content)
    cut = tmp_path / f"cut{ending}"
    cut.write_bytes(content[:kept])
    refused_at_once(finished, [flag, cut], cut, f"{kept:,} bytes", "truncated")


def test_truncated_checkpoint_of_the_older_format(finished, tmp_path):
    whole = tmp_path / "whole.pt"
    torch.save(load_state_dict(DIGITS_UNET), whole, _use_new_zipfile_serialization=False)
    content = whole.read_bytes()
    for kept in (100, len(content) // 2, len(content) - 1):
        whole.write_bytes(content[:kept])
        assert re.search("truncated|damaged", refused_at_once(finished, ["--model_path", whole], whole))


def test_a_folder_another_ending_and_another_content_are_no_checkpoints(finished, tmp_path):
    refused_at_once(finished, ["--model_path", tmp_path], tmp_path, "no checkpoint")
    (tmp_path / "weights.bin").write_bytes(b"weights")
    refused_at_once(
        finished, ["--model_path", tmp_path / "weights.bin"], tmp_path / "weights.bin", "a text file"
    )
    torch.save([1, 2], tmp_path / "list.pt")
    refused_at_once(finished, ["--model_path", tmp_path / "list.pt"], tmp_path / "list.pt", "state dict")


def test_a_checkpoint_that_carries_code_is_refused_and_the_code_is_not_run(finished, tmp_path):
    class Carrier:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "was_run"),)

    torch.save({"weight": Carrier()}, tmp_path / "evil.pt")
    refused_at_once(finished, ["--model_path", tmp_path / "evil.pt"], tmp_path / "evil.pt", "refused")
    assert not (tmp_path / "was_run").exists()


@pytest.mark.parametrize(
    ("flags", "key", "in_file", "in_network"),
    [
        (["--num_channels", 64], "time_embed.0.weight", "[128, 32]", "[256, 64]"),
        (["--learn_sigma", "False"], "out.2.weight", "[6, 32, 3, 3]", "[3, 32, 3, 3]"),
        (["--null_class", "False"], "label_emb.weight", "[11, 128]", "[10, 128]"),
        (["--num_classes", 12], "label_emb.weight", "[11, 128]", "[13, 128]"),
        (["--classifier_path", "{judge}"], "the file lacks conv1.weight", None, None),
        (["--num_res_blocks", 2], "input_blocks", None, None),
        (["--class_cond", "False", "--null_class", "False"], "label_emb.weight", None, None),
    ],
)
def test_architecture_flags_that_do_not_fit_the_checkpoint(finished, flags, key, in_file, in_network):
    flags = [str(flag).format(judge=PRETRAINED_DIR / "digits/judge.safetensors") for flag in flags]
    last = refused_at_once(finished, flags, "does not fit", key)
    if in_file:
        assert re.search(
            rf"{re.escape(key)} .*{re.escape(in_file)} in the file .*{re.escape(in_network)} in the network",
            last,
        )


def test_classifier_flags_that_do_not_fit_its_checkpoint(finished, tmp_path):
    unet = save_unet(tmp_path / "unet.pt", TINY_64)
    noisy = save_random(tmp_path / "noisy.pt", make_noisy_classifier())
    flags = [
        "--model_path",
        unet,
        "--classifier_path",
        noisy,
        *flags_of({**TINY_64, **TINY_NOISY}),
        "--classifier_width",
        64,
    ]
    refused_at_once(finished, flags, noisy, "time_embed.0.weight", "[128, 32]", "[256, 64]", base=())


# Classes


@pytest.mark.parametrize(
    ("flags", "value"),
    [
        (["--labels", "1,10"], 10),
        (["--labels", "8-12"], 10),
        (["--labels", "-1"], -1),
        (["--fix_class", "True", "--fix_class_index", 10], 10),
        (["--fix_class", "True", "--fix_class_index", -1], -1),
        (["--labels", "{text}"], 12),
        (["--labels", "{array}"], -3),
    ],
)
def test_class_out_of_range(finished, tmp_path, flags, value):
    text, array = tmp_path / "labels.txt", tmp_path / "labels.npy"
    text.write_text("1 2 12")
    np.save(array, [4, -3])
    flags = [str(flag).format(text=text, array=array) for flag in flags]
    last = refused_at_once(finished, flags, f"class {value} ", "0 to 9")
    assert re.search(r"\b(not|outside|out of)\b", last)


def labels_files(folder):
    (folder / "words.txt").write_text("1 a")
    (folder / "empty.txt").write_text("")
    (folder / "empty.npy").write_bytes(b"")
    (folder / "binary.txt").write_bytes(bytes(range(128, 256)))
    np.save(folder / "fractions.npy", [1.5, 2.5])
    np.save(folder / "objects.npy", np.array([{}]), allow_pickle=True)
    np.save(folder / "whole.npy", np.arange(10))
    (folder / "cut.npy").write_bytes((folder / "whole.npy").read_bytes()[:-30])


@pytest.mark.parametrize(
    "name",
    [
        "words.txt",
        "empty.txt",
        "empty.npy",
        "binary.txt",
        "fractions.npy",
        "objects.npy",
        "cut.npy",
        "absent.txt",
    ],
)
def test_labels_file_without_classes(finished, tmp_path, name):
    labels_files(tmp_path)
    refused_at_once(finished, ["--labels", tmp_path / name], tmp_path / name)


@pytest.mark.parametrize("text", ["", "ballanced", "1,,2", "5-2", "1-", "1;2", "1.5", "1,a", "1 2"])
def test_malformed_labels(finished, text):
    refused_at_once(finished, ["--labels", text], f"labels {text!r}", "such as 1,2,5-10")


# Sizes


@pytest.mark.parametrize(
    ("name", "flags"),
    [
        ("vit_b_16", ["--softplus_beta", "inf"]),
        ("vit_b_16", []),
        ("alexnet", []),
        ("convnext_tiny", ["--softplus_beta", "inf"]),
    ],
)
def test_image_size_that_the_classifier_cannot_take(finished, name, flags):
    flags = ["--classifier_type", name, "--classifier_path", "random", *flags]
    refused_at_once(finished, flags, f"{name} cannot take 16x16 images", "classifier_input imagenet")


@pytest.mark.parametrize(
    ("flags", "fragments"),
    [
        (["--image_size", 15], ("15", "channel_mult", "2 times")),
        (["--image_size", 30, "--channel_mult", "1,2,2,2"], ("30", "channel_mult", "3 times")),
        (["--image_size", 20, "--channel_mult", ""], ("20", "--channel_mult", "64")),
        (["--image_size", 0], ("image_size", "0")),
        (["--image_size", -16], ("image_size", "-16")),
    ],
)
def test_image_size_that_the_unet_cannot_take(finished, flags, fragments):
    refused_at_once(finished, flags, *fragments)


def test_image_size_that_a_noisy_classifier_cannot_take(finished, tmp_path):
    unet, noisy = (
        save_unet(tmp_path / "unet.pt", TINY),
        save_random(tmp_path / "noisy.pt", make_noisy_classifier()),
    )
    refused_at_once(
        finished,
        ["--model_path", unet, "--classifier_path", noisy, *flags_of({**TINY_NOISY, **TINY})],
        "16",
        "64",
        base=(),
    )


# Non-finite numbers


def write_faulty_classifier(folder, at_call=None, position=0, value="nan"):
    """A linear classifier whose gradient is not finite at one pixel, of one image, in one guided call
    (counted from 1).
    """
    (folder / "own.py").write_text(f"""
import torch

class Linear(torch.nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.linear, self.calls = torch.nn.Linear(3 * 16 * 16, num_classes), 0
        with torch.no_grad():
            self.linear.weight.normal_(generator=torch.Generator().manual_seed(1))
            self.linear.bias.zero_()

    def forward(self, x):
        x = x * 1.0
        if x.requires_grad:
            self.calls += 1
            if self.calls == {at_call}:
                fault = torch.zeros_like(x)
                fault[{position}, 1, 2, 3] = float("{value}")
                x.register_hook(lambda gradient: gradient + fault)
        return self.linear(x.flatten(1))

builder = Linear
""")
    return ["--classifier_type", f"{folder / 'own.py'}:builder", "--softplus_beta", "inf"]


# Five steps, 4 to 0, for samples 0 and 1, then for samples 2 and 3.
@pytest.mark.parametrize("use_ddim", [False, True])
@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
@pytest.mark.parametrize(
    ("call_number", "position", "step", "index"), [(1, 0, 4, 0), (5, 1, 0, 1), (7, 1, 3, 3)]
)
def test_nonfinite_gradient_stops_and_names_step_and_sample(
    tmp_path, use_ddim, value, call_number, position, step, index
):
    faulty = write_faulty_classifier(tmp_path, call_number, position, value)
    folder = tmp_path / "out"
    last = refused(
        [*QUICK, *faulty, "--use_ddim", use_ddim, "--out", folder], "gradient", "--on_nonfinite skip"
    )
    assert re.search(rf"step {step}\b.*sample {index}\b", last)
    assert list(folder.glob("samples_*.npz")) == []
    assert len(list(folder.glob("shards/*.npz"))) == (call_number > 5)


@pytest.mark.parametrize("value", ["nan", "inf"])
def test_on_nonfinite_skip_drops_that_guidance_and_counts_it(tmp_path, value):
    skip = ["--on_nonfinite", "skip", "--labels", "balanced"]
    sound = write_faulty_classifier(tmp_path)
    assert call(script.main, [*QUICK, *sound, *skip, "--out", tmp_path / "sound"]).code == 0
    faulty = write_faulty_classifier(tmp_path, at_call=7, position=1, value=value)
    result = call(script.main, [*QUICK, *faulty, *skip, "--out", tmp_path / "faulty"])
    assert result.code == 0, result.err
    assert re.search(r"dropped 1 time", result.err)
    assert json.loads((tmp_path / "faulty/run.json").read_text())["totals"]["skipped_guidance"] == 1
    assert json.loads((tmp_path / "sound/run.json").read_text())["totals"]["skipped_guidance"] == 0
    images, others = load_samples(tmp_path / "sound")[0], load_samples(tmp_path / "faulty")[0]
    assert [bool((a != b).any()) for a, b in zip(images, others, strict=True)] == [False, False, False, True]


@pytest.mark.parametrize("use_ddim", [False, True])
def test_nonfinite_gradient_of_a_noisy_classifier_stops_and_names_step_and_sample(tmp_path, use_ddim):
    unet, classifier = save_unet(tmp_path / "unet.pt", TINY_64), make_noisy_classifier()
    state = load_state_dict(save_random(tmp_path / "sound.pt", classifier))
    state["out.2.c_proj.bias"][3] = float("nan")
    torch.save(state, tmp_path / "noisy.pt")
    flags = [
        "--model_path",
        unet,
        "--classifier_path",
        tmp_path / "noisy.pt",
        *flags_of({**TINY_64, **TINY_NOISY}),
    ]
    flags += ["--num_samples", 1, "--timestep_respacing", 5, "--use_ddim", use_ddim]
    last = refused([*flags, "--out", tmp_path / "out"], "non-finite")
    # Such a classifier is asked at the original timesteps.
    assert re.search(r"step (999|800)\b.*sample 0\b", last)
    assert list((tmp_path / "out").glob("samples_*.npz")) == []


def test_an_infinity_of_the_network_does_not_become_a_black_image(tmp_path):
    """The clamp would turn it into a finite pixel."""
    state = load_state_dict(DIGITS_UNET)
    state["out.2.bias"][0] = float("inf")
    torch.save(state, tmp_path / "unet.pt")
    refused(
        [*QUICK, "--model_path", tmp_path / "unet.pt", "--out", tmp_path / "out"],
        "the network answered",
        "step 4",
        "sample 0, 1",
    )
    assert list((tmp_path / "out").glob("samples_*.npz")) == []


def test_skipped_guidance_of_a_noisy_classifier_is_counted(tmp_path):
    unet, classifier = save_unet(tmp_path / "unet.pt", TINY_64), make_noisy_classifier()
    state = load_state_dict(save_random(tmp_path / "sound.pt", classifier))
    state["out.2.c_proj.bias"][3] = float("nan")
    torch.save(state, tmp_path / "noisy.pt")
    flags = [
        "--model_path",
        unet,
        "--classifier_path",
        tmp_path / "noisy.pt",
        *flags_of({**TINY_64, **TINY_NOISY}),
    ]
    flags += [
        "--num_samples",
        2,
        "--timestep_respacing",
        2,
        "--on_nonfinite",
        "skip",
        "--out",
        tmp_path / "out",
    ]
    assert call(script.main, flags).code == 0
    assert json.loads((tmp_path / "out/run.json").read_text())["totals"]["skipped_guidance"] == 2 * 2


def test_nonfinite_network_stops_and_names_the_samples(tmp_path):
    state = load_state_dict(DIGITS_UNET)
    # The embedding of one class: with one sample of each, only one is spoilt.
    state["label_emb.weight"][7] = float("nan")
    torch.save(state, tmp_path / "unet.pt")
    flags = [
        *QUICK,
        "--model_path",
        tmp_path / "unet.pt",
        "--classifier_scale",
        0,
        "--fix_class",
        "True",
        "--fix_class_index",
        7,
    ]
    refused(
        [*flags, "--num_samples", 1, "--out", tmp_path / "out"],
        "the network answered NaN or infinity",
        "step 4",
        "sample 0",
    )
    assert list((tmp_path / "out").glob("samples_*.npz")) == []


# The output folder


@pytest.mark.parametrize("flag", ["--out", "--log_dir"])
@pytest.mark.parametrize("place", ["{file}", "{file}/below", "/proc/elsewhere", "/dev/null/below"])
def test_unwritable_output_folder(tmp_path, flag, place):
    file = tmp_path / "file"
    file.write_text("mine")
    folder = place.format(file=file)
    refused([*QUICK, flag, folder], f"cannot write to the output folder {folder}", "choose another --out")
    assert file.read_text() == "mine"


@pytest.mark.parametrize(
    ("flags", "fragments"),
    [
        (["--seed", 1], ["seed 0 -> 1"]),
        (
            ["--classifier_scale", 3, "--num_samples", 6],
            [f"classifier_scale {PRESETS['digits']['classifier_scale']} -> 3.0", "num_samples 4 -> 6"],
        ),
        (["--batch_size", 3], ["batch_size 2 -> 3"]),
        (["--labels", "3"], ["labels 'balanced' -> '3'"]),
        (["--classifier_type", "digits_judge"], ["classifier_type 'digits_guide' -> 'digits_judge'"]),
    ],
)
def test_a_folder_that_holds_another_runs_output(finished, flags, fragments):
    last = refused_at_once(
        finished,
        flags,
        finished,
        "another run's output",
        "choose another --out",
        "--overwrite True",
        *fragments,
    )
    assert "use_ddim" not in last


def test_a_folder_of_samples_without_a_manifest(tmp_path):
    (tmp_path / "samples_4x16x16x3.npz").write_bytes(b"somebody's")
    refused([*QUICK, "--out", tmp_path], tmp_path, "no run.json", "choose another --out", "--overwrite True")
    assert (tmp_path / "samples_4x16x16x3.npz").read_bytes() == b"somebody's"


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"foo": 1}', '{"settings": 3}'])
def test_a_folder_with_a_manifest_of_something_else(tmp_path, content):
    (tmp_path / "run.json").write_text(content)
    refused([*QUICK, "--out", tmp_path], tmp_path, "run.json", "--out")
    assert (tmp_path / "run.json").read_text() == content


def test_overwrite_removes_nothing_before_the_input_is_known_to_be_good(finished, tmp_path):
    for flags in (
        ["--model_path", tmp_path / "absent.pt"],
        ["--labels", "10"],
        ["--num_channels", 64],
        ["--classifier_type", "resnet"],
    ):
        refused_at_once(finished, ["--overwrite", "True", *flags])


# Choices


def test_unknown_preset_lists_the_choices(finished):
    refused_at_once(finished, ["--preset", "digit"], "unknown preset 'digit'", *PRESETS, code=2)


@pytest.mark.parametrize("name", ["resnet", "ResNet50", "digits"])
def test_unknown_classifier_lists_the_choices(finished, name):
    refused_at_once(
        finished,
        ["--classifier_type", name],
        f"unknown classifier '{name}'",
        "digits_guide",
        "resnet50",
        "vit_b_16",
        "FILE.py:builder",
    )


@pytest.mark.parametrize(
    ("classifier", "fragments"),
    [
        ("{folder}/absent.py:builder", ["no file", "absent.py"]),
        ("{folder}/own.py:absent", ["own.py", "no function 'absent'", "builder(num_classes)"]),
        ("{folder}/own.py:raises", ["own.py"]),
    ],
)
def test_ones_own_classifier_that_cannot_be_built(finished, tmp_path, classifier, fragments):
    write_faulty_classifier(tmp_path)
    with open(tmp_path / "own.py", "a") as file:
        file.write("\ndef raises(num_classes):\n    raise ValueError('own.py: no such thing')\n")
    refused_at_once(finished, ["--classifier_type", classifier.format(folder=tmp_path)], *fragments)


@pytest.mark.parametrize(
    ("flags", "fragments"),
    [
        (["--foo", 1], ["--foo"]),
        (["--num_sampl", 1], ["--num_sampl"]),
        (["--classifier", "x"], ["--classifier"]),
        (["stray"], ["stray"]),
        (["--use_ddim", "maybe"], ["--use_ddim", "'maybe'", "True or False"]),
        (["--use_ddim"], ["--use_ddim"]),
        (["--num_samples", "many"], ["--num_samples", "'many'"]),
        (["--seed", "1.5"], ["--seed", "'1.5'"]),
        (["--gamma_factor", "x"], ["--gamma_factor", "'x'"]),
        (["--classifier_input", "raw"], ["--classifier_input", "'raw'", "paper", "imagenet"]),
        (["--on_nonfinite", "warn"], ["--on_nonfinite", "'warn'", "stop", "skip"]),
        (["--variance_max", "x"], ["--variance_max", "'x'", "schedule", "first_pixel"]),
    ],
)
def test_flags_that_do_not_parse(finished, flags, fragments):
    refused_at_once(finished, flags, *fragments, code=2)


@pytest.mark.parametrize(
    ("flags", "fragments"),
    [
        (["--num_samples", 0], ["--num_samples", "0"]),
        (["--num_samples", -3], ["--num_samples", "-3"]),
        (["--batch_size", 0], ["--batch_size", "0"]),
        (["--num_classes", 0], ["--num_classes", "0"]),
        (["--channel_mult", "1,x"], ["channel_mult '1,x'", "1,2,2"]),
        (["--attention_resolutions", "x"], ["'x'", "32,16,8"]),
        (["--attention_resolutions", "0"], ["'0'", "32,16,8"]),
        (["--timestep_respacing", "x"], ["timestep_respacing 'x'", "250"]),
        (["--timestep_respacing", "10,"], ["timestep_respacing '10,'", "250"]),
        (["--timestep_respacing", "0"], ["timestep_respacing '0'", "250"]),
        (["--timestep_respacing", "ddim"], ["timestep_respacing 'ddim'", "ddim25"]),
        (["--timestep_respacing", "2000"], ["1000", "2000"]),
        (["--timestep_respacing", "ddim300"], ["300", "1000"]),
        (["--noise_schedule", "sigmoid"], ["'sigmoid'", "linear", "cosine"]),
        (["--diffusion_steps", 0], ["diffusion_steps", "0"]),
        (["--diffusion_steps", -5], ["diffusion_steps", "-5"]),
        (["--num_channels", 33], ["num_channels", "33", "32"]),
        (["--num_heads", 5], ["num_heads 5"]),
        (["--num_heads", 0], ["num_heads 0"]),
        (["--guidance_interval", "5"], ["--guidance_interval '5'", "LO,HI"]),
        (["--guidance_interval", "a,b"], ["--guidance_interval 'a,b'", "LO,HI"]),
        (["--guidance_interval", "1,2,3"], ["--guidance_interval '1,2,3'", "LO,HI"]),
        (["--guidance_interval", "5,1"], ["interval", "5.0,1.0", "lo < hi"]),
        (["--guidance_interval=-1,1"], ["interval", "-1.0,1.0", "0 <= lo"]),
        (["--guidance_interval", "nan,1"], ["interval", "nan,1.0"]),
        (["--softplus_beta", 0], ["softplus_beta", "0"]),
        (["--softplus_beta", -3], ["softplus_beta", "-3"]),
        (["--softplus_beta", "nan"], ["softplus_beta", "nan"]),
        (["--device", "graphics"], ["--device graphics", "cpu"]),
    ],
)
def test_values_that_mean_nothing(finished, flags, fragments):
    refused_at_once(finished, flags, *fragments)


@pytest.mark.parametrize(
    "flag", ["classifier_scale", "joint_temperature", "margin_temperature_discount", "gamma_factor"]
)
def test_infinity(finished, flag):
    refused_at_once(finished, [f"--{flag}", "inf"], f"--{flag} must be finite, got inf")


@pytest.mark.parametrize("seed", [-1, 2**63])
def test_a_seed_that_is_none(finished, seed):
    refused_at_once(finished, ["--seed", seed], f"--seed must be from 0 to 2**63 - 1, got {seed}")


def test_a_folder_that_another_run_is_writing_into(finished):
    with locked(finished):
        refused_at_once(finished, [], f"another run is writing into {finished}", "--out")


@pytest.mark.parametrize(
    "flag", ["classifier_scale", "joint_temperature", "margin_temperature_discount", "gamma_factor"]
)
def test_not_a_number(finished, tmp_path, flag):
    last = refused([*QUICK, f"--{flag}", "nan", "--out", tmp_path], flag, "nan", at_once=True)
    assert "another run" not in last
    refused_at_once(finished, [f"--{flag}", "nan"], flag, "nan")


@pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA is there")
@pytest.mark.parametrize("device", ["cuda", "cuda:1"])
def test_cuda_that_is_not_there(finished, device):
    refused_at_once(finished, ["--device", device], f"--device {device}", "write cpu")


# Classifiers that do not fit


def test_softplus_needs_a_relu(finished, tmp_path):
    linear = write_faulty_classifier(tmp_path)
    refused_at_once(
        finished, [*linear, "--softplus_beta", 3], "own.py:builder", "no ReLU", "softplus_beta inf"
    )


@pytest.mark.parametrize(
    ("name", "activation"), [("mobilenet_v2", "ReLU6"), ("mobilenet_v3_small", "Hardswish")]
)
def test_softplus_refuses_other_kinks_by_name(finished, name, activation):
    flags = ["--classifier_type", name, "--classifier_path", "random", "--softplus_beta", 3]
    refused_at_once(finished, flags, activation, "softplus_beta inf")


def test_classifier_of_another_number_of_classes(finished, tmp_path):
    (tmp_path / "own.py").write_text(
        "import torch\ndef builder(n):\n    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(768, 7))\n"
    )
    flags = ["--classifier_type", f"{tmp_path / 'own.py'}:builder", "--softplus_beta", "inf"]
    refused_at_once(finished, flags, "own.py:builder", "num_classes 10", "7")


def test_weights_of_another_number_of_classes(finished, tmp_path):
    flags = [
        "--model_path",
        save_unet(tmp_path / "unet.pt", TINY),
        *flags_of(TINY),
        "--classifier_type",
        "digits_guide",
        "--num_classes",
        9,
    ]
    refused_at_once(finished, flags, "guide.safetensors", "fc.weight", "[10, 512]", "[9, 512]", base=())


def test_classifier_weights_that_are_not_there(finished):
    refused_at_once(finished, ["--classifier_type", "resnet34"], "resnet34-", "give its path")
    refused_at_once(
        finished, ["--classifier_type", "resnet18", "--classifier_path", "IMAGENET1K_V7"], "IMAGENET1K_V7"
    )


# Contradictions


@pytest.mark.parametrize(
    ("flags", "fragments"),
    [
        (["--softplus_beta", 3], ["--softplus_beta", "--classifier_type"]),
        (
            ["--gamma_factor", 0.3, "--joint_temperature", 1],
            ["--gamma_factor", "--joint_temperature", "--classifier_type"],
        ),
        (["--margin_temperature_discount", 0.5], ["--margin_temperature_discount", "--classifier_type"]),
        (["--guidance_interval", "0,1"], ["--guidance_interval", "--classifier_type"]),
        (["--classifier_input", "paper"], ["--classifier_input", "--classifier_type"]),
        (["--on_nonfinite", "skip"], ["--on_nonfinite", "--classifier_type"]),
        (["--variance_max", "first_pixel"], ["--variance_max", "--classifier_type"]),
        (["--classifier_path", "x.pt", "--softplus_beta", 3], ["--softplus_beta", "--classifier_type"]),
        (["--classifier_scale", 2], ["--classifier_scale 2.0", "--classifier_type", "--classifier_path"]),
        (["--unconditional", "True"], ["--unconditional True", "--null_class True"]),
        (["--class_cond", "False", "--null_class", "True"], ["--null_class True", "--class_cond True"]),
        (["--fix_class_index", 3], ["--fix_class_index 3", "--fix_class True"]),
        (["--fix_class", "True", "--labels", "3"], ["--fix_class True", "--labels 3", "keep one"]),
        (["--log_dir", "{other}"], ["--log_dir", "--out", "{other}", "keep one"]),
    ],
)
def test_contradictions(finished, tmp_path, flags, fragments):
    flags, fragments = (
        [str(word).format(other=tmp_path / "other") for word in words] for words in (flags, fragments)
    )
    refused_at_once(finished, flags, *fragments, base=NETWORK)
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    ("flags", "fragments"),
    [
        (
            ["--use_ddim", "True", "--variance_max", "first_pixel"],
            ["--variance_max first_pixel", "--use_ddim"],
        ),
        (["--classifier_input", "imagenet"], ["digits_guide", "paper"]),
        (["--model_path", ""], ["--model_path", "--preset", "digits"]),
    ],
)
def test_contradictions_with_a_preset(finished, flags, fragments):
    refused_at_once(finished, flags, *fragments)


# In a shell


@pytest.mark.parametrize(
    ("flags", "code", "message"),
    [
        (["--model_path", "absent.pt"], 1, "error: no checkpoint at absent.pt"),
        (["--num_sampl", "3"], 2, "unrecognized arguments: --num_sampl 3"),
    ],
)
def test_the_shell_sees_one_line_and_the_exit_code(tmp_path, flags, code, message):
    command = [sys.executable, ROOT / "scripts/classifier_sample.py", *map(str, QUICK), *flags]
    result = subprocess.run(command, env=environment(), cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == code
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    assert message in result.stderr.splitlines()[-1]
