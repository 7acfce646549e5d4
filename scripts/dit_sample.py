"""Sample a DiT, a latent diffusion transformer, with classifier-free guidance and an off-the-shelf
classifier.

    python scripts/dit_sample.py --preset imagenet256-dit-resnet101 --num_samples 1000 --out results/dit

Writes samples_NxHxWx3.npz (arr_0 uint8 images, arr_1 int64 labels), one PNG per sample with the labels in
dataset.json, or with --format npz grid.png in their place; and run.json. A run that was interrupted resumes when the same
command is given again, on any number of processes (torchrun). The flags are those of DiT's sample_ddp.py,
guidance's, and a few more. It needs pip install -e ".[dit]".
"""

import _beside  # noqa: F401
from sampling import sample

from guided_diffusion.flags.dit import DiTFlags
from guided_diffusion.flags.parser import run_main
from guided_diffusion.flags.presets import DIT_PRESETS
from guided_diffusion.runs import dit


def main(flags=DiTFlags):
    sample(flags, __doc__, DIT_PRESETS, dit.make_job)


if __name__ == "__main__":
    run_main(main, resumable=True)
