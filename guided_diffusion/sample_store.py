"""The output folder of a run: settings, one shard per batch, and in the end one npz in the published layout.

    run.json                      the settings and what else is worth a record, written first; totals are added last
    log.txt, grid.png             what was said, and a look at the first images
    shards/000000-000016.npz      images and labels of a fixed range of sample indices, while the run lasts
    run.lock                      whose folder it is, while the run lasts
    samples_NxHxWx3.npz           arr_0: uint8 NHWC, arr_1: int64 labels, in index order

A file with one of these names is complete: it is written under another name in the same folder, then renamed. This module imports no
other of the project, so that every room may read a folder.
"""

import errno
import fcntl
import json
import math
import os
import re
import shutil
import socket
import zipfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor


class NonFinitePixelsError(ValueError):
    """A sample holds NaN or Inf; `positions` says where in the batch."""

    def __init__(self, positions: list[int]):
        self.positions = positions
        super().__init__(f"non-finite pixels in the samples at batch positions {positions}")


def to_uint8(x: Tensor) -> Tensor:
    """(N, C, H, W) float in [-1, 1] -> (N, H, W, C) uint8 by ADM's rule: (x + 1) * 127.5, clamped and truncated.

    Raises NonFinitePixelsError for a NaN or Inf, which would turn into a black or white pixel.
    """
    bad = ~x.isfinite().flatten(1).all(dim=1)
    if bad.any():
        raise NonFinitePixelsError(bad.nonzero()[:, 0].tolist())
    return ((x + 1) * 127.5).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()


class SampleStore:
    """One folder for `num_samples` images, cut into shards of `shard_size` consecutive indices.

    Opening a folder that holds the same settings continues its run. Raises ValueError where it holds another run's output, with the
    keys that differ, and OSError where it cannot be written. `record` is kept in run.json beside the settings, but not compared.
    """

    def __init__(self, folder: str | Path, settings: dict, num_samples: int, shard_size: int, record: dict | None = None):
        self.folder, self.num_samples, self.shard_size = Path(folder), num_samples, shard_size
        self._shards = self.folder / "shards"
        settings = json.loads(json.dumps({**settings, "num_samples": num_samples, "shard_size": shard_size}))
        if (self.folder / "run.json").exists():
            _require_same(self.folder, read_run(self.folder)["settings"], settings)
        else:
            if self.folder.is_dir() and any(self._leftovers()):
                raise ValueError(f"{self.folder} holds samples but no run.json: choose another --out, or pass --overwrite True")
            self._shards.mkdir(parents=True, exist_ok=True)
            write_json(self.folder / "run.json", {"settings": settings, **(record or {})})

    @staticmethod
    def clear(folder: str | Path) -> None:
        """Remove what a run wrote into `folder` but its log, and nothing else."""
        folder = Path(folder)
        for path in [folder / "run.json", folder / "grid.png", *_finished(folder), *folder.glob(".*.part")]:
            path.unlink(missing_ok=True)
        _remove_shards(folder / "shards")

    def require_space(self, image_bytes: int) -> None:
        """Raise ValueError where the disk has no room for what is missing and for the final npz, at `image_bytes` per image."""
        if self.samples_file():
            return
        needed = (sum(map(len, self.missing())) + self.num_samples) * (image_bytes + 8)
        free = shutil.disk_usage(self.folder).free
        if free < needed:
            raise ValueError(f"{self.folder} needs {needed:,} bytes more, and {free:,} are free: make room, or choose another --out")

    def samples_file(self) -> Path | None:
        """The final npz, if it is there."""
        return next((path for path in _finished(self.folder) if path.name.startswith(f"samples_{self.num_samples}x")), None)

    def missing(self) -> list[range]:
        """The index ranges of the shards that are not complete."""
        if self.samples_file():
            return []
        return [r for r in self._ranges() if not self._shard_file(r).exists()]

    def write(self, indices: range, images: Tensor, labels: Tensor, stats: dict[str, float]) -> None:
        """Keep one shard: (n, H, W, 3) uint8, (n,) int64, and numbers that `finish` adds up over all shards."""
        arrays = {"arr_0": images.cpu().numpy(), "arr_1": labels.cpu().numpy().astype(np.int64)}
        with _told_when_full(self.folder, images.nbytes), renamed_when_complete(self._shard_file(indices)) as file:
            np.savez(file, **arrays, **{f"stat_{key}": np.float64(value) for key, value in stats.items()})

    def finish(self) -> Path:
        """Join the shards into the final npz, draw grid.png, add the totals to run.json, remove the shards. Returns the npz's path.

        The bytes of the npz depend on images and labels alone. One shard is in memory at a time.
        """
        final = self.samples_file()
        if final is None:
            shape = (self.num_samples, *self._read(next(self._ranges()), "arr_0").shape[1:])
            final = self.folder / f"samples_{'x'.join(map(str, shape))}.npz"
            totals = self._totals()
            save_grid(self.folder / "grid.png", [self._grid_images()])
            write_json(self.folder / "run.json", {**read_run(self.folder), "totals": totals})
            size = math.prod(shape)
            with _told_when_full(self.folder, size), renamed_when_complete(final) as file, zipfile.ZipFile(file, "w") as archive:
                _stream(archive, "arr_0", np.uint8, shape, (self._read(r, "arr_0") for r in self._ranges()))
                _stream(archive, "arr_1", np.int64, shape[:1], (self._read(r, "arr_1") for r in self._ranges()))
        _remove_shards(self._shards)
        for left_by_a_kill in self.folder.glob(".*.part"):
            left_by_a_kill.unlink(missing_ok=True)
        return final

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
                totals.update({key.removeprefix("stat_"): float(shard[key]) for key in shard.files if key.startswith("stat_")})
        return dict(totals)

    def _grid_images(self, at_most=64):
        images = []
        for r in self._ranges():
            images.extend(self._read(r, "arr_0")[: at_most - len(images)])
            if len(images) == at_most:
                break
        return np.stack(images)

    def _leftovers(self):
        yield from _finished(self.folder)
        yield from self._shards.glob("*.npz")


