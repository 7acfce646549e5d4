"""What scripts/reproduce.py writes: the page of a problem, and the part of docs/results.md that sets the
answers of all problems side by side. It is no script of its own.
"""

import json
import re
import textwrap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import _beside  # noqa: F401
import numpy as np
from problems import PROBLEMS, Problem
from reproduce_claims import AGREES, CHANCE, DISAGREES, UNMEASURED, rank_correlation
from sweep_statistics import EQUAL, REAL, by_seed, paired, panel_of, standard_error

from evaluation.metrics import metric_label

BEGIN, END = "<!-- scripts/reproduce.py: begin -->", "<!-- scripts/reproduce.py: end -->"
WIDTH = 110
ON_PICTURES = (
    "In the first picture bars are standard deviations over the seeds, and no line is better in both numbers "
    "than one with a ring."
)
QUALITY = {"precision": ".3f", "recall": ".3f", "hit": ".1%"}
NEARER = {"nearer": "nearer", "nearer_confident": "nearer, the surest"}
Rows = Mapping[str, Sequence[Mapping[str, Any]]]  # of each cell, in the order of the file


def page(result: Mapping[str, Any]) -> str:
    """The page of a problem, from what its JSON file holds."""
    problem, rows = PROBLEMS[result["problem"]], by_cell(result["rows"])
    table = [panel_of(name)[1] for name in rows if panel_of(name)[0] == "table"]
    sections: dict[str, list[str]] = {
        "Results": [
            *section(rows, "table", problem, lambda i: table.index("off the shelf")),
            *real_line(result["real"], problem),
        ],
        "A second look": second_lines(result, table, problem),
        "Choice by choice": [*chain_lines(), *section(rows, "ablation", problem, lambda i: i - 1)],
        "Calibration and distance": ranking_lines(result["ranking"], problem),
        "Claims of the paper": claim_lines(result["answers"]),
        "Files": file_lines(result["sha256"]),
    }
    lines = [f"# {problem.name}, reproduced", "", f"    {result['command']}", "", *about(result), ""]
    for title, content in sections.items():
        lines += [f"## {title}", "", *content, ""] if content else []
    lines += [*textwrap.wrap(ON_PICTURES, WIDTH), ""]
    lines += [f"![{alt}]({name})" for alt, name in result["pictures"].items()]
    return "\n".join(lines).rstrip() + "\n"


