"""Write an ADM network as a pipeline of diffusers: a DDPMPipeline with the same weights and process.

    python scripts/export_diffusers.py --preset digits --out results/digits-pipeline
    python scripts/pipeline_sample.py --pipeline results/digits-pipeline --num_classes 10 --cfg_scale 1.5

Takes the flags of scripts/classifier_sample.py, of which those of the network and of its process count. A
network with labels is for pipelines that give some, as scripts/pipeline_sample.py does: diffusers' own
DDPMPipeline gives none. It needs pip install -e ".[diffusers]".
"""

import _beside  # noqa: F401

from guided_diffusion.adapters.export import export_pipeline
from guided_diffusion.files.checkpoints import load_state_dict
from guided_diffusion.files.console import print_result
from guided_diffusion.files.state_dicts import load_into
from guided_diffusion.flags.adm import ADMFlags
from guided_diffusion.flags.fields import parse
from guided_diffusion.flags.parser import run_main
from guided_diffusion.flags.presets import PRESETS
from guided_diffusion.script_util import create_from_flags


def main():
    config = parse(ADMFlags, __doc__, PRESETS)
    if config.folder.exists() and not config.overwrite:
        raise ValueError(f"{config.folder} exists: choose another --out, or pass --overwrite True")
    model, diffusion = create_from_flags(config.record())
    load_into(model, load_state_dict(config.model_path, config.checkpoint_key or None), config.model_path)
    export_pipeline(model, diffusion, config.noise_schedule, config.folder)
    print_result(str(config.folder))


if __name__ == "__main__":
    run_main(main)
