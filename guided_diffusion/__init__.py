"""How a picture comes out of noise: networks, samplers and guidance."""

__version__ = "0.1.0"
