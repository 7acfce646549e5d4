"""Training of networks: one loop, batches with labels, averaged weights."""

from guided_diffusion.training.data import drop_labels, random_batches
from guided_diffusion.training.ema import Average
from guided_diffusion.training.loop import Optimization, train

__all__ = ["Average", "Optimization", "drop_labels", "random_batches", "train"]
