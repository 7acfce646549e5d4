"""Sample every cell of a sweep for several seeds, measure the images, and write a table.

    python scripts/sweep.py docs/few-steps/solvers.txt --seeds 0-2 --num_samples 1000 --out results/solvers

A line of the file is NAME: PRESET [FLAGS...], preset and flags as ./guided_sample.sh takes them. {a,b} makes
one cell with a and one with b, in every combination, and a column of the table; # begins a comment. All
presets are of one problem (see problems.py); judge, features and reference are those of that problem.

Writes rows.json, a row for each cell and seed, and their means and standard deviations: table.md, table.csv
and table.json. A second table in table.md, and table.json, has the differences to the cell of --against, seed
by seed, with their 95 % intervals. The last column names the Pareto fronts that a cell is on, among those
whose names begin alike up to a slash. What rows.json holds is not drawn again: a sweep that was stopped
resumes, and a cell that is added is drawn alone. A run that fails is named at the end, and the others are
drawn all the same.
"""

import csv
import io
import json
import os
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor, as_completed
from functools import lru_cache
from multiprocessing import active_children, get_context, parent_process
from pathlib import Path

import _beside  # noqa: F401
import torch
from comparison import cost, distinct_numbers, judge, require_one_process, spread, with_error
from problems import SMALLEST, Quality, problem_of
from sweep_cells import named_cell, plan, problem_of_all, read_cells, refuse_twins
from sweep_statistics import by_seed, is_distance, on_front, paired, with_interval

from guided_diffusion import dist_util
from guided_diffusion.files.atomic import renamed_when_complete, write_json
from guided_diffusion.files.console import print_result
from guided_diffusion.flags.parser import Parser, run_main
from guided_diffusion.runs import machine
from guided_diffusion.runs.job import run
from guided_diffusion.runs.lock import locked


def main():
    args = create_argparser().parse_args()
    check_run_flags(args)
    out, seeds = args.out or Path("results", args.cells.stem), distinct_numbers(args.seeds, "--seeds")
    cells = read_cells(args.cells)
    against = named_cell(cells, args.against)
    planned = [plan(cell, seed, args, out) for seed in seeds for cell in cells]
    refuse_twins(planned)
    numbers = numbers_of(problem_of_all(cells))
    out.mkdir(parents=True, exist_ok=True)
    with locked(out):
        rows, failures = measured(planned, args, out)
        done = [{**rows[each.id], **each.about()} for each in planned if each.id in rows]
        text = write_tables(out, summed(done, numbers, against.command), numbers, against.name)
    print_result(text)
    if failures:
        raise ValueError(f"{len(failures)} of {len(planned)} runs failed: {'; '.join(failures)}")


def create_argparser():
    parser = Parser(description=__doc__)
    parser.add_argument("cells", type=Path, metavar="FILE", help="the cells, a line each")
    parser.add_argument("--seeds", default="0", help="0-2 draws every cell three times, from other noise")
    parser.add_argument("--against", help="the cell that others are compared with; by default the first")
    add_run_flags(parser, num_samples=1000)
    parser.add_argument("--out", type=Path, help="output folder, by default results/ and the file's name")
    return parser


def add_run_flags(parser, num_samples):
    """The flags that `measured` looks at."""
    parser.add_argument("--num_samples", type=int, default=num_samples, help="images of each cell and seed")
    parser.add_argument("--judge", help="the classifier that counts hits; by default the problem's own")
    parser.add_argument(
        "--processes", type=int, default=1, help="runs that are drawn side by side, each on the next GPU"
    )


def check_run_flags(args):
    """Raise ValueError for numbers that cannot be, and under torchrun."""
    require_one_process()
    if args.num_samples < SMALLEST:
        raise ValueError(f"--num_samples must be at least {SMALLEST}, got {args.num_samples}")
    if args.processes < 1:
        raise ValueError(f"--processes must be at least 1, got {args.processes}")


def numbers_of(problem):
    """Of a row: its key, the column's title, and how the number is written."""
    return {
        "evaluations": ("evaluations", ".0f"),
        "classifier_passes": ("classifier passes", ".0f"),
        "seconds_per_image": ("s per image", ".4f"),
        problem.distance: (problem.distance_label, ".2f"),
        "precision": ("precision", ".3f"),
        "recall": ("recall", ".3f"),
        "density": ("density", ".3f"),
        "coverage": ("coverage", ".3f"),
        "hit": ("wanted class", ".1%"),
    }


# Runs, and rows of numbers


def measured(planned, args, out):
    """({id: numbers} of all planned runs and of what rows.json has besides, what is said of those that
    failed); draws and measures what it lacks.
    """
    path = out / "rows.json"
    rows, failures = {row["id"]: row for row in read_rows(path)}, []
    missing = [each for each in planned if each.id not in rows]
    for each, numbers in drawn(missing, args, out):
        if isinstance(numbers, str):
            failures.append(f"{each.cell}, seed {each.seed}: {numbers}")
            continue
        rows[each.id] = {"id": each.id, **each.about(), **numbers}
        write_json(path, list(rows.values()))
    return rows, failures