def by_cell(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    """The rows of each cell by its name and, where a line of the file makes several, its command."""
    cells: dict[tuple, list[Mapping[str, Any]]] = {}
    for row in rows:
        cells.setdefault((row["name"], row["command"]), []).append(row)
    names = [name for name, _ in cells]
    return {
        name if names.count(name) == 1 else f"{name}: {command}": same
        for (name, command), same in cells.items()
    }


def about(result: Mapping[str, Any]) -> list[str]:
    """How it was measured."""
    seeds, machines = result["seeds"], sorted({row["machine"] for row in result["rows"]})
    drawn, calibrated = (f"{result['seconds'][what] / 60:.0f}" for what in ("sampling", "calibration"))
    count = f"{result['num_samples']:,} images for each of {len(seeds)} seed{'s' * (len(seeds) > 1)}"
    file = f"{result['problem']}.json"
    text = (
        f"{count}. ± behind a number is its standard error over the seeds. The lines of a table share labels "
        "and noise in each seed: a difference is taken seed by seed, and stands with its 95 % interval "
        "(Student's t); in brackets where zero is inside, so that it cannot be told. Of twenty differences "
        "that are none, one is still told apart. The first table compares with the line off the shelf, the "
        f"others with the line above. Labels: {', '.join(result['labels'])}. [{file}]({file}) has the flags "
        f"of each line. {'; '.join(machines)}. "
        f"Sampling took {drawn} minutes of one process, calibration {calibrated}."
    )
    if result["real"] and result["real"][0]["images"] < result["num_samples"]:
        text += " The real images are all that there are; fewer alone makes their distances larger."
    return textwrap.wrap(text, WIDTH)


def section(rows: Rows, panel: str, problem: Problem, base: Callable[[int], int]) -> list[str]:
    """The table of the cells of a panel; base: the place of a line -> that of the line it is compared with,
    below 0 for none.
    """
    cells = {panel_of(name)[1]: same for name, same in rows.items() if panel_of(name)[0] == panel}
    if not cells:
        return []
    lines, every = [], list(cells.values())
    for i, (name, same) in enumerate(cells.items()):
        other = every[base(i)] if base(i) not in (i, -1) else None
        difference = other and paired(by_seed(same, problem.distance), by_seed(other, problem.distance))
        lines.append(
            [
                name,
                *(f"{same[0][key]:.0f}" for key in ("evaluations", "classifier_passes")),
                with_error(same, problem.distance, ".2f"),
                bracketed(difference, ".2f"),
                *(with_error(same, key, form) for key, form in QUALITY.items()),
            ]
        )
    costs = ("evaluations", "classifier passes")
    titles = ("", *costs, problem.distance_label, "difference", "precision", "recall", "wanted class")
    return markdown([titles, *lines])


def chain_lines() -> list[str]:
    """What the lines of the ablation are."""
    note = (
        "From x_t to the sine term each line adds one choice of the paper to the line above, all at the "
        "scale of the recipe, which was tuned for the sine term's. The last two are ours: the posterior's "
        "strength in the place of the paper's, and the preset of few steps as a whole (solver, levels, "
        "temperatures, scale). Claims about these lines stand on the first network alone."
    )
    return [*textwrap.wrap(note, WIDTH), ""]


def real_line(real: Sequence[Mapping[str, Any]], problem: Problem) -> list[str]:
    """The last line of the table: real images, as if they were drawn; none without any."""
    if not real:
        return []
    distance = with_error(real, problem.distance, ".2f")
    numbers = [with_error(real, key, form) for key, form in QUALITY.items()]
    return [f"| {' | '.join([real_name(real), '', '', distance, '', *numbers])} |"]


def real_name(real: Sequence[Mapping[str, Any]]) -> str:
    """What stands in front of their line."""
    return f"*{real[0]['images']:,} real images that no network has seen*"


def second_lines(result: Mapping[str, Any], table: Sequence[str], problem: Problem) -> list[str]:
    """The lines of the table by both feature networks, and how near they come to training images."""
    cells, rows = by_cell(result["opinions"]), by_cell(result["rows"])
    if all(each["second"] is None and each["nearer"] is None for each in result["opinions"]):
        return []
    base = list(cells)[table.index("off the shelf")]
    first = {name: by_seed(rows[name], problem.distance) for name in cells}
    second = {name: by_seed(same, "second") for name, same in cells.items()}
    lines = [
        [
            panel_of(name)[1],
            *(text for of in (first, second) for text in distance_and_difference(of, name, base)),
            *(with_error(cells[name], key, ".3f") for key in NEARER),
        ]
        for name in cells
    ]
    if real := result["real"]:
        distances = (with_error(real, key, ".2f") for key in (problem.distance, "second"))
        nearness = ("0.500", f"{real[0]['nearer_confident']:.3f}")  # of all of them
        lines.append(
            [real_name(real), *(text for distance in distances for text in (distance, "")), *nearness]
        )
    label, other = problem.distance_label, metric_label("fid", problem.second)
    titles = ("", label, "difference", other, "difference", *NEARER.values())
    correlation = rank_correlation(list(first.values()), list(second.values()))
    note = (
        f"{other} is the distance by another network, trained on the same images. *Nearer*: the probability "
        f"that a sample lies nearer, by the first network, to one of {result['training_images']:,} training "
        "images than an image that no network has seen does: 0.5 for an honest generator, 1 for one that "
        "copies. Then of the tenth that the judge is surest of: such images are typical and lie nearer, "
        "those that no network has seen, too."
    )
    if correlation:
        orders = "Spearman's rank correlation of the two distances over these lines"
        note += f" {orders}: {bracketed(correlation, '.2f')}."
    return [*textwrap.wrap(note, WIDTH), "", *markdown([titles, *lines])]


def distance_and_difference(
    of: Mapping[str, Mapping[int, float | None]], name: str, base: str
) -> tuple[str, str]:
    """A distance, and its difference to that of `base`."""
    ours, theirs = ({seed: x for seed, x in of[each].items() if x is not None} for each in (name, base))
    return of_seeds(ours, ".2f"), bracketed(paired(ours, theirs) if name != base else None, ".2f")


def file_lines(hashes: Mapping[str, str]) -> list[str]:
    """What the numbers are of."""
    return markdown([("", "SHA-256"), *([name, f"{digest[:16]}…"] for name, digest in hashes.items())])


def ranking_lines(ranking: Mapping[str, Sequence[Mapping[str, Any]]], problem: Problem) -> list[str]:
    """What was ranked: the settings with their calibration and their distance."""
    titles = ("", "shown", "beta", "tau1", "ECE", "NLL", problem.distance_label)
    lines = [
        [
            label,
            {"x0": "predicted x0"}.get(each["shown"], each["shown"]),
            each["beta"],
            f"{each['tau']:g}",
            of_seeds(each["ece"], ".3f"),
            of_seeds(each["nll"], ".2f"),
            of_seeds(each["distance"], ".2f"),
        ]
        for label, settings in ranking.items()
        for each in settings
    ]
    note = "The ± of the calibration is over draws of the noise, not of the images."
    return [*textwrap.wrap(note, WIDTH), "", *markdown([titles, *lines])] if lines else []


def claim_lines(answers: Sequence[Mapping[str, Any]]) -> list[str]:
    """Claim by claim."""
    note = (
        f"'{AGREES}' and '{DISAGREES}' say that the 95 % interval leaves zero out. Of a ranking, the number "
        "is Spearman's rank correlation, its interval that over the seeds, and besides it must come about by "
        f"chance, over all orders of these settings, less often than {CHANCE:.0%}. All settings of a ranking "
        "are at one scale."
    )
    lines = []
    for each in answers:
        number = bracketed(each["difference"], ".3f")
        chance = each.get("by_chance")
        lines.append(
            [each["claim"], each["answer"], number + (f", by chance {chance:.1%}" if chance else "")]
        )
    return [*textwrap.wrap(note, WIDTH), "", *markdown([("", "here", "difference"), *lines])]


def of_seeds(values: Mapping[Any, float | None], form: str) -> str:
    """Mean and standard error over the seeds; "–" of none."""
    numbers = [value for value in values.values() if value is not None]
    if not numbers:
        return "–"  # noqa: RUF001
    error = f"±{standard_error(numbers):{form}}" if len(numbers) > 1 else ""
    return f"{np.mean(numbers):{form}}{error}"


def with_error(rows: Sequence[Mapping[str, Any]], key: str, form: str) -> str:
    return of_seeds(by_seed(rows, key), form)


def bracketed(difference: Mapping[str, Any] | None, form: str) -> str:
    """A difference with its interval, in brackets where it cannot be told from zero; "" of none."""
    if not difference:
        return ""
    if difference["verdict"] == EQUAL:
        return EQUAL
    half = difference["interval"]
    text = f"{difference['mean']:+{form}}" + ("" if half is None else f"±{half:{form}}")
    return text if difference["verdict"] == REAL else f"({text})"


def markdown(lines: Sequence[Sequence[str]]) -> list[str]:
    head, *rows = (f"| {' | '.join(cells)} |" for cells in lines)
    return [head, "|" + "---|" * len(lines[0]), *rows]


# The part of docs/results.md


def part(folder: Path) -> list[str]:
    """The answers of all problems whose JSON files are in a folder."""
    found = [json.loads(path.read_text()) for name in PROBLEMS if (path := folder / f"{name}.json").exists()]
    answers = {
        each["problem"]: {answer["claim"]: answer["answer"] for answer in each["answers"]} for each in found
    }
    claims = list(dict.fromkeys(claim for of_one in answers.values() for claim in of_one))
    head = ["claim of the paper", *(f"[{name}]({folder.name}/{name}.md)" for name in answers)]
    rows = [[claim, *(of_one.get(claim, UNMEASURED) for of_one in answers.values())] for claim in claims]
    return [*markdown([head, *rows]), *(line for each in found for line in ("", *measured_by(each)))]


def measured_by(result: Mapping[str, Any]) -> list[str]:
    """The command of a problem, what ran it and for how long."""
    minutes = sum(result["seconds"].values()) / 60
    machines = "; ".join(sorted({row["machine"] for row in result["rows"]}))
    return [
        "    " + result["command"],
        "",
        *textwrap.wrap(f"{machines}; {minutes:.0f} minutes of one process.", WIDTH),
    ]


def with_part(text: str, lines: Sequence[str]) -> str:
    """A page with these lines between its markers, at its end where it has none; all else stays. Raises
    ValueError where the markers do not stand once each, in order.
    """
    if BEGIN not in text and END not in text:
        text = f"{text.rstrip()}\n\n## The paper's claims\n\n{BEGIN}\n{END}\n"
    pattern = f"{re.escape(BEGIN)}.*{re.escape(END)}"
    if text.count(BEGIN) != 1 or text.count(END) != 1 or not re.search(pattern, text, re.DOTALL):
        raise ValueError(f"the page must have {BEGIN} once, and {END} once below it: mend it by hand")
    content = "\n".join([BEGIN, *lines, END])
    return re.sub(pattern, lambda _: content, text, flags=re.DOTALL)
