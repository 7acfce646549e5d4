"""The flags: their names and defaults, the published lines, presets; each is used, or named as idle."""

import pytest
from helpers import (
    TINY,
    TINY_64,
    TINY_NOISY,
    flags_of,
    load_samples,
    make_noisy_classifier,
    samples_bytes,
    save_random,
    save_unet,
)
from samplers import (
    ADM_SAMPLERS,
    DDPM,
    DIGITS,
    DIGITS_DIT,
    DIT_SAMPLERS,
    RELEASED,
    SCORE,
    levels_apart,
    manifest,
)

from guided_diffusion.flags.adm import ADMFlags
from guided_diffusion.flags.edm import EDMFlags
from guided_diffusion.flags.fields import parse
from guided_diffusion.flags.presets import EDM_PRESETS, PRESETS
from guided_diffusion.script_util import classifier_defaults, model_and_diffusion_defaults

INF, DECODER = float("inf"), DIGITS_DIT / "tiny"
# Beside upstream's defaults for networks, which tests of script_util hold.
SAMPLING = {
    "clip_denoised": True, "num_samples": 10000, "batch_size": 16, "use_ddim": False, "classifier_path": "",
    "classifier_scale": 1.0, "log_dir": "", "fix_class": False, "fix_class_index": 0, "classifier_type": "",
    "softplus_beta": INF, "joint_temperature": 1.0, "margin_temperature_discount": 1.0, "gamma_factor": 0.0,
    "seed": 0, "labels": "random", "out": "", "classifier_input": "paper", "guidance_interval": "",
    "preset": "", "device": "", "on_nonfinite": "stop", "sampler": "ddpm", "steps": None, "sigma_max": None,
}  # fmt: skip
DEFAULTS = {**model_and_diffusion_defaults(), **classifier_defaults(), **SAMPLING}
EDM_DEFAULTS = {
    "seeds": "0-63", "subdirs": False, "class": None, "batch_size": 64, "steps": 18, "sigma_min": None,
    "sigma_max": None, "rho": 7.0, "S_churn": 0.0, "S_min": 0.0, "S_max": INF, "S_noise": 1.0,
    "solver": "heun", "disc": "edm", "schedule": "linear", "scaling": "none", "use_classifier": False,
    "softplus_beta": 5.0,
    "joint_temperature": 1.0, "uncond_temperature": 1.0, "max_guidance": 0.001, "add_factor": 0.0,
}  # fmt: skip
ADM_LINE = (
    "--attention_resolutions 32,16,8 --class_cond True --image_size 128 --learn_sigma True --num_channels "
    "256 --num_heads 4 --num_res_blocks 2 --resblock_updown True --use_fp16 True --use_scale_shift_norm True"
)
ELUCD_LINE = (
    "--image_size 128 --classifier_attention_resolutions 32,16,8 --classifier_depth 2 --classifier_width 128 "
    "--classifier_pool attention --classifier_resblock_updown True --classifier_use_scale_shift_norm True "
    "--classifier_type resnet101 --classifier_scale 1.0 --softplus_beta 3.0 --joint_temperature 1.0 "
    "--margin_temperature_discount 0.5 --gamma_factor 0.3 --classifier_use_fp16 True"
)
ADM_VALUES = {
    "attention_resolutions": "32,16,8", "class_cond": True, "image_size": 128, "learn_sigma": True,
    "num_channels": 256, "num_heads": 4, "num_res_blocks": 2, "resblock_updown": True, "use_fp16": True,
    "use_scale_shift_norm": True,
}  # fmt: skip
ELUCD_VALUES = {
    "image_size": 128, "classifier_attention_resolutions": "32,16,8", "classifier_depth": 2,
    "classifier_width": 128, "classifier_pool": "attention", "classifier_resblock_updown": True,
    "classifier_use_scale_shift_norm": True, "classifier_type": "resnet101", "classifier_scale": 1.0,
    "softplus_beta": 3.0, "joint_temperature": 1.0, "margin_temperature_discount": 0.5, "gamma_factor": 0.3,
    "classifier_use_fp16": True,
}  # fmt: skip


