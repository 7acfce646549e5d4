"""The signatures that code outside this project relies on: names, order and defaults of the arguments."""

import inspect
import math

import pytest

import classifiers
from guided_diffusion import dist_util, guidance, logger, script_util, unet
from guided_diffusion.files import checkpoints
from guided_diffusion.gaussian_diffusion import GaussianDiffusion

REQUIRED = inspect.Parameter.empty
LOOP = {
    "model": REQUIRED, "shape": REQUIRED, "noise": None, "clip_denoised": True, "denoised_fn": None, "cond_fn": None,
    "model_kwargs": None, "device": None, "progress": False,
}  # fmt: skip
LOOP_KEYWORDS = {"guidance": None, "randn_like": None, "variance_max": "schedule"}
UNET = {
    "image_size": REQUIRED, "in_channels": REQUIRED, "model_channels": REQUIRED, "out_channels": REQUIRED, "num_res_blocks": REQUIRED,
    "attention_resolutions": REQUIRED, "dropout": 0, "channel_mult": (1, 2, 4, 8), "conv_resample": True, "dims": 2,
}  # fmt: skip
UNET_TAIL = {
    "use_checkpoint": False, "use_fp16": False, "num_heads": 1, "num_head_channels": -1, "num_heads_upsample": -1,
    "use_scale_shift_norm": False, "resblock_updown": False, "use_new_attention_order": False,
}  # fmt: skip
POSITIONAL = {
    "log_prob": (guidance.log_prob, {"logits": REQUIRED, "y": REQUIRED, "joint_temperature": 1.0, "marginal_temperature": 1.0}),
    "GuidanceStep": (
        guidance.GuidanceStep, {"index": REQUIRED, "num_steps": REQUIRED, "variance": REQUIRED, "variance_max": REQUIRED},
    ),
    "guidance call": (guidance.ClassifierGuidance.__call__, {"self": REQUIRED, "x": REQUIRED, "y": REQUIRED, "step": REQUIRED}),
    "p_sample_loop": (GaussianDiffusion.p_sample_loop, {"self": REQUIRED, **LOOP}),
    "p_sample_loop_progressive": (GaussianDiffusion.p_sample_loop_progressive, {"self": REQUIRED, **LOOP}),
    "ddim_sample_loop": (GaussianDiffusion.ddim_sample_loop, {"self": REQUIRED, **LOOP, "eta": 0.0}),
    "ddim_sample_loop_progressive": (GaussianDiffusion.ddim_sample_loop_progressive, {"self": REQUIRED, **LOOP, "eta": 0.0}),
    "p_mean_variance": (
        GaussianDiffusion.p_mean_variance,
        {
            "self": REQUIRED, "model": REQUIRED, "x": REQUIRED, "t": REQUIRED, "clip_denoised": True, "denoised_fn": None,
            "model_kwargs": None,
        },
    ),
    "q_sample": (GaussianDiffusion.q_sample, {"self": REQUIRED, "x_start": REQUIRED, "t": REQUIRED, "noise": None}),
    "training_losses": (
        GaussianDiffusion.training_losses,
        {"self": REQUIRED, "model": REQUIRED, "x_start": REQUIRED, "t": REQUIRED, "model_kwargs": None, "noise": None},
    ),
    "UNetModel": (unet.UNetModel, {**UNET, "num_classes": None, **UNET_TAIL}),
    "EncoderUNetModel": (unet.EncoderUNetModel, {**UNET, **UNET_TAIL, "pool": "adaptive"}),
    "load_classifier": (classifiers.load_classifier, {"name": REQUIRED, "weights": None}),
    "load_state_dict": (checkpoints.load_state_dict, {"path": REQUIRED}),
    "args_to_dict": (script_util.args_to_dict, {"args": REQUIRED, "keys": REQUIRED}),
    "add_dict_to_argparser": (script_util.add_dict_to_argparser, {"parser": REQUIRED, "default_dict": REQUIRED}),
    "setup_dist": (dist_util.setup_dist, {}),
    "dev": (dist_util.dev, {}),
    "get_dir": (logger.get_dir, {}),
}  # fmt: skip
KEYWORDS = {
    "p_sample_loop": (GaussianDiffusion.p_sample_loop, LOOP_KEYWORDS),
    "p_sample_loop_progressive": (GaussianDiffusion.p_sample_loop_progressive, LOOP_KEYWORDS),
    "ddim_sample_loop": (GaussianDiffusion.ddim_sample_loop, LOOP_KEYWORDS),
    "ddim_sample_loop_progressive": (GaussianDiffusion.ddim_sample_loop_progressive, LOOP_KEYWORDS),
    "load_classifier": (
        classifiers.load_classifier,
        {"num_classes": 1000, "softplus_beta": math.inf, "classifier_input": "paper"},
    ),
    "ClassifierGuidance": (
        guidance.ClassifierGuidance,
        {"joint_temperature": 1.0, "marginal_temperature": 1.0, "classifier_scale": 1.0, "gamma_factor": 0.0},
    ),
}


def parameters(function):
    return inspect.signature(function).parameters


@pytest.mark.parametrize("name", POSITIONAL)
def test_positional_arguments(name):
    function, expected = POSITIONAL[name]
    found = {key: p.default for key, p in parameters(function).items() if p.kind is p.POSITIONAL_OR_KEYWORD}
    # More may follow, if a caller need not know of them.
    assert list(found.items())[: len(expected)] == list(expected.items())
    assert all(default is not REQUIRED for default in list(found.values())[len(expected) :])


@pytest.mark.parametrize("name", KEYWORDS)
def test_keyword_arguments(name):
    function, expected = KEYWORDS[name]
    found = {key: p.default for key, p in parameters(function).items() if p.kind is p.KEYWORD_ONLY}
    assert {key: found.get(key) for key in expected} == expected
    assert set(expected) <= set(found)
    assert all(default is not REQUIRED for default in found.values())


@pytest.mark.parametrize(
    ("function", "defaults"),
    [
        (script_util.create_model_and_diffusion, script_util.model_and_diffusion_defaults),
        (script_util.create_classifier, script_util.classifier_defaults),
    ],
)
def test_builders_take_the_flags_and_the_number_of_classes(function, defaults):
    found = parameters(function)
    assert set(found) == {*defaults(), "num_classes"}
    assert found["num_classes"].default == 1000
    assert all(p.default is REQUIRED for key, p in found.items() if key != "num_classes")


def test_diffusion_attributes():
    diffusion = script_util.create_gaussian_diffusion(steps=1000, timestep_respacing="10")
    assert diffusion.num_timesteps == len(diffusion.betas) == len(diffusion.alphas_cumprod) == 10


@pytest.mark.parametrize("network", [unet.UNetModel, unet.EncoderUNetModel])
def test_networks_convert_both_ways(network):
    assert list(parameters(network.convert_to_fp16)) == list(parameters(network.convert_to_fp32)) == ["self"]
