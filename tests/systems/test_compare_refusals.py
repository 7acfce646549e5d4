"""What the scripts that compare runs of the digits refuse, before anything is sampled."""

import pytest
from helpers import call, load_script

GUIDANCE, EDM = load_script("compare_guidance"), load_script("compare_edm")
FEW_STEPS = load_script("compare_fewstep")
TWICE, JUDGE, OWN = (
    "names a number twice",
    "is the guide itself; choose another",
    "own to give to each row: drop it",
)
IDLE = "means nothing in any row of this table: drop it"
REFUSED_BY_ALL = [
    (["--seeds", "2,1-3"], 1, f"--seeds 2,1-3 {TWICE}"),
    (["--seeds", "3-"], 1, "--seeds '3-' is not understood"),
    (["--seeds", ""], 1, "--seeds '' is not understood"),
    (["--judge", "digits_guide"], 1, f"--judge digits_guide {JUDGE}"),
    (["--classifier_type=digits_judge"], 1, f"--judge digits_judge {JUDGE}"),
    (["--classifier_type", "resnet18", "--judge", "resnet18"], 1, f"--judge resnet18 {JUDGE}"),
    (["--judge", "nobody"], 1, "unknown classifier 'nobody'"),
    (["--dry_run"], 1, f"--dry_run is this script's {OWN}"),
    (["--num_sampl", "3"], 2, "--num_sampl"),
]
REFUSED = {
    GUIDANCE: [
        (["--preset", "digit"], 2, "digit"),
        (["--unconditional", "False"], 1, f"--unconditional is this script's {OWN}"),
        (["--preset", "imagenet128-resnet50"], 1, "no network with a null class"),
        (["--seed", "3"], 1, f"--seed is this script's {OWN}"),
        (["--dropout", "0.1"], 1, f"--dropout {IDLE}"),
        (["--sampler", "ddim", "--variance_max", "first_pixel"], 1, f"--variance_max {IDLE}"),
        (["--labels", "10"], 1, "class 10 is out of range"),
    ],
    EDM: [
        (["--unconditional", "False"], 1, f"--unconditional is this script's {OWN}"),
        (["--steps", "5,10,5"], 1, f"--steps 5,10,5 {TWICE}"),
        (["--steps", "5-"], 1, "--steps '5-' is not understood"),
        (["--steps", "0"], 1, "--steps must be at least 1, got 0"),
        (["--seeds", "-1"], 1, "--seeds must be from 0 on, got -1"),
        (["--num_samples", "5"], 1, "--num_samples must be at least 6, got 5"),
        (["--use_classifier", "1"], 1, f"--use_classifier is this script's {OWN}"),
        (["--guidance_form", "score"], 1, f"--guidance_form is this script's {OWN}"),
        (["--format", "png"], 1, f"--format is this script's {OWN}"),
        (["--subdirs"], 1, f"--subdirs {IDLE}"),
        (["--S_noise", "2"], 1, f"--S_noise {IDLE}"),
        (["--class", "10"], 1, "--class 10 is out of range"),
        (["--max_guidance", "strong"], 2, "--max_guidance"),
    ],
    FEW_STEPS: [
        (["--preset", "digits"], 2, "digits"),
        (["--seed", "3"], 1, f"--seed is this script's {OWN}"),
        (["--num_samples", "5"], 1, "--num_samples must be at least 6, got 5"),
        (["--dropout", "0.1"], 1, f"--dropout {IDLE}"),
        (["--sampler", "heun"], 1, f"--sampler is this script's {OWN}"),
    ],
}
CASES = [(script, *row) for script, rows in REFUSED.items() for row in [*REFUSED_BY_ALL, *rows]]


@pytest.mark.parametrize(
    ("script", "flags", "code", "message"),
    CASES,
    ids=lambda value: getattr(value, "__name__", str(value)[:60]),
)
def test_what_cannot_be_compared_is_refused_before_anything_is_sampled(
    tmp_path, script, flags, code, message
):
    result = call(script.main, ["--num_samples", 6, "--steps", 1, "--out", tmp_path / "out", *flags])
    assert (result.code, result.out) == (code, "")
    assert message in result.err.splitlines()[-1], result.err
    assert not list(tmp_path.rglob("*.npz")) and not (tmp_path / "out/comparison.json").exists()
