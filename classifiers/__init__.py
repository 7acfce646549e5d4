"""Which classifier guides and what it gets: torchvision networks by name, one's own by file, smoothed and fed as
the paper does.
"""

from classifiers.registry import classifier_files, load_classifier

__all__ = ["classifier_files", "load_classifier"]
