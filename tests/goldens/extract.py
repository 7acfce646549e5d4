"""Make the small golden files beside this script from the full golden sets:

    python tests/goldens/extract.py PATH_OF_THE_FULL_SET

The full sets hold outputs of the published implementations on networks whose weights follow a rule
(`goldens_util.set_golden_weights`). What is kept: the key manifests of the ADM, EDM, torchvision and
Inception networks (set A), ADM U-Net and classifier forwards (B, C), classifier guidance gradients (D), DDPM
and DDIM chains (E) and schedule tables (E_tables), EDM forwards and chains (F), DiT forwards and chains (G),
the numbers and the manifold radii of the evaluation maths (H), Inception features (I), and forwards of EDM's
other networks (J). What is dropped: inputs that are RandomState draws (checked here, drawn again in the
tests), and most entries of large arrays, of which `goldens_util.thin` keeps a fixed subset. The norms of
whole arrays stay in the json. The output depends on the input alone, byte for byte.
"""

import argparse
import gzip
import hashlib
import json
import re
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from goldens_util import GOLDENS, random_image, random_input, thin

MANIFESTS = (
    "adm_64_cond",
    "adm_128_cond",
    "adm_256_cond",
    "adm_classifier_64",
    "adm_classifier_128",
    "baseline_cifar10_32_cond_vp",
    "dit_s_2_256",
    "dit_xl_2_256",
    "edm_cifar10_32_cond_vp",
    "edm_ffhq_64_uncond_ve",
    "edm_imagenet64_cond_adm",
    "fid_inception_v3",
    "torchvision_resnet50",
    "torchvision_resnet101",
)
TRAJECTORY_STRIDE = 7  # of what `thin` leaves, for the inner steps of set F; like its strides a prime


def read(folder, name):
    with np.load(folder / f"{name}.npz", allow_pickle=False) as arrays:
        return json.loads((folder / f"{name}.json").read_text()), {key: arrays[key] for key in arrays.files}


def write(name, configuration, arrays):
    (GOLDENS / f"{name}.json").write_text(json.dumps(configuration, indent=1) + "\n")
    np.savez_compressed(GOLDENS / f"{name}.npz", **arrays)


def select(mapping, *keys):
    return {key: mapping[key] for key in keys if key in mapping}


def extract_manifests(folder):
    (GOLDENS / "manifests").mkdir(exist_ok=True)
    for name in MANIFESTS:
        full = json.loads(gzip.decompress((folder / "A_manifests" / f"{name}.json.gz").read_bytes()))
        flags = re.search(r"\{.*\}", full["how"])
        small = {
            "flags": json.loads(flags[0]) if flags else {},
            "parameters": full["total_parameters"],
            "shapes": {key: shape for key, shape, *_ in sorted(full["entries"])},
        }
        packed = gzip.compress(json.dumps(small, separators=(",", ":")).encode(), mtime=0)
        (GOLDENS / "manifests" / f"{name}.json.gz").write_bytes(packed)


def extract_forwards(folder, name):
    """Sets B and C: one forward (and, for C, one gradient) per case."""
    full, arrays = read(folder, name)
    cases, small = {}, {}
    for case, configuration in full["cases"].items():
        x = arrays[f"{case}/x"]
        assert np.array_equal(x, random_input(configuration["input"]["seed"], x.shape)), case
        cases[case] = select(
            configuration, "constructor", "config", "input", "out_rms", "logits_rms", "grad_rms"
        )
        cases[case]["x_shape"] = x.shape
        for key in ("out", "logits", "selected", "grad"):
            if f"{case}/{key}" in arrays:
                small[f"{case}/{key}"] = thin(arrays[f"{case}/{key}"])
    write(name, cases, small)


