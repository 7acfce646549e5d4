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
    "image_size": 64,
    "num_channels": 128,
    "num_res_blocks": 2,
    "num_heads": 4,
    "num_heads_upsample": -1,
    "num_head_channels": -1,
    "attention_resolutions": "16,8",
    "channel_mult": "",
    "dropout": 0.0,
    "class_cond": False,
    "use_checkpoint": False,
    "use_scale_shift_norm": True,
    "resblock_updown": False,
    "use_fp16": False,
    "use_new_attention_order": False,
    "learn_sigma": False,
    "diffusion_steps": 1000,
    "noise_schedule": "linear",
    "timestep_respacing": "",
    "use_kl": False,
    "predict_xstart": False,
    "rescale_timesteps": False,
    "rescale_learned_sigmas": False,
}
CLASSIFIER = {
    "image_size": 64,
    "classifier_use_fp16": False,
    "classifier_width": 128,
    "classifier_depth": 2,
    "classifier_attention_resolutions": "32,16,8",
    "classifier_use_scale_shift_norm": True,
    "classifier_resblock_updown": True,
    "classifier_pool": "attention",
}
TINY = {
    "image_size": 8,
    "num_channels": 32,
    "num_res_blocks": 1,
    "channel_mult": "1,1",
    "attention_resolutions": "4",
}


def create(**changes):
    return create_model_and_diffusion(**{**model_and_diffusion_defaults(), **TINY, **changes})


def typed(defaults):
    return {key: (value, type(value)) for key, value in defaults.items()}


def test_defaults_are_upstreams():
    assert typed(model_and_diffusion_defaults()) == typed(MODEL_AND_DIFFUSION)
    assert typed(classifier_defaults()) == typed(CLASSIFIER)
    assert NUM_CLASSES == 1000


def test_defaults_are_fresh_each_time():
    model_and_diffusion_defaults()["image_size"] = 1
    classifier_defaults()["image_size"] = 1
    assert model_and_diffusion_defaults()["image_size"] == classifier_defaults()["image_size"] == 64


def test_the_usual_script_builds_a_network_and_a_diffusion():
    parser = argparse.ArgumentParser()
    add_dict_to_argparser(parser, model_and_diffusion_defaults())
    flags = "--image_size 8 --num_channels 32 --num_res_blocks 1 --channel_mult 1,1 --attention_resolutions 4 --class_cond True"
    args = parser.parse_args(f"{flags} --learn_sigma True --timestep_respacing 5".split())
    model, diffusion = create_model_and_diffusion(**args_to_dict(args, model_and_diffusion_defaults().keys()))
    assert diffusion.num_timesteps == 5
    assert model.label_emb.num_embeddings == 1000
    with torch.no_grad():
        assert model(torch.zeros(2, 3, 8, 8), torch.tensor([3, 4]), torch.tensor([0, 999])).shape == (
            2,
            6,
            8,
            8,
        )


# Builders


@pytest.mark.parametrize("num_classes", [2, 11, 1000])
def test_number_of_classes(num_classes):
    model, _ = create(class_cond=True, num_classes=num_classes)
    assert model.label_emb.num_embeddings == num_classes
    flags = {**CLASSIFIER, "classifier_width": 64, "classifier_depth": 1}
    classifier = create_classifier(**flags, num_classes=num_classes)
    with torch.no_grad():
        assert classifier(torch.zeros(1, 3, 64, 64), torch.tensor([5])).shape == (1, num_classes)


def test_classifiers_default_is_imagenet():
    classifier = create_classifier(**{**CLASSIFIER, "classifier_width": 64, "classifier_depth": 1})
    assert classifier.out[-1].c_proj.out_channels == 1000


@pytest.mark.parametrize("num_classes", [1000, 7])
def test_number_of_classes_does_not_matter_to_an_unconditional_network(num_classes):
    assert create(num_classes=num_classes)[0].num_classes is None


@pytest.mark.parametrize(("learn_sigma", "channels"), [(False, 3), (True, 6)])
def test_learn_sigma(learn_sigma, channels):
    model, diffusion = create(learn_sigma=learn_sigma)
    assert model(torch.zeros(1, 3, 8, 8), torch.tensor([0])).shape == (1, channels, 8, 8)
    assert diffusion.model_var_type is (
        ModelVarType.LEARNED_RANGE if learn_sigma else ModelVarType.FIXED_LARGE
    )


