"""Find the noise levels at which a network's way bends least, for --levels FILE.

    python scripts/optimize_levels.py --preset digits --steps 10 --out results/levels-10.txt
    python scripts/classifier_sample.py --preset digits --sampler ipndm --levels results/levels-10.txt

Warm-up samples walk from noise to an image in many small steps of Heun's method. From each of their levels to
each later one, a single step of Euler's is compared with where they are then; dynamic programming finds the
levels of the least sum of these deviations (GITS: Chen et al., 2024, "On the trajectory regularity of
ODE-based diffusion sampling"). Every flag that is not listed here is one of the preset's sampling script:
with a classifier it is the guided way that is measured. EDM's networks need --guidance_form score for that.
"""

import tempfile
from itertools import pairwise
from pathlib import Path

import _beside  # noqa: F401
import numpy as np

import classifiers
from guided_diffusion.dist_util import choose_device
from guided_diffusion.files.atomic import renamed_when_complete
from guided_diffusion.files.console import print_result
from guided_diffusion.flags.fields import configure, defaults_of, given_flags
from guided_diffusion.flags.parser import Parser, run_main
from guided_diffusion.runs.systems import SYSTEMS, system_of
from guided_diffusion.runs.tally import Tally
from guided_diffusion.solvers import heun_step, solver


def main():
    args, rest = create_argparser().parse_known_args()
    if not 2 <= args.steps <= args.teacher_steps:
        raise ValueError(f"--steps must be from 2 to --teacher_steps {args.teacher_steps}, got {args.steps}")
    if args.num_samples < 1:
        raise ValueError(f"--num_samples must be at least 1, got {args.num_samples}")
    if args.out.exists() and not args.overwrite:
        raise ValueError(f"{args.out} exists: choose another name, or pass --overwrite")
    system = system_of(args.preset) if args.preset else SYSTEMS[args.system]
    config, teacher = watched(system, args, rest)
    measure(system.make_job(config, classifiers), config)
    levels, deviation = best_levels(teacher.sigmas, teacher.costs / args.num_samples, args.steps)
    lines = [
        f"# {args.steps} noise levels of {args.preset or args.system}, by scripts/optimize_levels.py:",
        f"# teacher of {args.teacher_steps} steps, {args.num_samples} samples, deviations {deviation:.4g}",
        *(f"{level:.8g}" for level in levels),
    ]
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with renamed_when_complete(args.out) as file:
        file.write("".join(f"{line}\n" for line in lines).encode())
    print_result(f"{args.out}: {', '.join(f'{level:.4g}' for level in levels)}")


def create_argparser():
    parser = Parser(description=__doc__)
    parser.add_argument("--preset", default="", help="flags by name, see scripts/presets.py")
    parser.add_argument(
        "--system", choices=tuple(SYSTEMS), default="adm", help="without --preset: whose flags"
    )
    parser.add_argument("--steps", type=int, default=10, help="how many levels to choose")
    parser.add_argument("--teacher_steps", type=int, default=61, help="among how many")
    parser.add_argument("--num_samples", type=int, default=256, help="warm-up samples")
    parser.add_argument("--out", type=Path, required=True, help="the file, text")
    parser.add_argument("--overwrite", action="store_true", help="replace it")
    return parser


def watched(system, args, rest):
    """The configuration of the teacher's run, and the Teacher that takes the place of its solver."""
    teacher = Teacher()

    class Config(system.config):
        def build_solver(self):
            return solver(teacher.walk)

    given = given_flags(
        Config, None, system.presets, [*(["--preset", args.preset] if args.preset else []), *rest]
    )
    count = args.num_samples
    fixed = {"sampler": "heun", "levels": "karras", "steps": args.teacher_steps, "out": tempfile.gettempdir()}
    fixed |= {"num_samples": count} if "num_samples" in defaults_of(Config) else {"seeds": f"0-{count - 1}"}
    if clash := sorted(fixed.keys() & given.keys()):
        raise ValueError(f"--{clash[0]} is this script's own to give to the teacher: drop it")
    return configure(Config, system.presets, given, fixed), teacher


def measure(job, config):
    """Draw the warm-up samples; the Teacher keeps the deviations."""
    device = choose_device(config.device)
    sampler = job.build(device, Tally(device))
    for start in range(0, job.num_samples, job.batch_size):
        sampler.sample(range(start, min(start + job.batch_size, job.num_samples)), lambda: None)
        print_result(
            f"{min(start + job.batch_size, job.num_samples)}/{job.num_samples} samples", to_stderr=True
        )


class Teacher:
    """Heun's method, which sums up over all images how far single Euler steps between its levels lead astray.

    sigmas: (m,) its levels without the closing 0. costs: (m, m); [i, j], i < j: the root mean square
    deviation after one step from level i to level j.
    """

    def __init__(self):
        self.sigmas, self.costs = [], 0.0

    def walk(self, denoise, x, sigmas, *, randn_like=None, on_step=None):
        xs, slopes = [x], []
        for t, t_next in pairwise(sigmas):
            slopes.append((x - denoise(x, t)) / t)
            x = heun_step(lambda x, s, t=t: slopes[-1] if s == t else (x - denoise(x, s)) / s, x, t, t_next)
            xs.append(x)
        self.sigmas, m = sigmas[:-1], len(sigmas) - 1
        costs = np.zeros((m, m))
        for i in range(m):
            for j in range(i + 1, m):
                astray = xs[i] + (sigmas[j] - sigmas[i]) * slopes[i] - xs[j]
                costs[i, j] = float(astray.square().flatten(1).mean(dim=1).sqrt().sum())
        self.costs = self.costs + costs
        return x


def best_levels(sigmas, costs, count):
    """(levels, sum): `count` of the levels, the first and the last among them, with the least sum of the
    costs between neighbours.
    """
    m = len(sigmas)
    total, before = np.full((count, m), np.inf), np.zeros((count, m), dtype=int)
    total[0, 0] = 0
    for k in range(1, count):
        for j in range(k, m):
            sums = total[k - 1, :j] + costs[:j, j]
            before[k, j] = int(np.argmin(sums))
            total[k, j] = sums[before[k, j]]
    path = [m - 1]
    for k in range(count - 1, 0, -1):
        path.append(before[k, path[-1]])
    return [sigmas[i] for i in reversed(path)], float(total[count - 1, m - 1])


if __name__ == "__main__":
    run_main(main)
