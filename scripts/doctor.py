"""Check what a run needs before hours are spent on it: files and hashes, output folder, memory and time.

    python scripts/doctor.py imagenet128-resnet101 --num_samples 50000 --batch_size 50

Takes the name of a preset and the flags of the script that samples it, which does the work: `--dry_run True`
there is the same. Ends with "ready", exit code 0, or with the number of problems, exit code 1. Nothing is
sampled, and the output folder is left alone.
"""

import runpy
import sys
from pathlib import Path

from guided_diffusion.flags.parser import Parser, run_main
from guided_diffusion.flags.presets import script_of


def main():
    parser = Parser(description=__doc__)
    parser.add_argument("preset", metavar="PRESET")
    args, flags = parser.parse_known_args()
    if any(flag == "--preset" or flag.startswith("--preset=") for flag in flags):
        raise ValueError("write the preset's name first, without --preset: scripts/doctor.py digits ...")
    sys.argv = [sys.argv[0], "--preset", args.preset, *flags, "--dry_run", "True"]
    runpy.run_path(str(Path(__file__).with_name(script_of(args.preset))), run_name="__main__")


if __name__ == "__main__":
    run_main(main)
