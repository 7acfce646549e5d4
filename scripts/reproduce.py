"""Measure the paper's table and its reasoning again: every baseline beside the method, each of the method's
choices alone, and whether calibration ranks classifiers as the distance does.

    python scripts/reproduce.py digits --processes 2
    python scripts/reproduce.py cifar10 --data_dir cifar-10-batches-py/test_batch --processes 2
    python scripts/reproduce.py imagenet128 --dry_run

The cells are those of docs/results/PROBLEM.txt, in the form of scripts/sweep.py. --data_dir has labelled
images that no network was trained on: calibration is measured on them, by scripts/calibrate.py, they are what
a perfect generator would draw, and they tell how near to the training images others come. Without it (the
digits have some) what needs them cannot be told. Writes PROBLEM.json with all numbers, PROBLEM.md and
pictures into the folder results beside --page, and into that page, between two marker comments, the answers
of all problems, computed from those files. What was drawn or measured is kept in --out: a run that was
stopped resumes.
--dry_run lists the files, the hours and the disk that it takes, and draws nothing.
"""

import shlex
import shutil
import sys
from pathlib import Path

import _beside
import reproduce_calibration as calibration
from comparison import distinct_numbers
from plot_sweep import curves, draw
from problems import PROBLEMS
from reproduce_claims import ALL_CLAIMS, SHELF, answer, rank_answer
from reproduce_opinion import Opinions
from reproduce_page import page, part, with_part
from reproduce_plan import dry_run
from sweep import add_run_flags, check_run_flags, measured, numbers_of, summed
from sweep_cells import plan, problem_of_all, read_cells
from sweep_statistics import by_seed, panel_of

from guided_diffusion.files.atomic import renamed_when_complete, write_json
from guided_diffusion.files.cifar_batches import is_cifar_folder
from guided_diffusion.files.console import print_result
from guided_diffusion.files.figures import plain_style, require_matplotlib, save_figure
from guided_diffusion.files.grid import save_grid
from guided_diffusion.flags.parser import Parser, run_main
from guided_diffusion.runs.lock import locked

# Seeds, images of each, and labelled images of the calibration, None for all.
SIZES = {
    "digits": ("0-4", 1000, None),
    "cifar10": ("0-2", 700, 1000),
    "imagenet128": ("0-2", 10000, 5000),
}


def main():
    args = create_argparser().parse_args()
    for name, size in zip(("seeds", "num_samples", "num_labelled"), SIZES[args.problem], strict=True):
        if getattr(args, name) is None:
            setattr(args, name, size)
    check_run_flags(args)
    held_out_of(args)
    seeds, cells = distinct_numbers(args.seeds, "--seeds"), cells_of(args)
    if args.dry_run:
        return dry_run(PROBLEMS[args.problem], cells, len(seeds), args)
    require_matplotlib("the pictures need")
    out = args.out or Path("results/reproduce", args.problem)
    planned = [plan(cell, seed, args, out) for seed in seeds for cell in cells]
    out.mkdir(parents=True, exist_ok=True)
    with locked(out):
        unique = {}  # a run may stand in two sections
        for each in planned:
            unique.setdefault(each.id, each)
        rows, failures = measured(list(unique.values()), args, out)
        if failures:
            raise ValueError(f"{len(failures)} of {len(unique)} runs failed: {'; '.join(failures)}")
        runs = calibrated(args, cells, seeds, out)
        about = looked_at(args, planned, seeds, out)
    done = [{**rows[each.id], **each.about()} for each in planned]
    print_result("\n".join(f"{path}" for path in write(args, cells, done, runs, about)))


def create_argparser():
    parser = Parser(description=__doc__)
    parser.add_argument("problem", choices=tuple(SIZES), metavar="PROBLEM", help=", ".join(SIZES))
    parser.add_argument("--cells", type=Path, metavar="FILE", help="other cells, named in the same way")
    sizes = ", ".join(f"{name} {seeds} of {count:,}" for name, (seeds, count, _) in SIZES.items())
    parser.add_argument("--seeds", help=f"by default, with the images of each: {sizes}")
    add_run_flags(parser, num_samples=None)
    parser.add_argument("--data_dir", help="labelled images that no network was trained on")
    labelled = ", ".join(f"{name} {count or 'all'}" for name, (_, _, count) in SIZES.items())
    parser.add_argument("--num_labelled", type=int, help=f"of the calibration; by default {labelled}")
    parser.add_argument("--num_levels", type=int, default=10, help="noise levels of the calibration")
    parser.add_argument("--page", type=Path, default=Path("docs/results.md"), help="the page of the answers")
    parser.add_argument("--out", type=Path, help="of the runs, by default results/reproduce/PROBLEM")
    parser.add_switch("--dry_run", "list what is needed")
    return parser


