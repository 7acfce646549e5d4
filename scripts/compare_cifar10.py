"""Sample CIFAR-10 without guidance, by the paper's recipe, without a classifier, and by few steps of ours,
from the same noise, and compare what comes out and what it costs.

    python scripts/compare_cifar10.py --preset cifar10 --seeds 0-2 --num_samples 1000 --out results/cifar10

Every flag that is not listed here is one of scripts/classifier_sample.py, and goes to the rows in which it
means something; sampler, steps and scales are the rows' own. Each row is a run of its own. Evaluations of the
network, passes of the classifier and seconds are per image. Judge and distance are by a network of another
architecture than the guide. Writes comparison.json and comparison.png beside the runs.
"""

import _beside  # noqa: F401
from compare_rows import compare

from guided_diffusion.flags.parser import run_main
from guided_diffusion.runs.systems import SYSTEMS

# The presets at their scales, the best ones of docs/cifar10/tuning.txt.
ROWS = {
    "unguided, 25 steps": {"preset": "cifar10-unguided"},
    "the paper's recipe, 25 steps": {"preset": "cifar10"},
    "classifier-free, 10 steps": {"preset": "cifar10-cfg", "steps": 10},
    "ours, 10 steps": {"preset": "cifar10-fewstep"},
}


def main():
    compare(__doc__, "cifar10", ROWS, SYSTEMS["adm"])


if __name__ == "__main__":
    run_main(main, resumable=True)
