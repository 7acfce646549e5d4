"""Bad input to the sampling scripts: one line with the flag, the value and the fix, and nothing lost.

A row is the flags, and fragments of the line between bars. Files: bad_files.py.
"""

import pytest
from helpers import TINY, TINY_64, TINY_NOISY, call, flags_of
from samplers import PLAIN_ADM, SCRIPTS
from table import ADM, BASES, rows

from guided_diffusion.flags.presets import EDM_PRESETS, PRESETS
from guided_diffusion.runs.lock import locked

CHECKPOINTS = [
    *(
        (f"--{flag} absent.pt", "no checkpoint at absent.pt | scripts/download.py")
        for flag in ("model_path", "classifier_path")
    ),
    *(
        (f"--model_path {{files}}/{kept}.{ending}", f"{{files}}/{kept}.{ending} | bytes | truncated")
        for ending in ("safetensors", "pt", "pth")
        for kept in ("empty", "head", "half", "last")
    ),
    ("--classifier_path {files}/half.pth", "half.pth | bytes | truncated"),
    ("--classifier_path {files}/last.safetensors", "last.safetensors | bytes | truncated"),
    ("--model_path {files}/half.old.pt", "half.old.pt"),
    ("--model_path {files}/last.old.pt", "last.old.pt"),
    ("--model_path {files}", "no checkpoint at {files}"),
    ("--model_path {files}/weights.bin", "weights.bin"),
    ("--model_path {files}/list.pt", "list.pt | state dict"),
    ("--model_path {files}/evil.pt", "evil.pt | refused"),
    ("--classifier_type resnet34", "resnet34- | give its path"),
    ("--classifier_type resnet18 --classifier_path IMAGENET1K_V7", "IMAGENET1K_V7"),
    # Flags that do not fit the file.
    (
        "--num_channels 64",
        "does not fit | time_embed.0.weight | [128, 32] in the file | [256, 64] in the network",
    ),
    (
        "--learn_sigma False",
        "does not fit | out.2.weight | [6, 32, 3, 3] in the file | [3, 32, 3, 3] in the network",
    ),
    (
        "--null_class False",
        "does not fit | label_emb.weight | [11, 128] in the file | [10, 128] in the network",
    ),
    (
        "--num_classes 12",
        "does not fit | label_emb.weight | [11, 128] in the file | [13, 128] in the network",
    ),
    ("--num_res_blocks 2", "does not fit | input_blocks"),
    ("--class_cond False --null_class False", "does not fit | label_emb.weight"),
    ("--classifier_path {digits}/judge.safetensors", "does not fit | the file lacks conv1.weight"),
    ("--classifier_type {files}/own.py:seven --softplus_beta inf", "own.py:seven | num_classes 10 | 7"),
]
LABELS = [
    ("--labels 1,10", "class 10 | out of range | 0 to 9"),
    ("--labels 8-12", "class 10 | out of range | 0 to 9"),
    ("--labels -1", "class -1 | out of range | 0 to 9"),
    ("--fix_class True --fix_class_index 10", "class 10 | out of range | 0 to 9"),
    ("--fix_class True --fix_class_index -1", "class -1 | out of range | 0 to 9"),
    ("--labels {files}/twelve.txt", "class 12 | out of range | 0 to 9"),
    ("--labels {files}/negative.npy", "class -3 | out of range | 0 to 9"),
    *(
        (f"--labels {{files}}/{name}", f"{{files}}/{name}")
        for name in ("words.txt", "empty.txt", "empty.npy", "binary.txt", "fractions.npy", "objects.npy")
    ),
    ("--labels {files}/cut.npy", "{files}/cut.npy"),
    ("--labels {files}/absent.txt", "{files}/absent.txt | no such file"),
    *((f"--labels={text}", f"labels {text.replace('~', ' ')!r} | such as 1,2,5-10") for text in
      ("", "ballanced", "1,,2", "5-2", "1-", "1;2", "1.5", "1,a", "1~2")),
]  # fmt: skip
SIZES = [
    ("--image_size 15", "15 | channel_mult | 2 times"),
    ("--image_size 30 --channel_mult 1,2,2,2", "30 | channel_mult | 3 times"),
    ("--image_size 20 --channel_mult=", "20 | --channel_mult | 64"),
    ("--image_size 0", "--image_size | 0"),
    ("--image_size -16", "--image_size | -16"),
    *((f"--classifier_type {name} --classifier_path random {beta}",
       f"{name} cannot take 16x16 | classifier_input imagenet")
      for name, beta in (("vit_b_16", "--softplus_beta inf"), ("vit_b_16", ""), ("alexnet", ""))),
    ("--classifier_type {files}/own.py:Linear --softplus_beta 3",
     "own.py:Linear | no ReLU | softplus_beta inf"),
]  # fmt: skip
NUMBERS = [
    *((f"--{name} {value}", f"--{name} | {value}")
      for name in ("num_samples", "batch_size", "num_classes") for value in (0, -3)),
    *((f"--steps {value}", f"--steps | {value}") for value in (0, -3)),
    ("--channel_mult 1,x", "channel_mult '1,x' | 1,2,2"),
    ("--attention_resolutions x", "'x' | 32,16,8"),
    ("--attention_resolutions 0", "'0' | 32,16,8"),
    *((f"--timestep_respacing {text}", f"timestep_respacing {text!r} | 250") for text in ("x", "10,", "0")),
    ("--timestep_respacing ddim", "timestep_respacing 'ddim' | ddim25"),
    ("--timestep_respacing 2000", "1000 | 2000"),
    ("--timestep_respacing ddim300", "300 | 1000"),
    ("--noise_schedule sigmoid", "'sigmoid' | linear | cosine"),
    ("--diffusion_steps 0", "diffusion_steps | 0"),
    ("--diffusion_steps -5", "diffusion_steps | -5"),
    ("--num_channels 33", "num_channels | 33 | 32"),
    ("--num_heads 5", "num_heads 5"),
    ("--num_heads 0", "num_heads 0"),
    *((f"--guidance_interval {text}", f"--guidance_interval {text!r} | LO,HI")
      for text in ("5", "a,b", "1,2,3")),
    ("--guidance_interval 5,1", "interval | 5.0,1.0 | lo < hi"),
    ("--guidance_interval=-1,1", "interval | -1.0,1.0 | 0 <= lo"),
    ("--guidance_interval nan,1", "interval | nan,1.0"),
    *((f"--softplus_beta {value}", f"softplus_beta | {value}") for value in (0, -3, "nan")),
    *((f"--{name} {value}", f"--{name} must be | {value}")
      for name in ("classifier_scale", "joint_temperature", "margin_temperature_discount", "gamma_factor",
                   "dropout")
      for value in ("inf", "nan")),
    ("--seed -1", "--seed must be from 0 to 2**63 - 1 | -1"),
    (f"--seed {2**63}", f"--seed must be from 0 to 2**63 - 1 | {2**63}"),
    ("--device graphics", "--device graphics | cpu"),
    ("--device cuda:99", "--device cuda:99"),
]  # fmt: skip
CHOICES = [
    *((f"--classifier_type {name}",
       f"unknown classifier '{name}' | digits_guide | resnet50 | vit_b_16 | FILE.py:builder")
      for name in ("resnet", "ResNet50", "digits")),
    ("--classifier_type {files}/absent.py:builder", "no file | absent.py"),
    ("--classifier_type {files}/own.py:absent", "own.py | no function 'absent' | builder(num_classes)"),
    ("--classifier_type {files}/own.py:raises", "own.py: no such thing"),
    ("--classifier_input imagenet", "digits_guide | paper"),
    ("--classifier_type clip:{files}", "--classifier_type clip: | add --prompts"),
    ("--prompts dog", "--prompts given | --classifier_type clip:FOLDER"),
    ("--classifier_type clip:{files} --prompts absent.txt", "no file absent.txt"),
    ("--classifier_type digits_guide+digits_judge --classifier_path random", "are 2 classifiers | random"),
    ("--model_path=", "--model_path is missing | --preset"),
]  # fmt: skip
OTHERS = [
    ("--seed 1", "seed 0 -> 1"),
    ("--classifier_scale 3 --num_samples 6", "classifier_scale 2.0 -> 3.0 | num_samples 4 -> 6"),
    ("--batch_size 3", "batch_size 2 -> 3"),
    ("--labels 3", "labels 'balanced' -> '3'"),
    ("--classifier_type digits_judge", "classifier_type 'digits_guide' -> 'digits_judge'"),
    ("--sampler heun", "sampler 'ddpm' -> 'heun'"),
    ("--log_guidance True", "log_guidance False -> True"),
]
TABLE = [*CHECKPOINTS, *LABELS, *SIZES, *NUMBERS, *CHOICES]


