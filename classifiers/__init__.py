"""Which classifier guides, how it is smoothed, and what it expects as input: torchvision networks by name,
one's own by file.
"""

from classifiers.registry import classifier_files, load_classifier

__all__ = ["classifier_files", "load_classifier"]
