"""What holds under every sampler: which rules it takes, what it tells them, and that off means off."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from toys import (
    SAMPLERS,
    GaussianDenoiser,
    N,
    X,
    Y,
    make_diffusion,
    process_levels,
    recorder,
    refuse,
    rule,
    sample,
    tanh_model,
)

from guided_diffusion.denoisers import GuidedDenoiser
from guided_diffusion.guidance import looks_at, within_interval, wrapper
from guided_diffusion.schedules import karras_sigmas
from guided_diffusion.solvers import SOLVERS

every_sampler = pytest.mark.parametrize("sampler", SAMPLERS)
TAKERS = {"ddpm": "p_sample_loop", "ddim": "ddim_sample_loop", "edm": "edm_sampler"}
TAKERS |= dict.fromkeys(SOLVERS, "GuidedDenoiser")


@wrapper
def negated(guidance):
    return lambda x, y, step: -guidance(x, y, step)


DRESSES = {
    "bare": lambda guidance: guidance,
    "within_interval": lambda guidance: within_interval(guidance, 0.3, 5.0),
    "negated": negated,
    "both": lambda guidance: negated(within_interval(guidance, 0.3, 5.0)),
}


def test_every_solver_is_among_the_samplers_here():
    assert set(SOLVERS) <= set(SAMPLERS)


@every_sampler
@pytest.mark.parametrize("dress", DRESSES)
def test_a_rule_of_the_wrong_kind_is_refused_by_name_and_of_the_right_kind_is_taken(sampler, dress):
    right, wrong = DRESSES[dress](rule(sampler)), DRESSES[dress](rule("ddpm" if sampler == "edm" else "edm"))
    looks = "the predicted clean image" if sampler == "edm" else "the noisy sample"
    name = "ClassifierGuidance" if sampler == "edm" else "released_edm_guidance"
    with pytest.raises(
        ValueError, match=rf"{name}\)* looks at {looks}, but {TAKERS[sampler]} hands over"
    ) as caught:
        sample(sampler, make_diffusion(2), guidance=wrong)
    assert dress in ("bare", "both") or f"{dress}({name})" in str(caught.value)
    assert sample(sampler, make_diffusion(2), guidance=right).isfinite().all()


@every_sampler
def test_a_plain_function_is_taken_and_a_declared_one_as_it_says(sampler):
    def plain(x, y, step):
        return 0.1 * torch.ones_like(x)

    unguided = sample(sampler, make_diffusion(2))
    assert not torch.equal(sample(sampler, make_diffusion(2), guidance=plain), unguided)
    looks_at("denoised" if sampler == "edm" else "noisy")(plain)
    with pytest.raises(ValueError, match="plain looks at"):
        sample(sampler, make_diffusion(2), guidance=plain)


@pytest.mark.parametrize("original", [1000, 200])
@every_sampler
def test_what_a_sampler_tells_guidance_of_its_steps(sampler, original):
    diffusion, seen = make_diffusion(5, original=original), []
    sample(sampler, diffusion, guidance=recorder(seen))
    steps = [step for *_, step in seen]
    sigmas = process_levels(diffusion)[:-1]
    index, num_steps, progress = range(4, -1, -1), 5, [i / 5 for i in range(5)]
    if sampler in SOLVERS:  # which is not told, and counts as the linear process of 1000 steps does
        if sampler == "heun":
            sigmas = [sigmas[0], *(sigma for sigma in sigmas[1:] for _ in range(2))]
        levels = np.array(process_levels(make_diffusion(1000))[-2::-1])
        index = [int(np.abs(np.log(levels / sigma)).argmin()) for sigma in sigmas]
        num_steps, progress = 1000, [(999 - i) / 1000 for i in index]
    elif sampler == "edm":
        index, sigmas = range(5), karras_sigmas(5, sigmas[-1], min(sigmas[0], 80), 7).tolist()
    assert [step.index for step in steps] == list(index)
    assert {step.num_steps for step in steps} == {num_steps}
    assert [step.sigma for step in steps] == pytest.approx(sigmas, rel=1e-9)
    assert [step.progress for step in steps] == pytest.approx(progress, abs=1e-12)
    assert all(now <= then for now, then in pairwise(step.progress for step in steps))
    assert 0 <= steps[0].progress < 0.2 and steps[-1].progress < 1
    assert all(y is Y for _, y, _ in seen)
    if sampler != "ddpm":  # whose variance is the model's, see test_sampling_loops
        ddim = [sigma**2 / (1 + sigma**2) ** 0.5 for sigma in sigmas]
        expected = [1.0] * 5 if sampler == "edm" else ddim
        assert [step.variance for step in steps] == pytest.approx(expected, rel=1e-9)
        assert [step.variance_max for step in steps] == [step.variance for step in steps]


@every_sampler
@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("var", ["FIXED_SMALL", "FIXED_LARGE", "LEARNED_RANGE"])
def test_no_guidance_scale_0_and_an_interval_never_met_are_the_unguided_sampler_bit_for_bit(
    sampler, clip, var
):
    def model(x, t, y):
        eps = tanh_model(x, t, y)
        return torch.cat([eps, torch.tanh(x)], 1) if var == "LEARNED_RANGE" else eps

    def run(guidance):
        return sample(sampler, make_diffusion(5, var=var), model, guidance=guidance, clip=clip)

    unguided = run(None)
    for off in (rule(sampler, 0.0, refuse), within_interval(rule(sampler, 1.0, refuse), 1e6, 1e7)):
        assert torch.equal(run(off), unguided)
    assert not torch.equal(run(rule(sampler, 1.0)), unguided)


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "euler"])
def test_guidance_shifts_the_last_step_too(sampler):
    def last_step_alone(x, y, step):
        return torch.full_like(x, 0.25 if step.sigma < 0.011 else 0.0)

    shifted, plain = (sample(sampler, make_diffusion(), guidance=g) for g in (last_step_alone, None))
    torch.testing.assert_close(shifted, plain + 0.25)


@every_sampler
def test_what_the_network_answers_wrongly_is_not_blamed_on_guidance(sampler):
    def broken(x, t, y):
        return torch.where(torch.arange(N).view(-1, 1, 1, 1) == 2, torch.nan, tanh_model(x, t, y))

    with pytest.raises(FloatingPointError, match=r"network output") as caught:
        sample(sampler, make_diffusion(3), broken, guidance=rule(sampler))
    assert caught.value.positions == [2]


@pytest.mark.parametrize("solver", SOLVERS)
def test_denoisers_compose(solver):
    """A guided denoiser is a denoiser: guided twice is guided by the sum, where a rule ignores its input."""
    net, sigmas = GaussianDenoiser(), [5.0, 1.0, 0.2, 0.0]

    def constant(value):
        return lambda x, y, step: torch.full_like(x, value)

    twice = GuidedDenoiser(GuidedDenoiser(net, constant(0.1), Y), constant(0.2), Y)
    once = GuidedDenoiser(net, constant(0.3), Y)
    got, expected = (SOLVERS[solver](d, 5 * X, sigmas, randn_like=torch.cos) for d in (twice, once))
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)