def without_respacing(flags):
    """The base without the flag that --steps stands for."""
    return ADM[:-2] if "--steps" in flags else ADM


@pytest.mark.parametrize(("flags", "fragments"), rows(TABLE))
def test_adm(refused, flags, fragments):
    refused(flags, fragments, base=without_respacing(flags))


@pytest.mark.parametrize(("flags", "fragments"), rows(OTHERS))
def test_a_folder_that_holds_another_runs_output(refused, flags, fragments):
    refused(flags, f"another run's output | choose another --out | --overwrite True | {fragments}")


@pytest.mark.parametrize(
    ("script", "missing"), list(zip(SCRIPTS, ("--model_path", "--network", "--ckpt"), strict=True))
)
def test_no_flags_at_all(script, missing):
    result = call(SCRIPTS[script].main, [])
    assert (result.code, result.out) == (1, "") and result.err.startswith(
        f"error: {missing} is missing: give "
    )


@pytest.mark.parametrize("script", BASES)
def test_a_folder_that_another_run_is_writing_into(done, refused, script):
    with locked(done[script]):
        refused("", f"another run is writing into {done[script]} | --out", script, BASES[script])


@pytest.mark.parametrize(
    "flags", ["--model_path absent.pt", "--labels 10", "--num_channels 64", "--classifier_type resnet"]
)
def test_overwrite_removes_nothing_before_the_input_is_known_to_be_good(refused, flags):
    refused(f"--overwrite True {flags}", "")


