"""Sets of images in archives: the array of an npz, streamed, and zip files of pictures."""

import io
import math
import zipfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

import numpy as np
from numpy.typing import NDArray

from guided_diffusion.files.images import (
    DAMAGED,
    FolderImages,
    Images,
    RefusedError,
    empty_batch,
    hash_of,
    mixed_sizes,
)


class ArrayImages(Images):
    """The `arr_0` of one npz, or of several in a row."""

    def __init__(self, path: Path, files: list[Path]):
        self._files, shapes = files, [_shape(file) for file in files]
        for file, shape in zip(files, shapes, strict=True):
            if shape[1:] != shapes[0][1:]:
                raise mixed_sizes(path, files[0], shapes[0][1:3], file, shape[1:3])
        self._lengths = [shape[0] for shape in shapes]
        super().__init__(path, sum(self._lengths), shapes[0][1:3])

    def batches(self, batch_size: int, start: int = 0) -> Iterator[NDArray[np.uint8]]:
        remaining = self.entries - start
        batch, filled = empty_batch(min(batch_size, remaining), self.resolution), 0
        for file, length in zip(self._files, self._lengths, strict=True):
            if start >= length:
                start -= length
                continue
            with _opened(file) as (stream, _):
                stream.seek(start * 3 * self.resolution[0] * self.resolution[1], io.SEEK_CUR)
                while start < length:
                    taken = min(length - start, len(batch) - filled)
                    pixels = np.frombuffer(stream.read(batch[:taken].size), np.uint8)
                    batch[filled : filled + taken] = pixels.reshape(taken, *batch.shape[1:])
                    start, filled, remaining = start + taken, filled + taken, remaining - taken
                    if filled == len(batch):
                        yield batch
                        batch, filled = empty_batch(min(batch_size, remaining), self.resolution), 0
            start = 0

    def pick(self, indices: NDArray[np.int64]) -> NDArray[np.uint8]:
        # Streamed once: every start in the middle would read, and decompress, all that comes before.
        picked, filled, size = empty_batch(len(indices), self.resolution), 0, 256
        for start, batch in zip(range(0, self.entries, size), self.batches(size), strict=True):
            rows = indices[(indices >= start) & (indices < start + len(batch))] - start
            picked[filled : filled + len(rows)] = batch[rows]
            filled += len(rows)
        return picked

    def fingerprint(self) -> str:
        checksums = (
            (size, crc) for file in self._files for name, size, crc in _directory(file) if name == "arr_0.npy"
        )
        return hash_of("arrays", *checksums)


@contextmanager
def _opened(file):
    """(stream of the pixels of arr_0, its shape); whatever is wrong with the file, now or while it is read,
    becomes a ValueError.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            names = [name.removesuffix(".npy") for name in archive.namelist()]
            if "arr_0" not in names:
                raise RefusedError(
                    f"{file} has no arr_0, which holds the images in an npz; it holds "
                    f"{', '.join(names) or 'nothing'}; statistics are an npz with mu and sigma"
                )
            with archive.open("arr_0.npy") as stream:
                shape = _read_header(file, stream)
                if stream.tell() + math.prod(shape) != archive.getinfo("arr_0.npy").file_size:
                    raise RefusedError(
                        f"{file} is damaged: arr_0 does not hold as many pixels as its header says"
                    )
                yield stream, shape
    except RefusedError:
        raise
    except DAMAGED as error:
        raise ValueError(f"{file} is truncated or not an npz ({error or type(error).__name__})") from error


def _shape(file):
    with _opened(file) as (_, shape):
        return shape


def _read_header(file, stream):
    version = np.lib.format.read_magic(stream)
    formats = np.lib.format
    read = formats.read_array_header_1_0 if version == (1, 0) else formats.read_array_header_2_0
    shape, fortran, dtype = read(stream)
    if dtype.hasobject:
        raise RefusedError(f"{file}: arr_0 holds Python objects, which are refused; save uint8 images")
    if dtype != np.uint8 or len(shape) != 4 or shape[3] != 3 or 0 in shape[1:] or fortran:
        order = "Fortran" if fortran else "C"
        hint = "; statistics are an npz with mu and sigma" if len(shape) < 3 else ""
        raise RefusedError(
            f"{file}: arr_0 is {dtype} {shape} in {order} order; needed are uint8 images "
            f"(N, height, width, 3) in C order{hint}"
        )
    if shape[0] == 0:
        raise RefusedError(f"{file} holds 0 images")
    return shape


class ZipImages(FolderImages):
    """The pictures in a zip file, as if it were the folder that it was made of."""

    def _listing(self, path):
        try:
            names = [name for name, _, _ in _directory(path) if not name.endswith("/")]
        except DAMAGED as error:
            raise ValueError(f"{path} is truncated or not a zip file ({error})") from error
        self._twice = sorted(name for name, number in Counter(names).items() if number > 1)
        return names

    def _notes_on_listing(self):
        if not self._twice:
            return []
        return [
            f"names that are more than once in the zip: {len(self._twice)}, such as {self._twice[0]}; "
            "each entry counts, and the last one of the name is read for all"
        ]

    @contextmanager
    def _reader(self):
        with zipfile.ZipFile(self.path) as archive:
            yield archive.read

    def _checksums(self):
        names = set(self._names)
        entries = (entry for entry in _directory(self.path) if entry[0] in names)
        return iter(sorted(entries, key=lambda entry: PurePosixPath(entry[0])))


def _directory(file):
    """(name, size, CRC-32) of what a zip file holds."""
    with zipfile.ZipFile(file) as archive:
        return [(info.filename, info.file_size, info.CRC) for info in archive.infolist()]
