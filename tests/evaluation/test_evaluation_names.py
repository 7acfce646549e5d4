"""The names that scripts outside this project import from the package, with their arguments."""

import inspect

import numpy as np
import pytest

import evaluation

SIGNATURES = {
    "frechet_distance": ["mu1", "sigma1", "mu2", "sigma2"],
    "precision_recall": ["real", "fake", "k"],
    "density_coverage": ["real", "fake", "k"],
    "clipped_density_coverage": ["real", "fake", "k"],
    "monge_distance": ["real", "fake", "directions", "seed"],
    "clip_mmd": ["real", "fake"],
    "inception_score": ["logits", "probs", "split_size"],
    "kernel_distance": ["real", "fake", "subsets"],
    "InceptionFeatures": ["weights", "protocol", "device"],
}


@pytest.mark.parametrize("name", SIGNATURES)
def test_public_names_take_their_arguments_in_order(name):
    assert (
        list(inspect.signature(getattr(evaluation, name)).parameters)[: len(SIGNATURES[name])]
        == SIGNATURES[name]
    )


def test_functions_give_python_floats():
    x, y = np.random.default_rng(0).normal(size=(2, 40, 4))
    numbers = [evaluation.frechet_distance(x.mean(0), np.cov(x.T), y.mean(0), np.cov(y.T))]
    numbers += [*evaluation.precision_recall(real=x, fake=y), *evaluation.density_coverage(real=x, fake=y)]
    numbers += [evaluation.inception_score(logits=x), evaluation.kernel_distance(real=x, fake=y)]
    numbers += evaluation.kernel_distance(real=x, fake=y, subsets=3, subset_size=10)
    numbers += [*evaluation.clipped_density_coverage(real=x, fake=y), evaluation.clip_mmd(real=x, fake=y)]
    numbers += [evaluation.monge_distance(real=x, fake=y, directions=5)]
    assert {type(number) for number in numbers} == {float}
