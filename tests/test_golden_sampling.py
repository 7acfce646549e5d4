"""DDPM and DDIM chains, free-running and step by step (golden set E)."""

from functools import cache

import numpy as np
import pytest
import torch
from goldens_util import (
    FixedNoise,
    from_numpy,
    load_golden,
    max_abs,
    resnet_weights,
    rms,
    set_golden_weights,
    thin,
)
from toys import a_step

from classifiers import load_classifier
from guided_diffusion.guidance import ClassifierGuidance
from guided_diffusion.schedules import get_named_beta_schedule
from guided_diffusion.script_util import create_gaussian_diffusion, create_model
from guided_diffusion.unet import EncoderUNetModel

SETTINGS, ARRAYS = load_golden("E_ddpm_sampling")
CASES = SETTINGS["cases"]
SINGLE_STEP_ATOL = 1e-4
GUIDED = [name for name, case in CASES.items() if (case["spec"]["guid"] or {}).get("kind") == "offtheshelf"]


def chain_atol(name):
    """Set E: 5e-4 for the guided, `wrap` cases; 1e-3 for raw networks, whose x0 saturates and amplifies
    noise.
    """
    return 5e-4 if CASES[name]["spec"].get("wrap") else 1e-3


class RecordingModel:
    """The U-Net as the sampler sees it; remembers the time steps that it was asked for.

    With `wrap`, eps = sqrt(1 - abar) x + 0.5 sqrt(abar) u instead of the bare output u: a network with random
    weights saturates x0 otherwise, and a guided chain turns chaotic.
    """

    def __init__(self, case):
        self.unet = set_golden_weights(create_model(**case["unet_config"]))
        self.wrap = bool(case["spec"].get("wrap"))
        process = case["diffusion_config"]
        betas = get_named_beta_schedule(process["noise_schedule"], process["steps"])
        self.abar = from_numpy(np.cumprod(1 - betas)).float()
        self.timesteps = []

    @torch.no_grad()
    def __call__(self, x, t, **model_kwargs):
        self.timesteps.append(float(t[0]))
        u = self.unet(x, t, **model_kwargs)
        if not self.wrap:
            return u
        abar = self.abar[t.long()].reshape(-1, 1, 1, 1)
        return torch.cat([(1 - abar).sqrt() * x + 0.5 * abar.sqrt() * u[:, :3], u[:, 3:]], dim=1)


class NoisyClassifierGradient:
    """The classic cond_fn: gradient of log_softmax[y] at x_t; remembers the time steps that it was asked
    for.
    """

    def __init__(self, scale):
        self.classifier = set_golden_weights(EncoderUNetModel(**SETTINGS["noisy_classifier"]))
        self.scale = scale
        self.timesteps = []

    def __call__(self, x, t, y):
        self.timesteps.append(float(t[0]))
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            selected = self.classifier(x, t).log_softmax(dim=-1)[range(len(y)), y]
            return torch.autograd.grad(selected.sum(), x)[0] * self.scale


class RecordingGuidance:
    """Off-the-shelf guidance that remembers the steps that the sampler made for it."""

    def __init__(self, spec):
        guid = spec["guid"]
        self.guidance = ClassifierGuidance(
            load_classifier(guid["net"], weights=resnet_weights(guid["net"]), softplus_beta=guid["beta"]),
            joint_temperature=guid["T"],
            marginal_temperature=guid["T"] * guid["d"],
            classifier_scale=guid["scale"],
            gamma_factor=spec.get("gamma", 0.0),
        )
        self.steps = []

    def __call__(self, x, y, step):
        self.steps.append(step)
        return self.guidance(x, y, step)


def set_up(name):
    """(diffusion, model, model_kwargs, cond_fn or None, guidance or None)."""
    case = CASES[name]
    spec, guid = case["spec"], case["spec"]["guid"] or {}
    diffusion = create_gaussian_diffusion(**case["diffusion_config"])
    model_kwargs = {"y": torch.tensor(spec["y"])} if "y" in spec else {}
    cond_fn = NoisyClassifierGradient(guid["scale"]) if guid.get("kind") == "adm_classifier" else None
    guidance = RecordingGuidance(spec) if guid.get("kind") == "offtheshelf" else None
    return diffusion, RecordingModel(case), model_kwargs, cond_fn, guidance


@cache
def run_chain(name):
    """(what each step yielded, model, cond_fn, guidance)."""
    spec = CASES[name]["spec"]
    diffusion, model, model_kwargs, cond_fn, guidance = set_up(name)
    noise = FixedNoise(spec["seed"])
    x_T = noise(torch.empty(ARRAYS[f"{name}/x_before_middle"].shape))
    loop, extra = diffusion.p_sample_loop_progressive, {"variance_max": "first_pixel"}
    if spec["sampler"] == "ddim":
        loop, extra = diffusion.ddim_sample_loop_progressive, {"eta": spec["eta"]}
    rules = {"cond_fn": cond_fn, "guidance": guidance, "model_kwargs": model_kwargs}
    yielded = list(loop(model, x_T.shape, noise=x_T, clip_denoised=True, randn_like=noise, **rules, **extra))
    # one draw per step, the last step and eta = 0 included
    assert len(yielded) == CASES[name]["n_steps"] == noise.calls - 1
    return yielded, model, cond_fn, guidance


