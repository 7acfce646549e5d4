"""Sets of images on disk, read as a stream of uint8 batches: npz files, folders, zip files, and the output
folders of this project.

Nothing here holds more than one batch, and no file is opened before its turn but the first picture and the
headers of npz files.
"""

import hashlib
import io
import math
import struct
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path, PurePosixPath

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from guided_diffusion.files.run_folder import finished_files, read_run, shard_files

ENDINGS = (".png", ".jpg", ".jpeg")
LOSSY = "JPEG, whose compression changes the features that are compared"
SKIPPED = "unreadable, skipped"
GREY = ("grey, converted to RGB",)
REMARKS_BY_MODE = {"RGB": (), "L": GREY, "1": GREY, "P": ("palette, converted to RGB",)}
# What zipfile, zlib and Pillow raise for a damaged file
DAMAGED = (
    OSError,
    ValueError,
    SyntaxError,
    EOFError,
    RuntimeError,
    struct.error,
    zlib.error,
    zipfile.BadZipFile,
    Image.DecompressionBombError,
)


class _Refused(ValueError):
    """Bad input that is already described."""


class Images:
    """A set of images of one size, as `open_images` returns it.

    `name` is the file's or folder's; `entries` counts the images, unreadable picture files included;
    `resolution` is (height, width); `remarks` counts, by its text, what the latest pass over `batches` met;
    `standing_notes` are true without a pass.
    """

    def __init__(self, path: Path, entries: int, resolution: tuple[int, int]):
        self.path, self.name, self.entries, self.resolution = path, path.resolve().name, entries, resolution
        self.remarks: Counter[str] = Counter()
        self.standing_notes: list[str] = []

    @property
    def count(self) -> int:
        """The number of images: `entries`, less those that the latest pass had to skip."""
        return self.entries - self.remarks[SKIPPED]

    @property
    def notes(self) -> list[str]:
        """One line for each thing to know about the set, among them the remarks of the latest pass."""
        return self.standing_notes + describe(self.remarks, self.entries)

    def batches(self, batch_size: int, start: int = 0) -> Iterator[NDArray[np.uint8]]:
        """Yield (n, H, W, 3) uint8 arrays, beginning at entry `start`. Each covers `batch_size` entries, the
        last one the rest.

        With skip_unreadable an array may hold fewer images than it covers entries, even none. Raises
        ValueError for a picture that is damaged, of another size, with alpha or with 16 bits, and for a
        damaged npz.
        """
        raise NotImplementedError

    def pick(self, indices: NDArray[np.int64]) -> NDArray[np.uint8]:
        """(n, H, W, 3): the images at these entries, which ascend; fewer where some are unreadable and
        skipped. Errors: see `batches`.
        """
        raise NotImplementedError

    def fingerprint(self) -> str:
        """64 hexadecimal digits that change when any pixel, the order or the number of the images changes.

        Hashed are names, sizes and CRC-32, which npz and zip record in their directories; a folder's files
        are read once. A folder and a zip of it have the same fingerprint.
        """
        raise NotImplementedError


def open_images(path: str | Path, *, skip_unreadable: bool = False) -> Images:
    """Open an npz (`arr_0`: uint8 NHWC), a zip or folder of PNG and JPEG files, or an output folder of this
    project.

    Folders are read recursively, in the order of the relative paths; hidden and other files are ignored. Of
    an output folder only the samples are read: samples_*.npz, or the shards of an unfinished run in the order
    of their indices. With skip_unreadable, damaged pictures are skipped and counted, not refused. Raises
    FileNotFoundError, and ValueError for anything that is not such a set.
    """
    path = Path(path)
    if path.is_dir():
        return _open_folder(path, skip_unreadable)
    if not path.exists():
        raise FileNotFoundError(f"there is nothing at {path}; give an npz, a zip or a folder of images")
    if path.suffix == ".npz":
        return _Arrays(path, [path])
    if path.suffix == ".zip":
        return _ZippedPictures(path, skip_unreadable)
    raise ValueError(f"cannot read images from {path}: give an npz, a zip or a folder of PNG or JPEG files")


def pick_images(images: Images, count: int, seed: int = 0) -> NDArray[np.uint8]:
    """(count, H, W, 3) random images of a set, in its order; fewer where it has fewer, or where some are
    unreadable and skipped.
    """
    return images.pick(np.sort(np.random.RandomState(seed).permutation(images.entries)[:count]))


def describe(remarks: Counter[str], entries: int) -> list[str]:
    """One line for each remark, with the number of the images that it is about."""
    return [f"{number} of {entries} images: {text}" for text, number in sorted(remarks.items())]