def adm(*words):
    return parse(
        ADMFlags, None, PRESETS, [*words, *([] if "--preset" in words else ["--model_path", "unet.pt"])]
    )


def edm(*words):
    return parse(
        EDMFlags, None, EDM_PRESETS, [*words, *([] if "--preset" in words else ["--network", "edm.pkl"])]
    )


@pytest.mark.parametrize(("parsed", "defaults"), [(adm, DEFAULTS), (edm, EDM_DEFAULTS)], ids=["adm", "edm"])
def test_every_flag_exists_with_its_default(parsed, defaults):
    record = parsed().record()
    assert {key: record.get(key, "no such flag") for key in defaults} == defaults
    assert {key: type(record[key]) for key in defaults} == {
        key: type(value) for key, value in defaults.items()
    }


@pytest.mark.parametrize(
    ("line", "values"),
    [
        (f"{ADM_LINE} --classifier_type resnet18", ADM_VALUES),
        (ELUCD_LINE, ELUCD_VALUES),
        (f"{ADM_LINE} {ELUCD_LINE}", {**ADM_VALUES, **ELUCD_VALUES}),
    ],
    ids=["adm", "elucd", "both"],
)
def test_the_published_lines_parse(line, values):
    config = adm(*line.split())
    assert {key: getattr(config, key) for key in values} == values
    assert config.given >= set(values)


def test_presets_are_the_published_lines():
    expected = {**ADM_VALUES, **ELUCD_VALUES, "timestep_respacing": "250"}
    config = adm("--preset", "imagenet128-resnet101")
    assert {key: getattr(config, key) for key in expected} == expected
    published = {"classifier_type": "resnet101", "softplus_beta": 5.0, "joint_temperature": 1.0}
    published |= {"uncond_temperature": 0.0, "max_guidance": 0.004, "add_factor": 0.3, "steps": 10}
    published |= {"seeds": "0-49999", "guidance_form": "released", "S_churn": 0.0}
    config = edm("--preset", "imagenet64-edm-resnet101")
    assert {key: getattr(config, key) for key in published} == published


# Every flag that is accepted is used: one image of two steps differs.

ONE = ("--steps", 2, "--batch_size", 1)


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """one(row, flags): the bytes of one image under these flags."""
    known = {}

    def run(sampler, *flags):
        if (key := (sampler.name, *flags)) not in known:
            folder = tmp_path_factory.mktemp("one")
            sampler.run(folder, *ONE, *sampler.images(1), *flags)
            known[key] = samples_bytes(folder)
        return known[key]

    return run


USED = {
    DDPM: [
        "--softplus_beta inf", "--joint_temperature 2", "--margin_temperature_discount 1", "--gamma_factor 3",
        "--classifier_scale 1", "--clip_denoised False", "--noise_schedule cosine", "--labels 8",
        "--rescale_timesteps True --diffusion_steps 500", "--use_new_attention_order True",
        "--variance_max first_pixel --gamma_factor 3 | --gamma_factor 3", "--guidance_interval 1,200",
        "--classifier_path random", "--classifier_type resnet18 --classifier_path random", "--use_fp16 True",
        "--classifier_type resnet18 --classifier_path random --classifier_input imagenet"
        " | --classifier_type resnet18 --classifier_path random",
    ],
    RELEASED: [
        "--S_churn 3", "--sigma_min 0.1", "--sigma_max 40", "--solver euler", "--disc vp", "--disc ve",
        "--disc iddpm", "--schedule vp", "--schedule ve", "--scaling vp", "--softplus_beta inf",
        "--uncond_temperature 1", "--max_guidance 0.1", "--add_factor 3", "--guidance_interval 1,70",
        "--classifier_path random", "--S_churn 3 --S_min 90 | --S_churn 3",
        "--S_churn 3 --S_max 1 | --S_churn 3",
        "--S_churn 3 --S_noise 1.1 | --S_churn 3", "--steps 3 --rho 5 | --steps 3", "--class 3",
        "--use_fp16 True",
    ],
    SCORE: ["--joint_temperature 3", "--classifier_scale 2", "--gamma_factor 1"],
}  # fmt: skip
for row in DIT_SAMPLERS[:1]:
    USED[row] = [
        "--cfg_scale 3", "--cfg_channels 3", "--cfg_scale 1",
        "--decode_dtype bfloat16 --classifier_scale 20 | --classifier_scale 20",
        "--cfg_scale 1 --unconditional 1 | --cfg_scale 1", f"--latent_decoder tiny --decoder_path {DECODER}",
        "--sampler euler --cfg_rule cfg++ --cfg_scale 0.5 | --sampler euler",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("sampler", "flags"),
    [pytest.param(row, flags, id=f"{row.name} {flags}") for row, table in USED.items() for flags in table],
)
def test_every_flag_that_is_accepted_is_used(one, sampler, flags):
    """Beside the second group of flags, if there is one."""
    changed, _, beside = flags.partition(" | ")
    assert one(sampler, *changed.split()) != one(sampler, *beside.split())


