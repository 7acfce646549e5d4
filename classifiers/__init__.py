"""Which classifier, and what it wants to eat: torchvision networks by name, one's own by file, smoothed and
fed as the paper does.
"""

from classifiers.registry import load_classifier

__all__ = ["load_classifier"]
