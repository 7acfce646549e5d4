"""Sample a pipeline of diffusers with a sampler of ours, guided by an off-the-shelf classifier or by nothing.

    python scripts/pipeline_sample.py --pipeline FOLDER --prompt "a red car" --cfg_scale 7.5 --out results/car

FOLDER is a DDPMPipeline, DiTPipeline, StableDiffusionPipeline or SD-XL's as save_pretrained writes it, with
safetensors. Writes samples_NxHxWx3.npz (arr_0 uint8 images, arr_1 int64 labels) and grid.png, or with
--format png a PNG per sample with the labels in dataset.json beside the npz; and run.json. A run that was
interrupted resumes when the same command is given again, on any number of processes (torchrun). It needs
pip install -e ".[diffusers]".
"""

import _beside  # noqa: F401
from sampling import sample

from guided_diffusion.flags.parser import run_main
from guided_diffusion.flags.pipeline import PipelineFlags
from guided_diffusion.runs import pipeline


def main(flags=PipelineFlags):
    sample(flags, __doc__, {}, pipeline.make_job)


if __name__ == "__main__":
    run_main(main, resumable=True)
