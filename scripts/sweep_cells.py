"""The cells of a sweep: what a line of its file stands for, and the runs that are made of it. sweep.py uses
it; it is no script of its own.
"""

import hashlib
import io
import json
import re
import shlex
from contextlib import redirect_stderr
from dataclasses import dataclass, field
from itertools import product

import _beside  # noqa: F401
from problems import problem_of, require_other_judge

import classifiers
from guided_diffusion.flags.fields import configure, defaults_of, given_flags
from guided_diffusion.runs.systems import system_of


@dataclass(frozen=True)
class Cell:
    """One cell: its line's name, the preset, further flags as words, and what it chose in each {}."""

    name: str
    preset: str
    words: tuple[str, ...]
    chosen: dict[str, str] = field(hash=False)

    @property
    def command(self):
        """Preset and flags, as ./guided_sample.sh takes them."""
        return shlex.join([self.preset, *self.words])

    def __str__(self):
        return f"{self.name}: {self.command}"


def read_cells(path):
    """The cells of a file. Raises FileNotFoundError without one, and ValueError with the line for a cell that
    is not understood.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file of cells, lines such as unguided: digits-unguided")
    cells = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        if text := line.partition("#")[0].strip():
            try:
                cells.extend(expanded(text))
            except ValueError as error:
                raise ValueError(f"{path}:{number}: {text!r} is not understood ({error})") from error
    if not cells:
        raise ValueError(f"{path} has no cells: write lines such as unguided: digits --classifier_scale 0")
    return cells


def expanded(line):
    """The cells of one line."""
    name, colon, text = line.partition(":")
    words = shlex.split(text)
    if not colon or not words:
        raise ValueError("write NAME: PRESET [FLAGS...]")
    choices = [re.fullmatch(r"\{(.*)\}", word) for word in words]
    if odd := [
        word for word, match in zip(words, choices, strict=True) if not match and re.search("[{}]", word)
    ]:
        raise ValueError(f"braces stand for a whole word, not for a part of {odd[0]}")
    options = [match[1].split(",") if match else [word] for match, word in zip(choices, words, strict=True)]
    names = [words[i - 1].lstrip("-") if i else "preset" for i, match in enumerate(choices) if match]
    for picked in product(*options):
        chosen = [word for match, word in zip(choices, picked, strict=True) if match]
        yield Cell(name.strip(), picked[0], picked[1:], dict(zip(names, chosen, strict=True)))


def named_cell(cells, name):
    """The first cell of that name, or of all where there is no name. Raises ValueError for an unknown one."""
    for cell in cells:
        if name in (None, cell.name):
            return cell
    names = ", ".join(dict.fromkeys(cell.name for cell in cells))
    raise ValueError(f"--against {name!r} is no cell; choose {names}")


@dataclass(frozen=True)
class Planned:
    """A cell and a seed: the run, and the id of its row, which says all that decides about its images and how
    they are judged.
    """

    cell: Cell
    seed: int
    job: object
    id: str

    def about(self):
        """What a row says beside its numbers."""
        cell = self.cell
        return {"name": cell.name, "chosen": cell.chosen, "seed": self.seed, "command": cell.command}


def plan(cell, seed, args, out):
    """Check a cell and make its job. Raises ValueError that names it for flags that cannot be."""
    try:
        return planned_run(cell, seed, args, out)
    except ValueError as error:
        raise ValueError(f"{cell}: {error}") from error


def planned_run(cell, seed, args, out):
    problem = problem_of(cell.preset)
    system, count, judge = system_of(cell.preset), args.num_samples, args.judge or problem.judge
    given = flags_of(system, cell)
    names = defaults_of(system.config)
    own = {"seeds": f"{seed * count}-{(seed + 1) * count - 1}"} if "seeds" in names else {"seed": seed}
    own |= {"num_samples": count} if "num_samples" in names else {}
    own |= {"format": "npz"} if "format" in names else {}
    if taken := sorted({*own, "out", "dry_run"} & given.keys()):
        raise ValueError(f"--{taken[0]} is this script's own to give to each cell: drop it")
    require_other_judge(judge, given, system.presets[cell.preset])
    job = system.make_job(configure(system.config, system.presets, {**given, **own}), classifiers)
    # Without what is at its default, a flag that a later version adds leaves the id as it is.
    decisive = {
        key: value for key, value in job.settings().items() if str(value) != str(job.defaults.get(key))
    }
    decisive |= {} if judge == problem.judge else {"judge": judge}
    digest = hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()[:16]
    config = configure(system.config, system.presets, {**given, **own, "out": str(out / "runs" / digest)})
    return Planned(cell, seed, system.make_job(config, classifiers), digest)


def flags_of(system, cell):
    """The flags that a cell gives. Raises ValueError for what is none."""
    said = io.StringIO()
    try:
        with redirect_stderr(said):
            given = given_flags(system.config, None, system.presets, [*cell.words, "--preset", cell.preset])
    except SystemExit:
        raise ValueError(said.getvalue().strip().partition("error: ")[2]) from None
    if "--preset" in cell.words:
        raise ValueError("the preset stands first, without --preset")
    return given


def problem_of_all(cells):
    """The problem that all cells sample. Raises ValueError where there are several."""
    problems = {problem_of(cell.preset).name: cell for cell in cells}
    if len(problems) > 1:
        raise ValueError(
            f"one table compares images of one problem, and these cells are of {' and '.join(problems)}"
        )
    return problem_of(cells[0].preset)


def refuse_twins(planned):
    """Raise ValueError where two cells are one run."""
    first = {}
    for each in planned:
        if (other := first.setdefault(each.id, each)) is not each:
            raise ValueError(f"two cells are the same run, '{other.cell}' and '{each.cell}': drop one")
