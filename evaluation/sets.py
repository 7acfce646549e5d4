"""A set of images as the metrics see it: by the features of its images, by statistics that a file brings, or
by both.

An npz may hold statistics beside or instead of images. Then FID and sFID come from them, everything else from
the images, or from the features of some images (`pool3`) where the file holds those instead. Whose
statistics they are is told by the array `protocol`, which scripts/make_reference.py writes. Published files
have none: those in guided-diffusion's layout, with images or spatial statistics, are of the protocol adm; a
plain mu and sigma is believed to be of the protocol that is asked for.
"""

import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from evaluation.features import FeatureNetwork, Features, extract
from evaluation.moments import Gaussian, moments_of
from evaluation.statistics_files import NEEDED, load_features, load_statistics, other_container
from guided_diffusion.files.image_sets import archive_kind, open_images
from guided_diffusion.files.images import Images
from guided_diffusion.files.pretrained import sha256

NEIGHBOURS = 3  # of precision and recall
DENSITY_NEIGHBOURS = 5  # of density and coverage


@dataclass(frozen=True)
class Statistics:
    """What a file says of its images: the Gaussians of their pooled and spatial features, and their number;
    None for what it lacks.
    """

    pool: Gaussian
    spatial: Gaussian | None
    count: int | None


@dataclass(frozen=True)
class OpenedSet:
    """A set of which no feature is extracted yet: images, statistics or both. features: what a file without
    images brings beside its statistics.
    """

    path: Path
    name: str
    images: Images | None
    statistics: Statistics | None
    notes: list[str]
    features: Features | None = None

    @property
    def resolution(self) -> tuple[int, int] | None:
        """(height, width), None where there are neither images nor features."""
        of = self.images or self.features
        return of.resolution if of else None


@dataclass(frozen=True)
class MeasuredSet:
    """A set that is ready for the metrics. Where `statistics` is None, the Gaussians are those of `features`;
    one of the two is there.
    """

    name: str
    features: Features | None
    statistics: Statistics | None
    notes: list[str]
    provenance: dict[str, Any]

    @property
    def count(self) -> int | None:
        """The number of images, or of those behind the statistics; None where a file does not say."""
        if self.features:
            return self.features.count
        return self.statistics.count if self.statistics else None

    @property
    def resolution(self) -> tuple[int, int] | None:
        """(height, width), None where there are no images."""
        return self.features.resolution if self.features else None

    def pool(self) -> Gaussian:
        """The Gaussian of the pooled features."""
        if self.statistics:
            return self.statistics.pool
        return moments_of(self._measured().pool3).gaussian()

    def spatial(self) -> Gaussian | None:
        """The Gaussian of the spatial features; None where the statistics or the network came without."""
        if self.statistics:
            return self.statistics.spatial
        moments = self._measured().spatial
        return moments.gaussian() if moments else None

    def _measured(self) -> Features:
        assert self.features
        return self.features


def open_set(
    path: str | Path, network: FeatureNetwork, *, skip_unreadable: bool = False, name: str | None = None
) -> OpenedSet:
    """Open what `open_images` reads, or an npz with statistics; nothing is extracted.

    Statistics of another protocol, or of another network's weights, are ignored with a note if the file has
    images too. Raises ValueError if it has none, for statistics that `load_statistics` refuses, and for too
    few images; else what `open_images` raises.
    """
    path = Path(path)
    if instead := other_container(path):
        raise ValueError(f"{path} {instead}; {NEEDED}, images an npz, a zip or a folder")
    arrays = _arrays_of(path)
    name = name or path.resolve().name
    if not {"mu", "sigma"} & arrays.keys():
        return OpenedSet(path, name, _open_images(path, skip_unreadable), None, [])
    images = _open_images(path, skip_unreadable) if "arr_0" in arrays else None
    notes, ours = _whose(path, name, arrays, network, bool(images))
    if not ours:
        return OpenedSet(path, name, images, None, notes)
    pool, spatial = load_statistics(path)
    count = arrays.get("count")
    statistics = Statistics(pool, spatial, count if isinstance(count, int) else None)
    features = _features_in(path, pool) if images is None and "pool3" in arrays else None
    return OpenedSet(path, name, images, statistics, notes, features)


def _features_in(path, pool):
    """The features that a file brings, which must be of its statistics' dimension."""
    pool3, resolution = load_features(path)
    if pool3.shape[1] != pool.mu.size:
        raise ValueError(f"{path}: pool3 has {pool3.shape[1]} features, its statistics {pool.mu.size}")
    require_enough(path, len(pool3))
    about = {"count": len(pool3), "resolution": list(resolution), "dtype": "float32", "notes": []}
    return Features(pool3, None, None, resolution, about)


def _arrays_of(path):
    """The names of the arrays in an npz, with the value of the short ones that tell where the statistics come
    from.
    """
    if path.is_dir() or archive_kind(path) != "npz":
        return {}
    try:
        with zipfile.ZipFile(path) as archive:
            names = [name.removesuffix(".npy") for name in archive.namelist()]
    except (OSError, zipfile.BadZipFile):
        return {}  # open_images knows how to refuse it
    arrays = dict.fromkeys(names)
    try:
        with np.load(path, allow_pickle=False) as archive:
            told = {name: archive[name] for name in {"protocol", "weights_sha256", "count"} & arrays.keys()}
    except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(
            f"{path} is damaged, or says whose statistics it holds in Python objects, which are refused"
        ) from error
    return arrays | {name: array.item() for name, array in told.items() if array.ndim == 0}


def _open_images(path, skip_unreadable):
    images = open_images(path, skip_unreadable=skip_unreadable)
    require_enough(path, images.entries)
    return images


