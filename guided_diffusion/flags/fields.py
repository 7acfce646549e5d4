"""A flag is a field of a dataclass: its name, default, help, check and what it builds stand in one place.

    @dataclass(frozen=True, kw_only=True)
    class MyFlags(Flags):
        strength: float = flag(1.0, "how far to go", check=finite)

    config = parse(MyFlags, description, presets={})

A script's configuration inherits from the groups that it has; the first line of a group's docstring is its
title in --help. A field may say when it means something (`needs`), so that a flag without effect is refused
or named, from the field alone.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar

from guided_diffusion.files.run_folder import read_run
from guided_diffusion.flags.parser import NOT_GIVEN, Parser, parse_bool, parse_floats
from guided_diffusion.flags.presets import script_of

Check = Callable[[Any], str | None]
# In a run.json: what is no flag, at least not of every script, and what says where and how a run goes.
_NO_FLAGS = {"sha256", "versions", "shard_size", "num_samples"}
_PLACES = {"preset", "config", "out", "log_dir", "overwrite", "device", "dry_run"}


@dataclass(frozen=True)
class Need:
    """When a flag means something.

    met: config -> bool. text: config -> what is missing where it is not, and what to do, after "--FLAG given
    "; None where such a flag does not end the run, but is named at the start as without effect.
    """

    met: Callable[[Any], bool]
    text: Callable[[Any], str] | None = None


def flag(
    default: Any,
    help: str,
    *,
    kind: Callable[[str], Any] | None = None,
    names: Sequence[str] = (),
    choices: Sequence[Any] = (),
    check: Check | None = None,
    needs: Need | None = None,
    compared: bool = True,
    **builds: Callable[..., Any],
) -> Any:
    """A dataclass field that is a flag.

    kind: how its text is read; by default as the default's type. names: how it is written where that is not
    the field's name, the first one for the record. check: value -> what is wrong with it, or None. compared:
    whether it decides about the samples, so that a run with another value may not resume in the same folder.
    builds: see `guided_diffusion.flags.rules`.
    """
    metadata: dict[str, Any] = {"help": help, "kind": kind, "names": tuple(names), "choices": tuple(choices)}
    metadata |= {"check": check, "needs": needs, "compared": compared, "builds": builds}
    return field(default=default, metadata=metadata)


# Checks


def finite(value: float) -> str | None:
    """Neither infinite nor NaN."""
    return None if math.isfinite(value) else "must be finite"


def above(low: float) -> Check:
    """Finite, and not at a number or below it."""
    return lambda value: None if low < value < math.inf else f"must be above {low} and finite"


def at_least(low: float) -> Check:
    """Not below a number."""
    return lambda value: None if value >= low else f"must be at least {low}"


def finite_from(low: float) -> Check:
    """Not below a number, nor infinite."""
    return lambda value: finite(value) or at_least(low)(value)


def between(low: float, high: float) -> Check:
    """From one number to another."""
    return lambda value: None if low <= value <= high else f"must be from {low} to {high}"


def some_numbers(*counts: int) -> Check:
    """Empty, or so many finite numbers with commas between them."""

    def check(text: str) -> str | None:
        try:
            values = parse_floats(text)
        except ValueError:
            values = [math.nan]
        if not text or (len(values) in counts and all(map(math.isfinite, values))):
            return None
        return f"takes {' or '.join(map(str, counts))} numbers, commas between them"

    return check


@dataclass(frozen=True, kw_only=True)
class Flags:
    """What every configuration is: flags, and which of them the user wrote."""

    given: frozenset[str] = frozenset()  # names of fields; not a flag itself
    trains: ClassVar[bool] = False  # whether the script trains a network

    @classmethod
    def of(cls, values: Mapping[str, Any], given: frozenset[str]) -> Any:
        """A checked configuration of these values over the defaults; the place to resolve two names of one
        thing.
        """
        config = cls(**values, given=given)
        config.check()
        return config

    def check(self) -> None:
        """Raise ValueError for values that cannot be, and for flags that mean nothing beside the others."""
        for each in flag_fields(self):
            value, checked = getattr(self, each.name), each.metadata["check"]
            if isinstance(value, float) and math.isnan(value):
                raise ValueError(f"--{written(each)} must be a number, got {value}")
            if checked and value is not None and (fault := checked(value)):
                raise ValueError(f"--{written(each)} {fault}, got {value}")
        without_effect = [each for each in self._idle_fields() if each.name in self.given]
        for need in dict.fromkeys(each.metadata["needs"] for each in without_effect):
            if need and need.text:
                names = [f"--{written(each)}" for each in without_effect if each.metadata["needs"] is need]
                raise ValueError(f"{', '.join(names)} given {need.text(self)}")

    def idle(self) -> set[str]:
        """The fields that mean nothing beside the others, written by the user or not."""
        return {each.name for each in self._idle_fields()}

    def without_effect(self) -> list[str]:
        """The flags that the user wrote and that mean nothing in this run."""
        return [written(each) for each in self._idle_fields() if each.name in self.given]

    def record(self) -> dict[str, Any]:
        """Every flag by the name that it is written with."""
        return {written(each): getattr(self, each.name) for each in flag_fields(self)}

    @classmethod
    def defaults(cls) -> dict[str, Any]:
        """The default of every flag, by the same name."""
        return {written(each): each.default for each in flag_fields(cls)}

    def not_compared(self) -> set[str]:
        """The flags that do not decide about the samples, those without effect among them."""
        places = {written(each) for each in flag_fields(self) if not each.metadata["compared"]}
        return places | {written(each) for each in self._idle_fields()}

    def _idle_fields(self):
        needing = [each for each in flag_fields(self) if each.metadata["needs"]]
        return [each for each in needing if not each.metadata["needs"].met(self)]


def flag_fields(config: Any) -> list[Any]:
    """The fields of a configuration, class or instance, that are flags."""
    return [each for each in fields(config) if "help" in each.metadata]


def written(each: Any) -> str:
    """The name of a field in records and messages."""
    return (each.metadata["names"] or (each.name,))[0]


def defaults_of(group: type) -> dict[str, Any]:
    """{field: default} of a configuration class."""
    return {each.name: each.default for each in flag_fields(group)}


def parse(
    config_class: type[Any],
    description: str | None,
    presets: Mapping[str, Mapping[str, Any]],
    argv: Sequence[str] | None = None,
) -> Any:
    """A checked `config_class` of the flags in `argv`, over those of the run that --config names, over those
    of the preset that --preset names, over the defaults.

    Unknown flags and presets end the program as argparse does; ValueError for what `Flags.check` refuses.
    """
    given = given_flags(config_class, description, presets, argv)
    return configure(config_class, presets, given)


def given_flags(
    config_class: type[Any],
    description: str | None,
    presets: Mapping[str, Mapping[str, Any]],
    argv: Sequence[str] | None = None,
) -> dict[str, Any]:
    """{field: value} of the flags in `argv`, not checked against each other."""
    parser = Parser(description=description, usage="%(prog)s [--FLAG VALUE ...]")
    add_flags(parser, config_class)
    given = {key: value for key, value in vars(parser.parse_args(argv)).items() if value is not NOT_GIVEN}
    if (preset := given.get("preset", "")) not in ("", *presets):
        with suppress(ValueError):
            parser.error(f"{preset!r} is a preset of scripts/{script_of(preset)}")
        parser.error(f"unknown preset {preset!r}; choose {', '.join(presets)}")
    return given


def configure(
    config_class: type[Any],
    presets: Mapping[str, Mapping[str, Any]],
    given: Mapping[str, Any],
    fixed: Mapping[str, Any] | None = None,
) -> Any:
    """A checked configuration of given flags over their preset. With `fixed`, that of one cell of a
    comparison: the fixed values win, and given flags that mean nothing beside them are left out.
    """
    fixed = fixed or {}
    preset = presets.get({**given, **fixed}.get("preset", ""), {})
    if path := given.get("config"):
        preset = {**preset, **recorded_flags(config_class, path)}
    if fixed:
        idle = config_class(**{**preset, **given, **fixed}).idle()
        given = {name: value for name, value in given.items() if name not in idle}
    given = {**given, **fixed}
    return config_class.of({**preset, **given}, frozenset(given))


def recorded_flags(config_class: type, path: str) -> dict[str, Any]:
    """{field: value} of the flags in a run.json, without those that say where and how a run goes. Raises
    ValueError, with the file, for what is no run of this script, and FileNotFoundError.
    """
    if not Path(path).exists():
        raise FileNotFoundError(f"--config {path}: no such file; give the run.json of a run")
    try:
        run = read_run(path)
    except ValueError as error:
        raise ValueError(f"--config {path} was not written by a run: give its run.json") from error
    recorded = {**run.get("not_compared", {}), **run["settings"]}
    known = {written(each): each for each in flag_fields(config_class)}
    if foreign := sorted(recorded.keys() - known.keys() - _NO_FLAGS):
        raise ValueError(f"--config {path} is of another script, or version: there is no --{foreign[0]} here")
    return {
        known[name].name: _from_json(known[name], value)
        for name, value in recorded.items()
        if name in known.keys() - _PLACES
    }


def _from_json(each, value):
    """A flag's value; JSON has no infinity, which is written as a word."""
    kind = each.metadata["kind"] or type(each.default)
    return float(value) if isinstance(value, str) and kind is float else value


def add_flags(parser: Parser, config_class: type) -> None:
    """Add the flags of a configuration, one group of --help for each class that defines some."""
    for group in reversed(config_class.__mro__):
        own = [each for each in flag_fields(config_class) if _defined_in(config_class, each.name) is group]
        if own:
            section = parser.add_argument_group((group.__doc__ or group.__name__).splitlines()[0].rstrip("."))
            for each in own:
                _add(section, each)


def _add(section, each):
    default, about = each.default, each.metadata
    kind = about["kind"] or (parse_bool if isinstance(default, bool) else type(default))
    shown = "" if default is None else f" (default: {'none' if default == '' else default})"
    section.add_argument(
        *(f"--{name}" for name in about["names"] or (each.name,)),
        dest=each.name,
        default=NOT_GIVEN,
        type=kind,
        choices=about["choices"] or None,
        metavar="True|False" if kind is parse_bool else None,
        help=about["help"].replace("%", "%%") + shown,
    )


def _defined_in(config_class, name):
    """The class whose help names a field: the first that declared it, whatever the default became later."""
    return next(c for c in reversed(config_class.__mro__) if name in vars(c).get("__annotations__", {}))
