"""From images to features, in one pass: what every metric is computed from.

Reading and decoding run in a thread ahead of the network. With a cache folder the features of every few
thousand images are kept as a part:

    NAME-PROTOCOL-KEY/00000000-00002048.npz   pool3 and logits of these entries, what was remarked so far, and the versions used
    NAME-PROTOCOL-KEY/spatial-00002048.npz    the moments of the spatial features of all entries before 2,048

The key is a hash of the network, its weights and the images' fingerprint. A file with one of these names is
complete, and the moments are written before the part that they end with, so that a killed extraction goes on
after its last part, and a complete one extracts nothing.
"""

import hashlib
import json
import zipfile
from collections import Counter, deque
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from evaluation.images import Images, describe
from evaluation.moments import Moments
from guided_diffusion.files.atomic import renamed_when_complete
from guided_diffusion.files.checkpoints import load_state_dict
from guided_diffusion.files.checkpoints import sha256 as sha256_of_file

PART_SIZE = 2048
BATCHES_AHEAD = 4


class FeatureNetwork(Protocol):
    """What `extract` asks of a network: (n, H, W, 3) uint8 -> float32 `pool3` (n, D), `spatial` (n, S) and
    `logits` (n, C).
    """

    name: str
    protocol: str
    sha256: str
    batch_size: int

    def __call__(self, images: NDArray[np.uint8]) -> Mapping[str, NDArray[np.float32]]: ...


@dataclass(frozen=True)
class Features:
    """The features of one set of images, in its order: `pool3` (N, D) and `logits` (N, C), float32; the
    float64 moments of the spatial features; the images' (height, width); and `provenance`, which says by
    JSON-able names and numbers where all this comes from.
    """

    pool3: NDArray[np.float32]
    logits: NDArray[np.float32]
    spatial: Moments
    resolution: tuple[int, int]
    provenance: dict[str, Any]

    @property
    def count(self) -> int:
        """The number of images."""
        return len(self.pool3)


def extract(
    images: Images,
    network: FeatureNetwork,
    *,
    batch_size: int | None = None,
    cache: str | Path | None = None,
    progress: bool = True,
) -> Features:
    """Run every image through the network once, `batch_size` (by default the network's own) at a time.

    `cache` is a folder in which features are kept, as said above; `progress` draws a bar with the time left
    on stderr. Raises ValueError for a batch size below 1, for a damaged cache, for features that are not
    finite, and for what `Images.batches` refuses.
    """
    batch_size = network.batch_size if batch_size is None else batch_size
    if batch_size < 1:
        raise ValueError(f"the batch size is {batch_size}; give 1 or more")
    fingerprint = images.fingerprint()
    parts = _PartFiles(cache, network, fingerprint) if cache is not None else None
    gathered = parts.restore(images.entries) if parts else _Gathered(images.entries)
    if gathered.stop < images.entries:
        with tqdm(
            total=images.entries, initial=gathered.stop, unit="image", desc=images.name, disable=not progress
        ) as bar:
            for part in _parts(images, network, batch_size, gathered, bar):
                gathered.add(part)
                if parts:
                    parts.keep(part, gathered)
    provenance = {
        "images": images.name,
        "features": network.name,
        "protocol": network.protocol,
        "weights_sha256": network.sha256,
        "count": gathered.count,
        "resolution": list(images.resolution),
        "fingerprint": fingerprint,
        "dtype": "float32",
        "device": str(getattr(network, "device", "cpu")),
        "versions": gathered.versions,
        "notes": images.standing_notes + describe(gathered.remarks, images.entries),
    }
    return Features(*gathered.arrays(), gathered.spatial, images.resolution, provenance)


@dataclass
class _Part:
    """The features of the entries start .. stop - 1; `remarks` is about all entries before `stop`."""

    start: int
    stop: int
    pool3: NDArray[np.float32]
    logits: NDArray[np.float32]
    spatial: NDArray[np.float32]
    remarks: Counter[str]


class _Gathered:
    """What all parts so far add up to; the arrays are made once, as large as they can become."""

    def __init__(self, entries: int):
        self._entries, self.stop, self.count = entries, 0, 0
        self.remarks: Counter[str] = Counter()
        self.versions = {
            "torch": torch.__version__,
            "numpy": np.__version__,
            "pytorch_fid": version("pytorch-fid"),
        }
        self.spatial = Moments(0)
        self._pool3 = self._logits = np.empty((0, 0), np.float32)

    def add(self, part: _Part) -> None:
        n = len(part.pool3)
        if self.count == 0:
            self._pool3, self._logits = (
                np.empty((self._entries, x.shape[1]), np.float32) for x in (part.pool3, part.logits)
            )
            self.spatial = Moments(part.spatial.shape[1])
        self._pool3[self.count : self.count + n], self._logits[self.count : self.count + n] = (
            part.pool3,
            part.logits,
        )
        self.spatial.update(part.spatial)
        self.stop, self.count, self.remarks = part.stop, self.count + n, part.remarks

    def arrays(self) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        return self._pool3[: self.count], self._logits[: self.count]

    def no_rows(self) -> dict[str, list[NDArray[np.float32]]]:
        """What the lists of a new part begin with, so that a part in which every image is unreadable has its
        shape.
        """
        if self.count == 0:
            return {"pool3": [], "logits": [], "spatial": []}
        spatial = np.empty((0, self.spatial.mean.size), np.float32)
        return {"pool3": [self._pool3[:0]], "logits": [self._logits[:0]], "spatial": [spatial]}


