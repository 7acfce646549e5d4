"""Say which script runs a preset: its file name in scripts/. Without a name, list all presets with theirs.

python scripts/presets.py imagenet128-resnet101
"""

import _beside  # noqa: F401

from guided_diffusion.flags.parser import Parser, run_main
from guided_diffusion.flags.presets import SCRIPTS, script_of

# The small problems are there to be compared: with and without guidance, over numbers of steps, with the
# paper's recipe.
COMPARED = {
    "digits": "compare_guidance.py",
    "digits-fewstep": "compare_fewstep.py",
    "digits-edm": "compare_edm.py",
    "digits-dit": "compare_dit.py",
    "cifar10": "compare_cifar10.py",
}


def main():
    parser = Parser(description=__doc__)
    parser.add_argument("preset", nargs="?", metavar="PRESET")
    preset = parser.parse_args().preset
    names = [name for presets in SCRIPTS.values() for name in presets]
    if preset is None:
        print(*(f"{name} {runner_of(name)}" for name in names), sep="\n")
    elif preset in names:
        print(runner_of(preset))
    else:
        parser.error(f"unknown preset {preset!r}; choose {', '.join(names)}")


def runner_of(preset):
    """The script that guided_sample.sh starts for a preset."""
    return COMPARED.get(preset) or script_of(preset)


if __name__ == "__main__":
    run_main(main)
