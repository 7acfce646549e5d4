"""Sample the digits by the paper's recipe and by few steps of ours, from the same noise, and compare what
comes out and what it costs.

    python scripts/compare_fewstep.py --preset digits-fewstep --seeds 0-2 --out results/digits-fewstep

Every flag that is not listed here is one of scripts/classifier_sample.py, and goes to the rows in which it
means something; sampler, steps and scale are the rows' own. Each row is a run of its own. Evaluations of the
network, passes of the classifier and seconds are per image. The judge is a classifier of another architecture
and seed than the guide; the distance is by the features of a third network. Writes comparison.json and
comparison.png beside the runs.
"""

import _beside  # noqa: F401
from compare_rows import compare

from guided_diffusion.flags.parser import run_main
from guided_diffusion.runs.systems import SYSTEMS

# Of the class-conditional network; the recipe at its best scale for each number of steps (docs/few-steps.md).
_RECIPE = {"preset": "digits", "sampler": "ddpm", "classifier_scale": 1.0}
_FEW = {"preset": "digits-fewstep", "sampler": "dpmpp_2m_sde", "classifier_scale": 2.0}
ROWS = {
    "unguided, 25 steps": {**_RECIPE, "steps": 25, "classifier_scale": 0.0},
    "the paper's recipe, 250 steps": {**_RECIPE, "steps": 250, "classifier_scale": 0.5},
    "the paper's recipe, 25 steps": {**_RECIPE, "steps": 25},
    "ours, 10 steps": {**_FEW, "steps": 10},
    "ours, 5 steps": {**_FEW, "steps": 5},
}


def main():
    compare(__doc__, "digits-fewstep", ROWS, SYSTEMS["adm"])


if __name__ == "__main__":
    run_main(main, resumable=True)
