"""Sample the digits by a DiT on latents without guidance, with classifier-free guidance, with an
off-the-shelf classifier, and with both, from the same noise, and compare what comes out and what it costs.

    python scripts/compare_dit.py --preset digits-dit --seeds 0-2 --out results/digits-dit

Every flag that is not listed here is one of scripts/dit_sample.py, and goes to the rows in which it means
something; the rows have scales of their own. Each row is a run of its own. Evaluations
of the transformer, passes of the classifier and seconds are per image; classifier-free guidance evaluates an
image twice in each step. The judge is a classifier of another architecture and seed than the guide; the
distance is by the features of a third network. Writes comparison.json and comparison.png beside the runs. It
needs pip install -e ".[dit]".
"""

import _beside  # noqa: F401
from compare_rows import compare

from guided_diffusion.flags.parser import run_main
from guided_diffusion.runs.systems import SYSTEMS


def _row(cfg_scale, classifier_scale):
    return {"preset": "digits-dit", "cfg_scale": cfg_scale, "classifier_scale": classifier_scale}


# Each at its best scale (docs/dit.md).
ROWS = {
    "unguided": _row(1.0, 0.0),
    "classifier-free": _row(1.5, 0.0),
    "classifier": _row(1.0, 0.5),
    "both": _row(1.25, 0.25),
}


def main():
    compare(__doc__, "digits-dit", ROWS, SYSTEMS["dit"])


if __name__ == "__main__":
    run_main(main, resumable=True)
