"""Sample a preset with and without guidance, on the class-conditional and on the unconditional network, and let a judge compare them.

    python scripts/compare_guidance.py --preset digits --seeds 0-2 --out results/digits

Every flag that is not listed here goes on to scripts/classifier_sample.py, which does the sampling, one run per row of the table. The
judge is a classifier of another architecture and seed than the guide. Writes comparison.json and comparison.png beside the runs.
"""

import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from classifiers.registry import find_classifier, load_classifier
from guided_diffusion.cli import Parser, parse_numbers, run_main
from guided_diffusion.presets import PRESETS
from guided_diffusion.sample_store import read_run, read_samples, save_grid, write_json

NETWORKS = {"class-conditional": "False", "unconditional": "True"}
GUIDANCE = {"unguided": ["--classifier_scale", "0"], "guided": []}
# Reads one flag out of those that go on.
_GUIDE = Parser(add_help=False)
_GUIDE.add_argument("--classifier_type")


def main():
    parser = Parser(description=__doc__)
    parser.add_argument("--preset", default="digits", help="a preset whose network has a null class")
    parser.add_argument("--judge", default="digits_judge", help="the classifier that counts hits; it must not be the guide")
    parser.add_argument("--seeds", default="0", help="one comparison per seed, for example 0-2")
    parser.add_argument("--out", type=Path, help="output folder, by default results/PRESET")
    args, flags = parser.parse_known_args()
    refuse_overrides(args, flags)
    folder = args.out or Path("results", args.preset)
    runs = {}
    for seed in parse_numbers(args.seeds, "--seeds"):
        for network, unconditional in NETWORKS.items():
            for mode, extra in GUIDANCE.items():
                out = folder / f"seed{seed}" / f"{network}-{mode}"
                print(f"{network}, {mode}, seed {seed}", file=sys.stderr)
                sample(["--preset", args.preset, "--unconditional", unconditional, *flags, *extra, "--seed", str(seed), "--out", str(out)])
                runs.setdefault((network, mode), []).append(out)
    rows = [{"network": n, "guidance": g, **compare(outs, args.judge)} for (n, g), outs in runs.items()]
    write_json(folder / "comparison.json", rows)
    draw(folder / "comparison.png", {key: outs[0] for key, outs in runs.items()})
    print_table(rows)
    print(f"pictures from the same noise: {folder / 'comparison.png'}")


def refuse_overrides(args, flags):
    """Raise ValueError for flags that would make two rows the same, and for a judge that cannot be one."""
    for flag, why in (
        ("--seed", "would give every run the same seed: use --seeds"),
        ("--unconditional", "would make rows of the table alike: both kinds of network are compared anyway"),
    ):
        if any(f == flag or f.startswith(f"{flag}=") for f in flags):
            raise ValueError(f"{flag} {why}")
    usable = [name for name, values in PRESETS.items() if values.get("null_class")]
    if args.preset not in usable:
        raise ValueError(f"--preset {args.preset} has no network with a null class, to sample unconditionally; choose {', '.join(usable)}")
    written, _ = _GUIDE.parse_known_args(flags)
    if args.judge == (written.classifier_type or PRESETS[args.preset].get("classifier_type")):
        raise ValueError(f"--judge {args.judge} is the guide itself; choose another classifier, of another architecture")
    find_classifier(args.judge)


def sample(flags):
    """Run one sampling; its own message stands, so only its exit code is passed on."""
    code = subprocess.call([sys.executable, Path(__file__).with_name("classifier_sample.py"), *flags])
    if code:
        sys.exit(code)


def compare(folders, judge_name):
    """Means and sample standard deviations over the runs of one row."""
    measured = [judge(folder, judge_name) for folder in folders]
    rows = {key: [m[key] for m in measured] for key in measured[0]}
    return {key: {"mean": float(np.mean(v)), "std": float(np.std(v, ddof=1)) if len(v) > 1 else None, "runs": v} for key, v in rows.items()}


def judge(folder, name):
    """What the judge and the clock say of one run: hit is the share of samples in the wanted class, log_prob its mean in nats."""
    images, labels = read_samples(folder)
    run = read_run(folder)
    classifier = load_classifier(name, num_classes=run["settings"]["num_classes"], image_size=images.shape[1])
    x = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1
    with torch.no_grad():
        log_probs = F.log_softmax(torch.cat([classifier(part) for part in x.split(100)]).float(), dim=1)
    labels = torch.from_numpy(labels)
    totals = run["totals"]
    return {
        "hit": float((log_probs.argmax(1) == labels).float().mean()),
        "log_prob": float(log_probs.gather(1, labels[:, None]).mean()),
        "seconds_per_image": totals["seconds"] / len(images),
        "guidance_share": totals["guidance_seconds"] / totals["seconds"],
    }


def draw(path, folders, columns=20):
    """One row per run, the same samples in each: the first two of every class, or as many as there are."""
    groups, titles = [], []
    for (network, mode), folder in folders.items():
        images, labels = read_samples(folder)
        rank = np.array([np.sum(labels[:i] == label) for i, label in enumerate(labels)])
        first = np.lexsort((labels, rank))[:columns]
        groups.append(images[first[np.argsort(labels[first], kind="stable")]])
        titles.append(f"{network}\n{mode}")
    save_grid(path, groups, scale=max(1, 48 // groups[0].shape[1]), columns=len(groups[0]), titles=titles)


def print_table(rows):
    print(f"\n{'network':<18} {'guidance':<9} {'wanted class':>15} {'log-probability':>16} {'s per image':>12} {'guidance time':>14}")
    for row in rows:
        hit, log_prob = row["hit"], row["log_prob"]
        spread = len(hit["runs"]) > 1
        hits = f"{hit['mean']:.1%}" + (f" ± {hit['std']:.1%}" if spread else "")
        logs = f"{log_prob['mean']:.2f}" + (f" ± {log_prob['std']:.2f}" if spread else "")
        seconds, share = row["seconds_per_image"]["mean"], row["guidance_share"]["mean"]
        print(f"{row['network']:<18} {row['guidance']:<9} {hits:>15} {logs:>16} {seconds:>12.4f} {share:>14.0%}")


if __name__ == "__main__":
    run_main(main, resumable=True)
