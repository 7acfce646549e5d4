"""The flags as fields: how they are written, shown, checked and recorded, and that each is used or named."""

import inspect
import re
import sys
from dataclasses import dataclass

import pytest
from helpers import (
    TINY_64,
    TINY_NOISY,
    call,
    flags_of,
    load_script,
    make_noisy_classifier,
    save_random,
    save_unet,
)

from guided_diffusion.flags import fields as fields_module
from guided_diffusion.flags.adm import ADMFlags
from guided_diffusion.flags.edm import EDMFlags
from guided_diffusion.flags.fields import (
    Flags,
    Need,
    at_least,
    configure,
    defaults_of,
    finite,
    flag,
    flag_fields,
    parse,
    written,
)
from guided_diffusion.flags.presets import EDM_PRESETS, PRESETS
from guided_diffusion.script_util import create_model_and_diffusion

SCRIPTS = {"classifier_sample": (ADMFlags, PRESETS), "edm_sample": (EDMFlags, EDM_PRESETS)}
each_script = pytest.mark.parametrize("script", SCRIPTS)
BIG = Need(lambda config: config.n > 3, lambda config: f"with --n {config.n}: make it larger")
NAMED = Need(lambda config: config.n > 3)


@dataclass(frozen=True, kw_only=True)
class Toy(Flags):
    """Toys."""

    n: int = flag(2, "how many, 100% sure", names=("n", "number"), check=at_least(1))
    on: bool = flag(False, "whether")
    off: bool = flag(True, "whether not")
    colour: str = flag("red", "which", choices=("red", "blue"), compared=False)
    rate: float = flag(0.5, "how fast", check=finite, needs=BIG)
    depth: int | None = flag(None, "how deep", kind=int, check=at_least(0), needs=NAMED)
    preset: str = flag("", "by name")


TOY_PRESETS = {"large": {"n": 7, "rate": 2.0}, "small": {"n": 1, "depth": 5}}


def toy(*argv):
    return parse(Toy, "Toys.", TOY_PRESETS, list(argv))


# How flags are written


@pytest.mark.parametrize("word", ["True", "1", "yes", "y", "t", "TRUE", None])
def test_booleans(word):
    given = [] if word is None else [word]
    assert toy("--on", *given).on is True
    assert toy("--on", *given, "--number", "3") == toy("--n", "3", "--on", "True")
    assert toy("--off", "False").off is False


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--on", "maybe"], "--on: boolean value expected, got 'maybe'"),
        (["--n", "1.5"], "--n/--number: invalid int value: '1.5'"),
        (["--colour", "green"], "--colour: invalid choice: 'green'"),
        (["--numb", "3"], "unrecognized arguments: --numb"),
        (["--preset", "huge"], "unknown preset 'huge'; choose large, small"),
        (["stray"], "unrecognized arguments: stray"),
    ],
)
def test_what_cannot_be_read_ends_in_one_line(argv, message, capsys):
    with pytest.raises(SystemExit) as caught:
        toy(*argv)
    error = capsys.readouterr().err
    assert caught.value.code == 2 and error.count("\n") == 1 and message in error


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--n", "0"], "--n must be at least 1, got 0"),
        (["--n", "4", "--rate", "inf"], "--rate must be finite, got inf"),
        (["--n", "4", "--rate", "nan"], "--rate must be a number, got nan"),
        (["--n", "4", "--depth", "-1"], "--depth must be at least 0, got -1"),
        (["--rate", "1"], "--rate given with --n 2: make it larger"),
        (["--rate", "0.5"], "--rate given with --n 2: make it larger"),  # the default, but written
    ],
)
def test_what_cannot_be_names_the_flag_and_the_value(argv, message):
    with pytest.raises(ValueError) as caught:
        toy(*argv)
    assert str(caught.value) == message


# Presets, needs, records


