"""Bad input to scripts/edm_sample.py, and words that no script knows; rows as in test_bad_values.py."""

import pytest
from table import ADM, EDM, rows

from guided_diffusion.flags.presets import PRESETS

OFF = "--use_classifier 0"
SCORE = "--guidance_form score"
NETWORKS = [
    ("--network=", "--network is missing | --preset"),
    ("--network absent.pkl", "no checkpoint at absent.pkl | scripts/download.py"),
    (
        "--network edm-imagenet-64x64-cond-adm.pkl",
        "python scripts/download.py edm-imagenet-64x64-cond-adm.pkl",
    ),
    ("--network {digits}/unet.safetensors", "unet.safetensors | scripts/convert_checkpoint.py"),
    ("--network {digits}/reference.npz", "reference.npz"),
    (f"--network {{files}}/grey.pkl {OFF}", "grey.pkl | img_channels 1"),
    ("--network {files}/system.pkl", "system.pkl | posix.system"),
    ("--network {files}/eval.pkl", "eval.pkl | builtins.eval"),
    ("--classifier_type resnet34", "resnet34-"),
    ("--classifier_input imagenet", "digits_guide | paper"),
    ("--classifier_type {files}/own.py:seven --softplus_beta inf", "own.py:seven | num_classes 10 | 7"),
]
CONTRADICTIONS = [
    *((f"{OFF} {flag}", f"{flag.split()[0]} | --use_classifier True") for flag in (
        "--max_guidance 0.1", "--add_factor 0.1", "--classifier_scale 2", "--gamma_factor 0.1",
        "--log_guidance 1", "--on_nonfinite skip", "--softplus_beta 3", "--uncond_temperature 1",
        "--joint_temperature 1",
        "--guidance_interval 0,1", "--guidance_form score", "--classifier_type resnet18",
    )),
    ("--classifier_scale 2", "--classifier_scale | --guidance_form score | drop it"),
    ("--gamma_factor 2", "--gamma_factor | add --guidance_form score"),
    (f"{SCORE} --max_guidance 0.1", "--max_guidance | --guidance_form released | drop it"),
    (f"{SCORE} --add_factor 0.1", "--add_factor | --guidance_form released | drop it"),
    ("--subdirs", "--subdirs | npz"),
    ("--disc ve --rho 5", "--rho | --disc ve"),
    ("--num_classes 10", "--num_classes 10 | drop it"),
    (f"--network {{files}}/unconditional.pkl {OFF} --unconditional 1",
     "--unconditional True | unconditional.pkl | drop it"),
    (f"--network {{files}}/unconditional.pkl {OFF} --class 3", "--class 3 | --use_classifier True"),
]  # fmt: skip
NUMBERS = [
    ("--seeds 1,0-3", "--seeds 1,0-3 | different"),
    ("--class 3 --labels balanced", "--class 3 | --labels balanced | keep one"),
    ("--seeds=-1", "--seeds -1 | from 0 on"),
    *((f"--seeds={text}", f"--seeds {text!r} | 1,2,5-10") for text in ("3-1", "1;2", "")),
    ("--class 10", "--class 10 | 0 to 9"),
    ("--class=-1", "--class -1 | 0 to 9"),
    *((f"--{name} {value}", f"--{name.replace('batch', 'batch_size')} | {value}")
      for name, value in (("batch", 0), ("steps", 0), ("steps", -3), ("num_classes", 0))),
    ("--max_guidance=-1", "max_guidance | -1"),
    *((f"--{name} {value}", f"{name} | {value}") for name, value in (
        ("max_guidance", "inf"), ("sigma_min", "nan"), ("S_churn", "inf"), ("add_factor", "nan"),
        ("rho", 0.0), ("rho", "inf"), ("rho", 0.001), ("sigma_min", 0.0), ("sigma_max", "inf"),
        ("S_churn", -1.0),
        ("S_noise", "inf"), ("softplus_beta", 0.0),
    )),
    ("--sigma_max 1e200", "sigma_max | 1e+200"),
    ("--sigma_min 90", "90.0 | 80.0"),
    ("--S_churn 1 --S_min 5 --S_max 1", "--S_min | 5.0 | 1.0"),
    ("--disc iddpm --steps 2000", "992 levels | 2000 steps"),
    ("--disc vp --sigma_min 1", "vp | 1"),
    ("--guidance_interval 5", "--guidance_interval '5' | LO,HI"),
    ("--guidance_interval 5,1", "interval | 5.0,1.0"),
    ("--device graphics", "--device graphics"),
]  # fmt: skip


@pytest.mark.parametrize(("flags", "fragments"), rows([*NETWORKS, *CONTRADICTIONS, *NUMBERS]))
def test_edm(refused, flags, fragments):
    refused(flags, fragments, "edm_sample", EDM)


UNKNOWN = [
    ("--foo 1", "--foo"),
    ("--num_sampl 1", "--num_sampl"),
    ("--classifier x", "--classifier"),
    ("stray", "stray"),
    ("--log_guidance maybe", "--log_guidance | 'maybe' | True or False"),
    ("--seed", "--seed"),
    ("--gamma_factor x", "--gamma_factor | 'x'"),
    ("--classifier_input raw", "--classifier_input | 'raw' | paper | imagenet"),
    ("--on_nonfinite warn", "--on_nonfinite | 'warn' | stop | skip"),
]
ADM_WORDS = [
    ("--preset digit", f"unknown preset 'digit' | {' | '.join(PRESETS)}"),
    ("--num_samples many", "--num_samples | 'many'"),
    ("--seed 1.5", "--seed | '1.5'"),
    ("--variance_max x", "--variance_max | 'x' | schedule | first_pixel"),
    ("--sampler rk4", "--sampler | 'rk4' | ddpm | heun"),
]
EDM_WORDS = [
    ("--preset digits", "'digits' is a preset of scripts/classifier_sample.py"),
    ("--step 3", "--step"),
    ("--solver rk4", "--solver | 'rk4' | heun"),
    ("--disc ddim", "--disc | 'ddim' | iddpm"),
    ("--scaling ve", "--scaling | 've' | vp"),
    ("--schedule cosine", "--schedule | 'cosine' | linear"),
    ("--format jpg", "--format | 'jpg' | png"),
    ("--guidance_form paper", "--guidance_form | 'paper' | score"),
]
WORDS = [("classifier_sample", *row) for row in UNKNOWN + ADM_WORDS]
WORDS += [("edm_sample", *row) for row in UNKNOWN + EDM_WORDS]


@pytest.mark.parametrize(("script", "flags", "fragments"), WORDS, ids=lambda value: value)
def test_words_that_do_not_parse(refused, script, flags, fragments):
    refused(flags, fragments, script, ADM if script == "classifier_sample" else EDM, code=2)
