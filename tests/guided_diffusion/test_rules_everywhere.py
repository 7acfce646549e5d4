"""What every rule owes its neighbours: from its flag, on the digits networks, under every kind of sampler."""

from functools import cache, partial

import pytest
import torch

from classifiers import load_classifier
from guided_diffusion.denoisers import DiscreteDenoiser, GuidedDenoiser
from guided_diffusion.edm import edm_sampler, load_edm_network
from guided_diffusion.files.checkpoints import load_state_dict
from guided_diffusion.files.state_dicts import load_into
from guided_diffusion.flags.adm import ADMFlags
from guided_diffusion.flags.edm import EDMFlags
from guided_diffusion.flags.fields import parse
from guided_diffusion.flags.presets import EDM_PRESETS, PRESETS
from guided_diffusion.guidance.stateful import every
from guided_diffusion.guidance.step import GuidanceStep
from guided_diffusion.script_util import create_from_flags
from guided_diffusion.solvers import SOLVERS, Interval, recurrent, restart
from guided_diffusion.solvers import STEPS as SINGLE

RULES = {
    "reverse_kl": "0.5",
    "forward_kl": "0.5,0.2",
    "jensen_shannon": "0.5",
    "reference_contrast": 0.5,
    "entropy_scaling": 0.2,
    "augmentations": 2,
    "through_network": True,
    "momentum": -0.5,
    "adam": "0.5,0.8",
    "guidance_every": 2,
    "max_shift": 0.001,
    "parallel_part": 0.0,
    "band_weights": "1,0.5",
    "fixed_length": 0.05,
    "damping": 8.0,
    "guidance_interval": "0.1,20",
}
EXCLUSIVE = ("fixed_length",)  # beside it the rules about the size of the shift mean nothing
STATEFUL = ("momentum", "adam", "guidance_every")
N, STEPS = 3, 3
SHAPE = (N, 3, 16, 16)
Y = torch.tensor([3, 7, 0])
NOISE = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1))


@cache
def networks():
    digits = PRESETS["digits"] | {"timestep_respacing": str(STEPS)}
    model, diffusion = create_from_flags(digits)
    load_into(model.eval(), load_state_dict(digits["model_path"]), digits["model_path"])
    net = load_edm_network(EDM_PRESETS["digits-edm"]["network"])
    return model.requires_grad_(False), diffusion, net, load_classifier("digits_guide", num_classes=10)


def ddpm(guidance, y, noise):
    model, diffusion, *_ = networks()
    conditions = {"noise": noise, "model_kwargs": {"y": y}, "randn_like": torch.cos}
    return diffusion.p_sample_loop(model, noise.shape, guidance=guidance, **conditions)


def solved(name, guidance, y, noise):
    model, diffusion, *_ = networks()
    levels = [*(diffusion.sigma(t) for t in range(STEPS - 1, -1, -1)), 0.0]
    denoise = DiscreteDenoiser(model, diffusion, {"y": y})
    denoise = GuidedDenoiser(denoise, guidance, y) if guidance else denoise
    return SOLVERS[name](denoise, noise.double() * levels[0], levels, randn_like=torch.cos)


def released(guidance, y, noise):
    labels = torch.eye(10)[y]
    return edm_sampler(networks()[2], noise, labels, torch.cos, guidance=guidance, num_steps=STEPS)


def score(guidance, y, noise):
    net = networks()[2]
    net = GuidedDenoiser(net, guidance, y) if guidance else net
    return edm_sampler(net, noise, torch.eye(10)[y], torch.cos, num_steps=STEPS, S_churn=1)


ADM, EDM = (ADMFlags, PRESETS, "digits"), (EDMFlags, EDM_PRESETS, "digits-edm")
EULER, SCORE = ("--sampler", "euler"), ("--guidance_form", "score")
SAMPLERS = {
    "ddpm": (ddpm, *ADM, ()),
    **{name: (partial(solved, name), *ADM, EULER) for name in SOLVERS},
    "released": (released, *EDM, ()),
    "score": (score, *EDM, SCORE),
}
# The released recipe brings the gradient to unit length, and only a denoiser can be differentiated.
MEANINGLESS = {("ddpm", "through_network"), ("released", "through_network"), ("released", "entropy_scaling")}
SOLVER = "dpmpp_2m" if "dpmpp_2m" in SOLVERS else "euler"
KINDS = ("ddpm", SOLVER, "released", "score")
CASES = [(sampler, rule) for sampler in KINDS for rule in RULES if (sampler, rule) not in MEANINGLESS]


