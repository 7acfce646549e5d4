"""Sample an EDM diffusion model, guided by an off-the-shelf classifier or by nothing.

    python scripts/edm_sample.py --preset imagenet64-edm-resnet101 --steps 18 --outdir results/edm18

Writes one PNG per seed and dataset.json with the labels, or with --format npz samples_NxHxWx3.npz (arr_0
uint8 images, arr_1 int64 labels, in the order of --seeds) and grid.png; and run.json. A run that was
interrupted resumes when the same command is given again, on any number of processes (torchrun). The flags are
those of EDM's generate.py and EluCD, and a few more.
"""

import _beside  # noqa: F401
from sampling import sample

from guided_diffusion.flags.edm import EDMFlags
from guided_diffusion.flags.parser import run_main
from guided_diffusion.flags.presets import EDM_PRESETS
from guided_diffusion.runs import edm


def main(flags=EDMFlags):
    sample(flags, __doc__, EDM_PRESETS, edm.make_job)


if __name__ == "__main__":
    run_main(main, resumable=True)
