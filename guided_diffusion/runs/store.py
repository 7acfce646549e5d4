"""The output folder of a run while it is written: one shard per batch, and in the end one npz, or a PNG for
every sample.

The layout is in guided_diffusion/files/run_folder.py.
"""

import errno
import json
import math
import re
import shutil
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import chain
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor

from guided_diffusion.files.atomic import PART, renamed_when_complete, write_json
from guided_diffusion.files.grid import save_grid
from guided_diffusion.files.run_folder import (
    finished_files,
    metrics_of_shards,
    pngs,
    read_run,
    require_no_leftovers,
)

DISK_BLOCK = 4096  # what a file takes at least


class SampleStore:
    """One folder for `num_samples` images, cut into shards of `shard_size` consecutive indices.

    Opening a folder that holds the same settings resumes its run. Raises ValueError where it holds another
    run's output, with the keys that differ, and OSError where it cannot be written. `record` is kept in
    run.json beside the settings, but not compared.
    png_name: index -> path of that sample's PNG in the folder; None for one npz. defaults: what a setting
    was before there was a flag for it, so that a new flag at its default leaves older folders theirs. npz_too:
    write the npz beside the PNGs.
    """

    def __init__(
        self,
        folder: str | Path,
        settings: dict,
        num_samples: int,
        shard_size: int,
        record: dict | None = None,
        png_name: Callable[[int], str] | None = None,
        defaults: Mapping[str, object] | None = None,
        npz_too: bool = False,
    ):
        self.folder, self.num_samples, self.shard_size = Path(folder), num_samples, shard_size
        self.png_name, self._npz_too = png_name, npz_too
        self._shards = self.folder / "shards"
        settings = json.loads(json.dumps({**settings, "num_samples": num_samples, "shard_size": shard_size}))
        if (self.folder / "run.json").exists():
            _require_same(self.folder, read_run(self.folder), settings, defaults or {})
        else:
            require_no_leftovers(self.folder, pictures=png_name is not None)
            self._shards.mkdir(parents=True, exist_ok=True)
            write_json(self.folder / "run.json", {"settings": settings, **(record or {})})

    @staticmethod
    def clear(folder: str | Path) -> None:
        """Remove what a run wrote into `folder` but its log, and nothing else; pictures only where a run.json
        says whose they are.
        """
        folder = Path(folder)
        done = finished_files(folder)
        if (folder / "run.json").exists():
            done += [folder / "grid.png", folder / "metrics.jsonl", *pngs(folder)]
        else:
            done = [path for path in done if path.suffix == ".npz"]
        for path in done:
            path.unlink(missing_ok=True)
        _remove_half_written(folder)
        for subfolder in folder.glob("[0-9]*000"):
            _remove_if_empty(subfolder)
        _remove_shards(folder / "shards")
        (folder / "run.json").unlink(missing_ok=True)

    def require_space(self, image_bytes: int) -> None:
        """Raise ValueError where the disk has no room for what is missing and for the final files, at
        `image_bytes` per image.
        """
        if not self.samples_file():
            missing = sum(map(len, self.missing()))
            files = (self.png_name is not None, self._npz_too)
            require_room(self.folder, required_bytes(missing, self.num_samples, image_bytes, *files))

    def samples_file(self) -> Path | None:
        """The final file that is written last, the npz or dataset.json, if it is there."""
        last = "dataset.json" if self.png_name else f"samples_{self.num_samples}x"
        return next((path for path in finished_files(self.folder) if path.name.startswith(last)), None)

    def missing(self) -> list[range]:
        """The index ranges of the shards that are not complete."""
        if self.samples_file():
            return []
        return [r for r in self._ranges() if not self._shard_file(r).exists()]

    def write(
        self,
        indices: range,
        images: Tensor,
        labels: Tensor,
        stats: dict[str, float],
        metrics: list[dict] | None = None,
    ) -> None:
        """Keep one shard: (n, H, W, 3) uint8, (n,) int64, numbers that `finish` adds up over all shards, and
        lines for metrics.jsonl.
        """
        arrays = {"arr_0": images.cpu().numpy(), "arr_1": labels.cpu().numpy().astype(np.int64)}
        if metrics:
            about = {"samples": [indices.start, indices.stop]}
            lines = "".join(json.dumps(about | line) + "\n" for line in metrics)
            arrays["metrics"] = np.frombuffer(lines.encode(), np.uint8)
        arrays |= {f"stat_{key}": np.float64(value) for key, value in stats.items()}
        with _complete_or_told(self._shard_file(indices), images.nbytes) as file:
            np.savez(file, **arrays)

    def finish(self) -> Path:
        """Join the shards into their final form, draw grid.png, add the totals to run.json, remove the
        shards.

        Returns the path of the npz, or of dataset.json. The bytes of the final files depend on images and
        labels alone. One shard is in memory at a time.
        """
        final = self.samples_file()
        if final is None:
            shape = (self.num_samples, *self._read(next(self._ranges()), "arr_0").shape[1:])
            write_json(self.folder / "run.json", {**read_run(self.folder), "totals": self._totals()})
            self._join_metrics()
            if not self.png_name:
                save_grid(self.folder / "grid.png", [self._grid_images()])
            if self._npz_too or not self.png_name:
                final = self._write_npz(shape)
            if self.png_name:
                final = self._write_pngs()
        _remove_shards(self._shards)
        _remove_half_written(self.folder)
        return final

    def _write_npz(self, shape):
        final = self.folder / f"samples_{'x'.join(map(str, shape))}.npz"
        with _complete_or_told(final, math.prod(shape)) as file, zipfile.ZipFile(file, "w") as archive:
            _stream(archive, "arr_0", np.uint8, shape, (self._read(r, "arr_0") for r in self._ranges()))
            _stream(archive, "arr_1", np.int64, shape[:1], (self._read(r, "arr_1") for r in self._ranges()))
        return final

    def _write_pngs(self):
        labels = []
        for r in self._ranges():
            for index, image, label in zip(r, self._read(r, "arr_0"), self._read(r, "arr_1"), strict=True):
                path = self.folder / self.png_name(index)
                path.parent.mkdir(exist_ok=True)
                with _complete_or_told(path, image.nbytes) as file:
                    Image.fromarray(image).save(file, format="PNG")
                labels.append([self.png_name(index), int(label)])
        write_json(self.folder / "dataset.json", {"labels": labels})
        return self.folder / "dataset.json"

    def _join_metrics(self):
        lines = metrics_of_shards(self.folder)
        if first := next(lines, b""):
            with _complete_or_told(self.folder / "metrics.jsonl", len(first)) as file:
                file.writelines(chain([first], lines))

    def _ranges(self) -> Iterator[range]:
        for start in range(0, self.num_samples, self.shard_size):
            yield range(start, min(start + self.shard_size, self.num_samples))

    def _shard_file(self, indices):
        return self._shards / f"{indices.start:06d}-{indices.stop:06d}.npz"

    def _read(self, indices, key):
        with np.load(self._shard_file(indices), allow_pickle=False) as shard:
            return shard[key]

    def _totals(self):
        totals = Counter()
        for indices in self._ranges():
            with np.load(self._shard_file(indices), allow_pickle=False) as shard:
                keys = [key for key in shard.files if key.startswith("stat_")]
                totals.update({key.removeprefix("stat_"): float(shard[key]) for key in keys})
        return dict(totals)

    def _grid_images(self, at_most=64):
        images = []
        for r in self._ranges():
            images.extend(self._read(r, "arr_0")[: at_most - len(images)])
            if len(images) == at_most:
                break
        return np.stack(images)