def extract_guidance(folder):
    full, arrays = read(folder, "D_offtheshelf_guidance")
    seeds = {}
    for name, spec in full["inputs"].items():
        seeds[name] = spec["seed"]
        x = random_image(spec["seed"], spec["shape"]).numpy()
        assert hashlib.sha256(x.tobytes()).hexdigest()[:16] == spec["sha256_16"], name
    cases, small = {}, {}
    for case, configuration in full["cases"].items():
        cases[case] = select(configuration, "net", "size", "softplus_beta", "y")
        cases[case]["seed"] = seeds[configuration["x"]]
        cases[case]["temperatures"] = [
            select(
                temps,
                "joint_temperature",
                "margin_temperature_discount",
                "stored",
                "grad_rms",
                "grad_l2_per_image",
            )
            for temps in configuration["temps"]
        ]
        small |= {key: thin(value) for key, value in arrays.items() if key.startswith(f"{case}/")}
    write("D_offtheshelf_guidance", cases, small)


def extract_sampling(folder):
    full, arrays = read(folder, "E_ddpm_sampling")
    cases, small = {}, {}
    for case, configuration in full["cases"].items():
        cases[case] = select(
            configuration,
            "spec",
            "unet_config",
            "diffusion_config",
            "n_steps",
            "final_rms",
            "classifier_timesteps",
        )
        steps, x = arrays[f"{case}/steps"], arrays[f"{case}/x"]
        middle = configuration["n_steps"] // 2
        small[f"{case}/steps"] = steps
        # whole, because the single-step test starts from it
        small[f"{case}/x_before_middle"] = x[list(steps).index(middle - 1)]
        small[f"{case}/x"] = np.stack([thin(one) for one in x])
        for key in ("final", "pred_xstart_mid", "timesteps_seen_by_model", "max_variance"):
            small[f"{case}/{key}"] = thin(arrays[f"{case}/{key}"])
    classifier = full["classifier_config(EncoderUNetModel)"]
    write("E_ddpm_sampling", {"cases": cases, "noisy_classifier": classifier}, small)


def extract_tables(folder):
    full, arrays = read(folder, "E_tables")
    for key, seed in (("x", 3000), ("model_out", 3001), ("grad", 3002)):
        for case in sorted({name.split("/")[1] for name in arrays if name.startswith("step/")}):
            stored = arrays.pop(f"step/{case}/{key}")
            assert np.array_equal(stored, random_input(seed, stored.shape)), (case, key)
    dropped = ("condition_score_mean", "edm_uint8", "edm_uint8_from_float64")
    small = {key: value for key, value in arrays.items() if not key.endswith(dropped)}
    write("E_tables", {"refused": sorted(full["cases"]["respace"]["errors"])}, small)


def extract_edm(folder):
    full, arrays = read(folder, "F_edm")
    forwards, chains = {}, {}
    small = {key: value for key, value in arrays.items() if key.startswith("f0_stacked_rng/")}
    for case, configuration in full["cases"].items():
        stored = {
            key.removeprefix(f"{case}/"): value for key, value in arrays.items() if key.startswith(f"{case}/")
        }
        if "config" in configuration:
            x = stored["x"]
            assert np.array_equal(
                x, random_noisy_image(configuration["input"]["seed"], stored["sigma"], x.shape)
            ), case
            forwards[case] = select(configuration, "config", "input", "num_heads", "out_rms", "F_x_rms")
            forwards[case]["x_shape"] = x.shape
            kept = {key: thin(stored[key]) for key in ("out", "F_x")}
        elif "spec" in configuration:
            assert np.abs(stored["final"] - stored["denoised_last"]).max() <= 1e-7, (
                case
            )  # one of the two is enough
            chains[case] = select(configuration, "spec", "final_rms")
            chains[case]["shape"] = stored["final"].shape
            kept = select(stored, "t_hat", "steps", "x_rms_per_step", "guidance_schedule", "measured_ratio")
            kept["final"] = thin(stored["final"]).astype(np.float32)
            for key in ("x_cur", "x_hat"):
                kept[key] = np.stack([thin(one)[::TRAJECTORY_STRIDE] for one in stored[key]])
        small |= {f"{case}/{key}": value for key, value in kept.items()}
    settings = {
        "forwards": forwards,
        "chains": chains,
        "chain_net": full["sampler_net_config"],
        "trajectory_stride": TRAJECTORY_STRIDE,
    }
    write("F_edm", settings, small)


