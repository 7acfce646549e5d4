"""Flags, defaults and builders: the names that other repositories import."""

import argparse

import pytest
import torch

from guided_diffusion.gaussian_diffusion import LossType, ModelMeanType, ModelVarType
from guided_diffusion.script_util import (
    NUM_CLASSES,
    add_dict_to_argparser,
    args_to_dict,
    classifier_defaults,
    create_classifier,
    create_gaussian_diffusion,
    create_model_and_diffusion,
    model_and_diffusion_defaults,
    str2bool,
)

MODEL_AND_DIFFUSION = {
    "image_size": 64, "num_channels": 128, "num_res_blocks": 2, "num_heads": 4, "num_heads_upsample": -1,
    "num_head_channels": -1, "attention_resolutions": "16,8", "channel_mult": "", "dropout": 0.0,
    "class_cond": False, "use_checkpoint": False, "use_scale_shift_norm": True, "resblock_updown": False,
    "use_fp16": False, "use_new_attention_order": False, "learn_sigma": False, "diffusion_steps": 1000,
    "noise_schedule": "linear", "timestep_respacing": "", "use_kl": False, "predict_xstart": False,
    "rescale_timesteps": False, "rescale_learned_sigmas": False,
}  # fmt: skip
CLASSIFIER = {
    "image_size": 64, "classifier_use_fp16": False, "classifier_width": 128, "classifier_depth": 2,
    "classifier_attention_resolutions": "32,16,8", "classifier_use_scale_shift_norm": True,
    "classifier_resblock_updown": True, "classifier_pool": "attention",
}  # fmt: skip
TINY = {
    "image_size": 8,
    "num_channels": 32,
    "num_res_blocks": 1,
    "channel_mult": "1,1",
    "attention_resolutions": "4",
}
SMALL_CLASSIFIER = {**CLASSIFIER, "classifier_width": 64, "classifier_depth": 1}


def create(**changes):
    return create_model_and_diffusion(**{**model_and_diffusion_defaults(), **TINY, **changes})


def typed(values):
    return {key: (value, type(value)) for key, value in values.items()}


def test_defaults_are_upstreams_and_fresh_each_time():
    for defaults, upstreams in (
        (model_and_diffusion_defaults, MODEL_AND_DIFFUSION),
        (classifier_defaults, CLASSIFIER),
    ):
        defaults()["image_size"] = 1
        assert typed(defaults()) == typed(upstreams)
    assert NUM_CLASSES == 1000


def test_the_usual_script_builds_a_network_and_a_diffusion():
    parser = argparse.ArgumentParser()
    add_dict_to_argparser(parser, model_and_diffusion_defaults())
    flags = {**TINY, "class_cond": True, "learn_sigma": True, "timestep_respacing": 5}
    args = parser.parse_args([word for key, value in flags.items() for word in (f"--{key}", str(value))])
    model, diffusion = create_model_and_diffusion(**args_to_dict(args, model_and_diffusion_defaults().keys()))
    assert diffusion.num_timesteps == 5
    x, t, y = torch.zeros(2, 3, 8, 8), torch.tensor([3, 4]), torch.tensor([0, 999])
    assert model(x, t, y).shape == (2, 6, 8, 8)


# Builders


@pytest.mark.parametrize("num_classes", [2, 11, None])
def test_number_of_classes(num_classes):
    classes = {} if num_classes is None else {"num_classes": num_classes}
    assert create(class_cond=True, **classes)[0].label_emb.num_embeddings == (num_classes or 1000)
    assert create(class_cond=False, **classes)[0].num_classes is None
    classifier = create_classifier(**SMALL_CLASSIFIER, **classes)
    with torch.no_grad():
        logits = classifier(torch.zeros(1, 3, 64, 64), torch.tensor([5]))
    assert logits.shape == (1, num_classes or 1000)


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (
            {},
            {"model_mean_type": ModelMeanType.EPSILON, "model_var_type": ModelVarType.FIXED_LARGE,
                 "loss_type": LossType.MSE, "rescale_timesteps": False, "num_timesteps": 1000},
        ),
        ({"predict_xstart": True}, {"model_mean_type": ModelMeanType.START_X}),
        ({"learn_sigma": True}, {"model_var_type": ModelVarType.LEARNED_RANGE}),
        ({"rescale_learned_sigmas": True}, {"loss_type": LossType.RESCALED_MSE}),
        ({"use_kl": True}, {"loss_type": LossType.RESCALED_KL}),
        ({"rescale_timesteps": True}, {"rescale_timesteps": True}),
        ({"diffusion_steps": 400}, {"num_timesteps": 400}),
        ({"timestep_respacing": "250"}, {"num_timesteps": 250}),
        ({"timestep_respacing": "ddim25"}, {"num_timesteps": 25}),
        ({"timestep_respacing": "10,10,5"}, {"num_timesteps": 25}),
    ],
)  # fmt: skip
def test_diffusion_flags(flags, expected):
    model, diffusion = create(**flags)
    assert {name: getattr(diffusion, name) for name in expected} == expected
    channels = 6 if flags.get("learn_sigma") else 3
    assert model(torch.zeros(1, 3, 8, 8), torch.tensor([0])).shape == (1, channels, 8, 8)


