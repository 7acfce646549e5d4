"""Calibration of the settings that a problem's cells rank, by scripts/calibrate.py, a file for each seed. It
is no script of its own.

A cell named "ranking / LABEL" guides by a classifier of some beta and tau1 that is shown x_t or the predicted
x0. Cells whose networks are the same are measured by one run of calibrate.py for each seed.
"""

import hashlib
import json
import math
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import _beside  # noqa: F401
import calibrate
from calibration_subjects import USED, configured
from sweep_cells import Cell, flags_of
from sweep_statistics import panel_of

import classifiers
from guided_diffusion.files.atomic import write_json
from guided_diffusion.files.pretrained import sha256
from guided_diffusion.flags.fields import configure
from guided_diffusion.runs.systems import system_of

RANKING, SMOOTHED = "ranking", "ablation / Softplus"
# What a cell says of its run, and not of its networks.
RUN = {"preset", "batch_size", "device", "sigma_min", "sigma_max"}


@dataclass(frozen=True)
class Setting:
    """What decides about a cell's calibration: words for calibrate.py, and a cell of its table."""

    words: tuple[str, ...]
    shown: str
    beta: float
    tau: float


def ranked(cells: Sequence[Cell]) -> dict[str, list[Cell]]:
    """By its label, the cells that are ranked against each other."""
    groups: dict[str, list[Cell]] = {}
    for cell in cells:
        panel, label = panel_of(cell.name)
        if panel == RANKING:
            groups.setdefault(label, []).append(cell)
    return groups


def setting_of(cell: Cell) -> Setting:
    """Where the calibration of a cell is found."""
    system = system_of(cell.preset)
    given = flags_of(system, cell)
    config = configure(system.config, system.presets, given)
    words = ["--preset", cell.preset]
    for name in sorted(given.keys() & USED - RUN):
        words += [f"--{name}", str(given[name])]
    # The released rule of EDM looks at the noisy sample too.
    shown = "x_t" if config.shown_noisy or config.unit_gradient else "x0"
    return Setting(tuple(words), shown, config.softplus_beta, config.joint_temperature)


def calls(cells: Sequence[Cell]) -> dict[tuple[str, ...], list[str]]:
    """{words of the networks: flags of the settings} of the runs of calibrate.py that these cells take."""
    settings: dict[tuple[str, ...], list[Setting]] = {}
    for cell in cells:
        setting = setting_of(cell)
        settings.setdefault(setting.words, []).append(setting)
    return {
        words: [
            *("--softplus_betas", ",".join(f"{beta:g}" for beta in sorted({each.beta for each in same}))),
            *("--joint_temperatures", ",".join(f"{tau:g}" for tau in sorted({each.tau for each in same}))),
        ]
        for words, same in settings.items()
    }


def measured(cells: Sequence[Cell], seeds: Sequence[int], more: Sequence[str], out: Path) -> Iterator[Path]:
    """The files of all runs; draws those that are not there, and a picture with those of the first seed.

    more: further flags of calibrate.py, the same for all.
    """
    out.mkdir(parents=True, exist_ok=True)
    for words, flags in calls(cells).items():
        for seed in seeds:
            argv = [*words, *flags, *more, "--seed", str(seed)]
            path = out / f"{_digest(words, argv)}.json"
            if not path.exists():
                print(f"calibration: {' '.join(argv)}", file=sys.stderr)
                plot = ["--plot", str(path.with_suffix(".png"))] if seed == seeds[0] else []
                _run([*argv, *plot], words, seed, path)
            yield path


def _digest(words, argv):
    """A name that says all that decides, the files of the networks too."""
    system = system_of(words[1])
    job = system.make_job(configured(system, list(words)), classifiers)
    data = Path(argv[argv.index("--data_dir") + 1])
    argv = [word for word in argv if word != str(data)]
    decisive = [argv, sha256(data) if data.is_file() else str(data), job.settings()["sha256"]]
    return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()[:16]


def _run(argv, words, seed, path):
    begun, raw = time.monotonic(), path.with_suffix(".raw.json")
    with redirect_stdout(sys.stderr):
        calibrate.main([*argv, "--json", str(raw)])
    seconds = time.monotonic() - begun
    write_json(path, {"words": words, "seed": seed, "seconds": seconds, **json.loads(raw.read_text())})
    raw.unlink()


def table_of(paths: Sequence[Path]) -> dict[tuple, dict[str, dict[int, float]]]:
    """{(words, shown, beta, tau1): {number: {seed: value}}} of finished runs."""
    table: dict[tuple, dict[str, dict[int, float]]] = {}
    for path in paths:
        run = json.loads(path.read_text())
        for each in run["cells"]:
            beta, tau = float(each["softplus_beta"]), each["joint_temperature"]
            numbers = table.setdefault((tuple(run["words"]), each["shown"], beta, tau), {})
            for name, value in each["means"].items():
                numbers.setdefault(name, {})[run["seed"]] = value
    return table


def calibration_of(
    cell: Cell, table: Mapping[tuple, Mapping[str, Mapping[int, float]]]
) -> Mapping[str, Mapping[int, float]]:
    """The numbers by seed of the setting that a cell guides with."""
    each = setting_of(cell)
    return table.get((each.words, each.shown, each.beta, each.tau), {})


def compared(cells: Sequence[Cell], table: Mapping[tuple, Any]) -> dict[str, Any]:
    """The numbers of the three classifiers that the paper compares, at tau1 1 and with the networks of the
    first ranked cell: shown x_t, shown the predicted x0, and this smoothed by the beta of the ablation.
    """
    first = next(cell for same in ranked(cells).values() for cell in same)
    words, plain = setting_of(first).words, math.inf
    names = {"x_t": ("x_t", plain), "predicted x0": ("x0", plain)}
    for cell in cells:
        if cell.name == SMOOTHED:
            names["Softplus"] = ("x0", setting_of(cell).beta)
    found = {name: table.get((words, *setting, 1.0)) for name, setting in names.items()}
    return {f"calibration / {name}": numbers for name, numbers in found.items() if numbers}


def seconds_of(path: Path) -> float:
    """What a run took."""
    return json.loads(path.read_text())["seconds"]