@contextmanager
def locked(folder: str | Path) -> Iterator[str | None]:
    """Keep a folder to this process while the block lasts, by a lock on its file run.lock, which says whose it is.

    The system takes the lock from a process that ends, however it ends: what is then left behind in the file is stale, and yielded.
    Raises ValueError, with process and host, where another process holds it, and where the file system has no locks.
    """
    path = Path(folder) / "run.lock"
    with _lock_file(path) as file:
        left_behind = file.read().strip() or None
        file.seek(0)
        file.truncate()
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        try:
            yield left_behind
        finally:
            path.unlink()


def _lock_file(path):
    """Open the lock file and lock it; what another process removed in between is opened anew."""
    while True:
        file = open(path, "a+")  # noqa: SIM115, returned to be closed by the caller
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if path.exists() and os.fstat(file.fileno()).st_ino == path.stat().st_ino:
                file.seek(0)
                return file
            file.close()
        except BlockingIOError:
            file.seek(0)
            owner = file.read().strip() or "a process"
            file.close()
            raise ValueError(f"another run is writing into {path.parent}: {owner}; wait for it, or choose another --out") from None
        except OSError as error:
            file.close()
            raise ValueError(f"cannot lock {path} ({error.strerror}): choose another --out") from error


@contextmanager
def _told_when_full(folder, size):
    try:
        yield
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        free = shutil.disk_usage(folder).free
        left = f"some {size:,} bytes are to be written, and {free:,} are free"
        raise OSError(f"no space left in {folder}: {left}; make room, and the same command goes on") from error


def read_samples(folder: str | Path) -> tuple[np.ndarray, np.ndarray]:
    """The (N, H, W, 3) uint8 images and (N,) int64 labels of a complete run. Raises FileNotFoundError where there are none."""
    files = _finished(Path(folder))
    if not files:
        raise FileNotFoundError(f"no samples_NxHxWx3.npz in {folder}: its run is not complete")
    with np.load(files[0], allow_pickle=False) as samples:
        return samples["arr_0"], samples["arr_1"]


