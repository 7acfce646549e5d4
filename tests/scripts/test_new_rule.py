"""A new rule of guidance is one function and one field: it then acts under every sampler, from the command
line on.
"""

from dataclasses import dataclass
from functools import cache

import pytest
from helpers import call, flags_of, load_script, samples_bytes

from guided_diffusion.flags.adm import ADMFlags
from guided_diffusion.flags.edm import EDMFlags
from guided_diffusion.flags.fields import at_least, flag

RUNS = {
    **{name: ("classifier_sample", {"preset": "digits", "num_samples": 4, "sampler": name})
       for name in ("ddpm", "ddim", "euler", "heun")},
    **{form: ("edm_sample", {"preset": "digits-edm", "seeds": "0-3", "guidance_form": form})
       for form in ("released", "score")},
}  # fmt: skip


# The rules: each is one function.


def until(guidance, progress):
    return lambda x, y, step: guidance(x, y, step) * (step.progress < progress)


def against_class_0(direction, weight):
    return lambda logits, y: direction(logits, y) - weight * logits[:, 0]


def fading(strength, power):
    return lambda step: strength(step) * (1 - step.progress) ** power


FIELDS = {
    "guide_until": (1.0, 0.3, "guidance", until),
    "away_from_0": (0.0, 3.0, "direction", against_class_0),
    "fade": (0.0, 2.0, "strength", fading),
}


def with_field(flags, name):
    """The configuration class with one field more."""
    default, _, part, rule = FIELDS[name]
    made = flag(default, "what is new", names=(name,), check=at_least(0), **{part: rule})

    @dataclass(frozen=True, kw_only=True)
    class NewFlags(flags):
        """A new rule."""

        new: type(default) = made

    return NewFlags


@cache
def plain_samples(run, folder):
    return samples(run, folder / run)


def samples(run, out, field=None, **more):
    script, settings = RUNS[run]
    classes = {"classifier_sample": ADMFlags, "edm_sample": EDMFlags}
    flags = with_field(classes[script], field) if field else classes[script]
    settings = {**settings, "steps": 4, "batch_size": 4, "device": "cpu", "out": out, **more}
    result = call(lambda: load_script(script).main(flags), flags_of(settings))
    assert result.code == 0, result.err
    return samples_bytes(out)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("plain")


@pytest.mark.parametrize("field", FIELDS)
@pytest.mark.parametrize("run", RUNS)
def test_it_acts_and_at_its_default_nothing_changes(run, field, folder, tmp_path):
    value = FIELDS[field][1]
    assert samples(run, tmp_path / "default", field) == plain_samples(run, folder)
    assert samples(run, tmp_path / "value", field, **{field: value}) != plain_samples(run, folder)


def test_it_is_in_the_help_checked_and_in_the_record(tmp_path):
    main, flags = load_script("classifier_sample").main, with_field(ADMFlags, "fade")
    shown = call(lambda: main(flags), ["--help"]).out
    assert "A new rule" in shown and "--fade" in shown and "what is new (default: 0.0)" in shown
    refused = call(lambda: main(flags), ["--preset", "digits", "--fade", "-1", "--out", tmp_path / "refused"])
    assert (refused.code, refused.err.strip()) == (1, "error: --fade must be at least 0, got -1.0")
    config = flags.of({"model_path": "x", "new": 2.0}, frozenset({"new"}))
    assert config.record()["fade"] == 2.0