def configured(sampler, rules=(), *more):
    _, flags, presets, preset, form = SAMPLERS[sampler]
    words = [word for rule in rules for word in (f"--{rule}", str(RULES[rule]))]
    return parse(flags, None, presets, ["--preset", preset, *form, *words, *map(str, more)])


def sample(sampler, guidance, y=Y, noise=NOISE):
    with torch.no_grad():
        return SAMPLERS[sampler][0](guidance, y, noise)


@cache
def plain(sampler):
    return sample(sampler, configured(sampler).build_guidance(networks()[3], None))


@pytest.mark.parametrize(("sampler", "rule"), CASES)
def test_a_rule_runs_and_changes_the_images(sampler, rule):
    """Twice with the same guidance: nothing lasts beyond a trajectory."""
    guidance = configured(sampler, [rule]).build_guidance(networks()[3], None)
    images = sample(sampler, guidance)
    assert images.isfinite().all()
    assert ((images - plain(sampler)).abs().flatten(1).amax(dim=1) > 1e-6).any()
    assert torch.equal(sample(sampler, guidance), images)


WEIGHT = torch.randn(10, 3 * 16 * 16, generator=torch.Generator().manual_seed(2), dtype=torch.float64) / 30


@pytest.mark.parametrize("rule", [*RULES, "together"])
def test_an_image_does_not_depend_on_its_neighbours(rule):
    """Over a trajectory of four steps, whose images change as a sampler's do."""
    rules = [rule] if rule != "together" else [rule for rule in RULES if rule not in EXCLUSIVE]
    # A smooth classifier in float64: the digits one magnifies the rounding that a batch size changes.
    guidance = configured("euler", rules).build_guidance(lambda x: x.tanh().flatten(1) @ WEIGHT.T, None)

    def trajectory(kept):
        x, memory, shifts = NOISE[kept].double(), {}, []
        for i, sigma in enumerate((15.0, 5.0, 1.0, 0.2)):
            step = GuidanceStep(i, 4, 0.5, 0.5, sigma, i / 4, memory=memory, pull_back=lambda v: 0.5 * v)
            shifts.append(guidance(x, Y[kept], step))
            x = 0.8 * x + shifts[-1]
        return torch.stack(shifts, dim=1)

    together = trajectory([0, 1, 2])
    for kept in ([0], [1], [2], [2, 0]):
        torch.testing.assert_close(trajectory(kept), together[kept], rtol=1e-9, atol=1e-12)


def refuse(x):
    raise AssertionError("the classifier was called")


@pytest.mark.parametrize("sampler", ["ddpm", "euler", "released", "score"])
def test_at_scale_0_all_rules_together_change_no_bit(sampler):
    zero = "--max_guidance" if sampler == "released" else "--classifier_scale"
    rules = [rule for rule in RULES if (sampler, rule) not in MEANINGLESS and rule not in EXCLUSIVE]
    guidance = configured(sampler, rules, zero, 0).build_guidance(refuse, None)
    assert torch.equal(sample(sampler, guidance), sample(sampler, None))


@pytest.mark.parametrize("sampler", ["ddpm", "euler", "released", "score"])
def test_rules_work_together(sampler):
    rules = [rule for rule in RULES if (sampler, rule) not in MEANINGLESS and rule not in EXCLUSIVE]
    guidance = configured(sampler, rules).build_guidance(networks()[3], None)
    images = sample(sampler, guidance)
    assert images.isfinite().all() and not torch.equal(images, plain(sampler))


def counted(sampler, rules, *more):
    """How often the classifier is asked in one trajectory, by step."""
    seen = []
    guidance = configured(sampler, rules, *more).build_guidance(networks()[3], seen.append)
    sample(sampler, guidance)
    return len(seen)