@contextmanager
def _complete_or_told(path, size):
    """`renamed_when_complete`, where a full disk is an error that says what is wanted."""
    try:
        with renamed_when_complete(path) as file:
            yield file
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        free = shutil.disk_usage(path.parent).free
        wanted = f"some {size:,} bytes are to be written, and {free:,} are free"
        raise OSError(
            f"no space left in {path.parent}: {wanted}; make room, and the same command resumes"
        ) from error


def required_bytes(
    missing: int, num_samples: int, image_bytes: int, pngs: bool, npz_too: bool = False
) -> int:
    """The room on disk that the shards of `missing` samples and the final npz, or the PNGs, or both need."""
    packed = image_bytes + 8
    final = (math.ceil(image_bytes / DISK_BLOCK) + 1) * DISK_BLOCK if pngs else 0
    final += packed if npz_too or not pngs else 0
    return missing * packed + num_samples * final


def require_room(folder: Path, needed: int) -> int:
    """The bytes that are free on the disk of a folder, which need not exist yet. Raises ValueError where they
    are fewer than `needed`.
    """
    free = shutil.disk_usage(existing_parent(folder)).free
    if free < needed:
        raise ValueError(
            f"{folder} needs {needed:,} bytes more, and {free:,} are free: make room, or choose another --out"
        )
    return free


def existing_parent(folder: Path) -> Path:
    """The folder itself, or the nearest one above it that exists."""
    return next(path for path in [folder, *folder.absolute().parents] if path.exists())


def _remove_shards(folder):
    """Remove the shards, those that a killed process left half written, and the folder if nothing else is in
    it.
    """
    for path in [*folder.glob("*.npz"), *folder.glob(".*.part")]:
        if re.fullmatch(r"\.?\d+-\d+\.npz.*", path.name):
            path.unlink()
    _remove_if_empty(folder)


def _remove_half_written(folder):
    """Remove what a killed process left under a name of its own."""
    for path in [*folder.glob(".*.part"), *folder.glob("[0-9]*000/.*.part")]:
        if re.fullmatch(PART, path.name):
            path.unlink(missing_ok=True)


def _remove_if_empty(folder):
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()


def _require_same(folder, run, new, defaults):
    unknown_then = new.keys() - run["settings"].keys() - run.get("not_compared", {}).keys()
    old = {**{key: defaults[key] for key in unknown_then & defaults.keys()}, **run["settings"]}
    differing = sorted(key for key in {*old, *new} if old.get(key) != new.get(key))
    if differing:
        changes = ", ".join(f"{key} {old.get(key)!r} -> {new.get(key)!r}" for key in differing)
        raise ValueError(
            f"{folder} holds another run's output ({changes}): choose another --out, or pass --overwrite True"
        )


def _stream(archive, name, dtype, shape, chunks):
    # A fixed date: the bytes must not depend on when they were written.
    member = zipfile.ZipInfo(f"{name}.npy", date_time=(1980, 1, 1, 0, 0, 0))
    with archive.open(member, "w", force_zip64=True) as file:
        descr = np.lib.format.dtype_to_descr(np.dtype(dtype))
        header = {"descr": descr, "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, header)
        for chunk in chunks:
            file.write(np.ascontiguousarray(chunk, dtype=dtype).tobytes())
