"""What the tables of bad input share."""

import pytest

ADM = ("--preset", "digits", "--num_samples", 4, "--batch_size", 2, "--timestep_respacing", 3)
EDM = ("--preset", "digits-edm", "--seeds", "0-3", "--batch", 2, "--steps", 3)


def rows(table):
    """Rows for parametrize, each with its flags as the name."""
    return [pytest.param(*row, id=row[0] or "none") for row in table]
