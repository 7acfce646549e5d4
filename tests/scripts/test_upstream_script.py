"""A script in the style of those that were written for guided-diffusion's public names runs here with plain
python, unmodified.
"""

import sys

import numpy as np
import pytest
import torch
from forked import run
from helpers import (
    TINY_64,
    TINY_NOISY,
    flags_of,
    make_noisy_classifier,
    make_unet,
    save_random,
    save_unet,
)

from guided_diffusion import dist_util, logger
from guided_diffusion.script_util import NUM_CLASSES

SCRIPT = """
import argparse
import os

import numpy as np
import torch as th
import torch.distributed as dist
import torch.nn.functional as F

from guided_diffusion import dist_util, logger
from guided_diffusion.script_util import (
    NUM_CLASSES, add_dict_to_argparser, args_to_dict, classifier_defaults, create_classifier,
    create_model_and_diffusion, model_and_diffusion_defaults,
)


def gather(tensor):
    parts = [th.zeros_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, tensor)
    return [part.cpu().numpy() for part in parts]


def load(network, path, use_fp16):
    network.load_state_dict(dist_util.load_state_dict(path, map_location="cpu"))
    network.to(dist_util.dev())
    if use_fp16:
        network.convert_to_fp16()
    return network.eval()


values = dict(num_samples=4, batch_size=2, use_ddim=False, clip_denoised=True)
values.update(model_path="", classifier_path="", classifier_scale=1.0)
values.update(model_and_diffusion_defaults())
values.update(classifier_defaults())
parser = argparse.ArgumentParser()
add_dict_to_argparser(parser, values)
args = parser.parse_args()
dist_util.setup_dist()
logger.configure()
logger.log("building the networks ...")
model, diffusion = create_model_and_diffusion(**args_to_dict(args, model_and_diffusion_defaults().keys()))
model = load(model, args.model_path, args.use_fp16)
classifier = create_classifier(**args_to_dict(args, classifier_defaults().keys()))
classifier = load(classifier, args.classifier_path, args.classifier_use_fp16)


def cond_fn(x, t, y=None):
    with th.enable_grad():
        x_in = x.detach().requires_grad_(True)
        chosen = F.log_softmax(classifier(x_in, t), dim=-1)[range(len(x)), y.view(-1)]
        return th.autograd.grad(chosen.sum(), x_in)[0] * args.classifier_scale


def model_fn(x, t, y=None):
    return model(x, t, y if args.class_cond else None)


images, labels = [], []
loop = diffusion.ddim_sample_loop if args.use_ddim else diffusion.p_sample_loop
while len(images) * args.batch_size < args.num_samples:
    y = th.randint(low=0, high=NUM_CLASSES, size=(args.batch_size,), device=dist_util.dev())
    x = loop(
        model_fn,
        (args.batch_size, 3, args.image_size, args.image_size),
        clip_denoised=args.clip_denoised,
        model_kwargs=dict(y=y),
        cond_fn=cond_fn,
        device=dist_util.dev(),
    )
    x = ((x + 1) * 127.5).clamp(0, 255).to(th.uint8).permute(0, 2, 3, 1).contiguous()
    images.extend(gather(x))
    labels.extend(gather(y))
    logger.log(f"made {len(images) * args.batch_size} images")
if dist.get_rank() == 0:
    path = os.path.join(logger.get_dir(), "result.npz")
    logger.log(f"saving to {path}")
    np.savez(path, np.concatenate(images)[: args.num_samples], np.concatenate(labels)[: args.num_samples])
dist.barrier()
logger.log("done")
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The script, and checkpoints with random weights."""
    folder = tmp_path_factory.mktemp("elsewhere")
    (folder / "their_sample.py").write_text(SCRIPT)
    save_unet(folder / "unet.pt", {**TINY_64, "class_cond": True, "learn_sigma": True})
    save_random(folder / "classifier.pt", make_noisy_classifier())
    return folder


HALF = {"use_fp16": True, "classifier_use_fp16": True}


@pytest.mark.parametrize(
    ("name", "flags"),
    [
        ("ancestral", {"timestep_respacing": "4"}),
        ("ddim", {"timestep_respacing": "ddim4", "use_ddim": True, **HALF}),
    ],
)
def test_a_script_written_for_guided_diffusion_runs(folder, name, flags):
    files = {"model_path": "unet.pt", "classifier_path": "classifier.pt", "classifier_scale": 2.0}
    networks = {**TINY_64, **TINY_NOISY, "class_cond": True, "learn_sigma": True}
    command = [sys.executable, "their_sample.py", *flags_of({**files, **networks, **flags})]
    run(command, folder, OPENAI_LOGDIR=str(folder / name))
    log = (folder / name / "log.txt").read_text().splitlines()
    assert log[:3] == ["building the networks ...", "made 2 images", "made 4 images"]
    assert log[3:] == [f"saving to {folder / name / 'result.npz'}", "done"]
    with np.load(folder / name / "result.npz", allow_pickle=False) as file:
        images, labels = file["arr_0"], file["arr_1"]
    assert (images.dtype, images.shape) == (np.uint8, (4, 64, 64, 3))
    assert (labels.dtype, labels.shape) == (np.int64, (4,))
    assert ((labels >= 0) & (labels < NUM_CLASSES)).all()
    assert all(image.std() > 0 for image in images)
    assert len(np.unique(images.reshape(4, -1), axis=0)) == 4


def test_without_a_folder_the_log_goes_to_a_new_one(tmp_path, monkeypatch):
    monkeypatch.delenv("OPENAI_LOGDIR", raising=False)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    logger.configure()
    logger.log("steps:", 3)
    (made,) = tmp_path.iterdir()
    assert logger.get_dir() == str(made)
    assert (made / "log.txt").read_text() == "steps: 3\n"


def test_setup_dist_may_be_called_again():
    dist_util.setup_dist()
    dist_util.setup_dist()
    gathered = [torch.zeros(2)]
    torch.distributed.all_gather(gathered, torch.tensor([1.0, 2.0]))
    assert (torch.distributed.get_rank(), torch.distributed.get_world_size()) == (0, 1)
    assert gathered[0].tolist() == [1.0, 2.0]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"learn_sigma": True},
        {"learn_sigma": True, "use_kl": True},
        {"learn_sigma": True, "rescale_learned_sigmas": True, "rescale_timesteps": True},
        {"predict_xstart": True, "noise_schedule": "cosine", "dropout": 0.1, "use_checkpoint": True},
    ],
    ids=lambda options: "-".join(options) or "defaults",
)
def test_one_step_of_training(options):
    torch.manual_seed(0)
    settings = {**TINY_64, "image_size": 16, "channel_mult": "1,1", "class_cond": True, **options}
    model, diffusion = make_unet(settings)
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    t = torch.tensor([0, 300, 999])
    batch, noise, y = torch.rand(3, 3, 16, 16) * 2 - 1, torch.randn(3, 3, 16, 16), torch.tensor([1, 2, 999])

    def loss():
        torch.manual_seed(1)
        terms = diffusion.training_losses(model, batch, t, model_kwargs={"y": y}, noise=noise)
        assert terms["loss"].shape == (3,)
        return terms["loss"].mean()

    before = loss()
    before.backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
    # A new network ends in a convolution of zeros, which therefore learns first.
    assert all(parameter.grad.abs().max() > 0 for parameter in model.out[2].parameters())
    optimizer.step()
    assert loss() < before
