"""What the scripts that sample do: parse, make the job, and run it, or only look ahead."""

import _beside  # noqa: F401

import classifiers
from guided_diffusion.files.console import print_result
from guided_diffusion.flags.fields import parse
from guided_diffusion.runs.dry_run import dry_run
from guided_diffusion.runs.job import run


def sample(flags, description, presets, make_job):
    """flags: the class of the configuration; make_job(config, classifiers) -> Job."""
    config = parse(flags, description, presets)
    job = make_job(config, classifiers)
    if config.dry_run:
        dry_run(job)
    elif path := run(job):
        print_result(str(path))