def drawn(missing, args, out) -> Iterator[tuple]:
    """Each run with its numbers, or with what it failed by, as they are done."""
    if args.processes == 1:
        for number, each in enumerate(missing, 1):
            print(f"{number}/{len(missing)}: {each.cell}, seed {each.seed}", file=sys.stderr)
            yield each, attempt(each, args.judge)
        return
    context = get_context("spawn")
    devices, number = visible_devices(os.environ, torch.cuda.device_count()), context.Value("i", 0)
    pool = ProcessPoolExecutor(args.processes, context, begin_worker, (devices, number))
    try:
        begun = {pool.submit(plan_and_attempt, each.cell, each.seed, args, out): each for each in missing}
        for number, future in enumerate(as_completed(begun), 1):
            each = begun[future]
            print(f"{number}/{len(missing)} done: {each.cell}, seed {each.seed}", file=sys.stderr)
            yield each, future.result()
        pool.shutdown()
    except BrokenExecutor:
        fewer = f"fewer --processes than {args.processes}"
        raise ValueError(f"a process of the sweep died, perhaps for want of memory: {fewer}") from None
    finally:  # a sweep that is stopped does not wait for what runs
        pool.shutdown(wait=False, cancel_futures=True)
        for process in active_children():
            process.terminate()


def visible_devices(environment, count):
    """The names of the GPUs that the sweep's processes take in turn, as CUDA_VISIBLE_DEVICES has them."""
    named = environment.get("CUDA_VISIBLE_DEVICES")
    return named.split(",") if named else [str(i) for i in range(count)]


def begin_worker(devices, number):
    """Take the next GPU, and let this process end where the sweep is killed."""
    if devices:
        with number.get_lock():
            os.environ["CUDA_VISIBLE_DEVICES"] = devices[number.value % len(devices)]
            number.value += 1

    def watch():
        parent_process().join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def plan_and_attempt(cell, seed, args, out):
    """In a process of its own, to which no job can be sent."""
    return attempt(plan(cell, seed, args, out), args.judge)


def attempt(each, judge_name):
    """The numbers of a planned run; what is said of it where it fails."""
    try:
        run(each.job)
        classifier, quality = judges_of(each.cell.preset.partition("-")[0], judge_name)
        folder = each.job.folder
        numbers = cost(folder) | judge(folder, classifier) | quality(folder)
        return {**numbers, "machine": machine.describe(dist_util.dev())}
    except (ValueError, OSError, RuntimeError, ArithmeticError) as error:
        return str(error).splitlines()[0] if str(error) else type(error).__name__


@lru_cache
def judges_of(preset, judge_name):
    """The judge and the metrics of a problem: loaded once."""
    problem = problem_of(preset)
    return problem.load_judge(judge_name or problem.judge), Quality(problem)


# Tables


def write_tables(out, summaries, numbers, against):
    """Write table.json, table.csv and table.md; return the text of the last. One seed has no differences."""
    write_json(out / "table.json", summaries)
    lines = table(summaries, numbers)
    parts = [markdown(lines)]
    if any(len(row["evaluations"]["runs"]) > 1 for row in summaries):
        parts += [[f"The differences to {against}:"], markdown(differences(summaries, numbers))]
    text = "\n\n".join("\n".join(part) for part in parts)
    for name, content in (("table.md", f"{text}\n"), ("table.csv", comma_separated(lines))):
        with renamed_when_complete(out / name) as file:
            file.write(content.encode())
    return text


def read_rows(path):
    return json.loads(path.read_text()) if path.exists() else []


def summed(rows, numbers, against):
    """One row per cell: its name, what it chose, the spread of each number over the seeds, its differences to
    the cell whose command is `against`, and the fronts that it is on.
    """
    cells = {}
    for row in rows:
        cells.setdefault((row["name"], row["command"]), []).append(row)
    base = [row for row in rows if row["command"] == against]
    summaries = [
        {"name": name, "chosen": same[0]["chosen"]}
        | {key: spread([row[key] for row in same]) for key in numbers}
        | {"differences": {key: paired(by_seed(same, key), by_seed(base, key)) for key in numbers}}
        for (name, _), same in cells.items()
    ]
    fronts = {x: on_front(summaries, x, "recall") for x in numbers if is_distance(x) or x == "precision"}
    return [
        row | {"fronts": [x for x, which in fronts.items() if which[i]]} for i, row in enumerate(summaries)
    ]


def table(rows, numbers):
    """The cells of the table as text, its titles first; a column for each flag that some line leaves open."""
    flags = chosen_flags(rows)
    lines = [["", *flags, *(title for title, _ in numbers.values()), "Pareto front"]]
    for row in rows:
        written = [with_error(without_zero(row[key]), form) for key, (_, form) in numbers.items()]
        fronts = ", ".join(f"{numbers[x][0]} and recall" for x in row["fronts"])
        lines.append([row["name"], *(row["chosen"].get(flag, "") for flag in flags), *written, fronts])
    return lines


def differences(rows, numbers):
    """The second table, in the same way."""
    flags = chosen_flags(rows)
    lines = [["", *flags, *(title for title, _ in numbers.values())]]
    for row in rows:
        written = [with_interval(row["differences"][key], form) for key, (_, form) in numbers.items()]
        lines.append([row["name"], *(row["chosen"].get(flag, "") for flag in flags), *written])
    return lines


def chosen_flags(rows):
    """The flags that some line of the file leaves open."""
    return list(dict.fromkeys(flag for row in rows for flag in row["chosen"]))


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
