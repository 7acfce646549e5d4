"""EDM networks, unguided and guided chains (golden set F)."""

from functools import cache

import numpy as np
import pytest
import torch
from goldens_util import (
    FixedNoise,
    load_golden,
    max_abs,
    random_input,
    resnet_weights,
    rms,
    set_golden_weights,
    thin,
)
from toys import a_step

from classifiers import load_classifier
from guided_diffusion.edm import EDMPrecond, edm_sampler
from guided_diffusion.guidance import released_edm_guidance, released_edm_schedule
from guided_diffusion.runs.noise import SeedNoise

SETTINGS, ARRAYS = load_golden("F_edm")
FORWARDS, CHAINS = SETTINGS["forwards"], SETTINGS["chains"]
GUIDED = [name for name, case in CHAINS.items() if case["spec"]["use_classifier"]]


def one_hot(labels, label_dim):
    return torch.eye(label_dim)[labels]


@pytest.mark.parametrize("name", FORWARDS)
def test_forward(name):
    case = FORWARDS[name]
    sigma, labels = torch.tensor(case["input"]["sigma"]), case["input"]["label"]
    x = random_input(case["input"]["seed"], case["x_shape"]) * (sigma**2 + 0.25).sqrt().view(-1, 1, 1, 1)
    net, raw = set_golden_weights(EDMPrecond(**case["config"])), []
    net.model.register_forward_hook(lambda module, args, output: raw.append(output))
    with torch.no_grad():
        out = net(x, sigma, None if labels is None else one_hot(labels, net.label_dim))
    # set F: atol 5e-5. The rms of a whole output cannot differ by more than its worst entry does.
    assert max_abs(thin(out), ARRAYS[f"{name}/out"]) <= 5e-5
    assert max_abs(thin(raw[0]), ARRAYS[f"{name}/F_x"]) <= 5e-5
    assert abs(rms(out) - case["out_rms"]) <= 5e-5
    assert abs(rms(raw[0]) - case["F_x_rms"]) <= 5e-5
    heads = {name: module.num_heads for name, module in net.named_modules() if hasattr(module, "num_heads")}
    assert heads == case["num_heads"]


class RecordingGuidance:
    """The released recipe, and the RMS of each image's shift over that of its sample."""

    def __init__(self, spec):
        classifier = load_classifier(
            spec["net"], weights=resnet_weights(spec["net"]), softplus_beta=spec["softplus_beta"]
        )
        self.guidance = released_edm_guidance(
            classifier,
            joint_temperature=spec["joint_temperature"],
            marginal_temperature=spec["uncond_temperature"],
            max_guidance=spec["max_guidance"],
            add_factor=spec["add_factor"],
        )
        self.ratios = []

    def __call__(self, x, y, step):
        shift = self.guidance(x, y, step)
        self.ratios.append([rms(one) / rms(sample) for one, sample in zip(shift, x, strict=True)])
        return shift


@cache
def run_chain(name):
    """(final, x_cur of every step, (x, sigma) of every call of the network, guidance or None)."""
    spec = CHAINS[name]["spec"]
    net, calls, x_cur = set_golden_weights(EDMPrecond(**SETTINGS["chain_net"])), [], []
    net.register_forward_pre_hook(lambda module, args: calls.append(args[:2]))
    noise = FixedNoise(spec["seed"])
    latents = noise(torch.empty(CHAINS[name]["shape"]))

    def randn_like(x):
        x_cur.append(x)
        return noise(x)

    guidance = RecordingGuidance(spec) if name in GUIDED else None
    options = {
        key: spec[key]
        for key in ("num_steps", "sigma_min", "sigma_max", "rho", "S_churn", "S_min", "S_max", "S_noise")
        if key in spec
    }
    final = edm_sampler(net, latents, one_hot(spec["labels"], 1000), randn_like, guidance=guidance, **options)
    return final, x_cur, calls, guidance


@pytest.mark.parametrize("name", CHAINS)
def test_chain(name):
    final, x_cur, calls, _ = run_chain(name)
    num_steps = CHAINS[name]["spec"]["num_steps"]
    # Noise at every step, Heun's correction at all but the last.
    assert (len(x_cur), len(calls)) == (num_steps, 2 * num_steps - 1)
    x_hat, t_hat = zip(*calls[::2], strict=True)
    np.testing.assert_allclose([float(t) for t in t_hat], ARRAYS[f"{name}/t_hat"], rtol=1e-12)
    for k, step in enumerate(ARRAYS[f"{name}/steps"]):
        for key, x in (("x_cur", x_cur[step]), ("x_hat", x_hat[step])):
            # set F: 2e-4 * max(1, rms)
            tolerance = 2e-4 * max(1, rms(x_cur[step]))
            golden = ARRAYS[f"{name}/{key}"][k]
            assert max_abs(thin(x)[:: SETTINGS["trajectory_stride"]], golden) <= tolerance, (
                f"{key} of step {step}"
            )
    golden_rms = ARRAYS[f"{name}/x_rms_per_step"]
    assert (np.abs([rms(x) for x in x_cur] - golden_rms) <= 2e-4 * np.maximum(1, golden_rms)).all()
    # set F: final 3e-4
    assert final.dtype == torch.float64
    assert max_abs(thin(final), ARRAYS[f"{name}/final"]) <= 3e-4
    assert abs(rms(final) - CHAINS[name]["final_rms"]) <= 3e-4


@pytest.mark.parametrize("name", GUIDED)
def test_strength_of_the_released_recipe(name):
    spec, ratios = CHAINS[name]["spec"], run_chain(name)[-1].ratios
    golden = ARRAYS[f"{name}/guidance_schedule"]
    steps = [a_step(index=i, num_steps=spec["num_steps"]) for i in range(spec["num_steps"])]
    schedule = [released_edm_schedule(step, spec["max_guidance"], spec["add_factor"]) for step in steps]
    np.testing.assert_allclose(schedule, golden, rtol=1e-12)
    # The published code normalises in float32.
    np.testing.assert_allclose(ratios, np.broadcast_to(golden[:, None], np.shape(ratios)), rtol=1e-6)
    if f"{name}/measured_ratio" in ARRAYS:
        np.testing.assert_allclose(ratios, ARRAYS[f"{name}/measured_ratio"], rtol=1e-6)


def test_the_published_generator_of_each_seed():
    seeds, corner = ARRAYS["f0_stacked_rng/seeds"].tolist(), np.s_[..., :2, :4]
    noise = SeedNoise(seeds)
    latents, labels = noise.randn((len(seeds), 3, 32, 32)), noise.randint(1000)
    first_step = noise(latents.double())
    # exact
    np.testing.assert_array_equal(latents.cpu().numpy()[corner], ARRAYS["f0_stacked_rng/latents_corner"])
    np.testing.assert_array_equal(labels.numpy(), ARRAYS["f0_stacked_rng/labels"])
    np.testing.assert_array_equal(
        first_step.numpy()[corner], ARRAYS["f0_stacked_rng/first_step_noise_corner_f64"]
    )
