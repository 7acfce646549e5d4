"""scripts/image_train.py, classifier_train.py and make_dataset.py from the command line."""

import json
import sys

import numpy as np
import pytest
import torch
from forked import run
from helpers import ROOT, call, flags_of, load_script

from classifiers import load_classifier
from guided_diffusion.edm import load_edm_network
from guided_diffusion.files.checkpoints import load_state_dict
from guided_diffusion.runs.lock import locked
from guided_diffusion.training.loop import Loop

IMAGES = {
    "image_size": 8,
    "num_channels": 32,
    "num_res_blocks": 1,
    "channel_mult": "1,2",
    "attention_resolutions": 4,
    "num_classes": 3,
    "class_cond": True,
    "labels_dropout": 0.2,
    "batch_size": 4,
    "log_interval": 2,
    "save_interval": 2,
    "lr_anneal_steps": 4,
    "ema_rate": "0.5,0.9",
    "samples": 4,
}
DISCRETE = {"diffusion_steps": 30, "learn_sigma": True}
CLASSIFIER = {
    "image_size": 32,
    "num_classes": 3,
    "batch_size": 4,
    "log_interval": 2,
    "save_interval": 4,
    "iterations": 4,
    "classifier_width": 32,
    "classifier_depth": 1,
    "classifier_attention_resolutions": 8,
}
images_main = load_script("image_train").main
classifier_main = load_script("classifier_train").main


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """npz files of ten images, 8.npz and 32.npz of these sizes."""
    folder, generator = tmp_path_factory.mktemp("data"), np.random.RandomState(0)
    for size in (8, 32):
        pixels = generator.randint(0, 256, (10, size, size, 3), dtype=np.uint8)
        np.savez(folder / f"{size}.npz", arr_0=pixels, arr_1=np.arange(10) % 3)
    return folder


def train(main, data, out, flags, **more):
    flags = {"data_dir": data / f"{flags['image_size']}.npz", "out": out, **flags, **more}
    return call(main, flags_of(flags))


def names(folder):
    return {path.name for path in folder.iterdir()}


def test_image_train_writes_upstreams_names_and_what_the_samplers_read(data, tmp_path):
    done = train(images_main, data, tmp_path, IMAGES, **DISCRETE, keep=1)
    assert (done.code, done.out) == (0, f"{tmp_path}\n"), done.err
    expected = {"model000004.pt", "opt000004.pt", "ema_0.5_000004.pt", "ema_0.9_000004.pt", "progress.csv"}
    expected |= {"network_0.5.safetensors", "network_0.9.safetensors", "training.json", "log.txt", "loss.png"}
    assert names(tmp_path) == expected | {"samples000002.png", "samples000004.png"}
    header, *rows = (tmp_path / "progress.csv").read_text().splitlines()
    assert header == "step,samples,lr,grad_norm,loss,loss_q0,loss_q1,loss_q2,loss_q3,mse,vb"
    assert [row.split(",")[:2] for row in rows] == [["2", "8"], ["4", "16"]]
    weights = load_state_dict(tmp_path / "network_0.5.safetensors")
    assert weights["label_emb.weight"].shape[0] == 4  # three classes and none
    torch.testing.assert_close(
        weights, load_state_dict(tmp_path / "ema_0.5_000004.pt"), check_dtype=False, rtol=1e-3, atol=1e-6
    )
    record = json.loads((tmp_path / "training.json").read_text())
    assert (record["flags"]["image_size"], record["step"]) == (8, 4) and record["seconds"] > 0
    assert f"--out {tmp_path}" in record["command"]
    assert "left" in done.err and "steps/s" in done.err


@pytest.mark.parametrize("kind", ["DhariwalUNet", "SongUNet"])
def test_edms_network_is_read_back(data, tmp_path, kind):
    done = train(images_main, data, tmp_path, IMAGES, loss="edm", edm_model=kind, learn_sigma=True)
    assert done.code == 0 and "note: --learn_sigma has no effect here" in done.err, done.err
    net = load_edm_network(tmp_path / "network_0.5.safetensors")
    assert (net.label_dim, net.img_resolution) == (3, 8)
    assert net(torch.zeros(1, 3, 8, 8), 1.0).isfinite().all()


@pytest.mark.parametrize("flags", [{"use_bf16": True}, {"use_fp16": True}, {"use_checkpoint": True}])
def test_half_precision_and_gradient_checkpointing(data, tmp_path, flags):
    assert train(images_main, data, tmp_path / "a", IMAGES, **DISCRETE).code == 0
    assert train(images_main, data, tmp_path / "b", IMAGES, **DISCRETE, **flags).code == 0
    one, other = (load_state_dict(tmp_path / run / "model000004.pt") for run in "ab")
    exact = "use_checkpoint" in flags
    for name in one:
        assert other[name].dtype == torch.float32
        torch.testing.assert_close(other[name], one[name], rtol=0, atol=0 if exact else 2e-3)


