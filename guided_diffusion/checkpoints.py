"""Public name of what reads weights; it stands in files/checkpoints.py."""

from guided_diffusion.files.checkpoints import load_into, load_state_dict

__all__ = ["load_into", "load_state_dict"]
