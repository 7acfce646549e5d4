"""The parts of an extraction: what they add up to in memory, and a folder that keeps them.

    00000000-00002048.npz   pool3, and logits if there are some, of these entries; what was remarked on all
                            entries so far; the versions used; whether there are spatial features
    spatial-00002048.npz    the moments of the spatial features of all entries before 2,048

A file with one of these names is complete. The moments are written before the part that they end with, and
those before them are removed after it: whenever the process is killed, the moments of the last part are
there.
"""

import json
import zipfile
from collections import Counter
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from evaluation.moments import Moments
from guided_diffusion.files.atomic import renamed_when_complete

KEPT = (
    "pool3",
    "logits",
)  # of every image; the spatial features are too large, and only their moments are used


@dataclass
class Part:
    """The features of the entries start .. stop - 1, by name, (n, D) float32 each; `remarks` is about all
    entries before `stop`.
    """

    start: int
    stop: int
    features: dict[str, NDArray[np.float32]]
    remarks: Counter[str]


class Gathered:
    """What all parts so far add up to; the arrays are made once, as large as they can become.

    `spatial` is None where the network gives no spatial features. What one part lacks, the whole lacks: a
    cache may be older than the network.
    """

    def __init__(self, entries: int):
        self._entries, self.stop, self.count = entries, 0, 0
        self.remarks: Counter[str] = Counter()
        self.versions: dict[str, str] = {
            "torch": torch.__version__,
            "numpy": np.__version__,
            "pytorch_fid": version("pytorch-fid"),
        }
        self.spatial: Moments | None = None
        self._arrays: dict[str, NDArray[np.float32]] = {}

    def add(self, part: Part) -> None:
        given, n = part.features, len(part.features["pool3"])
        if self.count == 0:
            shapes = {key: (self._entries, given[key].shape[1]) for key in KEPT if key in given}
            self._arrays = {key: np.empty(shape, np.float32) for key, shape in shapes.items()}
            self.spatial = Moments(given["spatial"].shape[1]) if "spatial" in given else None
        self._arrays = {key: array for key, array in self._arrays.items() if key in given}
        for key, array in self._arrays.items():
            array[self.count : self.count + n] = given[key]
        if self.spatial and "spatial" in given:
            self.spatial.update(given["spatial"])
        else:
            self.spatial = None
        self.stop, self.count, self.remarks = part.stop, self.count + n, part.remarks

    def arrays(self) -> dict[str, NDArray[np.float32]]:
        """The features of all images, for each of KEPT that the network gives."""
        return {key: array[: self.count] for key, array in self._arrays.items()}

    def no_rows(self) -> dict[str, list[NDArray[np.float32]]]:
        """What the lists of a new part begin with, so that a part in which every image is unreadable has its
        shape.
        """
        rows = {key: [array[:0]] for key, array in self._arrays.items()}
        if self.spatial:
            rows["spatial"] = [np.empty((0, self.spatial.mean.size), np.float32)]
        return rows


class PartFiles:
    """The parts of one set under one network in a folder of their own."""

    def __init__(self, folder: Path):
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def keep(self, part: Part, gathered: Gathered) -> None:
        """Write a part that `gathered` ends with."""
        about = {"remarks": part.remarks, "versions": gathered.versions, "spatial": bool(gathered.spatial)}
        if gathered.spatial:
            with renamed_when_complete(self._spatial_file(part.stop)) as file:
                np.savez(file, **gathered.spatial.state())
        kept: dict[str, Any] = {key: part.features[key] for key in gathered.arrays()}
        with renamed_when_complete(self._folder / f"{part.start:08d}-{part.stop:08d}.npz") as file:
            np.savez(file, **kept, about=np.array(json.dumps(about)))
        if part.start:
            self._spatial_file(part.start).unlink(missing_ok=True)

    def restore(self, entries: int) -> Gathered:
        """The complete parts in a row, as far as the moments of the spatial features are known too."""
        gathered, paths = Gathered(entries), self._paths()
        moments = self._moments(paths[-1]) if paths else None
        for path in paths:
            arrays = _read(path)
            about = json.loads(str(arrays.pop("about")))
            if moments:  # only their size is needed here
                arrays["spatial"] = np.empty((0, moments.mean.size), np.float32)
            gathered.add(Part(gathered.stop, _stop(path), arrays, Counter(about["remarks"])))
            gathered.versions = about["versions"]
        gathered.spatial = moments
        return gathered

    def _paths(self):
        following = {int(path.stem.partition("-")[0]): path for path in self._folder.glob("[0-9]*-*.npz")}
        paths = []
        while (path := following.get(_stop(paths[-1]) if paths else 0)) is not None:
            paths.append(path)
        while paths and _has_spatial(paths[-1]) and not self._spatial_file(_stop(paths[-1])).exists():
            paths.pop()
        return paths

    def _moments(self, path):
        """Those that end with this part; None where its network gives no spatial features."""
        return Moments.of_state(**_read(self._spatial_file(_stop(path)))) if _has_spatial(path) else None

    def _spatial_file(self, stop):
        return self._folder / f"spatial-{stop:08d}.npz"


def _has_spatial(path):
    """Parts that do not say are of a time when every network had spatial features."""
    return json.loads(str(_read(path, "about")["about"])).get("spatial", True)


def _stop(path):
    return int(path.stem.partition("-")[2])


def _read(path: Path, *names: str) -> dict[str, Any]:
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return {key: arrays[key] for key in names or arrays.files}
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile) as error:
        raise ValueError(
            f"{path} is damaged ({error}): delete its folder, and the features are extracted anew"
        ) from error
