"""Sample every cell of a sweep for several seeds, measure the images, and write a table.

    python scripts/sweep.py docs/few-steps/solvers.txt --seeds 0-2 --num_samples 1000 --out results/solvers

A line of the file is NAME: PRESET [FLAGS...], preset and flags as ./guided_sample.sh takes them. {a,b} makes
one cell with a and one with b, in every combination, and a column of the table; # begins a comment.

Writes rows.json, a row for each cell and seed, and their means and standard deviations: table.md, table.csv
and table.json. What rows.json holds is not drawn again: a sweep that was stopped resumes, and a cell that is
added is drawn alone. Judge, features and reference are those of the digits, as in the other comparisons.
"""

import csv
import hashlib
import io
import json
import re
import shlex
import sys
from contextlib import redirect_stderr
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path

import _beside  # noqa: F401
from comparison import (
    FEATURES,
    SMALLEST,
    DigitsQuality,
    cost,
    distinct_numbers,
    judge,
    require_one_process,
    require_other_judge,
    spread,
    with_error,
)

import classifiers
from classifiers import load_classifier
from evaluation.metrics import metric_key, metric_label
from guided_diffusion import dist_util
from guided_diffusion.files.atomic import renamed_when_complete, write_json
from guided_diffusion.files.console import print_result
from guided_diffusion.flags.fields import configure, defaults_of, given_flags
from guided_diffusion.flags.parser import Parser, run_main
from guided_diffusion.runs import machine
from guided_diffusion.runs.job import run
from guided_diffusion.runs.lock import locked
from guided_diffusion.runs.systems import system_of

JUDGE = "digits_judge"
DISTANCE = metric_key("fid", FEATURES)
# Of a row: its key, the column's title, and how the number is written.
NUMBERS = {
    "evaluations": ("evaluations", ".0f"),
    "classifier_passes": ("classifier passes", ".0f"),
    "seconds_per_image": ("s per image", ".4f"),
    DISTANCE: (metric_label("fid", FEATURES), ".2f"),
    "precision": ("precision", ".3f"),
    "recall": ("recall", ".3f"),
    "density": ("density", ".3f"),
    "coverage": ("coverage", ".3f"),
    "hit": ("wanted class", ".1%"),
}


def main():
    args = create_argparser().parse_args()
    require_one_process()
    if args.num_samples < SMALLEST:
        raise ValueError(f"--num_samples must be at least {SMALLEST}, got {args.num_samples}")
    out, seeds = args.out or Path("results", args.cells.stem), distinct_numbers(args.seeds, "--seeds")
    cells = read_cells(args.cells)
    planned = [plan(cell, seed, args, out) for seed in seeds for cell in cells]
    refuse_twins(planned)
    out.mkdir(parents=True, exist_ok=True)
    with locked(out):
        rows = measured(planned, args.judge, out / "rows.json")
        summaries = summed([{**rows[each.id], **each.about()} for each in planned])
        write_json(out / "table.json", summaries)
        lines = table(summaries)
        for name, text in (
            ("table.md", "\n".join(markdown(lines)) + "\n"),
            ("table.csv", comma_separated(lines)),
        ):
            with renamed_when_complete(out / name) as file:
                file.write(text.encode())
    print_result("\n".join(markdown(lines)))


def measured(planned, judge_name, path):
    """{id: numbers} of all planned runs and of what `path` has besides; draws and measures what it lacks."""
    rows = {row["id"]: row for row in read_rows(path)}
    missing = [each for each in planned if each.id not in rows]
    classifier, quality = load_classifier(judge_name, num_classes=10), DigitsQuality()
    for number, each in enumerate(missing, 1):
        print(f"{number}/{len(missing)}: {each.cell}, seed {each.seed}", file=sys.stderr)
        run(each.job)
        folder = each.job.folder
        numbers = cost(folder) | judge(folder, classifier) | quality(folder)
        rows[each.id] = {
            "id": each.id,
            **each.about(),
            **numbers,
            "machine": machine.describe(dist_util.dev()),
        }
        write_json(path, list(rows.values()))
    return rows


