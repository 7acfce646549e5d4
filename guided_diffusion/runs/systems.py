"""The sampling systems by name: what a script parses, and what makes a Job of it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from guided_diffusion.flags.adm import ADMFlags
from guided_diffusion.flags.dit import DiTFlags
from guided_diffusion.flags.edm import EDMFlags
from guided_diffusion.flags.pipeline import PipelineFlags
from guided_diffusion.flags.presets import DIT_PRESETS, EDM_PRESETS, PRESETS
from guided_diffusion.runs import adm, dit, edm, pipeline
from guided_diffusion.runs.job import Job


@dataclass(frozen=True)
class System:
    """config: the class of its flags. presets: its own, by name. make_job(config, classifiers) -> Job."""

    config: type
    presets: Mapping[str, Mapping[str, Any]]
    make_job: Callable[[Any, Any], Job]


SYSTEMS = {
    "adm": System(ADMFlags, PRESETS, adm.make_job),
    "edm": System(EDMFlags, EDM_PRESETS, edm.make_job),
    "dit": System(DiTFlags, DIT_PRESETS, dit.make_job),
    "pipeline": System(PipelineFlags, {}, pipeline.make_job),
}


def system_of(preset: str) -> System:
    """The system that a preset belongs to. Raises ValueError for an unknown one."""
    for system in SYSTEMS.values():
        if preset in system.presets:
            return system
    raise ValueError(f"unknown preset {preset!r}; python scripts/presets.py lists them")
