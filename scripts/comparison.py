"""Tables over kinds of runs: what a judge and the metrics say of each, with the spread over seeds."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from guided_diffusion import dist_util
from guided_diffusion.files.grid import save_grid
from guided_diffusion.files.run_folder import read_run, read_samples
from guided_diffusion.flags.fields import configure
from guided_diffusion.flags.parser import parse_numbers
from guided_diffusion.runs.launchers import find_place
from guided_diffusion.runs.tally import CLASSIFIER, NETWORK

Runs = Mapping[tuple, Sequence[Path]]


def cells(
    flags: type,
    presets: Mapping[str, Any],
    given: Mapping[str, Any],
    fixed: Mapping[tuple, Mapping[str, Any]],
) -> dict[tuple, Any]:
    """The configuration of each cell: what the user wrote, under what the cell fixes, by the cell's key.

    A given flag goes to the cells in which it means something. Raises ValueError for one that no cell takes:
    the cells fix it, or it means nothing in any.
    """
    configs = {key: configure(flags, presets, given, values) for key, values in fixed.items()}
    taken = {name for key, config in configs.items() for name in config.given - fixed[key].keys()}
    for name in sorted(given.keys() - taken - {"preset"}):
        if any(name in values for values in fixed.values()):
            raise ValueError(f"--{name} is this script's own to give to each row: drop it")
        raise ValueError(f"--{name} means nothing in any row of this table: drop it")
    return configs


def require_one_process() -> None:
    """Raise ValueError under torchrun and its kin: the runs of a table are drawn and measured one after
    another.
    """
    if find_place().size > 1:
        raise ValueError("this script is for one process: start it with plain python")


def distinct_numbers(text: str, flag: str) -> list[int]:
    """ "0-2" as a list. Raises ValueError where a number stands twice."""
    numbers = parse_numbers(text, flag)
    if len(set(numbers)) < len(numbers):
        raise ValueError(f"{flag} {text} names a number twice; each gives one run")
    return numbers


def summaries(
    runs: Runs, names: Iterable[str], numbers_of: Callable[[Path], dict[str, float]]
) -> list[dict[str, Any]]:
    """One row per kind of run: its key under `names`, and the `spread` over its runs of the numbers that
    `numbers_of` returns by name.
    """
    rows = []
    for key, outs in runs.items():
        numbers = [numbers_of(out) for out in outs]
        columns = {column: [row[column] for row in numbers] for column in numbers[0]}
        rows.append(
            {
                **dict(zip(names, key, strict=True)),
                **{column: spread(values) for column, values in columns.items()},
            }
        )
    return rows


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Mean, sample standard deviation (None of a single value) and the values."""
    return {
        "mean": float(np.mean(values)),
        "std": float(np.std(values, ddof=1)) if len(values) > 1 else None,
        "runs": list(values),
    }


def with_error(cell: Mapping[str, Any], form: str) -> str:
    """A `spread` as text: the mean, and the standard deviation behind a plus-minus."""
    return f"{cell['mean']:{form}}" + (f" ± {cell['std']:{form}}" if cell["std"] is not None else "")


def judge(folder: Path, classifier: Callable[[Tensor], Tensor]) -> dict[str, float]:
    """What a classifier, [-1, 1] NCHW images -> logits, says of a finished run.

    hit: the share of the samples that it assigns to the class that was asked for; log_prob: that class's mean
    log-probability in nats.
    """
    images, labels = (torch.from_numpy(array).to(dist_util.dev()) for array in read_samples(folder))
    x = images.permute(0, 3, 1, 2).float() / 127.5 - 1
    with torch.no_grad():
        log_probs = F.log_softmax(torch.cat([classifier(part) for part in x.split(100)]).float(), dim=1)
    return {
        "hit": float((log_probs.argmax(1) == labels).float().mean()),
        "log_prob": float(log_probs.gather(1, labels[:, None]).mean()),
    }


def cost(folder: Path) -> dict[str, float]:
    """What an image of a finished run took: evaluations of networks, passes of the classifier, seconds."""
    totals, images = read_run(folder)["totals"], len(read_samples(folder)[1])
    taken = {"evaluations": NETWORK, "classifier_passes": CLASSIFIER, "seconds_per_image": "seconds"}
    return {name: totals.get(key, 0) / images for name, key in taken.items()}


def draw_rows(path: Path, folders: Mapping[str, Path], columns: int = 20) -> None:
    """A picture of runs by title, one row per run, the same samples in each: the first two of every class, or
    as many as there are.
    """
    groups, titles = [], []
    for title, folder in folders.items():
        images, labels = read_samples(folder)
        rank = np.array([np.sum(labels[:i] == label) for i, label in enumerate(labels)])
        first = np.lexsort((labels, rank))[:columns]
        groups.append(images[first[np.argsort(labels[first], kind="stable")]])
        titles.append(title)
    save_grid(path, groups, scale=-(-48 // groups[0].shape[1]), columns=len(groups[0]), titles=titles)