def test_a_number_of_seconds_ends_the_training_too(data, tmp_path):
    flags = {**IMAGES, "lr_anneal_steps": 0, "save_interval": 10**6, "log_interval": 10**6, "samples": 0}
    assert train(images_main, data, tmp_path, flags, **DISCRETE, max_seconds=0.5).code == 0
    step, _, rate = (tmp_path / "progress.csv").read_text().splitlines()[1].split(",")[:3]
    assert 0 < float(rate) < 1e-4 and (tmp_path / f"model{int(step):06d}.pt").exists()


def test_two_processes_agree_with_one_at_the_same_whole_batch(data, tmp_path):
    flags = {**IMAGES, **DISCRETE, "samples": 0}
    assert train(images_main, data, tmp_path / "1", flags, batch_size=4).code == 0
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    more = {"batch_size": 2, "out": tmp_path / "2", "data_dir": data / "8.npz"}
    run([*torchrun, ROOT / "scripts/image_train.py", *flags_of({**flags, **more})])
    for name in ("model000004.pt", "ema_0.5_000004.pt"):
        one, two = (load_state_dict(tmp_path / run / name) for run in "12")
        torch.testing.assert_close(two, one, rtol=0, atol=2e-6)
    one, two = (np.genfromtxt(tmp_path / run / "progress.csv", delimiter=",", names=True) for run in "12")
    np.testing.assert_allclose(two["loss"], one["loss"], rtol=1e-4)
    np.testing.assert_array_equal(two["samples"], [8, 16])


# Classifiers


def test_a_clean_classifier_is_read_back_with_its_accuracy(data, tmp_path):
    more = {"classifier_type": "cifar_resnet20", "noised": False, "optimizer": "sgd", "random_crop": 2}
    clean = {name: value for name, value in CLASSIFIER.items() if not name.startswith("classifier_")}
    done = train(
        classifier_main, data, tmp_path, clean, **more, val_data_dir=data / "32.npz", eval_interval=2
    )
    assert done.code == 0, done.err
    figures = json.loads((tmp_path / "accuracy.json").read_text())
    for file in ("classifier.safetensors", "model000004.pt"):
        classifier = load_classifier("cifar_resnet20", tmp_path / file, num_classes=3)
        images = torch.from_numpy(np.load(data / "32.npz")["arr_0"]).permute(0, 3, 1, 2).float() / 127.5 - 1
        hits = (classifier(images).argmax(dim=1) == torch.arange(10) % 3).float().mean().item()
        assert figures["acc@1"] == pytest.approx(hits, abs=0.11)
    assert figures["images"] == 10
    assert (tmp_path / "validation.csv").read_text().startswith("step,acc@1,loss\n2,")


def test_a_noisy_classifier(data, tmp_path):
    done = train(classifier_main, data, tmp_path, CLASSIFIER)
    assert done.code == 0, done.err
    assert "out.2.positional_embedding" in load_state_dict(tmp_path / "classifier.safetensors")
    assert "loss_q3" in (tmp_path / "progress.csv").read_text()


# What is refused, in one line


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"data_dir": ""}, "--data_dir is missing"),
        ({"data_dir": "nowhere"}, "there is nothing at nowhere"),
        ({"num_classes": 2}, "image 2 has label 2, and --num_classes 2 allows 0 to 1"),
        ({"ema_rate": "0.9,1.5"}, "--ema_rate takes numbers in [0, 1) such as 0.999,0.9999, got '1.5'"),
        ({"ema_rate": "0.9,0.9"}, "--ema_rate has a rate twice"),
        ({"use_bf16": True, "use_fp16": True}, "--use_bf16 and float16 contradict each other"),
        ({"microbatch": 0}, "--microbatch must be -1 or at least 1, got 0"),
        ({"labels_dropout": 2}, "--labels_dropout must be from 0 to 1, got 2.0"),
        ({"resume_checkpoint": "model000100.pt"}, "model000100.pt"),
        ({"lr": "nan"}, "--lr must be a number, got nan"),
        ({"fp16_scale_growth": 0}, "--fp16_scale_growth must be above 0 and finite, got 0.0"),
        (
            {"loss": "edm", "learn_sigma": False, "channel_mult": "0.5,1"},
            "--loss edm takes whole numbers as --channel_mult, such as 1,2,2; got 0.5,1",
        ),
    ],
)
def test_wrong_flags(data, tmp_path, flags, message):
    done = train(images_main, data, tmp_path, {**IMAGES, **DISCRETE}, **flags)
    assert done.code == 1 and message in done.err, done.err
    assert done.err.strip().splitlines()[-1].startswith("error: ")


def test_a_classifier_of_clean_images_cannot_be_noised(data, tmp_path):
    done = train(classifier_main, data, tmp_path, {"image_size": 32}, classifier_type="cifar_resnet20")
    assert (done.code, done.err) == (
        1,
        "error: --classifier_type cifar_resnet20 sees no noise level: add --noised False\n",
    )


