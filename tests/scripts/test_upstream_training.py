"""Training scripts in the style of those that were written for guided-diffusion's public names run here with
plain python, unmodified.
"""

import sys

import numpy as np
import pytest
import torch
from forked import run
from PIL import Image

from guided_diffusion import logger
from guided_diffusion.dist_util import load_state_dict
from guided_diffusion.fp16_util import MixedPrecisionTrainer
from guided_diffusion.script_util import create_classifier
from guided_diffusion.train_util import log_loss_dict, parse_resume_step_from_filename

IMAGES = """
import sys
from guided_diffusion import dist_util, logger
from guided_diffusion.image_datasets import load_data
from guided_diffusion.resample import create_named_schedule_sampler
from guided_diffusion.script_util import (
    args_to_dict, create_model_and_diffusion, model_and_diffusion_defaults,
)
from guided_diffusion.train_util import TrainLoop

data_dir, steps, resume, use_fp16, sampler = sys.argv[1:]
dist_util.setup_dist()
logger.configure()
flags = model_and_diffusion_defaults()
flags.update(image_size=16, num_channels=32, num_res_blocks=1, channel_mult="1,2", attention_resolutions="8")
flags.update(class_cond=True, learn_sigma=True, diffusion_steps=20, noise_schedule="cosine")
flags.update(use_fp16=bool(int(use_fp16)))
logger.log("creating model and diffusion...")
model, diffusion = create_model_and_diffusion(**flags)
model.to(dist_util.dev())
schedule_sampler = create_named_schedule_sampler(sampler, diffusion)
logger.log("creating data loader...")
data = load_data(data_dir=data_dir, batch_size=4, image_size=16, class_cond=True)
TrainLoop(
    model=model, diffusion=diffusion, data=data, batch_size=4, microbatch=-1, lr=1e-3,
    ema_rate="0.9,0.99", log_interval=5, save_interval=10, resume_checkpoint=resume,
    use_fp16=flags["use_fp16"], fp16_scale_growth=1e-3, schedule_sampler=schedule_sampler,
    weight_decay=0.0, lr_anneal_steps=int(steps),
).run_loop()
"""
CLASSIFIER = """
import os, sys
import torch as th
import torch.nn.functional as F
from torch.nn.parallel.distributed import DistributedDataParallel as DDP
from torch.optim import AdamW
from guided_diffusion import dist_util, logger
from guided_diffusion.fp16_util import MixedPrecisionTrainer
from guided_diffusion.image_datasets import load_data
from guided_diffusion.resample import create_named_schedule_sampler
from guided_diffusion.script_util import classifier_and_diffusion_defaults, create_classifier_and_diffusion
from guided_diffusion.train_util import log_loss_dict, parse_resume_step_from_filename

data_dir, steps, resume = sys.argv[1:]
dist_util.setup_dist()
logger.configure()
flags = classifier_and_diffusion_defaults()
flags.update(image_size=32, classifier_width=32, classifier_depth=1, classifier_attention_resolutions="8")
model, diffusion = create_classifier_and_diffusion(**flags)
model.to(dist_util.dev())
sampler = create_named_schedule_sampler("uniform", diffusion)
start = 0
if resume:
    start = parse_resume_step_from_filename(resume)
    model.load_state_dict(dist_util.load_state_dict(resume, map_location=dist_util.dev()))
dist_util.sync_params(model.parameters())
trainer = MixedPrecisionTrainer(model=model, use_fp16=False, initial_lg_loss_scale=16.0)
model = DDP(model, broadcast_buffers=False, bucket_cap_mb=128, find_unused_parameters=False)
data = load_data(data_dir=data_dir, batch_size=4, image_size=32, class_cond=True, random_crop=True)
optimizer = AdamW(trainer.master_params, lr=1e-3, weight_decay=0.1)
if resume:
    file = os.path.join(os.path.dirname(resume), f"opt{start:06d}.pt")
    optimizer.load_state_dict(dist_util.load_state_dict(file, map_location="cpu"))
for step in range(start, int(steps)):
    logger.logkv("step", step)
    batch, extra = next(data)
    labels = extra["y"].to(dist_util.dev())
    t, _ = sampler.sample(batch.shape[0], dist_util.dev())
    logits = model(diffusion.q_sample(batch.to(dist_util.dev()), t), timesteps=t)
    loss = F.cross_entropy(logits, labels, reduction="none")
    log_loss_dict(diffusion, t, {"train_loss": loss.detach()})
    trainer.zero_grad()
    trainer.backward(loss.mean())
    trainer.optimize(optimizer)
    logger.dumpkvs()
folder = logger.get_dir()
th.save(trainer.master_params_to_state_dict(trainer.master_params), f"{folder}/model{int(steps):06d}.pt")
th.save(optimizer.state_dict(), f"{folder}/opt{int(steps):06d}.pt")
"""


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder, generator = tmp_path_factory.mktemp("photos"), np.random.RandomState(0)
    for i in range(8):
        pixels = generator.randint(0, 256, (40, 50, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{('cat', 'dog')[i % 2]}_{i}.jpg")
    return folder


def script(text, *words, folder):
    return run([sys.executable, "-c", text, *words], OPENAI_LOGDIR=str(folder))[1]


def test_image_training_of_20_steps_resumes(photos, tmp_path):
    kind = (1, "loss-second-moment")
    script(IMAGES, photos, 20, "", *kind, folder=tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    for step in ("000010", "000020"):
        kinds = {f"model{step}.pt", f"opt{step}.pt", f"ema_0.9_{step}.pt", f"ema_0.99_{step}.pt"}
        assert kinds <= names
    err = script(IMAGES, photos, 30, tmp_path / "model000020.pt", *kind, folder=tmp_path)
    assert "resumed from" in err and "20 steps" in err
    steps = [line.split(",")[0] for line in (tmp_path / "progress.csv").read_text().splitlines()]
    assert steps == ["step", "5", "10", "15", "20", "25", "30"]
    before, after = (load_state_dict(tmp_path / f"model{step}.pt") for step in ("000020", "000030"))
    assert not torch.equal(before["label_emb.weight"][0], after["label_emb.weight"][0])


def test_classifier_training_of_20_steps_resumes(photos, tmp_path):
    script(CLASSIFIER, photos, 20, "", folder=tmp_path)
    rows = np.genfromtxt(tmp_path / "progress.csv", delimiter=",", names=True)
    assert rows["step"].tolist() == list(range(20)) and np.isfinite(rows["train_loss"]).all()
    script(CLASSIFIER, photos, 25, tmp_path / "model000020.pt", folder=tmp_path)
    assert load_state_dict(tmp_path / "opt000025.pt")["state"][0]["step"] == 25


def test_the_helpers_of_train_util(tmp_path):
    assert parse_resume_step_from_filename("a/model001200.pt") == 1200
    assert parse_resume_step_from_filename("a/other.pt") == 0
    logger.configure(tmp_path)
    process = type("Process", (), {"num_timesteps": 8})
    log_loss_dict(process, torch.tensor([0, 1, 7]), {"mse": torch.tensor([1.0, 3.0, 5.0])})
    logger.logkv("step", 4)
    assert logger.dumpkvs() == {"mse": 3, "mse_q0": 2, "mse_q3": 5, "step": 4}
    assert (tmp_path / "progress.csv").read_text().splitlines()[0] == "mse,mse_q0,mse_q3,step"


def test_mixed_precision_steps_as_float32_does_and_leaves_out_an_overflow():
    torch.manual_seed(0)
    flags = (32, False, 32, 1, "8", True, True, "attention", 10)
    model = create_classifier(*flags)
    trainer = MixedPrecisionTrainer(model=model, use_fp16=True, initial_lg_loss_scale=10.0)
    optimizer = torch.optim.SGD(trainer.master_params, lr=0.1)
    before = trainer.master_params_to_state_dict(trainer.master_params)
    name = "input_blocks.0.0.weight"
    assert before[name].dtype == torch.float32 and model.state_dict()[name].dtype == torch.bfloat16
    before = {key: value.clone() for key, value in before.items()}
    for poison, taken in ((torch.inf, False), (1.0, True)):
        trainer.zero_grad()
        trainer.backward(poison * model(torch.ones(2, 3, 32, 32), torch.zeros(2)).square().mean())
        assert trainer.optimize(optimizer) is taken
        after = trainer.master_params_to_state_dict(trainer.master_params)
        assert any(not torch.equal(after[key], before[key]) for key in before) is taken
    assert trainer.lg_loss_scale == pytest.approx(9.001)
    assert torch.equal(after[name].bfloat16(), model.state_dict()[name])
    restored = trainer.state_dict_to_master_params(after)
    assert all(torch.equal(a, b) for a, b in zip(restored, trainer.master_params, strict=True))