def cells_of(args):
    """The cells of the problem. Raises ValueError for those of another, for a name of two cells that are
    compared by it, and without the one that the table is compared with.
    """
    path = args.cells or _beside.ROOT / "docs/results" / f"{args.problem}.txt"
    cells = read_cells(path)
    if (found := problem_of_all(cells).name) != args.problem:
        raise ValueError(f"{path} has cells of {found}, not of {args.problem}")
    names = [cell.name for cell in cells if panel_of(cell.name)[0] != calibration.RANKING]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise ValueError(
            f"{path} has two cells {twice!r}: only those of {calibration.RANKING} / share a name"
        )
    if SHELF not in names:
        raise ValueError(f"{path} has no cell {SHELF!r}, which the others are compared with: add it")
    return cells


def calibrated(args, cells, seeds, out):
    """The files of calibrate.py's runs; none without labelled images."""
    ranked = [cell for same in calibration.ranked(cells).values() for cell in same]
    held_out = held_out_of(args)
    if not ranked or held_out is None:
        print("no calibration: it takes labelled images, --data_dir", file=sys.stderr)
        return []
    more = ["--num_levels", str(args.num_levels), "--data_dir", str(held_out)]
    more += ["--num_samples", str(args.num_labelled)] if args.num_labelled else []
    return list(calibration.measured(ranked, seeds, more, out / "calibration"))


def held_out_of(args):
    """Labelled images that no network was trained on: the user's, else the problem's; None if it has none."""
    if args.data_dir is None:
        shipped = PROBLEMS[args.problem].held_out
        return shipped if shipped.exists() else None
    if not Path(args.data_dir).exists():
        raise FileNotFoundError(f"--data_dir {args.data_dir}: there is nothing; give a folder, zip or npz")
    if is_cifar_folder(args.data_dir):
        raise ValueError(
            f"--data_dir {args.data_dir} has the images that networks are trained on: give its test_batch"
        )
    return Path(args.data_dir)


def looked_at(args, planned, seeds, out):
    """What the page says beside the rows: opinions of the table's runs, real images, and what all is of."""
    problem, held_out = PROBLEMS[args.problem], held_out_of(args)
    opinions = Opinions(problem, args.judge or problem.judge, held_out, out)
    of_table = [each for each in planned if panel_of(each.cell.name)[0] == "table"]
    shelf = next(each for each in of_table if each.cell.name == SHELF)
    found = opinions({each.id: each.job.folder for each in of_table})
    return {
        "seeds": seeds,
        "pairs": opinions.nearest_pairs(shelf.job.folder),
        "opinions": [{**each.about(), **found[each.id]} for each in of_table],
        "real": opinions.real(args.num_samples, len(seeds)),
        "training_images": opinions.training_images(),
        "labels": sorted({str(each.job.settings().get("labels")) for each in planned}),
        "sha256": {**hashes(planned), **opinions.hashes()},
    }


def hashes(planned):
    """{file: its SHA-256} of the networks that sampled and guided."""
    found = {}
    for job in (each.job for each in planned):
        hashed = job.settings()["sha256"]
        found |= {"/".join(job.files[flag]().parts[-2:]): digest for flag, digest in hashed.items()}
    return found


def command_of(args):
    """What draws the same numbers elsewhere: without the user's folders."""
    words, (seeds, count, labelled) = ["python scripts/reproduce.py", args.problem], SIZES[args.problem]
    words += [f"--cells {args.cells.name}"] if args.cells else []
    words += ["--data_dir UNSEEN"] if args.data_dir else []
    defaults = {"seeds": seeds, "num_samples": count, "judge": None}
    defaults |= {"num_labelled": labelled, "num_levels": 10}
    for name, default in defaults.items():
        if (value := getattr(args, name)) != default:
            words.append(f"--{name} {shlex.quote(str(value))}")
    return " ".join(words)