# A digits network without a classifier, for flags that contradict each other.
WITHOUT_CLASSIFIER = [
    *((f"--{name} {value}", f"--{name} | --classifier_type") for name, value in (
        ("softplus_beta", 3), ("joint_temperature", 1), ("gamma_factor", 0.3),
        ("margin_temperature_discount", 0.5), ("guidance_interval", "0,1"), ("classifier_input", "paper"),
        ("on_nonfinite", "skip"), ("log_guidance", True), ("variance_max", "first_pixel"),
        ("classifier_scale", 2),
    )),
    ("--softplus_beta 3 --joint_temperature 1", "--softplus_beta | --joint_temperature | --classifier_type"),
    ("--classifier_path x.pt --softplus_beta 3", "--softplus_beta | --classifier_type"),
    ("--unconditional True --null_class False", "--unconditional True | --null_class True"),
    ("--class_cond False", "--null_class True | --class_cond True"),
    ("--fix_class_index 3", "--fix_class_index | --fix_class True"),
    ("--fix_class True", "--fix_class True | --labels balanced | keep one"),
    ("--log_dir elsewhere", "--log_dir elsewhere | --out | keep one"),
    ("--use_ddim True --sampler heun", "--use_ddim True | --sampler heun | keep one"),
    ("--steps 5", "--steps 5 | --timestep_respacing 3 | keep one"),
    ("--classifier_path x.pt --sampler heun", "--sampler heun | ddpm or ddim | --classifier_type"),
]  # fmt: skip


@pytest.mark.parametrize(("flags", "fragments"), rows(WITHOUT_CLASSIFIER))
def test_contradictions(refused, flags, fragments):
    refused(flags, fragments, base=PLAIN_ADM)


X_T = "--looks_at noisy --classifier_type digits_guide"


@pytest.mark.parametrize(
    ("flags", "fragments"),
    [
        ("--looks_at noisy", "--looks_at | --sampler ddpm | --classifier_type"),
        (f"{X_T} --sampler heun", "--looks_at | --sampler ddpm"),
        (f"{X_T} --gamma_factor 0.3", "--gamma_factor | --looks_at noisy | drop one"),
        (f"{X_T} --guidance_strength ddim", "--guidance_strength | --looks_at noisy"),
        (f"{X_T} --momentum 0.5 --max_shift 1", "--momentum | --looks_at noisy"),
        (f"{X_T} --fixed_length 1", "--fixed_length | --looks_at noisy"),
        (f"{X_T} --variance_max first_pixel", "--variance_max | --looks_at noisy"),
    ],
)
def test_a_rule_that_is_given_no_step(refused, flags, fragments):
    refused(flags, fragments, base=PLAIN_ADM)


@pytest.mark.parametrize("sampler", ["ddim", "euler", "heun"])
def test_a_flag_of_the_ancestral_sampler_beside_another(refused, sampler):
    refused(f"--sampler {sampler} --variance_max first_pixel", "--variance_max | --sampler ddpm")


NOISY = (
    " ".join(flags_of({**TINY_64, **TINY_NOISY}))
    + " --model_path {files}/tiny64.pt --classifier_path {files}/noisy.pt"
)
TINY_GUIDED = f"--model_path {{files}}/tiny.pt {' '.join(flags_of({**TINY_NOISY, **TINY}))}"


@pytest.mark.parametrize(
    ("flags", "fragments"),
    rows(
        [
            (f"{NOISY} --classifier_width 64", "noisy.pt | time_embed.0.weight | [128, 32] | [256, 64]"),
            (f"{TINY_GUIDED} --classifier_path {{files}}/noisy.pt", "noisy.pt | does not fit"),
            (f"--model_path {{files}}/tiny.pt {' '.join(flags_of(TINY))} --classifier_type digits_guide"
             " --num_classes 9",
             "guide.safetensors | fc.weight | [10, 512] | [9, 512]"),
        ]
    ),
)  # fmt: skip
def test_classifiers_that_do_not_fit(refused, flags, fragments):
    refused(flags, fragments, base=())


@pytest.mark.parametrize(
    ("preset", "presets", "script", "flag", "name"),
    [
        ("imagenet128-resnet50", PRESETS, "classifier_sample", "model_path", "128x128_diffusion.pt"),
        ("imagenet64-edm-resnet101", EDM_PRESETS, "edm_sample", "network", "edm-imagenet-64x64-cond-adm.pkl"),
    ],
)
def test_a_missing_file_of_a_preset_names_the_command_that_fetches_it(
    refused, tmp_path, monkeypatch, preset, presets, script, flag, name
):
    monkeypatch.setitem(presets, preset, {**presets[preset], flag: str(tmp_path / name)})
    base = ("--preset", preset, "--classifier_path", "random")
    refused("", f"{tmp_path / name} | python scripts/download.py {name}", script, base)
