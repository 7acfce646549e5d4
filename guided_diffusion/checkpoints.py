"""Public name of what reads weights; it stands in files/checkpoints.py."""

from guided_diffusion.files.checkpoints import load_state_dict
from guided_diffusion.files.state_dicts import load_into

__all__ = ["load_into", "load_state_dict"]