def test_flags_stand_over_presets_and_presets_over_defaults():
    assert toy("--preset", "large").n == 7
    assert toy("--preset", "large", "--n", "5").rate == 2.0
    assert toy("--preset", "large", "--n", "5").given == {"preset", "n"}
    # What a preset says and means nothing here is neither refused nor named.
    assert toy("--preset", "small").without_effect() == []
    fixed = configure(Toy, TOY_PRESETS, {"rate": 9.0, "on": True}, {"n": 2})
    assert (fixed.n, fixed.on, fixed.rate) == (2, True, 0.5)


def test_a_flag_that_means_nothing_is_named_and_does_not_decide():
    config = toy("--depth", "3", "--on")
    assert config.without_effect() == ["depth"]
    assert config.idle() == {"rate", "depth"}
    assert config.not_compared() == {"colour", "rate", "depth"}
    assert toy("--n", "4", "--depth", "3").not_compared() == {"colour"}
    record = {"n": 2, "on": True, "off": True, "colour": "red", "rate": 0.5, "depth": 3, "preset": ""}
    assert config.record() == record


@each_script
def test_presets_hold_fields_with_values_that_pass_the_checks(script):
    flags, presets = SCRIPTS[script]
    for name, values in presets.items():
        assert set(values) <= set(defaults_of(flags))
        config = parse(flags, None, presets, ["--preset", name])
        assert {key: getattr(config, key) for key in values} == values
        assert config.given == {"preset"}


@each_script
def test_help_shows_every_flag_with_its_default(script):
    flags, _ = SCRIPTS[script]
    shown = " ".join(call(load_script(script).main, ["--help"]).out.split())
    for each in flag_fields(flags):
        names, default, text = each.metadata["names"] or (each.name,), each.default, each.metadata["help"]
        assert all(re.search(rf"--{name}\b", shown) for name in names)
        assert text and text[0] != " " and not text.endswith(".")
        assert text in shown
        if default not in (None, False, ""):
            assert f"{text} (default: {default})" in shown


@each_script
def test_every_number_refuses_nan_and_records_hold_every_field(script):
    flags, presets = SCRIPTS[script]
    preset = next(
        name
        for name, values in presets.items()
        if values.get("use_classifier", values.get("classifier_type"))
    )
    numbers = [
        each
        for each in flag_fields(flags)
        if isinstance(each.default, float) or each.metadata["kind"] is float
    ]
    assert len(numbers) > 5
    for each in numbers:
        with pytest.raises(ValueError, match=rf"--{written(each)} must be a number, got nan"):
            parse(flags, None, presets, ["--preset", preset, f"--{written(each)}", "nan"])
    config = parse(flags, None, presets, ["--preset", preset])
    names = {written(each): each.name for each in flag_fields(flags)}
    assert config.record() == {name: getattr(config, field) for name, field in names.items()}
    compared = {written(each) for each in flag_fields(flags) if each.metadata["compared"]}
    idle = {name for name, field in names.items() if field in config.idle()}
    assert config.not_compared() == set(names) - compared | idle


# Every flag that is accepted is used, or is idle, and then refused or named

EDM = {"preset": "digits-edm", "seeds": "0-1", "steps": 2}
DIGITS = {"preset": "digits", "num_samples": 2, "steps": 2}
NOISY = {"num_samples": 1, "steps": 2, "sampler": "ddim"}
RUNS = {
    "unguided": ("classifier_sample", {**DIGITS, "classifier_type": ""}),
    "ancestral": ("classifier_sample", {**DIGITS, "guidance_interval": "0.1,5"}),
    "solver": ("classifier_sample", {**DIGITS, "sampler": "euler", "unconditional": True}),
    "noisy classifier": ("classifier_sample", NOISY),
    "edm, unguided": ("edm_sample", {**EDM, "use_classifier": False, "format": "png"}),
    "edm, released": ("edm_sample", {**EDM, "S_churn": 1.0}),
    "edm, score": ("edm_sample", {**EDM, "guidance_form": "score", "disc": "vp"}),
}
# Where fields are looked at without being used: where all are, and where one decides what another means.
LOOKS = ("_built", "<lambda>", "text", "check", "_check_sampler", "_check_labels")
# Used otherwise than as an attribute: taken into another field as the configuration is made, or handed to the
# builder of the network by the record.
RESOLVED = {"steps": (3, "timestep_respacing", "3"), "use_ddim": (True, "sampler", "ddim")}
BUILDERS = {*inspect.signature(create_model_and_diffusion).parameters, "null_class"}
REFUSED = {"num_classes": "--num_classes 7 is for networks without labels, and this has 10: drop it"}