def require_enough(path: str | Path, count: int) -> None:
    """Raise ValueError for fewer images than the metrics look at neighbours of each."""
    if count <= DENSITY_NEIGHBOURS:
        held = f"{count} image{'s' if count != 1 else ''}"
        raise ValueError(
            f"{path} holds {held}; the metrics look at {DENSITY_NEIGHBOURS} neighbours of each: "
            f"give {DENSITY_NEIGHBOURS + 1} or more"
        )


def _whose(path, name, arrays, network, has_images):
    """(notes, whether the statistics are of this network and protocol). Raises ValueError where nothing else
    could be used.
    """
    protocol = arrays.get("protocol")
    if protocol is None and {"mu_s", "arr_0"} & arrays.keys():
        protocol = "adm"
    if protocol is None:
        unsaid = f"{name} does not say of which protocol its statistics are: taken as {network.protocol}"
        return [unsaid], True
    weights = arrays.get("weights_sha256")
    if protocol == network.protocol and weights in (None, network.sha256):
        return [], True
    whose = f"of the protocol {protocol}, not {network.protocol}"
    if protocol == network.protocol:
        hashes = f"sha256 {str(weights)[:8]}..., not {network.sha256[:8]}..."
        whose = f"of a feature network with other weights ({hashes})"
    if not has_images:
        raise ValueError(
            f"{path} holds statistics {whose}, and no images (arr_0) to compute others from: "
            "give a reference that fits"
        )
    instead = "not used, but computed from its images, which may be a subset of what they were of"
    return [f"the statistics in {name} are {whose}: {instead}"], False


def require_comparable(
    reference: OpenedSet, samples: OpenedSet, network: FeatureNetwork, allow_resolution: bool = False
) -> None:
    """Raise ValueError, before anything is extracted, for a pair of two resolutions (unless allowed) or of
    two feature dimensions.
    """
    if not allow_resolution:
        require_same_resolution(reference, samples)
    if not (reference.statistics or samples.statistics):
        return
    dimensions = [_dimension(opened, network) for opened in (reference, samples)]
    if dimensions[0] != dimensions[1]:
        raise ValueError(
            f"{reference.path} has features of {dimensions[0]} dimensions and {samples.path} of "
            f"{dimensions[1]}: these are of different networks; compute the statistics anew with "
            "scripts/make_reference.py"
        )


def require_same_resolution(reference: OpenedSet | MeasuredSet, samples: OpenedSet | MeasuredSet) -> None:
    """Raise ValueError for images of two sizes; a set without images fits to any."""
    if reference.resolution and samples.resolution and reference.resolution != samples.resolution:
        (h, w), (height, width) = reference.resolution, samples.resolution
        raise ValueError(
            f"the reference {reference.name} is {h}x{w} and {samples.name} is {height}x{width} (HxW): "
            "resize one, or pass --allow_resolution"
        )


def require_measured_alike(samples: MeasuredSet, reference: MeasuredSet) -> None:
    """Raise ValueError for sets of two networks or protocols."""
    ours, theirs = samples.provenance, reference.provenance
    for key in ("features", "protocol", "weights_sha256"):
        if ours[key] != theirs[key]:
            raise ValueError(
                f"{samples.name} was measured with {key} {ours[key]}, the reference with {theirs[key]}: "
                "measure both alike"
            )


def require_images_only(compared: OpenedSet | MeasuredSet) -> None:
    """Raise ValueError for a set whose distance is that of statistics, which cannot be resampled."""
    if compared.statistics:
        raise ValueError(
            f"a comparison resamples images; {compared.name} holds statistics, give its images instead"
        )


def _dimension(opened, network):
    if opened.statistics:
        return opened.statistics.pool.mu.size
    return network(np.zeros((1, *opened.resolution, 3), np.uint8))["pool3"].shape[1]


def measure(
    opened: OpenedSet,
    network: FeatureNetwork,
    *,
    batch_size: int | None = None,
    cache: str | Path | None = None,
    progress: bool = True,
) -> MeasuredSet:
    """Extract the features of a set, if it has images; for the options and errors see `extract`."""
    features = opened.features
    if opened.images:
        features = extract(opened.images, network, batch_size=batch_size, cache=cache, progress=progress)
        require_enough(opened.path, features.count)
    provenance: dict[str, Any] = {
        "images": opened.name,
        "features": network.name,
        "protocol": network.protocol,
        "weights_sha256": network.sha256,
        "outputs": list(getattr(network, "outputs", ())) or None,  # where there are images, what it gave
        "count": None,
        "resolution": None,
        "fingerprint": None,
        "dtype": None,
        "versions": {"numpy": np.__version__},
    }
    if features:
        provenance |= {
            key: value for key, value in features.provenance.items() if key not in ("images", "notes")
        }
    provenance["statistics"] = "in the file" if opened.statistics else "of the images"
    provenance["statistics_count"] = opened.statistics.count if opened.statistics else provenance["count"]
    provenance["file_sha256"] = sha256(opened.path) if opened.path.is_file() else None
    notes = [*opened.notes, *_notes_on_spatial(opened, provenance["outputs"])]
    notes += features.provenance["notes"] if features else []
    return MeasuredSet(opened.name, features, opened.statistics, notes, provenance)


def _notes_on_spatial(opened, outputs):
    """That a file lacks what its network, as far as is known, would give."""
    given = outputs is None or "spatial" in outputs
    if not given or not opened.statistics or opened.statistics.spatial:
        return []
    return [f"{opened.name} has no spatial statistics (mu_s, sigma_s): sFID is n/a"]