def write(args, cells, rows, runs, about):
    """Write pictures, numbers and pages; return their paths."""
    problem, folder = PROBLEMS[args.problem], args.page.parent / "results"
    folder.mkdir(parents=True, exist_ok=True)
    ranking, answers = reasoned(problem, cells, rows, calibration.table_of(runs), about["opinions"])
    pictures = drawn(problem, folder, rows, runs, about.pop("pairs"))
    each_once = {row["id"]: row for row in rows}.values()
    result = {
        "problem": problem.name,
        "command": command_of(args),
        "num_samples": args.num_samples,
        "seconds": {
            "sampling": sum(row["seconds_per_image"] * row["images"] for row in each_once),
            "calibration": sum(calibration.seconds_of(path) for path in runs),
        },
        "answers": answers,
        "ranking": ranking,
        "pictures": pictures,
        **about,
        "rows": rows,
    }
    write_json(folder / f"{problem.name}.json", result)
    texts = {folder / f"{problem.name}.md": page(result)}
    texts[args.page] = with_part(args.page.read_text() if args.page.exists() else "", part(folder))
    for path, text in texts.items():
        with renamed_when_complete(path) as file:
            file.write(text.encode())
    return [*(folder / name for name in pictures.values()), folder / f"{problem.name}.json", *texts]


def drawn(problem, folder, rows, runs, pairs):
    """{what it shows: the file} of the pictures in a folder."""
    name = problem.name
    compared = [row for row in rows if panel_of(row["name"])[0] == "table"]
    shelf = next(row["command"] for row in compared if row["name"] == SHELF)
    summaries = summed(compared, numbers_of(problem), shelf)
    for summary in summaries:
        summary["name"] = panel_of(summary["name"])[1]
    pictures = {"Distance and precision against recall": f"{name}.png"}
    with plain_style():
        figure = draw(curves(summaries), "recall", [problem.distance, "precision"])
        save_figure(figure, folder / f"{name}.png", dpi=110)
    if runs:
        pictures["Calibration over the timesteps"] = f"{name}-calibration.png"
        shutil.copy(runs[0].with_suffix(".png"), folder / f"{name}-calibration.png")
    if pairs:
        pictures["What the judge is surest of, above the nearest training images"] = f"{name}-nearest.png"
        scale = -(-48 // pairs[0].shape[1])
        save_grid(folder / f"{name}-nearest.png", pairs, scale, len(pairs[0]), ["off the shelf", "nearest"])
    return pictures


def reasoned(problem, cells, rows, table, opinions):
    """(the ranked settings by label, the answer to each claim)."""
    numbers = {}
    for cell in cells:
        same = [row for row in rows if (row["name"], row["command"]) == (cell.name, cell.command)]
        keys = {"distance": problem.distance, "precision": "precision", "recall": "recall"}
        numbers[cell.name] = {name: by_seed(same, key) for name, key in keys.items()}
    if all(each["second"] is not None for each in opinions):
        for each in opinions:
            numbers[each["name"]].setdefault("second", {})[each["seed"]] = each["second"]
    ranking = {}
    for label, group in calibration.ranked(cells).items():
        for cell in group:
            own, each = calibration.calibration_of(cell, table), calibration.setting_of(cell)
            same = [row for row in rows if row["command"] == cell.command]
            setting = {"shown": each.shown, "beta": f"{each.beta:g}", "tau": each.tau}
            setting |= {name: own.get(name, {}) for name in ("ece", "nll")}
            setting["distance"] = by_seed(same, problem.distance)
            ranking.setdefault(label, []).append(setting)
    if ranking:
        numbers |= calibration.compared(cells, table)
    answers = [answer(claim, numbers) for claim in ALL_CLAIMS]
    answers += [
        rank_answer(label, [each["ece"] for each in group], [each["distance"] for each in group])
        for label, group in ranking.items()
    ]
    return ranking, answers


if __name__ == "__main__":
    run_main(main, resumable=True)
