"""Numbers about a set of images. Reads files and arrays, never a model of this project."""

from evaluation.calibration import expected_calibration_error
from evaluation.frechet import frechet_distance
from evaluation.networks.inception import InceptionFeatures
from evaluation.precision_recall import density_coverage, precision_recall
from evaluation.scores import inception_score, kernel_distance

__all__ = [
    "InceptionFeatures",
    "density_coverage",
    "expected_calibration_error",
    "frechet_distance",
    "inception_score",
    "kernel_distance",
    "precision_recall",
]
