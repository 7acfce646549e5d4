"""What must be as it was where a training resumes, and which parts of a checkpoint count."""

import json

import pytest
import torch

from guided_diffusion.flags.training import ImageTrainFlags
from guided_diffusion.resample import LossSecondMomentResampler
from guided_diffusion.training.checkpoints import Checkpoints
from guided_diffusion.training.loop import Loop, Precision
from guided_diffusion.training.resume import describe_data, read_record, require_same
from guided_diffusion.training.run import Intervals, Run, Schedule

BEFORE = {"data_dir": "photos", "batch_size": 4, "weight_decay": 0.1, "channel_mult": "1,2"}
DATA = "10 images, checksum 0000abcd"


def check(folder, now, data=DATA, processes=1):
    flags = ImageTrainFlags(**BEFORE).record()
    record = {"flags": flags, "processes": 1, "data": DATA, "step": 4}
    (folder / "training.json").write_text(json.dumps(record))
    config = ImageTrainFlags(**{**BEFORE, **now})
    require_same(folder, read_record(folder), config, data, processes)


@pytest.mark.parametrize(
    ("now", "more", "message"),
    [
        ({"weight_decay": 0.2}, {}, "--weight_decay: 0.1, now 0.2; choose another --out"),
        ({"batch_size": 8}, {}, "--batch_size: 4, now 8"),
        ({"channel_mult": ""}, {}, "--channel_mult: 1,2, now none"),
        ({"loss": "edm"}, {}, "--loss: ddpm, now edm"),
        ({"seed": 1}, {}, "--seed: 0, now 1"),
        ({}, {"processes": 2}, "the number of processes: 1, now 2"),
        ({"data_dir": "b"}, {"data": "9 images"}, rf"--data_dir: photos \({DATA}\), now b \(9 images\)"),
    ],
)
def test_what_decides_about_the_weights_must_stay(tmp_path, now, more, message):
    with pytest.raises(ValueError, match=f"holds a training with another value of {message}"):
        check(tmp_path, now, **more)


def test_the_rest_may_change(tmp_path):
    now = {
        "lr": 1.0,
        "lr_anneal_steps": 9,
        "save_interval": 1,
        "keep": 0,
        "device": "cpu",
        "out": "elsewhere",
    }
    check(tmp_path, {**now, "data_dir": "moved", "microbatch": 1, "edm_model": "SongUNet", "samples": 0})
    require_same(tmp_path, {}, ImageTrainFlags(**now), DATA, 4)
    (tmp_path / "training.json").write_text("[")
    with pytest.raises(ValueError, match=r"training.json is damaged"):
        read_record(tmp_path)


def test_data_are_told_apart_by_pixels_and_labels():
    images, labels = torch.zeros(3, 2, 2, 3, dtype=torch.uint8), torch.arange(3)
    texts = [describe_data(*each) for each in ((images, labels), (images + 1, labels), (images, labels + 1))]
    assert len(set(texts)) == 3 and texts[0].startswith("3 images, checksum ")


# Parts of a checkpoint


def run_of(folder, optimizer=torch.optim.AdamW, learner=None):
    net = torch.nn.Linear(1, 1)
    loop = Loop(net, lambda x: {"loss": net(x)[:, 0] ** 2}, optimizer(net.parameters(), weight_decay=0.5))
    intervals = Intervals(1, 2)
    run = Run(
        loop, lambda step: (torch.ones(2, 1),), Schedule(0.1, 2), intervals, Checkpoints(folder),
        averages={}, batch_size=2, learner=learner,
    )  # fmt: skip
    run.begin(run.checkpoints.latest())
    return run


@pytest.fixture
def trained(tmp_path):
    run = run_of(tmp_path)
    run.run()
    return tmp_path, run.loop.optimizer.state_dict()


def rewrite(folder, change):
    rest = torch.load(folder / "opt000002.pt", weights_only=True)
    torch.save(change(rest), folder / "opt000002.pt")


def momentum(run):
    return [state["exp_avg"] for state in run.loop.optimizer.state_dict()["state"].values()]


@pytest.mark.parametrize("bare", [True, False])
def test_the_optimizers_state_is_taken_and_its_settings_are_ours(trained, bare):
    """Bare: as guided-diffusion writes it."""
    folder, state = trained
    state["param_groups"][0]["weight_decay"] = 0.25
    rewrite(folder, lambda rest: state if bare else {**rest, "optimizer": state})
    run = run_of(folder)
    assert run.loop.step == 2 and momentum(run) == [each["exp_avg"] for each in state["state"].values()]
    assert run.loop.optimizer.param_groups[0]["weight_decay"] == 0.5


def other_shape(rest):
    for state in rest["optimizer"]["state"].values():
        state["exp_avg"] = torch.zeros(7)
    return rest


@pytest.mark.parametrize(
    ("change", "optimizer"),
    [
        (lambda rest: {**rest, "optimizer": {}}, torch.optim.AdamW),
        (lambda rest: [], torch.optim.AdamW),
        (lambda rest: rest, torch.optim.SGD),
        (other_shape, torch.optim.AdamW),
        (lambda rest: {"state": {}, "param_groups": [{"params": [0]}]}, torch.optim.AdamW),
    ],
)
def test_a_state_that_does_not_fit_starts_anew(trained, change, optimizer):
    rewrite(trained[0], change)
    run = run_of(trained[0], optimizer)
    assert run.loop.step == 2 and not run.loop.optimizer.state_dict()["state"]


def test_parts_that_are_empty_or_missing_start_anew(trained, monkeypatch):
    """float32 -> float16, and uniform -> loss-second-moment."""
    monkeypatch.setattr(Precision, "scaler", lambda self, device: torch.amp.GradScaler(device.type))
    learner = LossSecondMomentResampler(type("Steps", (), {"num_timesteps": 3}))
    for change in (lambda rest: rest, lambda rest: {"optimizer": rest["optimizer"]}):
        rewrite(trained[0], change)
        run = run_of(trained[0], learner=learner)
        assert run.loop.step == 2 and momentum(run)
