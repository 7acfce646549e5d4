"""The output folder of a run: settings, one shard per batch, and in the end one npz in the published layout,
or a PNG for every sample.

    run.json                      the settings and what else is worth a record, written first; totals last
    log.txt, grid.png             what was said, and a look at the first images (not beside PNGs, where it
                                  would count as one)
    shards/000000-000016.npz      images, labels and metrics of a fixed range of sample indices, while the run
                                  lasts
    run.lock                      whose folder it is, while the run lasts
    metrics.jsonl                 what guidance did at each step of each batch, if that was asked for
    samples_NxHxWx3.npz           arr_0: uint8 NHWC, arr_1: int64 labels, in index order
    000000.png ... dataset.json   instead of that npz, of DiT beside it; the labels are in the json, which
                                  comes last, in the layout of EDM's datasets

A file with one of these names is complete: it is written under another name in the same folder, then renamed.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np

_DONE = r"samples_\d+x\d+x\d+x3\.npz|dataset\.json"  # a folder that holds one of these is complete
_PNG = r"\d{6,}\.png"


def read_samples(folder: str | Path) -> tuple[np.ndarray, np.ndarray]:
    """The (N, H, W, 3) uint8 images and (N,) int64 labels of a complete run. Raises FileNotFoundError where
    there are none.
    """
    files = [path for path in finished_files(folder) if path.suffix == ".npz"]
    if not files:
        raise FileNotFoundError(f"no samples_NxHxWx3.npz in {folder}: its run is not complete")
    with np.load(files[0], allow_pickle=False) as samples:
        return samples["arr_0"], samples["arr_1"]


def read_run(folder: str | Path) -> dict:
    """The content of run.json, of a folder or by its own path: settings, and totals once the run is complete.
    Raises ValueError if it is something else.
    """
    path = Path(folder) / "run.json" if Path(folder).is_dir() else Path(folder)
    try:
        run = json.loads(path.read_text())
    except ValueError:
        run = None
    if not isinstance(run, dict) or not isinstance(run.get("settings"), dict):
        raise ValueError(f"{path} was not written by a run: choose another --out, or pass --overwrite True")
    return run


def read_metrics(folder: str | Path) -> Iterator[dict]:
    """The lines of metrics.jsonl, or of the shards of a run that is not complete."""
    path = Path(folder) / "metrics.jsonl"
    for text in [path.read_bytes()] if path.exists() else metrics_of_shards(folder):
        yield from map(json.loads, text.splitlines())


def metrics_of_shards(folder):
    """The lines that each shard holds for metrics.jsonl, as bytes, in the order of the samples; none where it
    holds none.
    """
    for path in shard_files(folder):
        with np.load(path, allow_pickle=False) as shard:
            if "metrics" in shard.files:
                yield shard["metrics"].tobytes()


def finished_files(folder: str | Path) -> list[Path]:
    """What says that the run in a folder is complete: samples_NxHxWx3.npz or dataset.json. Empty while it is
    not.
    """
    return sorted(path for path in Path(folder).glob("*") if re.fullmatch(_DONE, path.name))


def shard_files(folder: str | Path) -> list[Path]:
    """The complete shards of an unfinished run, in the order of their samples."""
    paths = (path for path in Path(folder, "shards").glob("*.npz") if re.fullmatch(r"\d+-\d+", path.stem))
    return sorted(paths, key=lambda path: int(path.stem.partition("-")[0]))


def require_no_leftovers(folder: Path, pictures: bool) -> None:
    """Raise ValueError where a folder without run.json holds samples, or, if `pictures` are to go there, such
    pictures.
    """
    done = finished_files(folder)
    if done and done[0].suffix == ".json":
        raise ValueError(
            f"{folder} holds {done[0].name}, but no run.json that says whose: choose another --out"
        )
    if done or shard_files(folder):
        raise ValueError(
            f"{folder} holds samples but no run.json: choose another --out, or pass --overwrite True"
        )
    if pictures and (others := pngs(folder)):
        raise ValueError(
            f"{folder} holds pictures, such as {others[0].name}, but no run.json that says whose: "
            "choose another --out"
        )


def pngs(folder):
    return [
        path
        for path in [*folder.glob("*.png"), *folder.glob("[0-9]*000/*.png")]
        if re.fullmatch(_PNG, path.name)
    ]
