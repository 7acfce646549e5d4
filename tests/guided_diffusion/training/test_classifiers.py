"""What a classifier is trained by, and which flags it leaves unused."""

import numpy as np
import pytest
import torch

from guided_diffusion.files.labelled import LabelledImages
from guided_diffusion.flags.training import ClassifierTrainFlags
from guided_diffusion.training import classifiers
from guided_diffusion.training.classifiers import noisy_objective

PROCESS = {"learn_sigma", "use_kl", "predict_xstart", "rescale_timesteps", "rescale_learned_sigmas"}


class Spy(torch.nn.Module):
    def forward(self, x, t):
        self.x, self.t = x, t
        return x.mean(dim=(2, 3))


def seen(**flags):
    """(x, t) that a classifier sees of images of ones."""
    model = Spy()
    objective = noisy_objective(ClassifierTrainFlags(**flags), model)
    images = torch.ones(64, 3, 4, 4)
    drawn = objective.draw(tuple(images.shape), torch.Generator().manual_seed(0))
    losses = objective.losses(images, torch.zeros(64, dtype=torch.int64), *drawn)
    assert ("position" in losses) == flags.get("noised", True)
    return model.x, model.t


def test_without_noise_the_images_are_clean_and_t_is_0():
    x, t = seen(noised=False, schedule_sampler="uniform")
    assert (x == 1).all() and t.dtype == torch.int64 and t.tolist() == [0] * 64
    x, t = seen()
    assert (x != 1).any() and len(set(t.tolist())) > 32


@pytest.mark.parametrize(
    ("flags", "idle"),
    [
        ({}, PROCESS),
        ({"noised": False}, {*PROCESS, "noise_schedule", "diffusion_steps", "schedule_sampler"}),
        (
            {"noised": False, "classifier_type": "cifar_resnet20"},
            {*PROCESS, "timestep_respacing", "classifier_width"},
        ),
    ],
)
def test_flags_without_effect_are_named(flags, idle):
    config = ClassifierTrainFlags(**flags, given=frozenset({*idle, "lr", "num_classes"}))
    assert set(config.without_effect()) == idle


def test_the_held_out_images_are_numbered_as_those_that_are_trained_on(monkeypatch, tmp_path):
    images = np.zeros((1, 8, 8, 3), dtype=np.uint8)
    found = LabelledImages(images, np.array([0]), ["dog"])
    monkeypatch.setattr(classifiers, "read_labelled", lambda path, size: found)

    class Session:
        classes, folder = ["cat", "dog"], tmp_path

        def placed(self, found, labelled, source):
            return torch.from_numpy(found.images), torch.from_numpy(found.labels)

    config = ClassifierTrainFlags(val_data_dir="held_out", image_size=8)
    validation = classifiers._Validation(config, Session(), None, None)
    assert validation.batches.labels.tolist() == [1]