@pytest.mark.parametrize(
    ("flags", "attribute", "expected"),
    [
        ({}, "model_mean_type", ModelMeanType.EPSILON),
        ({"predict_xstart": True}, "model_mean_type", ModelMeanType.START_X),
        ({}, "loss_type", LossType.MSE),
        ({"rescale_learned_sigmas": True}, "loss_type", LossType.RESCALED_MSE),
        ({"use_kl": True}, "loss_type", LossType.RESCALED_KL),
        ({}, "rescale_timesteps", False),
        ({"rescale_timesteps": True}, "rescale_timesteps", True),
        ({}, "num_timesteps", 1000),
        ({"diffusion_steps": 400}, "num_timesteps", 400),
        ({"timestep_respacing": "250"}, "num_timesteps", 250),
        ({"timestep_respacing": "ddim25"}, "num_timesteps", 25),
        ({"timestep_respacing": "10,10,5"}, "num_timesteps", 25),
    ],
)
def test_diffusion_flags(flags, attribute, expected):
    assert getattr(create(**flags)[1], attribute) == expected


def test_small_sigma():
    assert create_gaussian_diffusion(sigma_small=True).model_var_type is ModelVarType.FIXED_SMALL


def test_cosine_schedule_is_chosen_by_name():
    assert create(noise_schedule="cosine")[1].betas[-1] == pytest.approx(0.999)
    with pytest.raises(ValueError, match="noise schedule 'sqrt'"):
        create(noise_schedule="sqrt")


@pytest.mark.parametrize(
    ("size", "widths"),
    [(64, [32, 64, 96, 128]), (128, [32, 32, 64, 96, 128]), (256, [32, 32, 64, 64, 128, 128])],
)
def test_channel_multipliers_by_size(size, widths):
    with torch.device("meta"):
        model, _ = create(
            image_size=size, channel_mult="", attention_resolutions=str(size // 4), num_channels=32
        )
    found = [
        block[0].out_layers[3].out_channels for block in model.input_blocks if hasattr(block[0], "out_layers")
    ]
    assert found == widths


def test_channel_multipliers_of_512():
    with torch.device("meta"):
        model, _ = create(image_size=512, channel_mult="", attention_resolutions="32", num_channels=64)
    assert model.input_blocks[0][0].out_channels == 32
    assert model.input_blocks[-1][0].out_layers[3].out_channels == 256


def test_attention_resolutions_are_in_pixels():
    model, _ = create(image_size=16, channel_mult="1,1,1", attention_resolutions="8")
    with_attention = [len(block) > 1 for block in model.input_blocks]
    # Convolution, 16 pixels, down, 8 pixels, down, 4 pixels.
    assert with_attention == [False, False, False, True, False, False]


# Bad input


@pytest.mark.parametrize(
    ("flags", "message"),
    [
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
        create_classifier(**{**CLASSIFIER, "classifier_width": 64, **flags})


# argparse


@pytest.mark.parametrize("text", ["True", "true", "TRUE", "yes", "y", "t", "1"])
def test_true(text):
    assert str2bool(text) is True


@pytest.mark.parametrize("text", ["False", "false", "no", "N", "f", "0"])
def test_false(text):
    assert str2bool(text) is False


@pytest.mark.parametrize("value", [True, False])
def test_booleans_are_left_alone(value):
    assert str2bool(value) is value


@pytest.mark.parametrize("text", ["maybe", "", "2", "None"])
def test_neither(text):
    with pytest.raises(argparse.ArgumentTypeError, match="boolean"):
        str2bool(text)


def test_flags_have_the_type_of_their_default():
    parser = argparse.ArgumentParser()
    add_dict_to_argparser(parser, {"i": 1, "f": 0.5, "b": False, "s": "x", "n": None})
    assert vars(parser.parse_args([])) == {"i": 1, "f": 0.5, "b": False, "s": "x", "n": None}
    args = vars(parser.parse_args(["--i", "3", "--f", "2", "--b", "yes", "--s", "7", "--n", "8"]))
    assert typed(args) == typed({"i": 3, "f": 2.0, "b": True, "s": "7", "n": "8"})


@pytest.mark.parametrize("argv", ["--b maybe", "--i 1.5", "--b"])
def test_values_of_another_type_end_the_program(argv, capsys):
    parser = argparse.ArgumentParser()
    add_dict_to_argparser(parser, {"i": 1, "b": False})
    with pytest.raises(SystemExit) as caught:
        parser.parse_args(argv.split())
    assert caught.value.code == 2
    assert argv.split()[0] in capsys.readouterr().err


def test_args_to_dict_takes_the_keys_asked_for():
    args = argparse.Namespace(a=1, b=2, c=3)
    assert args_to_dict(args, ["c", "a"]) == {"c": 3, "a": 1}
