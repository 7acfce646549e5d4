"""The small digits network under the solvers: guidance raises the share of wanted digits as under DDIM."""

from functools import cache

import torch
from toys import sample

from classifiers import load_classifier
from guided_diffusion.denoisers import DiscreteDenoiser, GuidedDenoiser
from guided_diffusion.files.checkpoints import load_state_dict
from guided_diffusion.files.state_dicts import load_into
from guided_diffusion.flags.presets import PRESETS
from guided_diffusion.guidance import ClassifierGuidance
from guided_diffusion.schedules import karras_sigmas
from guided_diffusion.script_util import create_from_flags
from guided_diffusion.solvers import heun

DIGITS, IMAGES = PRESETS["digits"], 40
Y = torch.arange(IMAGES) % 10
NO_CLASS = torch.full_like(Y, 10)
NOISE = torch.randn(IMAGES, 3, 16, 16, generator=torch.Generator().manual_seed(0))


@cache
def networks():
    unet, _ = create_from_flags(DIGITS)
    load_into(unet, load_state_dict(DIGITS["model_path"]), DIGITS["model_path"])
    guide = load_classifier("digits_guide", num_classes=10, softplus_beta=DIGITS["softplus_beta"])
    return unet.eval(), guide, load_classifier("digits_judge", num_classes=10)


@torch.no_grad()
def share_of_wanted(sampler, steps, guided=True):
    """The share of the images of the network without labels that the judge calls by the wanted class."""
    unet, guide, judge = networks()
    _, diffusion = create_from_flags({**DIGITS, "timestep_respacing": str(steps)})
    options = {"classifier_scale": DIGITS["classifier_scale"], "gamma_factor": DIGITS["gamma_factor"]}
    rule = ClassifierGuidance(guide, marginal_temperature=DIGITS["margin_temperature_discount"], **options)
    if sampler == "heun":  # whose steps are too long at the first levels of an evenly respaced process
        denoise = GuidedDenoiser(DiscreteDenoiser(lambda x, t: unet(x, t, NO_CLASS), diffusion), rule, Y)
        images = heun(denoise, 80 * NOISE, [*karras_sigmas(steps, 0.02, 80, 7), 0.0])
    else:
        options = {"noise": NOISE, "y": Y, "guidance": rule if guided else None}
        images = sample(sampler, diffusion, lambda x, t, y: unet(x, t, NO_CLASS), **options)
    return float((judge(images.clamp(-1, 1).float()).argmax(dim=1) == Y).float().mean())


def test_guidance_raises_the_share_of_wanted_digits_as_under_ddim():
    assert share_of_wanted("euler", 10, guided=False) < 0.25
    under_ddim = share_of_wanted("ddim", 10)
    for solver in ("euler", "heun"):
        guided = share_of_wanted(solver, 10)
        assert guided > 0.5, solver
        assert guided > under_ddim - 0.15, solver
