"""Which classifier guides, how it is smoothed, and what it expects as input: torchvision's and timm's
networks by name, transformers' and CLIP by folder, one's own by file.
"""

from classifiers.decoders import DecodedClassifier, autoencoder_weights, load_decoder
from classifiers.registry import classifier_files, classifier_packages, load_classifier

__all__ = [
    "DecodedClassifier",
    "autoencoder_weights",
    "classifier_files",
    "classifier_packages",
    "load_classifier",
    "load_decoder",
]