@pytest.mark.parametrize("name", CASES)
def test_chain(name):
    yielded, model, cond_fn, guidance = run_chain(name)
    atol = chain_atol(name)
    steps = ARRAYS[f"{name}/steps"][:-1]  # the last one is `final`
    for step, golden in zip(steps, ARRAYS[f"{name}/x"], strict=True):
        assert max_abs(thin(yielded[step]["sample"]), golden) <= atol, f"the sample of step {step}"
    final = yielded[-1]["sample"]
    assert max_abs(thin(final), ARRAYS[f"{name}/final"]) <= atol
    assert abs(rms(final) - CASES[name]["final_rms"]) <= atol
    pred_xstart_mid = yielded[len(yielded) // 2]["pred_xstart"]
    assert max_abs(thin(pred_xstart_mid), ARRAYS[f"{name}/pred_xstart_mid"]) <= atol
    # the network and the noisy classifier are asked for time steps of the 1000-step process, not respaced
    # ones
    assert model.timesteps == ARRAYS[f"{name}/timesteps_seen_by_model"].tolist()
    assert (cond_fn.timesteps if cond_fn else []) == CASES[name]["classifier_timesteps"]
    if guidance:
        assert [step.index for step in guidance.steps] == list(range(len(yielded)))[::-1]
        assert {step.num_steps for step in guidance.steps} == {len(yielded)}


@pytest.mark.parametrize("name", [name for name in GUIDED if CASES[name]["spec"]["sampler"] == "p"])
def test_released_running_maximum(name):
    guidance = run_chain(name)[-1]
    # Tighter than the chains (5e-4) can resolve: the schedule's own maximum is only 3e-5 to 1e-4 away.
    np.testing.assert_allclose(
        [step.variance_max for step in guidance.steps], ARRAYS[f"{name}/max_variance"], rtol=1e-5
    )


def middle_step(name):
    """(position in the chain, x before it, its noise, its respaced index as (N,) int64)."""
    position, n_steps = CASES[name]["n_steps"] // 2, CASES[name]["n_steps"]
    x = from_numpy(ARRAYS[f"{name}/x_before_middle"])
    randn_like = FixedNoise(CASES[name]["spec"]["seed"])
    noise = [randn_like(x) for _ in range(position + 2)][-1]  # x_T, then one draw per step
    return position, x, noise, torch.full((len(x),), n_steps - 1 - position)


def assert_middle_step(name, position, sample):
    golden = ARRAYS[f"{name}/x"][list(ARRAYS[f"{name}/steps"]).index(position)]
    assert max_abs(thin(sample), golden) <= SINGLE_STEP_ATOL


@pytest.mark.parametrize("name", [name for name in CASES if name not in GUIDED])
def test_single_step(name):
    """A step on its own, from the stored x: no error of earlier steps to hide behind."""
    spec = CASES[name]["spec"]
    diffusion, model, model_kwargs, cond_fn, _ = set_up(name)
    position, x, noise, t = middle_step(name)
    step, extra = diffusion.p_sample, {}
    if spec["sampler"] == "ddim":
        step, extra = diffusion.ddim_sample, {"eta": spec["eta"]}
    out = step(
        model, x, t, clip_denoised=True, cond_fn=cond_fn, model_kwargs=model_kwargs, noise=noise, **extra
    )
    assert_middle_step(name, position, out["sample"])


@pytest.mark.parametrize("name", GUIDED)
def test_single_guided_step(name):
    """The rule itself at the clamped pred_xstart: mean + shift with the maximum that the released chain had
    then, and under DDIM the gradient given to the classic rule.
    """
    diffusion, model, model_kwargs, _, guidance = set_up(name)
    position, x, noise, t = middle_step(name)
    out = diffusion.p_mean_variance(model, x, t, clip_denoised=True, model_kwargs=model_kwargs)
    place = {"index": int(t[0]), "num_steps": CASES[name]["n_steps"]}
    if CASES[name]["spec"]["sampler"] == "p":
        variance_max = float(ARRAYS[f"{name}/max_variance"][position])
        step = a_step(**place, variance=out["variance"], variance_max=variance_max)
        mean = out["mean"] + guidance(out["pred_xstart"], model_kwargs["y"], step)
        sample = mean + (0.5 * out["log_variance"]).exp() * noise
    else:
        gradient = guidance(out["pred_xstart"], model_kwargs["y"], a_step(**place))
        options = {"cond_fn": lambda x, t, **kw: gradient, "model_kwargs": model_kwargs, "noise": noise}
        sample = diffusion.ddim_sample(model, x, t, **options)["sample"]
    assert_middle_step(name, position, sample)
