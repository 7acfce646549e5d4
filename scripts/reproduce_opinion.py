"""A second look at the runs of the table, for scripts/reproduce.py: by another feature network, and by how
near they come to the training images; and real images as if they were a run. It is no script of its own.
"""

import hashlib
import json
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import _beside  # noqa: F401
import numpy as np
import torch
from comparison import judge
from numpy.typing import NDArray
from problems import Problem, Quality

from classifiers.registry import Classifier, classifier_files
from evaluation.memorisation import Nearest, nearer_share, nearest_training
from guided_diffusion import dist_util
from guided_diffusion.files.atomic import renamed_when_complete, write_json
from guided_diffusion.files.labelled import LabelledImages, read_labelled
from guided_diffusion.files.pretrained import sha256
from guided_diffusion.files.run_folder import read_samples

CONFIDENT = 0.1  # the share of samples that the judge is most sure of
PAIRS = 20  # of the picture


@dataclass
class Opinions:
    """Called on finished runs by their ids, it gives {id: numbers}: those that FOLDER/opinions.json has of
    the same networks, reference and held-out images, and else those that it measures, which it keeps there.

    "second": the distance by the problem's second network; None where its weights are not there. "nearer":
    the probability that a sample lies nearer to a training image than a held-out image does, 0.5 for an
    honest generator; "nearer_confident": of the samples that the judge is most sure of, to be set beside that
    of the held-out images (`real`). Both are None without held_out, a set of labelled images.
    """

    problem: Problem
    judge_name: str
    held_out: Path | None
    folder: Path

    def __call__(self, runs: Mapping[str, Path]) -> dict[str, dict[str, float | None]]:
        path, of = self.folder / "opinions.json", self.hashes()
        kept = json.loads(path.read_text()) if path.exists() else {}
        known = kept["runs"] if kept.get("of") == of else {}
        for key, run in runs.items():
            if key not in known:
                known[key] = {"second": self._second(run), **self._nearness(run)}
                write_json(path, {"of": of, "runs": known})
        return {key: known[key] for key in runs}

    def real(self, count: int, most: int) -> list[dict[str, Any]]:
        """The numbers of up to `most` sets of `count` held-out images that share none, or of all of them if
        they are fewer. "nearer_confident" is that of all held-out images.
        """
        if self.held_out is None:
            return []
        labels = self._unseen_labels
        count = min(count, len(labels))
        order = np.random.RandomState(0).permutation(len(labels))[: most * count]
        return [
            self._of_real(f"real{part}", order[start : start + count], labels)
            for part, start in enumerate(range(0, len(order) - count + 1, count))
        ]

    def _of_real(self, name, chosen, labels):
        run = self._as_run(name, self._unseen.images[chosen], labels[chosen])
        numbers = {**judge(run, self._judge), **self._first(run), "second": self._second(run)}
        return {**numbers, "seed": name, "nearer_confident": self._unseen_confident}

    def nearest_pairs(self, run: Path) -> list[NDArray[np.uint8]] | None:
        """[the samples that the judge is surest of, the training image nearest to each], (n, S, S, 3) both;
        None where the reference has not the images of all its features.
        """
        with np.load(self.problem.reference, allow_pickle=False) as reference:
            images = reference.get("arr_0", [])
        if len(images) != self.training_images():
            return None
        first = np.argsort(-self._confidence(run), kind="stable")[:PAIRS]
        return [read_samples(run)[0][first], images[self._nearest(run).which[first]]]

    def hashes(self) -> dict[str, str]:
        """{what judges: the SHA-256 of its weights or file}."""
        own = self.judge_name == self.problem.judge
        judged_by = classifier_files(self.judge_name, self.problem.judge_weights if own else None)
        files = {f"judge, {path.name}": path for find in judged_by.values() if (path := find())}
        networks = [quality.network for quality in (self._first, self._other) if quality]
        for network in networks:
            files[f"reference, {network.name}"] = self.problem.reference_for(network.name)
        unseen = {}
        if self.held_out:
            digest = hashlib.sha256(self._unseen.images.tobytes() + self._unseen_labels.tobytes())
            unseen[f"held out, {len(self._unseen_labels):,} images and labels"] = digest.hexdigest()
        return {
            **{name: sha256(path) for name, path in files.items()},
            **unseen,
            **{f"features, {network.name}": network.sha256 for network in networks},
        }

    def training_images(self) -> int:
        """How many of them the reference has."""
        return len(self._first.reference.features)

    def _second(self, run: Path) -> float | None:
        return self._other.distance(run) if self._other else None

    def _nearness(self, run):
        if self.held_out is None:
            return {"nearer": None, "nearer_confident": None}
        distances, sure = self._nearest(run).distances, self._confidence(run)
        first = np.argsort(-sure, kind="stable")[: max(1, round(CONFIDENT * len(sure)))]
        return {
            "nearer": nearer_share(distances, self._unseen_to_training),
            "nearer_confident": nearer_share(distances[first], self._unseen_to_training),
        }

    def _nearest(self, run) -> Nearest:
        """From each image to the nearest training image."""
        points, train = self._first.measured(run).features, self._first.reference.features
        return nearest_training(train=train, points=points.pool3)

    def _confidence(self, run) -> NDArray[np.float32]:
        """(N,) the judge's probability of the class that it finds likeliest."""
        images = torch.from_numpy(read_samples(run)[0]).permute(0, 3, 1, 2)
        with torch.no_grad():
            logits = [self._judge(part.to(dist_util.dev()) / 127.5 - 1) for part in images.split(100)]
        return torch.cat(logits).float().softmax(1).amax(1).cpu().numpy()

    def _as_run(self, name, images, labels) -> Path:
        """Images as the folder of a finished run."""
        run = self.folder / name
        shutil.rmtree(run, ignore_errors=True)  # an earlier call's may be of other images
        run.mkdir()
        with renamed_when_complete(run / f"samples_{'x'.join(map(str, images.shape))}.npz") as file:
            np.savez(file, arr_0=images, arr_1=labels)
        return run

    @cached_property
    def _unseen(self) -> LabelledImages:
        return read_labelled(self.held_out, self._first.reference.measured.resolution[0])

    @cached_property
    def _unseen_labels(self) -> NDArray[np.int64]:
        return self._unseen.require_labels(str(self.held_out), self.problem.num_classes)

    @cached_property
    def _all_unseen(self) -> Path:
        return self._as_run("held_out", self._unseen.images, self._unseen_labels)

    @cached_property
    def _unseen_confident(self) -> float:
        return self._nearness(self._all_unseen)["nearer_confident"]

    @cached_property
    def _unseen_to_training(self) -> NDArray[np.float64]:
        return self._nearest(self._all_unseen).distances

    @cached_property
    def _judge(self) -> Classifier:
        return self.problem.load_judge(self.judge_name)

    @cached_property
    def _first(self) -> Quality:
        return Quality(self.problem)

    @cached_property
    def _other(self) -> Quality | None:
        quality = Quality(self.problem, self.problem.second)
        try:
            quality.network  # noqa: B018
        except (FileNotFoundError, ValueError) as error:
            print(f"no second opinion: {error}", file=sys.stderr)
            return None
        return quality