def _open_folder(folder, skip_unreadable):
    finished = finished_files(folder)
    if finished and finished[0].suffix == ".json":
        return _Pictures(folder, skip_unreadable)
    if len(finished) > 1:
        raise ValueError(
            f"{folder} holds {len(finished)} sample files ({finished[0].name}, {finished[1].name}, ...): give one of them"
        )
    if finished:
        return _Arrays(folder, finished)
    if shards := shard_files(folder):
        images = _Arrays(folder, shards)
        images.standing_notes.append(
            f"unfinished run: {images.entries} of {read_run(folder)['settings'].get('num_samples')} images"
        )
        return images
    if (folder / "run.json").is_file():
        raise ValueError(f"{folder} holds 0 images: its run has not completed a shard yet")
    return _Pictures(folder, skip_unreadable)


class _Arrays(Images):
    """The `arr_0` of one npz, or of several in a row."""

    def __init__(self, path: Path, files: list[Path]):
        self._files, shapes = files, [_shape(file) for file in files]
        for file, shape in zip(files, shapes, strict=True):
            if shape[1:] != shapes[0][1:]:
                raise _mixed_sizes(path, files[0], shapes[0][1:3], file, shape[1:3])
        self._lengths = [shape[0] for shape in shapes]
        super().__init__(path, sum(self._lengths), shapes[0][1:3])

    def batches(self, batch_size: int, start: int = 0) -> Iterator[NDArray[np.uint8]]:
        batch, filled, remaining = (
            _empty(min(batch_size, self.entries - start), self.resolution),
            0,
            self.entries - start,
        )
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
                        batch, filled = _empty(min(batch_size, remaining), self.resolution), 0
            start = 0

    def pick(self, indices: NDArray[np.int64]) -> NDArray[np.uint8]:
        # Streamed once: every start in the middle would read, and decompress, all that comes before.
        picked, filled, size = _empty(len(indices), self.resolution), 0, 256
        for start, batch in zip(range(0, self.entries, size), self.batches(size), strict=True):
            rows = indices[(indices >= start) & (indices < start + len(batch))] - start
            picked[filled : filled + len(rows)] = batch[rows]
            filled += len(rows)
        return picked

    def fingerprint(self) -> str:
        checksums = (
            (size, crc) for file in self._files for name, size, crc in _directory(file) if name == "arr_0.npy"
        )
        return _hash("arrays", *checksums)


