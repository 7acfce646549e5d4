"""Sets of images on disk, read as a stream of uint8 batches: what all of them can do, how one picture is
decoded, and folders of pictures. npz and zip: archives. By their path: image_sets.

Nothing here holds more than one batch, and no file is opened before its turn but the first picture and the
headers of npz files.
"""

import hashlib
import io
import os
import struct
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path, PurePosixPath

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

# The endings that pytorch-fid reads, in capitals too.
ENDINGS = (".bmp", ".jpg", ".jpeg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
FORMATS = ("PNG", "JPEG", "BMP", "PPM", "TIFF", "WEBP")
# What a run, or a data set of EDM's, keeps beside its pictures: nobody misses them among the images.
RECORDS = ("run.json", "run.lock", "log.txt", "metrics.jsonl", "dataset.json")
LOSSY = "JPEG, whose compression changes the features that are compared"
LOSSY_WEBP = "WebP, whose compression changes the features that are compared"
FIRST_FRAME = "several frames, only the first is read"
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


class RefusedError(ValueError):
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
        """(n, H, W, 3): the images at these entries, which ascend, in one pass; fewer where some are
        unreadable and skipped. Errors: see `batches`.
        """
        raise NotImplementedError

    def fingerprint(self) -> str:
        """64 hexadecimal digits that change when any pixel, the order or the number of the images changes.

        Hashed are names, sizes and CRC-32, which npz and zip record in their directories; a folder's files
        are read once. A folder and a zip of it have the same fingerprint.
        """
        raise NotImplementedError


def describe(remarks: Counter[str], entries: int) -> list[str]:
    """One line for each remark, with the number of the images that it is about."""
    return [f"{number} of {entries} images: {text}" for text, number in sorted(remarks.items())]


class FolderImages(Images):
    """The pictures in a folder and in the folders below it, in the order of their relative paths.

    Links are followed. A file that is reached by two paths counts twice, as torchvision's ImageFolder counts
    it; a link back to a folder that it lies in is not entered.
    """

    def __init__(self, path: Path, skip_unreadable: bool):
        self._skip = skip_unreadable
        files = [name for name in self._listing(path) if not _is_hidden(name)]
        self._names = sorted(filter(_is_picture, files), key=PurePosixPath)
        left_out = describe_left_out([name for name in files if not _is_picture(name)])
        if not self._names:
            endings = " ".join(ENDINGS)
            raise ValueError(
                "; ".join([f"{path} holds 0 images: no file in it ends in {endings}", *left_out])
            )
        super().__init__(path, len(self._names), (0, 0))
        with self._reader() as read:
            decoded = ((name, self._image(read, name, Counter())) for name in self._names)
            readable = next((pair for pair in decoded if pair[1] is not None), None)
        if readable is None:
            raise ValueError(f"{path} holds 0 readable images: all {self.entries} files are damaged")
        self._first, self.resolution = readable[0], readable[1].shape[:2]
        self.standing_notes += [*self._notes_on_listing(), *left_out]

    def batches(self, batch_size: int, start: int = 0) -> Iterator[NDArray[np.uint8]]:
        self.remarks.clear()
        with self._reader() as read:
            for first in range(start, self.entries, batch_size):
                yield self._load(read, self._names[first : first + batch_size], self.remarks)

    def pick(self, indices: NDArray[np.int64]) -> NDArray[np.uint8]:
        with self._reader() as read:  # opened once: to open a large zip takes longer than to read a picture
            return self._load(read, [self._names[index] for index in indices], Counter())

    def fingerprint(self) -> str:
        return hash_of("pictures", self._skip, *self._checksums())

    def _load(self, read, names, remarks):
        """(n, H, W, 3): the pictures of these names, but for the unreadable ones that may be skipped."""
        batch, filled = empty_batch(len(names), self.resolution), 0
        for name in names:
            image = self._image(read, name, remarks)
            if image is not None:
                if image.shape[:2] != self.resolution:
                    raise mixed_sizes(self.path, self._first, self.resolution, name, image.shape[:2])
                batch[filled] = image
                filled += 1
        return batch[:filled]

    def _image(self, read, name, remarks):
        """(H, W, 3) uint8, or None for a damaged file that may be skipped."""
        try:
            image, met = decode(read(name))
        except RefusedError as error:
            raise ValueError(f"{self.path / name} {error}") from error
        except DAMAGED as error:
            if not self._skip:
                unknown = isinstance(error, UnidentifiedImageError)
                why = "no picture that is read" if unknown else str(error) or type(error).__name__
                problem = f"{self.path / name} is damaged ({why}); --skip_unreadable leaves it out"
                raise ValueError(problem) from error
            remarks[SKIPPED] += 1
            return None
        remarks.update(met)
        return image

    def _listing(self, path: Path) -> list[str]:
        self._nowhere: list[str] = []
        names = list(self._walk(path, "", ()))
        if self._nowhere and not self._skip:
            raise ValueError(
                f"{path / self._nowhere[0]} is a link that leads nowhere{_and_more(self._nowhere)}: "
                "mend or remove it; --skip_unreadable leaves it out"
            )
        return names

    def _walk(self, folder, prefix, above):
        """Yield the relative paths of the files below a folder; `above` identifies the folders around it."""
        status = os.stat(folder)
        here = status.st_dev, status.st_ino
        if here in above:  # a link back up, which would go round for ever
            return
        with os.scandir(folder) as entries:
            found = [entry for entry in entries if not entry.name.startswith(".")]
        for entry in found:
            if os.path.isdir(entry):
                yield from self._walk(entry.path, f"{prefix}{entry.name}/", (*above, here))
            elif os.path.isfile(entry):
                yield prefix + entry.name
            elif entry.is_symlink():  # its target is gone, or it leads to itself
                self._nowhere.append(prefix + entry.name)

    def _notes_on_listing(self) -> list[str]:
        if not self._nowhere:
            return []
        return [f"links that lead nowhere, left out: {len(self._nowhere)}, such as {min(self._nowhere)}"]

    def _reader(self) -> AbstractContextManager[Callable[[str], bytes]]:
        return nullcontext(lambda name: (self.path / name).read_bytes())

    def _checksums(self) -> Iterator[tuple[str, int, int]]:
        for name in self._names:
            content = (self.path / name).read_bytes()
            yield name, len(content), zlib.crc32(content)


def describe_left_out(names: list[str]) -> list[str]:
    """[a line about files that are not read as pictures, counted by their endings]; [] for none of them."""
    others = [name for name in map(PurePosixPath, names) if name.name not in RECORDS]
    if not others:
        return []
    endings = Counter(name.suffix.lower() or "without an ending" for name in others)
    counted = ", ".join(f"{number} {ending}" for ending, number in sorted(endings.items()))
    return [f"{len(others)} file{'s' if len(others) > 1 else ''} left out, not read as pictures: {counted}"]


def decode(data: bytes) -> tuple[NDArray[np.uint8], tuple[str, ...]]:
    """The bytes of a picture file -> ((H, W, 3) uint8, what to remark).

    Raises RefusedError for alpha, more than 8 bits per channel and other modes, and what DAMAGED lists.
    """
    with Image.open(io.BytesIO(data), formats=FORMATS) as picture:
        if (bits := _bits_per_channel(data, picture)) > 8:
            raise RefusedError(f"has {bits} bits per channel; save it with 8")
        if "A" in picture.getbands() or "transparency" in picture.info:
            raise RefusedError("has an alpha channel; save it as RGB over the background it should have")
        if picture.mode not in REMARKS_BY_MODE:
            raise RefusedError(f"is of mode {picture.mode}; save it as RGB")
        remarks = REMARKS_BY_MODE[picture.mode] + _remarks_on_file(data, picture)
        return np.asarray(picture.convert("RGB")), remarks


def _bits_per_channel(data, picture):
    """Pillow reads some pictures of 16 bits as if they had 8: what the file itself says counts."""
    if data.startswith(b"\x89PNG"):
        return data[24]
    if picture.format == "TIFF":
        bits = picture.tag_v2.get(258, 1)  # BitsPerSample, of one channel or of each
        return max(bits) if isinstance(bits, tuple) else bits
    if picture.format == "PPM":  # "P6", width, height and the largest value, with comments between them
        words = b" ".join(line.partition(b"#")[0] for line in data[:4096].splitlines()).split()
        return 16 if data[:2] in (b"P2", b"P3", b"P5", b"P6") and int(words[3]) > 255 else 8
    return 8


def _remarks_on_file(data, picture):
    remarks = (FIRST_FRAME,) if getattr(picture, "n_frames", 1) > 1 else ()
    if picture.format == "JPEG" or picture.info.get("compression") in ("jpeg", "tiff_jpeg"):
        remarks += (LOSSY,)
    # The first chunk of a WebP file without loss is VP8L.
    if picture.format == "WEBP" and data[12:16] != b"VP8L":
        remarks += (LOSSY_WEBP,)
    return remarks


def _is_hidden(name):
    return any(part.startswith(".") for part in PurePosixPath(name).parts)


def _is_picture(name):
    return name.lower().endswith(ENDINGS)


def _and_more(names):
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""


def empty_batch(n: int, resolution: tuple[int, int]) -> NDArray[np.uint8]:
    """(n, H, W, 3) uint8, not yet filled."""
    return np.empty((n, *resolution, 3), dtype=np.uint8)


def mixed_sizes(path, first, one, second, other) -> ValueError:
    """The error about two pictures, `first` of (height, width) `one` and `second` of `other`."""
    sizes = f"{first} is {one[0]}x{one[1]}, {second} is {other[0]}x{other[1]} (HxW)"
    return ValueError(f"{path} holds images of different sizes: {sizes}")


def hash_of(*parts) -> str:
    """SHA-256 of what these parts look like in Python."""
    return hashlib.sha256(repr(parts).encode()).hexdigest()
