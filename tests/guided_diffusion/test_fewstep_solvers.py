"""The few-step solvers: the papers' numbers, orders on a mixture, Restart, guidance beside the history."""

import json
import math
from itertools import pairwise

import pytest
import torch
from exact_posteriors import ORDERS, SHAPE, SIGMA_MAX, WITH_MEMORY, GaussianDenoiser, draws, tilting
from goldens_util import GOLDENS

from guided_diffusion.denoisers import GuidedDenoiser
from guided_diffusion.schedules import named_levels
from guided_diffusion.solvers import SOLVERS, Interval, restart

GOLDEN = json.loads((GOLDENS / "K_solvers.json").read_text())
LEVELS = [*named_levels("karras", 6, 0.01, SIGMA_MAX), 0.0]
X, Y = SIGMA_MAX * draws(4, *SHAPE), torch.tensor([0, 4, 2, 2])
every_solver = pytest.mark.parametrize("name", ORDERS)
with_memory = pytest.mark.parametrize("name", WITH_MEMORY)


def noise(x):
    """Each image's noise is its own, whatever the batch."""
    return torch.sin(10 * x)


def run(name, denoise, x=X, sigmas=LEVELS, **options):
    return ORDERS[name][0](denoise, x, sigmas, randn_like=noise, **options)


def guided(scale=1.0, y=Y, net=None):
    rule = tilting(strength="posterior", classifier_scale=scale)
    return GuidedDenoiser(net or GaussianDenoiser(), rule, y, clip_denoised=False)


@pytest.mark.parametrize("case", GOLDEN["cases"])
def test_every_step_is_the_papers_formula(case):
    expected, given, seen = GOLDEN["cases"][case], iter(GOLDEN["noise"]), []
    solver, x = SOLVERS[case.split()[0]], torch.full((1, 1, 1, 1), GOLDEN["x"])
    solver(
        GaussianDenoiser(0.3, 0.5), x, [*GOLDEN["sigmas"], 0.0], **expected["options"],
        randn_like=lambda x: torch.full_like(x, next(given)), on_step=lambda i, x: seen.append((i, x.item())),
    )  # fmt: skip
    assert [i for i, _ in seen] == list(range(8))
    assert [x for _, x in seen] == pytest.approx(expected["steps"], rel=1e-13)


class Mixture:
    """Two normal components in every pixel. Its probability flow keeps quantiles, so that the exact end of a
    trajectory is known.
    """

    weights, means, std = torch.tensor([0.3, 0.7]).double(), torch.tensor([-0.6, 0.5]).double(), 0.25

    def __call__(self, x, sigma):
        variance = self.std**2 + sigma**2
        apart = x[..., None] - self.means
        share = (self.weights.log() - apart**2 / (2 * variance)).softmax(dim=-1)
        return (share * (self.means + self.std**2 / variance * apart)).sum(dim=-1)

    def quantile(self, x, sigma):
        scaled = (x[..., None] - self.means) / math.sqrt(2 * (self.std**2 + sigma**2))
        return (self.weights * torch.special.erfc(-scaled)).sum(dim=-1) / 2

    def moved(self, x, sigma, until):
        """Where the probability flow takes x, by bisection."""
        wanted, low, high = self.quantile(x, sigma), torch.full_like(x, -100), torch.full_like(x, 100)
        for _ in range(70):
            middle = (low + high) / 2
            below = self.quantile(middle, until) < wanted
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        return middle


@pytest.mark.parametrize("name", [name for name in ORDERS if name != "dpmpp_2m_sde"])
def test_on_a_mixture_the_error_falls_by_the_solvers_order(name):
    net, x, errors = Mixture(), torch.linspace(-60, 60, 8).double().view(1, 1, 2, 4), []
    exact = net(net.moved(x, 40.0, 0.01), 0.01)
    for num_steps in (60, 120, 240):
        levels = [*named_levels("logsnr", num_steps, 0.01, 40.0), 0.0]
        errors.append(float((run(name, net, x, levels) - exact).abs().max()))
    assert math.log2(errors[1] / errors[2]) == pytest.approx(ORDERS[name][1], abs=0.35)
    assert errors[2] < 0.02 / 4 ** (ORDERS[name][1] - 1)


@every_solver
def test_the_network_is_asked_once_per_step_but_by_heun(name):
    net = GaussianDenoiser()
    run(name, net)
    assert net.calls == (11 if name == "heun" else 6)


# Restart


def test_restart_asks_as_often_as_published():
    published = [(4, 1, 19.35, 40.79), (4, 1, 1.09, 1.92), (4, 5, 0.59, 1.09), (4, 5, 0.3, 0.59)]
    intervals = [Interval(*numbers) for numbers in [*published, (6, 6, 0.06, 0.3)]]
    net, noises, steps = GaussianDenoiser(), [], []
    restart(SOLVERS["heun"], intervals)(
        net, X, [*named_levels("karras", 36, 0.002, 80.0), 0.0], on_step=lambda i, x: steps.append(i),
        randn_like=lambda x: noises.append(x) or noise(x),
    )  # fmt: skip
    assert (net.calls, len(noises), steps) == (203, 18, list(range(36)))


