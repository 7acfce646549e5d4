"""From the sampler's [-1, 1] image to what a classifier expects."""

import pytest
import torch

from classifiers.input_transform import InputTransform, raw_image
from classifiers.registry import find_classifier

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
PLAIN = (0.0,) * 3, (1.0,) * 3


def images(size, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    return (torch.rand(2, 3, size, size, generator=generator, dtype=torch.float64) * 2 - 1).to(dtype)


def test_paper_input_is_the_image_itself():
    x = images(8)
    assert raw_image(x) is x


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [4, 8, 16, 31])
def test_constant_images_map_to_the_range_minus_mean_over_std(size, dtype):
    for level in (-1.0, 0.0, 0.5, 1.0):
        got = InputTransform(16, MEAN, STD)(torch.full((2, 3, size, size), level, dtype=dtype))
        mean, std = (torch.tensor(values, dtype=dtype).view(1, 3, 1, 1) for values in (MEAN, STD))
        expected = (((level + 1) / 2 - mean) / std).expand(2, 3, 16, 16)
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-12 if dtype == torch.float64 else 1e-5)


def test_native_size_is_not_resampled():
    x = images(16)
    got = InputTransform(16, (0.5, 0.25, 0.0), (1.0, 0.5, 2.0))(x)
    torch.testing.assert_close(got[:, 1], ((x[:, 1] + 1) / 2 - 0.25) / 0.5, rtol=0, atol=1e-12)


def test_enlarging_is_bilinear_with_half_pixels():
    x = torch.tensor([[0.0, 1.0]], dtype=torch.float64).expand(1, 3, 2, 2) * 2 - 1
    assert InputTransform(4, *PLAIN)(x)[0, 0, 0].tolist() == pytest.approx([0, 0.25, 0.75, 1])


def test_shrinking_is_antialiased():
    # Stripes two pixels wide, so that without antialiasing each of the 8 samples would fall between the two
    # pixels of a white one.
    x = torch.tensor([-1.0, 1.0, 1.0, -1.0], dtype=torch.float64).repeat(8).expand(1, 3, 32, 32)
    inside = InputTransform(8, *PLAIN)(x)[..., 1:-1]
    torch.testing.assert_close(inside, torch.full_like(inside, 0.5), rtol=0, atol=1e-6)


@pytest.mark.parametrize("size", [5, 8, 13])
def test_gradient_matches_finite_differences(size):
    x = images(size)[:1].requires_grad_()
    assert torch.autograd.gradcheck(InputTransform(8, MEAN, STD), x)


@pytest.mark.parametrize(
    ("name", "seen"), [("resnet50", "224x224 bilinear"), ("efficientnet_b0", "224x224 bicubic")]
)
def test_torchvisions_networks_see_what_their_weights_were_trained_on(name, seen):
    assert str(find_classifier(name).trained_on).startswith(seen)
