"""FID, sFID, Inception Score, precision, recall, density, coverage and KID of sets of images against a
reference.

    python evaluation/evaluator.py REFERENCE SAMPLES [--weights FILE] [--device DEVICE]

prints the five lines of guided-diffusion's evaluator under its protocol; scripts/evaluate.py is the same with
every option. FID and sFID of a reference in the published layout are those of the statistics in it, the other
numbers those of its images.
"""

import sys
from dataclasses import asdict, dataclass, field
from typing import Any

import scipy
import torch

from evaluation.accuracy import Judgement
from evaluation.frechet import ErrorBar, Extrapolation
from evaluation.metrics import Pair, compute
from evaluation.networks import feature_network
from evaluation.reference import ENOUGH_IMAGES, Reference, notes_on_covariances
from evaluation.resampling import Options, frechet_extras
from evaluation.sets import (
    DENSITY_NEIGHBOURS,
    NEIGHBOURS,
    MeasuredSet,
    measure,
    open_set,
    require_comparable,
    require_measured_alike,
    require_same_resolution,
)
from evaluation.sliced import DIRECTIONS
from guided_diffusion.files.console import print_result

FIVE_LINES = {
    "Inception Score": "inception_score",
    "FID": "fid",
    "sFID": "sfid",
    "Precision": "precision",
    "Recall": "recall",
}
FLAGS = ("--weights", "--device")
NEAREST_PAIRS = 16


@dataclass(frozen=True)
class Result:
    """The numbers of one set. `metrics` has all of METRICS by key; what could not be had is None, and `notes`
    say why.

    The keys in `metrics` are those of Inception; `metric_key` and `metric_label` give the names to show.
    nearest_pairs: (sample, training image, their distance) of the most suspicious, if there are training
    images; judgement: if there is a judge.
    """

    name: str
    count: int | None
    metrics: dict[str, float | None]
    notes: list[str]
    samples: dict[str, Any]
    reference: dict[str, Any]
    precision_recall_dtype: str
    options: dict[str, Any] = field(default_factory=dict)
    fid_error: ErrorBar | None = None
    fid_infinity: Extrapolation | None = None
    nearest_pairs: list[tuple[int, int, float]] = field(default_factory=list)
    judgement: Judgement | None = None

    @property
    def protocol(self) -> str:
        """All that two results must share to be compared, but the reference."""
        features = f"{self.samples['features']} {self.samples['weights_sha256'][:8]}"
        return f"{self.samples['protocol']}, {features}, precision/recall in {self.precision_recall_dtype}"


def evaluate(reference: Reference, samples: MeasuredSet, options: Options | None = None) -> Result:
    """Every number of one set against a reference that was measured with the same network.

    Raises ValueError for sets of two networks or protocols, two resolutions (unless allowed), and too few
    images.
    """
    options = options or Options()
    require_measured_alike(samples, reference.measured)
    notes = samples.notes + notes_on_covariances(samples)
    notes += _notes_on_resolution(reference.measured, samples, options.allow_resolution)
    pair = Pair(reference, samples, options.precision_recall_dtype, options.progress)
    metrics, missing = compute(pair)
    about_images = missing.pop("features", None)
    notes += [*missing.values(), *_notes_on_images(samples), *([about_images] if about_images else [])]
    return Result(
        samples.name,
        samples.count,
        metrics,
        notes,
        samples.provenance,
        reference.provenance,
        options.precision_recall_dtype,
        _on_record(reference, options),
        nearest_pairs=pair.nearest.closest(NEAREST_PAIRS) if pair.missing("train") is None else [],
        **frechet_extras(reference, samples, metrics["fid"], options, notes),
    )


def _notes_on_resolution(reference, samples, allowed):
    if not allowed:
        require_same_resolution(reference, samples)
    elif samples.resolution and reference.resolution not in (None, samples.resolution):
        return [f"resolution {samples.resolution} against {reference.resolution} of the reference"]
    return []


def _notes_on_images(samples):
    if samples.features is None:
        return ["statistics without images: only the Frechet distances can be had"]
    if samples.features.count >= ENOUGH_IMAGES:
        return []
    compared = "compare IS, precision and recall only with those of as many images"
    return [f"fewer than {ENOUGH_IMAGES:,} images: {compared}"]


def _on_record(reference, options):
    """What the numbers depend on besides the two sets."""
    record = {
        **asdict(options),
        "neighbours": NEIGHBOURS,
        "density_neighbours": DENSITY_NEIGHBOURS,
        "mind_directions": DIRECTIONS,
        "reference_images_used": None if reference.features is None else len(reference.features),
        "reference_seed": reference.seed,
        "scipy": scipy.__version__,
    }
    return {key: value for key, value in record.items() if key != "progress"}


def five_lines(result: Result) -> str:
    """What guided-diffusion's evaluator prints; nan for what could not be had."""
    values = {label: result.metrics[key] for label, key in FIVE_LINES.items()}
    lines = [f"{label}: {float('nan') if value is None else value}" for label, value in values.items()]
    return "\n".join(lines)


def main(words: list[str]) -> None:
    """The command line of guided-diffusion's evaluator; --weights and --device are this project's."""
    if "-h" in words or "--help" in words:
        return print_result(__doc__.strip())
    (real, fake), flags = _parse(words)
    device = flags.get("device", "cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        why = str(error).splitlines()[0]
        raise ValueError(f"--device {device} cannot be used here ({why}); write cpu or cuda") from error
    network = feature_network(weights=flags.get("weights"), device=device)
    opened = [open_set(path, network) for path in (real, fake)]
    require_comparable(opened[0], opened[1], network)
    reference = Reference(measure(opened[0], network))
    result = evaluate(reference, measure(opened[1], network))
    dtype = (
        "precision and recall in float32; in guided-diffusion's float16 both come out 0.001 to 0.004 larger"
    )
    for note in [*(f"reference: {note}" for note in reference.notes), *result.notes, dtype]:
        print_result(f"note: {note}", to_stderr=True)
    print_result(five_lines(result))


def _parse(words):
    """([reference, samples], {"weights": ..., "device": ...} as far as given). Ends the program, exit code 2,
    where it is called in another way.
    """
    paths, flags, rest = [], {}, iter(words)
    for word in rest:
        name, equals, value = word.partition("=")
        if name in FLAGS:
            flags[name[2:]] = value if equals else next(rest, "")
        else:
            paths.append(word)
    if len(paths) != 2 or any(path.startswith("-") for path in paths) or "" in flags.values():
        usage = "python evaluation/evaluator.py REFERENCE SAMPLES [--weights FILE] [--device DEVICE]"
        print_result(f"evaluator.py: error: it is called as {usage}", to_stderr=True)
        sys.exit(2)
    return paths, flags


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (ValueError, OSError) as error:
        sys.exit(f"error: {' '.join(str(error).split())}")
    except KeyboardInterrupt:
        sys.exit(130)
