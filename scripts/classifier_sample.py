"""Sample an ADM diffusion model, guided by an off-the-shelf classifier, by a noisy classifier, or by nothing.

    python scripts/classifier_sample.py --preset imagenet128-resnet101 --num_samples 1000 --out results/new

Writes samples_NxHxWx3.npz (arr_0 uint8 images, arr_1 int64 labels), grid.png and run.json. A run that was
interrupted resumes when the same command is given again, on any number of processes (torchrun). The flags are
those of guided-diffusion and EluCD, and a few more.
"""

import _beside  # noqa: F401
from sampling import sample

from guided_diffusion.flags.adm import ADMFlags
from guided_diffusion.flags.parser import run_main
from guided_diffusion.flags.presets import PRESETS
from guided_diffusion.runs import adm


def main(flags=ADMFlags):
    sample(flags, __doc__, PRESETS, adm.make_job)


if __name__ == "__main__":
    run_main(main, resumable=True)