def test_a_checkpoint_of_another_shape(data, tmp_path):
    assert train(images_main, data, tmp_path, IMAGES, **DISCRETE, samples=0).code == 0
    flags = {**IMAGES, **DISCRETE, "samples": 0, "num_channels": 64}
    done = train(images_main, data, tmp_path, flags)
    assert done.code == 1 and "another value of --num_channels: 32, now 64; choose another --out" in done.err
    more = {"resume_checkpoint": tmp_path / "model000004.pt"}
    done = train(images_main, data, tmp_path / "other", flags, **more)
    assert done.code == 1 and "model000004.pt does not fit the architecture flags" in done.err


def test_a_folder_that_another_training_writes_into(data, tmp_path):
    with locked(tmp_path):
        done = train(images_main, data, tmp_path, IMAGES, **DISCRETE)
    assert done.code == 1 and f"error: another run is writing into {tmp_path}" in done.err
    assert names(tmp_path) == set()


def test_a_resumed_training_ends_where_a_checkpoint_is_named_or_is_refused(data, tmp_path):
    flags = {**IMAGES, **DISCRETE, "samples": 0}
    assert train(images_main, data, tmp_path / "a", flags).code == 0
    earlier = tmp_path / "a/model000002.pt"
    done = train(images_main, data, tmp_path / "a", flags, resume_checkpoint=earlier)
    assert done.code == 1 and "is followed by the checkpoint of step 4" in done.err
    assert train(images_main, data, tmp_path / "b", flags, resume_checkpoint=earlier).code == 0
    for name in ("model000004.pt", "ema_0.9_000004.pt"):
        assert (tmp_path / "b" / name).read_bytes() == (tmp_path / "a" / name).read_bytes()
    (tmp_path / "b/network_0.5.safetensors").unlink()
    done = train(images_main, data, tmp_path / "b", flags, resume_checkpoint=earlier, lr_anneal_steps=5)
    assert done.code == 0 and f"resumed from {tmp_path / 'b/model000004.pt'}, 4 steps" in done.err, done.err
    assert {"model000005.pt", "network_0.5.safetensors"} <= names(tmp_path / "b")
    (tmp_path / "a/network_0.5.safetensors").unlink()  # as if it was killed before it wrote the file
    assert train(images_main, data, tmp_path / "a", flags).code == 0
    assert (tmp_path / "a/network_0.5.safetensors").exists()


def test_a_loss_that_is_not_finite_keeps_the_last_good_checkpoint(data, tmp_path, monkeypatch):
    advance = Loop.advance

    def poisoned(loop, batch):
        return advance(loop, (batch[0] * (float("nan") if loop.step == 2 else 1), *batch[1:]))

    monkeypatch.setattr(Loop, "advance", poisoned)
    done = train(images_main, data, tmp_path, IMAGES, **DISCRETE, samples=0)
    assert done.code == 1
    last = done.err.strip().splitlines()[-1]
    assert last.startswith("error: non-finite training loss at step 2; the checkpoint of step 2 is good")
    assert all(p.isfinite().all() for p in load_state_dict(tmp_path / "model000002.pt").values())
    assert "model000004.pt" not in names(tmp_path)


def test_a_full_disk_keeps_the_last_checkpoint(data, tmp_path, monkeypatch):
    save = torch.save

    def full(content, file):
        if "000004" in file.name:
            raise OSError(28, "No space left on device")
        save(content, file)

    monkeypatch.setattr(torch, "save", full)
    done = train(images_main, data, tmp_path, IMAGES, **DISCRETE, samples=0)
    last = done.err.strip().splitlines()[-1]
    assert (
        done.code == 1
        and last.startswith("error: ")
        and "could not be written (No space left on device)" in last
    )
    assert last.endswith("the checkpoint of step 2 is complete")
    assert {"model000002.pt", "opt000002.pt"} <= names(tmp_path) and "model000004.pt" not in names(tmp_path)


# Packing


@pytest.mark.parametrize("kind", ["npz", "zip"])
def test_make_dataset_packs_what_training_reads(data, tmp_path, kind):
    main, out = load_script("make_dataset").main, tmp_path / f"packed.{kind}"
    done = call(main, [data / "8.npz", out, "--image_size", 8])
    assert (done.code, done.out) == (0, f"{out}: 10 images of 8 pixels, 3 classes\n")
    again = call(main, [out, tmp_path / "again.npz", "--image_size", 8])
    assert again.code == 0
    one, other = (np.load(file, allow_pickle=False) for file in (data / "8.npz", tmp_path / "again.npz"))
    np.testing.assert_array_equal(other["arr_0"], one["arr_0"])
    np.testing.assert_array_equal(other["arr_1"], one["arr_1"])
    assert "exists: choose another name" in call(main, [data / "8.npz", out, "--image_size", 8]).err
    assert (
        "must end in .npz or .zip" in call(main, [data / "8.npz", tmp_path / "a.tar", "--image_size", 8]).err
    )
