"""Train a network that denoises on your own images.

    python scripts/image_train.py --data_dir photos --image_size 64 --batch_size 64 --lr_anneal_steps 20000

Writes, every --save_interval steps, modelS.pt, ema_RATE_S.pt and optS.pt, from which the same command
resumes; network_RATE.safetensors, the averaged network in float16, for the samplers; samplesS.png and
loss.png; and progress.csv, log.txt and training.json. Plain python, or torchrun for several processes. The
flags are those of guided-diffusion, and a few more.
"""

import _beside  # noqa: F401

from guided_diffusion.files.console import print_result
from guided_diffusion.flags.fields import parse
from guided_diffusion.flags.parser import run_main
from guided_diffusion.flags.training import ImageTrainFlags
from guided_diffusion.training.images import train_images


def main():
    folder = train_images(parse(ImageTrainFlags, __doc__, {}))
    print_result(str(folder))


if __name__ == "__main__":
    run_main(main, resumable=True)