def create_argparser():
    parser = Parser(description=__doc__)
    parser.add_argument("cells", type=Path, metavar="FILE", help="the cells, a line each")
    parser.add_argument("--seeds", default="0", help="0-2 draws every cell three times, from other noise")
    parser.add_argument("--num_samples", type=int, default=1000, help="images of each cell and seed")
    parser.add_argument("--judge", default=JUDGE, help="the classifier that counts hits")
    parser.add_argument("--out", type=Path, help="output folder, by default results/ and the file's name")
    return parser


@dataclass(frozen=True)
class Cell:
    """One cell: its line's name, the preset, further flags as words, and what it chose in each {}."""

    name: str
    preset: str
    words: tuple[str, ...]
    chosen: dict[str, str] = field(hash=False)

    def __str__(self):
        return f"{self.name}: {shlex.join([self.preset, *self.words])}"


def read_cells(path):
    """The cells of a file. Raises ValueError with the line for one that is not understood."""
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
        command = shlex.join([cell.preset, *cell.words])
        return {"name": cell.name, "chosen": cell.chosen, "seed": self.seed, "command": command}


def plan(cell, seed, args, out):
    """Check a cell and make its job. Raises ValueError that names it for flags that cannot be."""
    try:
        return planned_run(cell, seed, args, out)
    except ValueError as error:
        raise ValueError(f"{cell}: {error}") from error


def planned_run(cell, seed, args, out):
    if not cell.preset.startswith(FEATURES):
        raise ValueError(
            f"judge and metrics are those of the digits, and {cell.preset} is none of their presets"
        )
    system, count = system_of(cell.preset), args.num_samples
    given = flags_of(system, cell)
    names = defaults_of(system.config)
    own = {"seeds": f"{seed * count}-{(seed + 1) * count - 1}"} if "seeds" in names else {"seed": seed}
    own |= {"num_samples": count} if "num_samples" in names else {}
    own |= {"format": "npz"} if "format" in names else {}
    if taken := sorted({*own, "out", "dry_run"} & given.keys()):
        raise ValueError(f"--{taken[0]} is this script's own to give to each cell: drop it")
    require_other_judge(args.judge, given, system.presets[cell.preset])
    job = system.make_job(configure(system.config, system.presets, {**given, **own}), classifiers)
    # Without what is at its default, a flag that a later version adds leaves the id as it is.
    decisive = {
        key: value for key, value in job.settings().items() if str(value) != str(job.defaults.get(key))
    }
    decisive |= {} if args.judge == JUDGE else {"judge": args.judge}
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


def refuse_twins(planned):
    """Raise ValueError where two cells are one run."""
    first = {}
    for each in planned:
        if (other := first.setdefault(each.id, each)) is not each:
            raise ValueError(f"two cells are the same run, '{other.cell}' and '{each.cell}': drop one")


def read_rows(path):
    return json.loads(path.read_text()) if path.exists() else []


def summed(rows):
    """One row per cell: its name, what it chose, and the spread of each number over the seeds."""
    cells = {}
    for row in rows:
        cells.setdefault((row["name"], row["command"]), []).append(row)
    return [
        {"name": name, "chosen": same[0]["chosen"]}
        | {key: spread([row[key] for row in same]) for key in NUMBERS}
        for (name, _), same in cells.items()
    ]


def table(rows):
    """The cells of the table as text, its titles first; a column for each flag that some line leaves open."""
    flags = list(dict.fromkeys(flag for row in rows for flag in row["chosen"]))
    lines = [["", *flags, *(title for title, _ in NUMBERS.values())]]
    for row in rows:
        numbers = [with_error(without_zero(row[key]), form) for key, (_, form) in NUMBERS.items()]
        lines.append([row["name"], *(row["chosen"].get(flag, "") for flag in flags), *numbers])
    return lines


def without_zero(cell):
    """A spread without its error where all runs agree."""
    return cell if cell["std"] else {**cell, "std": None}


def markdown(lines):
    head, *rows = (f"| {' | '.join(cells)} |" for cells in lines)
    return [head, "|" + "---|" * len(lines[0]), *rows]


def comma_separated(lines):
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(lines)
    return text.getvalue()


if __name__ == "__main__":
    run_main(main, resumable=True)
