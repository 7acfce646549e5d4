"""From images to features, in one pass: what every metric is computed from.

Reading and decoding run in a thread ahead of the network. With a cache folder the features of every few
thousand images are kept as a part (see parts), so that a killed extraction resumes after its last part, and a
complete one extracts nothing. The cache has a folder NAME-PROTOCOL-KEY for each set under each network; the
key is a hash of the network, its weights and the images' fingerprint.
"""

import hashlib
from collections import Counter, defaultdict, deque
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from evaluation.moments import Moments
from evaluation.parts import KEPT, Gathered, Part, PartFiles
from guided_diffusion.files.images import Images, describe

PART_SIZE = 2048
BATCHES_AHEAD = 4


class FeatureNetwork(Protocol):
    """What `extract` asks of a network: (n, H, W, 3) uint8 -> float32 arrays by name.

    `pool3` (n, D) must be there. `logits` (n, C), for the Inception Score, and `spatial` (n, S), for sFID,
    are what some networks have; without them these metrics are left out. A network may say by a tuple of
    names, `outputs`, what it gives: that counts for statistics, of which no image is seen.
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
    JSON-able names and numbers where all this comes from. None for what the network does not give.
    """

    pool3: NDArray[np.float32]
    logits: NDArray[np.float32] | None
    spatial: Moments | None
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
    on stderr. Raises ValueError for a batch size below 1, for a network without `pool3`, for a damaged cache,
    for features that are not finite, and for what `Images.batches` refuses.
    """
    batch_size = network.batch_size if batch_size is None else batch_size
    if batch_size < 1:
        raise ValueError(f"the batch size is {batch_size}; give 1 or more")
    fingerprint = images.fingerprint()
    files = PartFiles(_cache_folder(cache, network, fingerprint)) if cache is not None else None
    gathered = files.restore(images.entries) if files else Gathered(images.entries)
    if gathered.stop < images.entries:
        with tqdm(
            total=images.entries, initial=gathered.stop, unit="image", desc=images.name, disable=not progress
        ) as bar:
            for part in _parts(images, network, batch_size, gathered, bar):
                gathered.add(part)
                if files:
                    files.keep(part, gathered)
    arrays = gathered.arrays()
    provenance = {
        "images": images.name,
        "features": network.name,
        "protocol": network.protocol,
        "weights_sha256": network.sha256,
        "outputs": [*arrays, *(["spatial"] if gathered.spatial else [])],
        "count": gathered.count,
        "resolution": list(images.resolution),
        "fingerprint": fingerprint,
        "dtype": "float32",
        "device": str(getattr(network, "device", "cpu")),
        "versions": gathered.versions,
        "notes": images.standing_notes + describe(gathered.remarks, images.entries),
    }
    return Features(
        arrays.get("pool3", np.empty((0, 0), np.float32)),
        arrays.get("logits"),
        gathered.spatial,
        images.resolution,
        provenance,
    )


def _cache_folder(cache, network, fingerprint):
    identity = f"{network.name} {network.protocol} {network.sha256} {fingerprint}"
    key = hashlib.sha256(identity.encode()).hexdigest()[:32]
    return Path(cache) / f"{network.name}-{network.protocol}-{key}"


def _parts(images, network, batch_size, gathered, bar):
    """Yield a Part for every PART_SIZE entries, and one for the rest.

    The caller adds each to `gathered` before it asks for the next. A part ends with a batch, so that it may
    be larger; and it waits for the first readable image, which shows the sizes of the features.
    """
    rows, remarks_before = _rows(gathered), gathered.remarks
    with closing(_read_ahead(images, batch_size, gathered.stop)) as batches:
        for stop, batch, remarks in batches:
            if len(batch):
                for key, value in _outputs(network, batch).items():
                    rows[key].append(value)
            bar.update(stop - bar.n)
            if rows["pool3"] and (stop - gathered.stop >= PART_SIZE or stop == images.entries):
                joined = {key: np.concatenate(value) for key, value in rows.items() if value}
                # What an older part has, but not this one, is of no use.
                given = {key: value for key, value in joined.items() if len(value) == len(joined["pool3"])}
                yield Part(gathered.stop, stop, given, remarks_before + remarks)
                rows = _rows(gathered)


def _rows(gathered):
    return defaultdict(list, gathered.no_rows())


def _outputs(network, batch):
    """Of what the network gives, what is used."""
    outputs = network(batch)
    if "pool3" not in outputs:
        given = ", ".join(outputs) or "nothing"
        raise ValueError(f"the feature network {network.name} gives {given}; pool3 must be there")
    return {key: outputs[key] for key in (*KEPT, "spatial") if key in outputs}


def _read_ahead(images: Images, batch_size: int, start: int) -> Iterator[tuple[int, NDArray, Counter[str]]]:
    """Yield (entries covered, (n, H, W, 3) uint8, remarks) while a thread reads the next batches; its errors
    come out here.

    The one thread runs `read` for one batch after the other, so that each answer holds the remarks as they
    stood after its batch, though the thread is already further.
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
            assert batch is not None  # there are as many as the loop counts
            yield min(covered + batch_size, images.entries), batch, remarks
    finally:
        pool.shutdown(cancel_futures=True)
        batches.close()  # type: ignore[attr-defined]  # a generator, whose files are closed here
