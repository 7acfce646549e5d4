"""Sample an ADM diffusion model, guided by an off-the-shelf classifier, by a noisy classifier, or by nothing.

    python scripts/classifier_sample.py --preset imagenet128-resnet101 --num_samples 1000 --out results/new

Writes samples_NxHxWx3.npz (arr_0 uint8 images, arr_1 int64 labels), grid.png and run.json. A run that was
interrupted resumes when the same command is given again, on any number of processes (torchrun). The flags are
those of guided-diffusion and EluCD, and a few more.
"""

import _beside  # noqa: F401

import classifiers
from guided_diffusion.files.console import print_result
from guided_diffusion.flags.adm import ADMFlags
from guided_diffusion.flags.fields import parse
from guided_diffusion.flags.parser import run_main
from guided_diffusion.flags.presets import PRESETS
from guided_diffusion.runs import adm
from guided_diffusion.runs.dry_run import dry_run
from guided_diffusion.runs.job import run


def main(flags=ADMFlags):
    config = parse(flags, __doc__, PRESETS)
    job = adm.make_job(config, classifiers)
    if config.dry_run:
        dry_run(job)
    elif path := run(job):
        print_result(str(path))


if __name__ == "__main__":
    run_main(main, resumable=True)
