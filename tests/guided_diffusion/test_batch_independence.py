"""A sample is the same whatever the size of the batch that it was drawn in: a small U-Net, guided and not,
under every sampler.
"""

from functools import cache

import pytest
import torch
from toys import SAMPLERS, rule, sample

from classifiers import load_classifier
from guided_diffusion.files.pixels import to_uint8
from guided_diffusion.flags.labels import label_source
from guided_diffusion.runs.noise import SampleNoise
from guided_diffusion.script_util import create_gaussian_diffusion, create_model
from guided_diffusion.solvers import SOLVERS

SAMPLES, SIZE, STEPS, SEED, SCALE = 6, 16, 3, 11, 8.0
every_sampler = pytest.mark.parametrize("sampler", SAMPLERS)
each_size = pytest.mark.parametrize("batch_size", [1, 4])


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
        SIZE, 32, 1, channel_mult="1,2", learn_sigma=True, class_cond=True, attention_resolutions="8",
        num_heads=2, use_scale_shift_norm=True, resblock_updown=True, num_classes=10,
    )  # fmt: skip
    torch.manual_seed(0)
    classifier = load_classifier("resnet18", "random", num_classes=10, softplus_beta=3.0, image_size=SIZE)
    return drawn(unet, 1), classifier


@cache
def images_and_draws(sampler, batch_size, scale):
    """(labels, images, the noise that the sampler was given) of all samples."""
    unet, classifier = networks()
    options = {"learn_sigma": True, "predict_xstart": True, "timestep_respacing": str(STEPS)}
    diffusion = create_gaussian_diffusion(**options)
    guidance = rule(sampler, scale, classifier) if scale else None
    labels, images, noises = [], [], []
    for start in range(0, SAMPLES, batch_size):
        indices = range(start, min(start + batch_size, SAMPLES))
        source, given = SampleNoise(SEED, indices), []

        def randn_like(x, source=source, given=given):
            given.append(source(x))
            return given[-1]

        y = torch.from_numpy(label_source("balanced", SEED, 10)(indices))
        x_T = source.randn((len(indices), 3, SIZE, SIZE))
        x = sample(sampler, diffusion, unet, noise=x_T, y=y, guidance=guidance, randn_like=randn_like)
        labels.append(y)
        images.append(to_uint8(x))
        noises.append(torch.stack([x_T, *given], dim=1))
    return torch.cat(labels), torch.cat(images).int(), torch.cat(noises)


def levels_apart(a, b):
    """The largest difference of a pixel, per image."""
    return (a - b).abs().flatten(1).amax(dim=1).numpy()


@each_size
@every_sampler
def test_images_of_other_batch_sizes(sampler, batch_size):
    for scale in (0, SCALE):
        labels, images, noise = images_and_draws(sampler, batch_size, scale)
        whole_labels, whole_images, whole_noise = images_and_draws(sampler, SAMPLES, scale)
        assert torch.equal(labels, whole_labels) and torch.equal(noise, whole_noise)
        drawing = sampler not in SOLVERS or sampler == "dpmpp_2m_sde"
        assert noise.shape[1] == (STEPS + 1 if drawing else 1)
        assert levels_apart(images, whole_images).max() <= 1


@every_sampler
def test_images_differ_and_guidance_moves_each(sampler):
    plain, guided = (images_and_draws(sampler, SAMPLES, scale)[1] for scale in (0, SCALE))
    assert (levels_apart(plain, guided) > 1).all()
    assert len({image.numpy().tobytes() for image in plain}) == SAMPLES


def test_same_batches_give_the_same_bytes():
    _, first, _ = images_and_draws("ddpm", SAMPLES, SCALE)
    _, again, _ = images_and_draws.__wrapped__("ddpm", SAMPLES, SCALE)
    assert torch.equal(first, again)
