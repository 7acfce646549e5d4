"""A sample is the same whatever the size of the batch that it was drawn in: a small U-Net, guided and not."""

from functools import cache

import numpy as np
import pytest
import torch

from classifiers import load_classifier
from guided_diffusion.files.pixels import to_uint8
from guided_diffusion.flags.labels import label_source
from guided_diffusion.guidance import ClassifierGuidance
from guided_diffusion.runs.noise import SampleNoise
from guided_diffusion.script_util import create_gaussian_diffusion, create_model

SAMPLES, SIZE, STEPS, SEED = 16, 16, 10, 11
BATCHES = [1, 3]


def drawn(module, seed):
    """Fill every parameter: the residual branches of a new U-Net are all zero."""
    generator = torch.Generator().manual_seed(seed)
    for p in module.parameters():
        noise = torch.randn(p.shape, generator=generator)
        p.data = noise / p[0].numel() ** 0.5 if p.ndim > 1 else p.data + 0.1 * noise
    return module.eval()


@cache
def networks():
    unet = create_model(
        SIZE, 32, 1, channel_mult="1,2", learn_sigma=True, class_cond=True, attention_resolutions="8", num_heads=2,
        use_scale_shift_norm=True, resblock_updown=True, num_classes=10,
    )  # fmt: skip
    torch.manual_seed(0)
    classifier = load_classifier("resnet18", "random", num_classes=10, softplus_beta=3.0, image_size=SIZE)
    return drawn(unet, 1), classifier


@cache
def sample(loop, batch_size, scale):
    """(labels, images, the noise that the loop was given) of all samples."""
    unet, classifier = networks()
    diffusion = create_gaussian_diffusion(
        learn_sigma=True, predict_xstart=True, timestep_respacing=str(STEPS)
    )
    guidance = (
        ClassifierGuidance(classifier, marginal_temperature=0.5, classifier_scale=scale, gamma_factor=0.3)
        if scale
        else None
    )
    labels, images, noises = [], [], []
    for start in range(0, SAMPLES, batch_size):
        indices = range(start, min(start + batch_size, SAMPLES))
        y, noise = (
            torch.from_numpy(label_source("balanced", SEED, 10)(indices)),
            Recorded(SampleNoise(SEED, indices)),
        )
        shape = (len(indices), 3, SIZE, SIZE)
        x = getattr(diffusion, loop)(unet, shape, model_kwargs={"y": y}, guidance=guidance, randn_like=noise)
        labels.append(y)
        images.append(to_uint8(x))
        noises.append(torch.stack(noise.draws, dim=1))
    return torch.cat(labels), torch.cat(images).int(), torch.cat(noises)


class Recorded:
    """A source of noise that keeps what it gave."""

    def __init__(self, source):
        self.source, self.draws = source, []

    def randn(self, shape):
        self.draws.append(self.source.randn(shape))
        return self.draws[-1]

    def __call__(self, x):
        self.draws.append(self.source(x))
        return self.draws[-1]


def levels_apart(a, b):
    """The largest difference of a pixel, per image."""
    return (a - b).abs().flatten(1).amax(dim=1).numpy()


@pytest.mark.parametrize("batch_size", BATCHES)
@pytest.mark.parametrize("loop", ["p_sample_loop", "ddim_sample_loop"])
def test_labels_and_noise_are_the_same_bit_for_bit(loop, batch_size):
    labels, _, noise = sample(loop, batch_size, 0)
    whole_labels, _, whole_noise = sample(loop, SAMPLES, 0)
    assert torch.equal(labels, whole_labels)
    assert torch.equal(noise, whole_noise)
    assert noise.shape == (SAMPLES, STEPS + 1, 3, SIZE, SIZE)


@pytest.mark.parametrize("batch_size", BATCHES)
@pytest.mark.parametrize("loop", ["p_sample_loop", "ddim_sample_loop"])
def test_unguided_pixels_are_within_one_level(loop, batch_size):
    assert levels_apart(sample(loop, batch_size, 0)[1], sample(loop, SAMPLES, 0)[1]).max() <= 1


@pytest.mark.parametrize("batch_size", BATCHES)
@pytest.mark.parametrize("loop", ["p_sample_loop", "ddim_sample_loop"])
def test_guided_images_are_within_one_level(loop, batch_size):
    apart = levels_apart(sample(loop, batch_size, 4.0)[1], sample(loop, SAMPLES, 4.0)[1])
    assert np.mean(apart <= 1) >= 0.99


@pytest.mark.parametrize("loop", ["p_sample_loop", "ddim_sample_loop"])
def test_images_differ_and_guidance_moves_each(loop):
    plain, guided = (sample(loop, SAMPLES, scale)[1] for scale in (0, 4.0))
    assert (levels_apart(plain, guided) > 1).all()
    assert len({image.numpy().tobytes() for image in plain}) == SAMPLES


def test_same_batches_give_the_same_bytes():
    _, first, _ = sample("p_sample_loop", SAMPLES, 4.0)
    _, again, _ = sample.__wrapped__("p_sample_loop", SAMPLES, 4.0)
    assert torch.equal(first, again)