def extract_dit(folder):
    full, arrays = read(folder, "G_dit")
    cases, small = {}, {}
    for case, configuration in full["cases"].items():
        stored = {
            key.removeprefix(f"{case}/"): value for key, value in arrays.items() if key.startswith(f"{case}/")
        }
        cases[case] = select(configuration, "config", "input", "spec", "n_params", "out_rms", "final_rms")
        if "input" in configuration:
            x = stored.pop("x")
            assert np.array_equal(x, random_input(configuration["input"]["seed"], x.shape)), case
            cases[case]["x_shape"] = x.shape
            kept = select(stored, "out", "pos_embed")
        else:
            kept = select(stored, "steps", "final_kept", "timesteps_seen_by_model")
            kept["x"] = np.stack([thin(one) for one in stored["x"]])
        small |= {f"{case}/{key}": value for key, value in kept.items()}
    write("G_dit", cases, small)


def random_noisy_image(seed, sigma, shape):
    """A sample at noise level `sigma` of data with a standard deviation of 0.5, float32."""
    sigma = sigma.astype(np.float32).reshape(-1, 1, 1, 1)
    return random_input(seed, shape).numpy() * np.sqrt(sigma**2 + np.float32(0.25))


def extract_eval_math(folder):
    full, arrays = read(folder, "H_eval_math")
    write(
        "H_eval_math",
        full["cases"],
        {
            key: value
            for key, value in arrays.items()
            if key.endswith(("radii_sq_ref_f64", "radii_sq_smp_f64"))
        },
    )


def extract_inception(folder):
    full, arrays = read(folder, "I_inception")
    cases, small = {}, {}
    for case, configuration in full["cases"].items():
        cases[case] = select(
            configuration, "spec", "pool2048_l2_per_image", "torch_fidelity_pool2048_l2_per_image"
        )
        stored = {
            key.removeprefix(f"{case}/"): value for key, value in arrays.items() if key.startswith(f"{case}/")
        }
        assert np.array_equal(stored.pop("images"), random_bytes(**configuration["spec"])), case
        del stored["pytorch_fid_logits"]  # logits_unbiased and a bias that the weight rule gives
        small |= {
            f"{case}/{key.removesuffix('_Mixed_6d_branch1x1_UNVERIFIED')}": thin(value)
            for key, value in stored.items()
        }
    write("I_inception", {"gain": full["gain"], "cases": cases}, small)


def random_bytes(seed, n, h, w):
    """(n, h, w, 3) uint8; image k is k + 1 times darker than noise."""
    images = np.random.RandomState(seed).randint(0, 256, (n, h, w, 3))
    return (images // np.arange(1, n + 1).reshape(-1, 1, 1, 1)).astype(np.uint8)


def extract_edm_networks(folder):
    full, arrays = read(folder, "J_edm_networks")
    cases, small = {}, {}
    for case, configuration in full["cases"].items():
        x = arrays[f"{case}/x"]
        scale = 1 + np.float32(configuration["sigma"]).reshape(-1, 1, 1, 1)
        assert np.array_equal(x, random_input(configuration["seed"], x.shape).numpy() * scale), case
        kept = ("cls", "config", "seed", "sigma", "labels", "out_rms", "n_params", "sigma_min", "sigma_max")
        cases[case] = {**select(configuration, *kept), "x_shape": x.shape}
        small[f"{case}/sigma"] = arrays[f"{case}/sigma"]  # rounded to the levels of the network
        small[f"{case}/out"] = thin(arrays[f"{case}/out"])
    write("J_edm_networks", cases, small)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("full_set", type=Path, help="folder with the full golden sets")
    folder = parser.parse_args().full_set
    extract_manifests(folder)
    for name in ("B_adm_unet", "C_adm_classifier"):
        extract_forwards(folder, name)
    extract_guidance(folder)
    extract_sampling(folder)
    extract_tables(folder)
    extract_edm(folder)
    extract_dit(folder)
    extract_eval_math(folder)
    extract_inception(folder)
    extract_edm_networks(folder)


if __name__ == "__main__":
    main()