def test_restart_by_hand():
    net, x, levels, seen = GaussianDenoiser(std=1.0), X, [10.0, 5.0, 3.0, 1.0, 0.0], []
    assert torch.equal(restart(SOLVERS["euler"], [])(net, X, levels), SOLVERS["euler"](net, X, levels))
    for now, then in [(10, 5), (5, 3), ("noise", 6), (6, 3), (3, 1), (1, 0)]:
        x = x + 27**0.5 * noise(x) if now == "noise" else x + (then - now) * (x - net(x, now)) / now
    got = restart(SOLVERS["euler"], [Interval(2, 1, 2.8, 6.0)])(
        net, X, levels, randn_like=noise, on_step=lambda i, x: seen.append(i)
    )
    torch.testing.assert_close(got, x, rtol=1e-9, atol=1e-9)
    assert seen == [0, 1, 2, 3]


@pytest.mark.parametrize("name", SOLVERS)
def test_restarts_go_around_every_solver(name):
    """Of data of one point nothing but that comes, whatever noise there was."""
    again = restart(SOLVERS[name], [Interval(3, 2, 1.0, 4.0)])
    got = again(GaussianDenoiser(std=1e-6), X, LEVELS, randn_like=noise)
    torch.testing.assert_close(got, torch.full_like(got, 0.3), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    "wrong", [(1, 1, 1, 2), (3, 0, 1, 2), (3, 1, 0, 2), (3, 1, 2, 2), (3, 1, 1, math.inf)]
)
def test_intervals_that_cannot_be_are_refused(wrong):
    with pytest.raises(ValueError, match="a restart interval needs"):
        restart(SOLVERS["heun"], [Interval(*wrong)])


def test_an_interval_below_the_nearest_level_is_refused():
    with pytest.raises(ValueError, match="nearest level of the sampler is 10"):
        restart(SOLVERS["heun"], [Interval(3, 1, 0.1, 1.0)])(GaussianDenoiser(), X, [80.0, 10.0, 0.0])


# Guidance and the history


@every_solver
def test_guidance_of_scale_0_changes_no_bit(name):
    plain = run(name, GaussianDenoiser())
    assert torch.equal(run(name, guided(scale=0.0)), plain)
    if name in WITH_MEMORY:
        assert torch.equal(run(name, guided(scale=0.0), split_guidance=True), plain)
    assert (run(name, guided()) - plain).abs().max() > 0.01


@pytest.mark.parametrize("split", [False, True])
@with_memory
def test_an_image_does_not_depend_on_its_batch(name, split):
    whole = run(name, guided(), split_guidance=split)
    for i in range(len(X)):
        alone = run(name, guided(y=Y[i : i + 1]), X[i : i + 1], split_guidance=split)
        torch.testing.assert_close(alone[0], whole[i], rtol=1e-12, atol=1e-12)


def test_a_split_step_is_the_published_one():
    """x' = (sigma'/sigma) x + (1 - sigma'/sigma) (E of the unguided answers + shift); arXiv 2301.11558."""
    net, x, answers, h = GaussianDenoiser(), X, [], []
    for now, then in pairwise(LEVELS):
        unguided, shift = guided(net=net).parts(x, now)
        answers, h = [*answers, unguided], [*h, math.log(now / then) if then else math.inf]
        E = unguided
        if len(h) > 1 and then:
            E = unguided + (unguided - answers[-2]) * h[-1] / (2 * h[-2])
        x = then / now * x + (1 - then / now) * (E + shift)
    torch.testing.assert_close(run("dpmpp_2m", guided(), split_guidance=True), x, rtol=1e-12, atol=1e-12)
    assert (run("dpmpp_2m", guided()) - x).abs().max() > 0.01


def test_splitting_without_parts_is_refused_by_the_denoisers_name():
    class Around:
        """What passes on the attributes of the guided denoiser inside it, and answers something else."""

        def __init__(self, inner):
            self.inner = inner

        def __call__(self, x, sigma):
            return 2 * self.inner(x, sigma)

        def __getattr__(self, name):
            return getattr(object.__getattribute__(self, "inner"), name)

    for denoise in (GaussianDenoiser(), Around(guided())):
        with pytest.raises(ValueError, match=f"{type(denoise).__name__} is not one: pass a GuidedDenoiser"):
            SOLVERS["dpmpp_2m"](denoise, X, LEVELS, split_guidance=True)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("ipndm", {"order": 5}),
        ("ipndm", {"order": 0}),
        ("unipc", {"order": 4}),
        ("unipc", {"variant": "bh3"}),
    ],
)
def test_unknown_orders_and_variants_are_refused(name, options):
    with pytest.raises(ValueError, match=rf"{name} has the orders .*, got "):
        SOLVERS[name](GaussianDenoiser(), X, LEVELS, **options)
