"""A judge of CIFAR-10's 32x32 images whose features are those of their evaluation too: another architecture
than the residual networks that guide. Its distance is FD(cifar10), never FID. To train it:

    python scripts/classifier_train.py --classifier_type evaluation/networks/cifar.py:cifar_network ...
"""

from evaluation.networks.digits import DigitsFeatures, DigitsNetwork
from guided_diffusion.files.pretrained import PRETRAINED_DIR

CIFAR_NETWORK = "evaluation/networks/cifar.py:cifar_network"
CIFAR_WEIGHTS = PRETRAINED_DIR / "cifar10" / "judge.safetensors"


def cifar_network(num_classes: int = 10) -> DigitsNetwork:
    """The digits' architecture, wider: (N, 3, 32, 32) images in [-1, 1] -> logits; `pool` gives (N, 256)."""
    return DigitsNetwork(num_classes, (64, 128, 256))


class CIFARFeatures(DigitsFeatures):
    """As `DigitsFeatures`, of (N, 32, 32, 3) images: `pool3` (N, 256) and `logits` (N, 10)."""

    name, protocol, batch_size = "cifar10", "cifar10", 500
    size = 32
    build = staticmethod(cifar_network)