@contextmanager
def _opened(file):
    """(stream of the pixels of arr_0, its shape); whatever is wrong with the file, now or while it is read,
    becomes a ValueError.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            if "arr_0.npy" not in archive.namelist():
                held = ", ".join(name.removesuffix(".npy") for name in archive.namelist())
                raise _Refused(
                    f"{file} has no arr_0, which holds the images in an npz; it holds {held or 'nothing'}"
                )
            with archive.open("arr_0.npy") as stream:
                shape = _read_header(file, stream)
                if stream.tell() + math.prod(shape) != archive.getinfo("arr_0.npy").file_size:
                    raise _Refused(
                        f"{file} is damaged: arr_0 does not hold as many pixels as its header says"
                    )
                yield stream, shape
    except _Refused:
        raise
    except DAMAGED as error:
        raise ValueError(f"{file} is truncated or not an npz ({error or type(error).__name__})") from error


def _shape(file):
    with _opened(file) as (_, shape):
        return shape


def _read_header(file, stream):
    short = np.lib.format.read_magic(stream) == (1, 0)
    shape, fortran, dtype = (
        np.lib.format.read_array_header_1_0 if short else np.lib.format.read_array_header_2_0
    )(stream)
    if dtype.hasobject:
        raise _Refused(f"{file}: arr_0 holds Python objects, which are refused; save uint8 images")
    if dtype != np.uint8 or len(shape) != 4 or shape[3] != 3 or 0 in shape[1:] or fortran:
        order = "Fortran" if fortran else "C"
        raise _Refused(
            f"{file}: arr_0 is {dtype} {shape} in {order} order; needed are uint8 images (N, height, width, 3) in C order"
        )
    if shape[0] == 0:
        raise _Refused(f"{file} holds 0 images")
    return shape


class _Pictures(Images):
    """PNG and JPEG files in a folder."""

    def __init__(self, path: Path, skip_unreadable: bool):
        self._skip = skip_unreadable
        self._names = sorted(filter(_is_picture, self._listing(path)), key=PurePosixPath)
        if not self._names:
            raise ValueError(f"{path} holds 0 images: no PNG or JPEG file in it")
        super().__init__(path, len(self._names), (0, 0))
        with self._reader() as read:
            decoded = ((name, self._image(read, name)) for name in self._names)
            readable = next((pair for pair in decoded if pair[1] is not None), None)
        if readable is None:
            raise ValueError(f"{path} holds 0 readable images: all {self.entries} files are damaged")
        self._first, self.resolution = readable[0], readable[1].shape[:2]
        self.remarks.clear()

    def batches(self, batch_size: int, start: int = 0) -> Iterator[NDArray[np.uint8]]:
        self.remarks.clear()
        with self._reader() as read:
            for first in range(start, self.entries, batch_size):
                names = self._names[first : first + batch_size]
                batch, filled = _empty(len(names), self.resolution), 0
                for name in names:
                    image = self._image(read, name)
                    if image is not None:
                        if image.shape[:2] != self.resolution:
                            raise _mixed_sizes(self.path, self._first, self.resolution, name, image.shape[:2])
                        batch[filled] = image
                        filled += 1
                yield batch[:filled]

    def pick(self, indices: NDArray[np.int64]) -> NDArray[np.uint8]:
        return np.concatenate([next(self.batches(1, int(index))) for index in indices])

    def fingerprint(self) -> str:
        return _hash("pictures", self._skip, *self._checksums())

    def _image(self, read, name):
        """(H, W, 3) uint8, or None for a damaged file that may be skipped."""
        try:
            image, remarks = _decode(read(name))
        except _Refused as error:
            raise ValueError(f"{self.path / name} {error}") from error
        except DAMAGED as error:
            if not self._skip:
                why = (
                    "no PNG or JPEG"
                    if isinstance(error, UnidentifiedImageError)
                    else str(error) or type(error).__name__
                )
                raise ValueError(
                    f"{self.path / name} is damaged ({why}); --skip_unreadable leaves it out"
                ) from error
            self.remarks[SKIPPED] += 1
            return None
        self.remarks.update(remarks)
        return image

    def _listing(self, path: Path) -> list[str]:
        return [
            file.relative_to(path).as_posix()
            for file in path.rglob("*")
            if file.suffix.lower() in ENDINGS and file.is_file()
        ]

    def _reader(self) -> AbstractContextManager[Callable[[str], bytes]]:
        return nullcontext(lambda name: (self.path / name).read_bytes())

    def _checksums(self) -> Iterator[tuple[str, int, int]]:
        for name in self._names:
            content = (self.path / name).read_bytes()
            yield name, len(content), zlib.crc32(content)


class _ZippedPictures(_Pictures):
    """The same in a zip file."""

    def _listing(self, path):
        try:
            return [name for name, _, _ in _directory(path)]
        except DAMAGED as error:
            raise ValueError(f"{path} is truncated or not a zip file ({error})") from error

    @contextmanager
    def _reader(self):
        with zipfile.ZipFile(self.path) as archive:
            yield archive.read

    def _checksums(self):
        return iter(
            sorted(
                (entry for entry in _directory(self.path) if _is_picture(entry[0])),
                key=lambda e: PurePosixPath(e[0]),
            )
        )


def _is_picture(name):
    parts = PurePosixPath(name).parts
    return name.lower().endswith(ENDINGS) and not any(part.startswith(".") for part in parts)


def _decode(data):
    """The bytes of a PNG or JPEG file -> ((H, W, 3) uint8, what to remark)."""
    # Pillow reads a 16-bit PNG as if it had 8; its header says so: bit depth is byte 24.
    if data.startswith(b"\x89PNG") and data[24:25] == b"\x10":
        raise _Refused("has 16 bits per channel; save it with 8")
    with Image.open(io.BytesIO(data), formats=("PNG", "JPEG")) as picture:
        if "A" in picture.getbands() or "transparency" in picture.info:
            raise _Refused("has an alpha channel; save it as RGB over the background it should have")
        if picture.mode not in REMARKS_BY_MODE:
            raise _Refused(f"is of mode {picture.mode}; save it as RGB")
        lossy = (LOSSY,) if picture.format == "JPEG" else ()
        return np.asarray(picture.convert("RGB")), REMARKS_BY_MODE[picture.mode] + lossy


def _empty(n, resolution):
    return np.empty((n, *resolution, 3), dtype=np.uint8)


def _mixed_sizes(path, first, one, second, other):
    return ValueError(
        f"{path} holds images of different sizes: {first} is {one[0]}x{one[1]}, {second} is {other[0]}x{other[1]} (HxW)"
    )


def _directory(file):
    """(name, size, CRC-32) of what a zip file holds."""
    with zipfile.ZipFile(file) as archive:
        return [(info.filename, info.file_size, info.CRC) for info in archive.infolist()]


def _hash(*parts):
    return hashlib.sha256(repr(parts).encode()).hexdigest()