def watched(flags, read):
    """The class, which adds to `read` what code outside of flags/fields.py reads of it by name."""

    class Watched(flags):
        def __getattribute__(self, name):
            frame = sys._getframe(1)
            while frame.f_code.co_name in ("<dictcomp>", "<listcomp>", "<genexpr>"):
                frame = frame.f_back
            if frame.f_code.co_filename != fields_module.__file__ and frame.f_code.co_name not in LOOKS:
                read.add(name)
            return super().__getattribute__(name)

    return Watched


@pytest.fixture(scope="module")
def noisy_files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("noisy")
    save_unet(folder / "unet.pt", TINY_64)
    save_random(folder / "classifier.pt", make_noisy_classifier())
    return {
        **TINY_64,
        **TINY_NOISY,
        "model_path": folder / "unet.pt",
        "classifier_path": folder / "classifier.pt",
    }


@pytest.mark.parametrize("name", RUNS)
def test_every_field_is_used_or_idle(name, noisy_files, tmp_path):
    script, settings = RUNS[name]
    settings = {**(noisy_files if settings is NOISY else {}), **settings, "device": "cpu", "out": tmp_path}
    flags, presets = SCRIPTS[script]
    read, argv = set(), flags_of(settings)
    result = call(lambda: load_script(script).main(watched(flags, read)), argv)
    assert result.code == 0, result.err
    parse(watched(flags, read), None, presets, argv[:-2]).folder  # noqa: B018, where no --out is given
    config = parse(flags, None, presets, argv)
    used = read | config.idle() | {each.name for each in flag_fields(flags) if each.metadata["builds"]}
    used |= {"config"}  # taken as the configuration is made
    used |= BUILDERS | set(RESOLVED) if flags is ADMFlags else set(REFUSED)
    assert set(defaults_of(flags)) - used == set()


def test_two_names_of_one_thing():
    for name, (value, field, resolved) in RESOLVED.items():
        given = {"preset": "digits", name: value}
        assert getattr(configure(ADMFlags, PRESETS, given), field) == resolved
    given = {"preset": "digits", "fix_class": True, "fix_class_index": 3}
    assert configure(ADMFlags, PRESETS, given).labels == "3"


def test_a_network_with_labels_refuses_a_number_of_classes(tmp_path):
    result = call(load_script("edm_sample").main, flags_of({**EDM, "num_classes": 7, "out": tmp_path}))
    assert result.code == 1
    assert REFUSED["num_classes"] in result.err


@each_script
def test_every_need_refuses_or_names(script):
    """Without a classifier, every flag that then means nothing is refused with what to add, or named."""
    flags, presets = SCRIPTS[script]
    preset = {"classifier_sample": "imagenet128-unguided", "edm_sample": "imagenet64-edm-unguided"}[script]
    plain = parse(flags, None, presets, ["--preset", preset])
    idle = [each for each in flag_fields(flags) if each.name in plain.idle()]
    assert len(idle) > 8
    for each in idle:
        values = {"preset": preset, each.name: each.default}
        if each.metadata["needs"].text:
            with pytest.raises(ValueError, match=rf"^--{written(each)} given .*: (add|drop) "):
                configure(flags, presets, values)
        else:
            assert configure(flags, presets, values).without_effect() == [written(each)]