ALIKE = [
    (DDPM, "--sampler ddpm"),
    (DDPM, "--classifier_path {digits}/guide.safetensors"),
    (DDPM, "--guidance_interval 0,100000"),
    (DDPM, "--classifier_use_fp16 True --device cpu"),
    (RELEASED, "--guidance_interval 0,100"),
    (RELEASED, "--use_fp16 False"),
    *((row, "--decode_checkpointing True --decode_dtype float32") for row in DIT_SAMPLERS[:1]),
    # Without effect.
    (DDPM, "--use_kl True --dropout 0.1 --use_checkpoint True --rescale_learned_sigmas True"),
    (DDPM, "--classifier_width 64 --classifier_pool spatial"),
    (RELEASED, "--S_noise 2 --S_min 1"),
]


@pytest.mark.parametrize(("sampler", "flags"), ALIKE, ids=lambda value: getattr(value, "name", value))
def test_flags_that_change_nothing(one, sampler, flags):
    assert one(sampler, *flags.format(digits=DIGITS).split()) == one(sampler)


@pytest.mark.parametrize(("sampler", "flags"), ALIKE[-3:], ids=lambda value: getattr(value, "name", value))
def test_idle_flags_are_named_at_the_start_and_do_not_decide_about_resuming(tmp_path, sampler, flags):
    quick = (*ONE, *sampler.images(1))
    assert "without effect" not in sampler.run(tmp_path / "plain", *quick).err
    result = sampler.run(tmp_path / "idle", *quick, *flags.split())
    (line,) = [line for line in result.err.splitlines() if "without effect in this run" in line]
    assert {word.strip(",") for word in line.split() if word.startswith("--")} == set(flags.split()[::2])
    assert "complete, nothing to do" in sampler.run(tmp_path / "plain", *quick, *flags.split()).err
    resumed = sampler.run(tmp_path / "idle", *quick)
    assert "complete, nothing to do" in resumed.err
    assert manifest(tmp_path / "idle")["settings"] == manifest(tmp_path / "plain")["settings"]


@pytest.mark.parametrize("words", ["--sampler ddim", "--use_ddim True", "--use_ddim"])
def test_two_names_of_one_thing_resume_each_other(tmp_path, words):
    """--steps is --timestep_respacing, --use_ddim is --sampler ddim; a device decides about nothing."""
    DDPM.run(tmp_path, "--timestep_respacing", 2, *words.split(), base=("--preset", "digits"))
    again = DDPM.run(
        tmp_path, "--steps", 2, "--sampler", "ddim", "--device", "cpu", base=("--preset", "digits")
    )
    assert "complete, nothing to do" in again.err


# Off is off


def test_scale_0_has_the_bytes_of_a_run_without_classifier(sampler, finished, unguided, tmp_path):
    sampler.run(tmp_path, *sampler.scale_0)
    assert samples_bytes(tmp_path) == samples_bytes(unguided(sampler))
    assert levels_apart(finished(sampler), unguided(sampler)).min() > 0


