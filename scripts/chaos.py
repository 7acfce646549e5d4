"""Kill a sampling run again and again, and check that its images are those of a run that nobody disturbed.

    python scripts/chaos.py --kills 30 --out results/chaos

Each attempt runs on 1, 2 or 3 processes, drawn at random, and one of them is killed with signal 9 at a random
time. After every attempt each file with a final name must be complete. In the end the npz must equal that of
an undisturbed run byte for byte. Flags that are not listed here are those of scripts/classifier_sample.py.
One thread per process: pixels depend on how sums are split over threads.
"""

import os
import random
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import _beside  # noqa: F401
import numpy as np
from tqdm import tqdm

from guided_diffusion.flags.parser import Parser, parse_numbers, run_main

SAMPLE = Path(__file__).with_name("classifier_sample.py")
PATIENCE_SECONDS = 60  # within which the others end when one was killed


def main():
    args, flags = create_argparser().parse_known_args()
    counts, chance = parse_numbers(args.processes, "--processes"), random.Random(args.seed)
    numbers = ["--num_samples", args.num_samples, "--batch_size", args.batch_size]
    flags = ["--preset", "digits", *numbers, *flags, "--overwrite"]
    whole, killed = args.out / "whole", args.out / "killed"
    finish(start(1, [*flags, "True", "--out", whole]))

    overwrite = "True"
    for done in (bar := tqdm(range(args.kills), desc="kills")):
        group = start(chance.choice(counts), [*flags, overwrite, "--out", killed])
        if not kill_one(group, chance, chance.uniform(0, args.longest)):
            raise ValueError(
                f"the run was complete after {done} kills: give more --num_samples, or a shorter --longest"
            )
        overwrite = "False" if (killed / "run.json").exists() else overwrite
        bar.set_postfix(complete=check_files(killed))
    finish(start(chance.choice(counts), [*flags, overwrite, "--out", killed]))
    compare(whole, killed)
    print(f"{args.kills} kills, {args.num_samples} samples: the same bytes as those of an undisturbed run")


def create_argparser():
    parser = Parser(description=__doc__)
    flag = parser.add_argument
    flag("--kills", type=int, default=30)
    flag("--processes", default="1-3", help="how many a run may have")
    flag("--longest", type=float, default=10.0, help="seconds that an attempt may live")
    flag("--num_samples", type=int, default=2000)
    flag("--batch_size", type=int, default=10)
    flag("--seed", type=int, default=0, help="of what is killed when; that of the samples stays 0")
    flag("--out", type=Path, default=Path("results/chaos"))
    return parser


def start(processes, flags):
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", processes]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True, "errors": "replace"}
    return subprocess.Popen(
        [str(word) for word in [*launcher, SAMPLE, *flags]], env=environment, start_new_session=True, **quiet
    )


def finish(group):
    """Wait for an undisturbed run. Raises ValueError with the end of what it said where it failed."""
    _, errors = group.communicate()
    if group.returncode:
        raise ValueError(
            f"a run that nobody disturbed failed with exit code {group.returncode}: ...{errors[-1000:]}"
        )


def kill_one(group, chance, delay):
    """Kill a random process of a run after `delay` seconds, and wait for the others; False if the run had
    ended by itself.
    """
    try:
        _, errors = group.communicate(timeout=delay)
        if group.returncode:
            code = group.returncode
            raise ValueError(f"a run failed with exit code {code} before it was killed: ...{errors[-1000:]}")
        return False
    except subprocess.TimeoutExpired:
        pids = [group.pid, *workers(group.pid)]
        victim = chance.choice(pids)
        os.kill(victim, signal.SIGKILL)
    try:
        # The others must end by themselves; but the workers of a launcher that was killed belong to nobody,
        # and go with it.
        if victim != group.pid:
            group.wait(PATIENCE_SECONDS)
    except subprocess.TimeoutExpired:
        raise ValueError(
            f"{len(pids) - 1} other processes did not end within {PATIENCE_SECONDS} s after one was killed"
        ) from None
    finally:
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        group.communicate()
    return True


def workers(pid):
    """The processes that a launcher started; empty for plain python."""
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def check_files(folder):
    """Open every file that has a final name; returns the number of samples in them. Raises ValueError for an
    incomplete one.
    """
    complete = 0
    for path in [*folder.glob("shards/[0-9]*.npz"), *folder.glob("samples_*.npz")]:
        try:
            with np.load(path, allow_pickle=False) as file:
                images, labels = file["arr_0"], file["arr_1"]
        except Exception as error:
            raise ValueError(f"{path} has a final name, but is not complete ({error})") from error
        if len(images) != len(labels):
            raise ValueError(f"{path} holds {len(images)} images and {len(labels)} labels")
        complete += len(images)
    return complete


def compare(whole, killed):
    (one,), (other,) = (list(folder.glob("samples_*.npz")) for folder in (whole, killed))
    if one.read_bytes() != other.read_bytes():
        with np.load(one, allow_pickle=False) as a, np.load(other, allow_pickle=False) as b:
            images, labels = (
                (a[key] != b[key]).reshape(len(a[key]), -1).any(1) for key in ("arr_0", "arr_1")
            )
        differing = np.flatnonzero(images | labels)
        raise ValueError(f"{other} differs from {one} in {len(differing)} samples, first in {differing[:1]}")


if __name__ == "__main__":
    run_main(main)
