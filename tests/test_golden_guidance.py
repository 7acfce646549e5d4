"""Logits, log-probabilities and gradients of off-the-shelf classifiers (golden set D)."""

import numpy as np
import pytest
import torch
from goldens_util import (
    l2_per_image,
    load_golden,
    max_abs,
    random_image,
    relative_l2,
    resnet_weights,
    rms_relative,
    thin,
)

from classifiers import load_classifier
from guided_diffusion.guidance import ClassifierGuidance, GuidanceStep, log_prob

CASES, ARRAYS = load_golden("D_offtheshelf_guidance")
# With variance 1, no sine term and scale 1, the shift is the gradient itself.
GRADIENT_ONLY = GuidanceStep(index=1, num_steps=2, variance=1.0, variance_max=1.0, sigma=1.0, progress=0.0)


def load_case(name):
    """(classifier, x, y); beta = inf keeps the ReLU, and the image goes in as it is, in [-1, 1]."""
    case = CASES[name]
    classifier = load_classifier(
        case["net"], weights=resnet_weights(case["net"]), softplus_beta=float(case["softplus_beta"])
    )
    return classifier, random_image(case["seed"], (2, 3, case["size"], case["size"])), torch.tensor(case["y"])


@pytest.mark.parametrize("name", CASES)
def test_logits_and_log_prob(name):
    classifier, x, y = load_case(name)
    with torch.no_grad():
        logits = classifier(x)
    # set D: logits and selected atol 1e-3
    assert max_abs(thin(logits), ARRAYS[f"{name}/logits"]) <= 1e-3
    for temperatures in CASES[name]["temperatures"]:
        joint, discount = temperatures["joint_temperature"], temperatures["margin_temperature_discount"]
        selected = log_prob(logits, y, joint, joint * discount)
        assert max_abs(selected, ARRAYS[f"{name}/selected_T{joint:g}_d{discount:g}"]) <= 1e-3


@pytest.mark.parametrize("name", CASES)
def test_gradient(name):
    classifier, x, y = load_case(name)
    for temperatures in CASES[name]["temperatures"]:
        joint, discount = temperatures["joint_temperature"], temperatures["margin_temperature_discount"]
        guidance = ClassifierGuidance(
            classifier, joint_temperature=joint, marginal_temperature=joint * discount, classifier_scale=1.0
        )
        check_gradient(guidance(x, y, GRADIENT_ONLY), f"{name}/grad_T{joint:g}_d{discount:g}", temperatures)


def check_gradient(grad, key, expected):
    stored = thin(grad if expected["stored"] == "full" else grad[:, :, ::2, ::2])
    lengths, golden_lengths = l2_per_image(grad), np.array(expected["grad_l2_per_image"])
    if "betainf" in key:
        # set D: relative L2 1e-2, because float noise near a ReLU's kink can move single pixels by 0.1 rms
        assert relative_l2(stored, ARRAYS[key]) <= 1e-2, key
        assert np.abs(lengths / golden_lengths - 1).max() <= 1e-2, key
    else:
        # set D: 1e-3 of the rms of the whole gradient; the same bounds the length over each image
        assert rms_relative(stored, ARRAYS[key], expected["grad_rms"]) <= 1e-3, key
        assert (
            np.abs(lengths - golden_lengths).max() <= 1e-3 * expected["grad_rms"] * grad[0].numel() ** 0.5
        ), key
