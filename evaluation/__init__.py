"""Numbers about a set of images. Reads files and arrays, never a model of this project."""

from evaluation.calibration import expected_calibration_error
from evaluation.frechet import frechet_distance
from evaluation.networks.inception import InceptionFeatures
from evaluation.precision_recall import clipped_density_coverage, density_coverage, precision_recall
from evaluation.scores import clip_mmd, inception_score, kernel_distance
from evaluation.sliced import monge_distance

__all__ = [
    "InceptionFeatures",
    "clip_mmd",
    "clipped_density_coverage",
    "density_coverage",
    "expected_calibration_error",
    "frechet_distance",
    "inception_score",
    "kernel_distance",
    "monge_distance",
    "precision_recall",
]
