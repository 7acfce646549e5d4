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
    parser.add_argument("preset", metavar="PRESET", help="see scripts/presets.py")
    args, flags = parser.parse_known_args()
    flags = [flag for flag in flags if flag != "--preset"]  # its name has been taken already
    system = system_of(args.preset)
    config = parse(system.config, __doc__, system.presets, ["--preset", args.preset, *flags])
    if config.preset != args.preset:
        raise ValueError(f"two presets, {args.preset} and {config.preset}: write one name, without --preset")
    dry_run(system.make_job(config, classifiers))


if __name__ == "__main__":
    run_main(main)
