"""The flags of every run: where results lie, and how they are made, but not what they are."""

from dataclasses import dataclass

from guided_diffusion.flags.fields import Flags, at_least, flag


@dataclass(frozen=True, kw_only=True)
class RunFlags(Flags):
    """The run."""

    preset: str = flag(
        "", "flags by name, which python scripts/presets.py lists; flags that you write win", compared=False
    )
    config: str = flag(
        "",
        "run.json of another run of this script: its flags in the place of a preset's, but for where and how "
        "it ran; flags that you write win",
        compared=False,
    )
    batch_size: int = flag(16, "images per step", check=at_least(1))
    out: str = flag("", "output folder; by default results/PRESET", compared=False)
    overwrite: bool = flag(
        False, "start anew: remove what an earlier run wrote into the output folder", compared=False
    )
    device: str = flag(
        "", "cpu, cuda or cuda:1; by default this rank's CUDA device, else the CPU", compared=False
    )
    dry_run: bool = flag(
        False,
        "check files, room and memory, estimate the time, and sample nothing",
        compared=False,
    )