def _parts(images, network, batch_size, gathered, bar):
    """Yield a _Part for every PART_SIZE entries, and one for the rest; the caller adds it to `gathered`
    before it asks for the next.
    """
    rows, remarks_before = gathered.no_rows(), gathered.remarks
    with closing(_read_ahead(images, batch_size, gathered.stop)) as batches:
        for stop, batch, remarks in batches:
            if len(batch):
                for key, value in network(batch).items():
                    rows[key].append(value)
            bar.update(stop - bar.n)
            if rows["pool3"] and (stop - gathered.stop >= PART_SIZE or stop == images.entries):
                joined = {key: np.concatenate(value) for key, value in rows.items()}
                yield _Part(gathered.stop, stop, remarks=remarks_before + remarks, **joined)
                rows = gathered.no_rows()


def _read_ahead(images, batch_size, start):
    """Yield (entries covered, (n, H, W, 3) uint8, remarks) while a thread reads the next batches; its errors
    come out here.
    """
    batches = images.batches(batch_size, start)

    def read():
        return next(batches, None), Counter(images.remarks)

    pool = ThreadPoolExecutor(1)
    try:
        ahead = deque(pool.submit(read) for _ in range(BATCHES_AHEAD))
        for covered in range(start, images.entries, batch_size):
            batch, remarks = ahead.popleft().result()
            ahead.append(pool.submit(read))
            yield min(covered + batch_size, images.entries), batch, remarks
    finally:
        pool.shutdown(cancel_futures=True)
        batches.close()


class _PartFiles:
    """The parts of one set under one network in a cache folder."""

    def __init__(self, cache: str | Path, network: FeatureNetwork, fingerprint: str):
        key = hashlib.sha256(
            f"{network.name} {network.protocol} {network.sha256} {fingerprint}".encode()
        ).hexdigest()
        self._folder = Path(cache) / f"{network.name}-{network.protocol}-{key[:32]}"
        self._folder.mkdir(parents=True, exist_ok=True)

    def keep(self, part: _Part, gathered: _Gathered) -> None:
        """Write a part that `gathered` ends with."""
        about = json.dumps({"remarks": part.remarks, "versions": gathered.versions})
        with renamed_when_complete(self._spatial_file(part.stop)) as file:
            np.savez(file, **_state(gathered.spatial))
        with renamed_when_complete(self._folder / f"{part.start:08d}-{part.stop:08d}.npz") as file:
            np.savez(file, pool3=part.pool3, logits=part.logits, about=np.array(about))
        if part.start:
            self._spatial_file(part.start).unlink(missing_ok=True)

    def restore(self, entries: int) -> _Gathered:
        """The complete parts in a row, as far as the moments of the spatial features are known too."""
        gathered, paths = _Gathered(entries), self._paths()
        if not paths:
            return gathered
        moments = _moments(**self._read(self._spatial_file(_stop(paths[-1]))))
        for path in paths:
            arrays = self._read(path)
            about = json.loads(str(arrays["about"]))
            spatial = np.empty((0, moments.mean.size), np.float32)
            gathered.add(
                _Part(
                    gathered.stop,
                    _stop(path),
                    arrays["pool3"],
                    arrays["logits"],
                    spatial,
                    Counter(about["remarks"]),
                )
            )
            gathered.versions = about["versions"]
        gathered.spatial = moments
        return gathered

    def _paths(self):
        following = {int(path.stem.partition("-")[0]): path for path in self._folder.glob("[0-9]*-*.npz")}
        paths = []
        while (path := following.get(_stop(paths[-1]) if paths else 0)) is not None:
            paths.append(path)
        while paths and not self._spatial_file(_stop(paths[-1])).exists():
            paths.pop()
        return paths

    def _spatial_file(self, stop):
        return self._folder / f"spatial-{stop:08d}.npz"

    @staticmethod
    def _read(path):
        try:
            with np.load(path, allow_pickle=False) as arrays:
                return {key: arrays[key] for key in arrays.files}
        except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
            raise ValueError(
                f"{path} is damaged ({error}): delete its folder, and the features are extracted anew"
            ) from error


def _stop(path):
    return int(path.stem.partition("-")[2])


def _state(moments):
    return {"count": np.int64(moments.count), "mean": moments.mean, "scatter": moments._scatter}


def _moments(count, mean, scatter):
    """The inverse of `_state`, bit for bit."""
    moments = Moments(len(mean))
    moments.count, moments.mean, moments._scatter = int(count), mean, scatter
    return moments


def read_weights(weights: str | Path | Mapping[str, Tensor]) -> tuple[dict[str, Tensor], str]:
    """A file or a state dict -> (name -> tensor, 64 hexadecimal digits: of the file, or of the names and
    values of the state dict).
    """
    if isinstance(weights, str | Path):
        return load_state_dict(weights), sha256_of_file(weights)
    digest = hashlib.sha256()
    for name, tensor in sorted(weights.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return dict(weights), digest.hexdigest()
