"""Check what a run needs before hours are spent on it: files and hashes, output folder, memory and time.

    python scripts/doctor.py imagenet128-resnet101 --num_samples 50000 --batch_size 50

Takes the name of a preset and the flags of the script that samples it, which does the work: `--dry_run True`
there is the same. Ends with "ready", exit code 0, or with the number of problems, exit code 1. Nothing is
sampled, and the output folder is left alone.
"""

import _beside  # noqa: F401

import classifiers
from guided_diffusion.flags.fields import parse
from guided_diffusion.flags.parser import Parser, run_main
from guided_diffusion.runs.dry_run import dry_run
from guided_diffusion.runs.systems import system_of


def main():
    parser = Parser(description=__doc__)
    parser.add_argument("name", nargs="?", metavar="PRESET", help="python scripts/presets.py lists them")
    parser.add_argument("--preset", help="the same, as the sampling scripts have it")
    args, flags = parser.parse_known_args()
    preset, *other = {args.name, args.preset} - {None} or {""}
    if other or not preset:
        parser.error(f"two presets, {preset} and {other[0]}" if other else "give the name of a PRESET")
    system = system_of(preset)
    config = parse(system.config, __doc__, system.presets, ["--preset", preset, *flags])
    dry_run(system.make_job(config, classifiers))


if __name__ == "__main__":
    run_main(main)
