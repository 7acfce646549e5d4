"""The set that others are compared with: factored and thinned out once."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evaluation.frechet import FrechetReference
from evaluation.memorisation import are_training_images, nearest_training
from evaluation.sets import MeasuredSet, OpenedSet, require_measured_alike

MAX_REFERENCE_IMAGES = 10_000  # as in guided-diffusion's evaluation
ENOUGH_IMAGES = 10_000  # from here on little is left of the bias of precision, recall and Inception Score


@dataclass
class Reference:
    """A measured set to which others are compared: its covariances are factored once.

    `features` are those of at most 10,000 of its images, drawn with `seed`; None where it has no images.
    `spatial` is None where it has no spatial features. `notes` are about the reference.

    against: the training images, measured alike, if memorisation is asked about; the reference then is of
    held-out images, and `held_out` has the distances of `features` to their nearest training images, without
    those that are training images themselves. Raises ValueError where one of the two has no images, and where
    most of the reference's are training images.
    """

    measured: MeasuredSet
    seed: int = 0
    against: MeasuredSet | None = None
    pool: FrechetReference = field(init=False)
    spatial: FrechetReference | None = field(init=False)
    features: NDArray[np.float32] | None = field(init=False)
    held_out: NDArray[np.float64] | None = field(init=False, default=None)
    notes: list[str] = field(init=False)

    def __post_init__(self) -> None:
        spatial = self.measured.spatial()
        self.pool = FrechetReference(self.measured.pool())
        self.spatial = FrechetReference(spatial) if spatial else None
        self.notes = self.measured.notes + notes_on_covariances(self.measured)
        self.features = self.measured.features.pool3 if self.measured.features else None
        self._thin_out()
        if self.against:
            self.held_out = self._distances_to(self.against)

    def _thin_out(self):
        if self.features is None:
            return
        count = len(self.features)
        if count < ENOUGH_IMAGES:
            fewer = f"{count} images, fewer than {ENOUGH_IMAGES:,}"
            self.notes.append(f"{fewer}: precision and recall depend on their number")
        elif count > MAX_REFERENCE_IMAGES:
            taken = f"{MAX_REFERENCE_IMAGES:,} of {count:,} images"
            self.notes.append(f"all but FID, sFID and IS take {taken}")
            self.features = some_rows(self.features, MAX_REFERENCE_IMAGES, self.seed)

    def _distances_to(self, train):
        require_measured_alike(train, self.measured)
        require_images(self.measured, train)
        distances = nearest_training(train=train.features.pool3, points=self.features).distances
        equal = are_training_images(distances, train.features.pool3)
        shares = f"{equal.sum()} of {len(distances)} images"
        if 2 * equal.sum() > len(distances):
            raise ValueError(
                f"--against {train.name}: {shares} of the reference {self.measured.name} are training images "
                "themselves; give held-out images as the reference"
            )
        if equal.any():  # left in, they would make a distance of 0 normal, and no copy would be seen
            self.notes.append(f"{shares} are training images: memorisation is measured without them")
        return distances[~equal]

    @property
    def provenance(self) -> dict[str, Any]:
        """That of the measured set, and whose training images it is held out from."""
        if self.against is None:
            return self.measured.provenance
        about = {key: self.against.provenance[key] for key in ("images", "count", "fingerprint")}
        return self.measured.provenance | {"against": about}


def require_images(*sets: OpenedSet | MeasuredSet) -> None:
    """Raise ValueError for a set without images or their features, as memorisation compares."""
    for each in sets:
        if not (each.features or getattr(each, "images", None)):
            raise ValueError(f"--against compares images, and {each.name} holds statistics: give its images")


def some_rows(features: NDArray, count: int, seed: int) -> NDArray:
    """`count` random rows in their order; all of them where there are no more."""
    if len(features) == count:
        return features
    return features[np.sort(np.random.RandomState(seed).choice(len(features), count, replace=False))]


def notes_on_covariances(measured: MeasuredSet) -> list[str]:
    """A line for each covariance that is singular because it is of too few images."""
    dimensions = {}
    if measured.statistics:
        dimensions["pooled"] = measured.statistics.pool.mu.size
    elif measured.features:
        dimensions["pooled"] = measured.features.pool3.shape[1]
        if measured.features.spatial:
            dimensions["spatial"] = measured.features.spatial.mean.size
    count = measured.statistics.count if measured.statistics else measured.count
    return [
        f"{count} images are not more than the {dimension} {kind} features: singular covariance"
        for kind, dimension in dimensions.items()
        if count is not None and count <= dimension
    ]