@pytest.mark.parametrize(
    ("sampler", "calls"), [("ddpm", 3), ("euler", 3), ("heun", 5), ("released", 3), ("score", 5)]
)
def test_every_kth_call_and_an_interval_cut_the_passes(sampler, calls):
    assert counted(sampler, []) == calls
    for k in (2, 4):
        assert counted(sampler, [], "--guidance_every", k) == -(-calls // k)
    # Of three levels the middle one; Heun asks there twice.
    middle = counted(sampler, [], "--guidance_interval", "0.1,20")
    assert middle == (1 if calls == 3 else 2)
    assert counted(sampler, [], "--guidance_interval", "0.1,20", "--guidance_every", 4) == 1
    assert counted(sampler, [], "--augmentations", 3) == 3 * calls


# The memory of a trajectory


CHURN = {"num_steps": 3, "sigma_min": 50, "S_churn": 3, "S_max": 70}  # from 80 to 63, and up to 89
BACK_UP = {
    "recurrence": partial(recurrent(SINGLE["heun"], 2), sigmas=[9.0, 3.0, 0.0]),
    "restart": partial(restart(SOLVERS["heun"], [Interval(2, 2, 3.0, 20.0)]), sigmas=[9.0, 3.0, 0.0]),
    "churn": lambda net, x, randn_like: edm_sampler(net, x, None, randn_like, **CHURN),
}


@pytest.mark.parametrize("name", BACK_UP)
def test_a_trajectory_that_comes_back_to_its_highest_level_or_above_remembers(name):
    asked, levels = [], []
    rule = every(lambda x, y, step: asked.append(step.sigma) or torch.zeros_like(x), 1000)

    def noted(x, y, step):
        levels.append(step.sigma)
        return rule(x, y, step)

    for batch in (1, 2):  # each with a denoiser of its own
        BACK_UP[name](GuidedDenoiser(networks()[2], noted, Y), NOISE, randn_like=torch.cos)
        assert len(asked) == batch and max(levels[1:]) >= levels[0]


@pytest.mark.parametrize("rule", STATEFUL)
def test_samplers_share_no_memory(rule):
    """The same rule under one sampler after another, each from its own highest level."""
    guidance = configured("euler", [rule]).build_guidance(networks()[3], None)
    fresh = {name: sample(name, guidance) for name in ("score", "euler", "ddpm")}
    for name in ("ddpm", "score", "euler"):
        assert torch.equal(sample(name, guidance), fresh[name])


# Combinations that mean nothing


@pytest.mark.parametrize(
    ("sampler", "flags", "told"),
    [
        ("ddpm", "--through_network", "--classifier_type and a solver, such as --sampler heun"),
        ("released", "--through_network", "--guidance_form score"),
        ("released", "--entropy_scaling 0.1", "unit length"),
        ("euler", "--entropy_scaling 0.1 --fixed_length 1", "--entropy_scaling given with --fixed_length"),
        ("euler", "--max_shift 0.1 --fixed_length 1", "--max_shift given with --fixed_length"),
        ("euler", "--through_network --gamma_factor 1", "--gamma_factor given with --through_network True"),
        ("score", "--guidance_strength posterior --posterior learned", "EDM's networks do not predict"),
        ("ddpm", "--recurrence 2", "--sampler euler or heun"),
        ("released", "--use_classifier False --damping 8", "--use_classifier True"),
        ("euler", "--adam 0.9", "--adam takes 2 numbers, commas between them, got 0.9"),
        ("euler", "--adam 0.9,nan", "--adam takes 2 numbers"),
        ("euler", "--adam 0.9,1", "from 0 to below 1, got 0.9,1.0"),
        ("euler", "--reverse_kl 1,2", "smoothing"),
        ("euler", "--reverse_kl much", "--reverse_kl takes 1 or 2 numbers"),
        ("euler", "--band_weights 1,2,3", "--band_weights takes 2 numbers"),
        ("euler", "--momentum 1.5", "momentum must be above -1"),
        ("euler", "--entropy_scaling 2", "--entropy_scaling must be from 0 to 1"),
        ("euler", "--guidance_every 0", "--guidance_every must be at least 1"),
        ("euler", "--guidance_interval 3,1", "3.0,1.0 is empty"),
    ],
)
def test_combinations_that_mean_nothing_are_refused(sampler, flags, told):
    with pytest.raises(ValueError, match=told):
        configured(sampler, [], *flags.split())


def test_a_strength_is_to_choose_where_nothing_goes_through_the_network():
    """The rows of a comparison leave out what means nothing in theirs, and no more."""
    for sampler, idle in (("ddpm", {"through_network"}), ("euler", {"guidance_strength", "posterior"})):
        config = ADMFlags(classifier_type="resnet18", sampler=sampler, through_network=True,
                          guidance_strength="posterior")  # fmt: skip
        assert config.idle() & {"through_network", "guidance_strength", "posterior"} == idle