def test_variance_and_schedule_by_name():
    assert create_gaussian_diffusion(sigma_small=True).model_var_type is ModelVarType.FIXED_SMALL
    assert create(noise_schedule="cosine")[1].betas[-1] == pytest.approx(0.999)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"noise_schedule": "sqrt"}, "noise schedule 'sqrt'"),
        ({"image_size": 100, "channel_mult": ""}, r"image_size 100.*512, 256, 128, 64.*channel_mult"),
        ({"image_size": 9}, r"image_size 9.*halved 1 time"),
        ({"image_size": 12, "channel_mult": "1,1,1,1"}, r"image_size 12.*halved 3 times"),
        ({"channel_mult": "1;2"}, r"channel_mult '1;2'.*1,2,2"),
        ({"channel_mult": "1,,2"}, r"channel_mult '1,,2'"),
        ({"channel_mult": "a"}, r"channel_mult 'a'"),
        ({"attention_resolutions": "16;8"}, r"attention.resolutions '16;8'"),
        ({"attention_resolutions": "16,x"}, r"attention.resolutions '16,x'"),
        ({"attention_resolutions": "0"}, r"attention.resolutions '0'"),
        ({"num_heads": 5}, r"num_heads 5"),
        ({"num_head_channels": 5}, r"num_head_channels 5"),
        ({"timestep_respacing": "1001"}, r"1001"),
        ({"timestep_respacing": "many"}, r"timestep_respacing 'many'"),
    ],
)
def test_wrong_flags(flags, message):
    with pytest.raises(ValueError, match=message):
        create(**flags)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"image_size": 100}, "image_size 100"),
        ({"classifier_pool": "max"}, "pool 'max'.*attention.*adaptive"),
    ],
)
def test_wrong_classifier_flags(flags, message):
    with pytest.raises(ValueError, match=message):
        create_classifier(**{**SMALL_CLASSIFIER, **flags})


# argparse


@pytest.mark.parametrize(
    ("texts", "value"),
    [(["True", "TRUE", "yes", "y", "t", "1", True], True), (["False", "no", "N", "f", "0", False], False)],
)
def test_booleans(texts, value):
    assert all(str2bool(text) is value for text in texts)


@pytest.mark.parametrize("text", ["maybe", "", "2", "None"])
def test_what_is_no_boolean(text):
    with pytest.raises(argparse.ArgumentTypeError, match="boolean"):
        str2bool(text)


def test_flags_have_the_type_of_their_default(capsys):
    parser = argparse.ArgumentParser()
    defaults = {"i": 1, "f": 0.5, "b": False, "s": "x", "n": None}
    add_dict_to_argparser(parser, defaults)
    assert args_to_dict(parser.parse_args([]), defaults) == defaults
    args = parser.parse_args(["--i=3", "--f=2", "--b=yes", "--s=7", "--n=8"])
    assert typed(args_to_dict(args, defaults)) == typed({"i": 3, "f": 2.0, "b": True, "s": "7", "n": "8"})
    assert parser.parse_args(["--b"]).b is True
    for flag, value in (("--b", "maybe"), ("--i", "1.5")):
        with pytest.raises(SystemExit) as caught:
            parser.parse_args([flag, value])
        assert caught.value.code == 2 and flag in capsys.readouterr().err
