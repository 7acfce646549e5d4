"""A judge of CIFAR-10's 32x32 images whose features are those of their evaluation too: another architecture
than the residual networks that guide. To train it:

    python scripts/classifier_train.py --classifier_type evaluation/networks/cifar.py:cifar_network ...
"""

from evaluation.networks.digits import DigitsNetwork


def cifar_network(num_classes: int = 10) -> DigitsNetwork:
    """The digits' architecture, wider: (N, 3, 32, 32) images in [-1, 1] -> logits; `pool` gives (N, 256)."""
    return DigitsNetwork(num_classes, widths=(64, 128, 256))
