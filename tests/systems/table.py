"""What the tables of bad input share."""

from importlib.util import find_spec

import pytest

ADM = ("--preset", "digits", "--num_samples", 4, "--batch_size", 2, "--timestep_respacing", 3)
EDM = ("--preset", "digits-edm", "--seeds", "0-3", "--batch", 2, "--steps", 3)
DIT = ("--preset", "digits-dit", "--num_samples", 4, "--batch_size", 2, "--steps", 3)
BASES = {"classifier_sample": ADM, "edm_sample": EDM}
BASES |= {"dit_sample": DIT} if find_spec("diffusers") else {}


def rows(table):
    """Rows for parametrize, each with its flags as the name."""
    return [pytest.param(*row, id=row[0] or "none") for row in table]