@pytest.mark.parametrize("flags", ["--guidance_interval 100000,200000"])
def test_an_interval_without_a_step_is_unguided(sampler, unguided, tmp_path, flags):
    sampler.run(tmp_path, *flags.split())
    assert samples_bytes(tmp_path) == samples_bytes(unguided(sampler))


def test_without_a_classifier_its_flags_are_named(unguided, tmp_path):
    flags = ("--classifier_use_fp16", True, "--classifier_depth", 4)
    result = DDPM.run(tmp_path, *flags, base=DDPM.unguided)
    (line,) = [line for line in result.err.splitlines() if "without effect" in line]
    assert "--classifier_use_fp16" in line and "--classifier_depth" in line
    assert samples_bytes(tmp_path) == samples_bytes(unguided(DDPM))


# Half precision on a CPU


@pytest.mark.parametrize(
    ("sampler", "flags", "said"),
    [
        (DDPM, "--use_fp16 True", "--use_fp16 on a CPU: the U-Net runs in bfloat16"),
        (
            DDPM,
            "--classifier_use_fp16 True",
            "--classifier_use_fp16 on a CPU: the classifier stays in float32",
        ),
        (RELEASED, "--use_fp16 True", "on a CPU that is bfloat16"),
    ],
)
def test_half_precision_on_a_cpu_says_what_it_is(tmp_path, sampler, flags, said, finished):
    assert said in sampler.run(tmp_path, *flags.split(), "--device", "cpu").err
    apart = abs(load_samples(tmp_path)[0].astype(int) - load_samples(finished(sampler))[0])
    assert (apart.mean() == 0) == ("classifier" in flags) and apart.mean() < 25


# Networks drawn at random


@pytest.mark.parametrize("sampler", ADM_SAMPLERS[:2], ids=lambda sampler: sampler.name)
def test_classifier_path_alone_is_a_noisy_classifier(tmp_path, sampler):
    unet = save_unet(tmp_path / "unet.pt", TINY_64)
    noisy = save_random(tmp_path / "noisy.pt", make_noisy_classifier(num_classes=10))
    base = [*flags_of({**TINY_64, **TINY_NOISY, "num_classes": 10}), *ONE, "--num_samples", 2]
    base += ["--model_path", unet, "--sampler", sampler.name]
    guided = [*base, "--classifier_path", noisy, "--classifier_scale"]
    runs = {"unguided": base[4:], "scale0": [*guided, 0], "guided": [*guided, 1e5]}
    runs["half"] = [*runs["guided"], "--classifier_use_fp16", True]
    runs["unguided"] = [*flags_of({**TINY_64, "num_classes": 10}), *ONE, "--num_samples", 2, *base[-4:]]
    said = {
        name: sampler.run(tmp_path / name, *sampler.images(2), base=flags).err for name, flags in runs.items()
    }
    assert levels_apart(tmp_path / "scale0", tmp_path / "unguided").max() == 0
    assert levels_apart(tmp_path / "guided", tmp_path / "unguided").min() > 1
    assert "the classifier stays in float32" in said["half"]
    assert samples_bytes(tmp_path / "half") == samples_bytes(tmp_path / "guided")


def test_the_published_classifier_line_runs_with_another_network(tmp_path):
    network = {**TINY, "image_size": 128, "channel_mult": "1,1,1,1,1"}
    unet = save_unet(tmp_path / "unet.pt", network)
    flags = [*ELUCD_LINE.split(), *flags_of(network), "--model_path", unet, "--classifier_path", "random"]
    result = DDPM.run(tmp_path / "out", "--num_samples", 1, "--steps", 1, "--device", "cpu", base=flags)
    assert load_samples(tmp_path / "out")[0].shape == (1, 128, 128, 3)
    (line,) = [line for line in result.err.splitlines() if "without effect" in line]
    used = {"image_size", "classifier_use_fp16"}
    named = {word.strip(",-") for word in line.split() if word.startswith("--")}
    assert named == classifier_defaults().keys() - used