def read_run(folder: str | Path) -> dict:
    """The content of run.json: settings, and totals once the run is complete. Raises ValueError if it is something else."""
    path = Path(folder) / "run.json"
    try:
        run = json.loads(path.read_text())
    except ValueError:
        run = None
    if not isinstance(run, dict) or not isinstance(run.get("settings"), dict):
        raise ValueError(f"{path} was not written by a run: choose another --out, or pass --overwrite True")
    return run


def save_grid(
    path: str | Path,
    groups: list[np.ndarray],
    scale: int = 1,
    columns: int | None = None,
    titles: list[str] | None = None,
) -> None:
    """Draw groups of (n, H, W, 3) uint8 images as one PNG, each in rows of its own, enlarged `scale` times, its title to the left."""
    columns = columns or math.ceil(math.sqrt(max(len(group) for group in groups)))
    blocks = [_tile(group, columns).repeat(scale, axis=0).repeat(scale, axis=1) for group in groups]
    margin = 150 if titles else 0
    picture = Image.new("RGB", (margin + blocks[0].shape[1], sum(len(block) for block in blocks)), "white")
    top = 0
    for block, title in zip(blocks, titles or [""] * len(blocks), strict=True):
        picture.paste(Image.fromarray(block), (margin, top))
        ImageDraw.Draw(picture).multiline_text((8, top + len(block) / 2), title, fill="black", font=ImageFont.load_default(14), anchor="lm")
        top += len(block)
    with renamed_when_complete(path) as file:
        picture.save(file, format="PNG")


def _tile(images, columns):
    """(n, H, W, 3) -> one picture of rows of `columns` images with a white border of one pixel."""
    n, h, w, c = images.shape
    blank = np.full((-n % columns, h, w, c), 255, dtype=np.uint8)
    cells = np.pad(np.concatenate([images, blank]), ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=255)
    rows = cells.reshape(-1, columns, h + 2, w + 2, c).transpose(0, 2, 1, 3, 4)
    return rows.reshape(-1, columns * (w + 2), c)


def _finished(folder):
    return [path for path in folder.glob("samples_*.npz") if re.fullmatch(r"samples_\d+x\d+x\d+x3\.npz", path.name)]


def _remove_shards(folder):
    """Remove the shards, those that a killed process left half written, and the folder if nothing else is in it."""
    for path in [*folder.glob("*.npz"), *folder.glob(".*.part")]:
        if re.fullmatch(r"\.?\d+-\d+\.npz.*", path.name):
            path.unlink()
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()


def _require_same(folder, old, new):
    differing = sorted(key for key in {*old, *new} if old.get(key) != new.get(key))
    if differing:
        changes = ", ".join(f"{key} {old.get(key)!r} -> {new.get(key)!r}" for key in differing)
        raise ValueError(f"{folder} holds another run's output ({changes}): choose another --out, or pass --overwrite True")


@contextmanager
def renamed_when_complete(path: str | Path) -> Iterator[BinaryIO]:
    """Open a file for writing that takes the name `path` once the block ends without an error, and vanishes otherwise."""
    path = Path(path)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with open(part, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def write_json(path: str | Path, content: object) -> None:
    """Write a JSON file that is complete or absent."""
    with renamed_when_complete(path) as file:
        file.write((json.dumps(content, indent=2) + "\n").encode())


def _stream(archive, name, dtype, shape, chunks):
    # A fixed date: the bytes must not depend on when they were written.
    member = zipfile.ZipInfo(f"{name}.npy", date_time=(1980, 1, 1, 0, 0, 0))
    with archive.open(member, "w", force_zip64=True) as file:
        header = {"descr": np.lib.format.dtype_to_descr(np.dtype(dtype)), "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, header)
        for chunk in chunks:
            file.write(np.ascontiguousarray(chunk, dtype=dtype).tobytes())
