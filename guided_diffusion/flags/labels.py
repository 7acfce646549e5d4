"""Which classes a run draws, from the text of a flag."""

import codecs
import io
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from guided_diffusion.flags.parser import parse_numbers
from guided_diffusion.runs.noise import random_labels, shuffled_labels

_NPY = b"\x93NUMPY"
_MARKS = {codecs.BOM_UTF8: "utf-8-sig", codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}


def label_source(labels: str, seed: int, num_classes: int) -> Callable[[Sequence[int]], np.ndarray]:
    """Return the function indices -> (len(indices),) int64 labels that `labels` describes.

    "random"; "balanced"; a list such as "1,2,5-10"; or a file with whole numbers: an .npy array, or text with
    spaces, commas, semicolons or line ends between them. Lists and files are used again and again, shuffled
    each time. Raises ValueError for a class outside [0, num_classes), FileNotFoundError for a file that is
    not there.
    """
    if labels == "random":
        return lambda indices: random_labels(seed, indices, num_classes)
    pool = _pool(labels, num_classes)
    if not pool:
        raise ValueError(f"labels {labels!r} names no class")
    outside = [label for label in pool if not 0 <= label < num_classes]
    if outside:
        raise ValueError(
            f"--labels {labels}: class {outside[0]} is out of range, the classes are 0 to {num_classes - 1}"
        )
    return lambda indices: shuffled_labels(seed, indices, pool)


def labels_file(labels: str) -> Path | None:
    """The file that `labels` names; None where it is a word or a list."""
    return None if labels in ("random", "balanced") or re.fullmatch(r"[-\d,\s]+", labels) else Path(labels)


def _pool(labels: str, num_classes: int) -> list[int]:
    if labels == "balanced":
        return list(range(num_classes))
    path = labels_file(labels)
    if path is None:
        return parse_numbers(labels, "labels")
    if not path.is_file():
        raise FileNotFoundError(
            f"labels {labels!r}: no such file; write random, balanced, a list such as 1,2,5-10,"
            " or a file's path"
        )
    try:
        return _whole_numbers(path.read_bytes())
    except (ValueError, EOFError) as error:
        raise ValueError(f"labels file {labels} does not hold whole numbers ({error})") from error


def _whole_numbers(content: bytes) -> list[int]:
    """The numbers in a file's bytes, which say by themselves what kind of file it is."""
    if content.startswith(_NPY):
        array = np.load(io.BytesIO(content), allow_pickle=False).ravel()
        if array.dtype.kind not in "iu":
            raise ValueError(f"it holds {array.dtype}")
        return array.tolist()
    encoding = next((name for mark, name in _MARKS.items() if content.startswith(mark)), "utf-8")
    # A comma or semicolon may end the text; two in a row leave a number out, which int refuses.
    text = re.sub(r"\s*[,;]?\s*$", "", content.decode(encoding)).strip()
    return [int(word) for word in re.split(r"\s*[,;]\s*|\s+", text)] if text else []
