"""scripts/evaluate.py --judge: the labels of a set of images, and what a classifier says of them. It is no
script of its own.
"""

import json
from pathlib import Path, PurePosixPath

import _beside  # noqa: F401
import numpy as np
import torch
from tqdm import tqdm

from classifiers import load_classifier
from classifiers.registry import find_classifier
from evaluation.accuracy import Judgement, judgement
from guided_diffusion.files.image_sets import archive_kind
from guided_diffusion.files.images import Images
from guided_diffusion.files.run_folder import finished_files

BATCH = 100


class Judge:
    """A classifier that is asked which class an image is of; its input is what its weights were trained on.

    Raises what `load_classifier` does.
    """

    def __init__(
        self, name: str, weights: str | None, num_classes: int, image_size: int, device: torch.device
    ):
        trained_on = find_classifier(name).trained_on
        self.name, self.device, self.num_classes = name, device, num_classes
        try:
            classifier = load_classifier(
                name,
                weights,
                num_classes=num_classes,
                classifier_input="imagenet" if trained_on else "paper",
                image_size=image_size,
            )
        except ValueError as error:
            raise ValueError(f"--judge {name} with --num_classes {num_classes}: {error}") from error
        self.classifier = classifier.to(device)

    def labels(self, images: Images) -> np.ndarray:
        """(N,) of a set. Raises ValueError where not every image has one, and for those that it does not
        know.
        """
        labels = labels_of(images.path)
        if len(labels) != images.entries:
            raise ValueError(f"{images.name} has {len(labels)} labels for {images.entries} images")
        if wrong := sorted({int(label) for label in labels if not 0 <= label < self.num_classes}):
            raise ValueError(
                f"{images.name} has label {wrong[0]}, and --num_classes {self.num_classes} allows 0 to "
                f"{self.num_classes - 1}"
            )
        return labels

    @torch.inference_mode()
    def __call__(self, images: Images, labels: np.ndarray) -> Judgement:
        """Of a set and its labels. Raises ValueError where damaged images are skipped."""
        predicted = []
        with tqdm(total=images.entries, unit="image", desc=f"{self.name} on {images.name}") as bar:
            for batch in images.batches(BATCH):
                x = torch.from_numpy(batch).to(self.device).permute(0, 3, 1, 2).float() / 127.5 - 1
                predicted += self.classifier(x).argmax(dim=1).tolist() if len(x) else []
                bar.update(len(batch))
        if len(predicted) != len(labels):
            damaged = f"{len(labels) - len(predicted)} of {len(labels)} images are damaged"
            raise ValueError(
                f"{images.name}: {damaged}, and which labels are theirs is not known: repair them"
            )
        return judgement(self.name, predicted, labels)


def labels_of(path: Path) -> np.ndarray:
    """(N,) labels in the order of the images: arr_1 of an npz, those of a finished run, or of dataset.json
    beside pictures. Raises ValueError where there are none.
    """
    finished = finished_files(path) if path.is_dir() else [path]
    file = finished[0] if finished else None
    if file and file.suffix == ".json":
        return _listed(file)
    if file and archive_kind(file) == "npz":
        with np.load(file, allow_pickle=False) as arrays:
            if "arr_1" in arrays.files:
                return arrays["arr_1"]
    raise ValueError(
        f"--judge needs the labels of {path}: give an npz with arr_1, a finished run, or pictures with a "
        "dataset.json"
    )


def _listed(file):
    labels = dict(json.loads(file.read_text()).get("labels") or ())
    return np.array([labels[name] for name in sorted(labels, key=PurePosixPath)], dtype=np.int64)
