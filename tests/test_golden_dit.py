"""DiT's forwards, with and without classifier-free guidance, and chains of its sampler (golden set G)."""

import pytest
import torch
from goldens_util import (
    FixedNoise,
    load_golden,
    load_manifest,
    max_abs,
    random_input,
    rms,
    rms_relative,
    set_golden_weights,
    thin,
)

from guided_diffusion.dit import DIT_MODELS, DiT
from guided_diffusion.mixed_denoisers import in_one_batch
from guided_diffusion.script_util import create_gaussian_diffusion

CASES, ARRAYS = load_golden("G_dit")
FORWARDS = [name for name, case in CASES.items() if "input" in case]
CHAINS = [name for name, case in CASES.items() if "spec" in case]


@pytest.mark.parametrize("name", FORWARDS)
def test_forward(name):
    case, spec = CASES[name], CASES[name]["input"]
    net = set_golden_weights(DiT(**case["config"]))
    arguments = random_input(spec["seed"], case["x_shape"]), torch.tensor(spec["t"]), torch.tensor(spec["y"])
    with torch.no_grad():
        out = net.forward_with_cfg(*arguments, spec["cfg"]) if "cfg" in spec else net(*arguments)
    assert max_abs(out, ARRAYS[f"{name}/out"]) <= 5e-4
    assert abs(rms(out) - case["out_rms"]) <= 5e-4
    assert max_abs(net.pos_embed[0], ARRAYS[f"{name}/pos_embed"]) <= 1e-6
    assert sum(parameter.numel() for parameter in net.parameters()) == case["n_params"]


@pytest.mark.parametrize("name", CHAINS)
def test_chain(name):
    case, spec = CASES[name], CASES[name]["spec"]
    net, timesteps, noise = set_golden_weights(DiT(**case["config"])), [], FixedNoise(spec["seed"])
    x_T, y = noise(torch.empty(len(spec["y"]), 4, 8, 8)), torch.tensor(spec["y"])
    if spec["cfg"]:  # both halves begin with one noise
        x_T, y = torch.cat([x_T, x_T]), torch.cat([y, torch.full_like(y, net.num_classes)])

    def model(x, t, y):
        timesteps.append(int(t[0]))
        return net.forward_with_cfg(x, t, y, spec["cfg"]) if spec["cfg"] else net(x, t, y)

    diffusion = create_gaussian_diffusion(learn_sigma=True, timestep_respacing=spec["resp"])
    loops = {"p": diffusion.p_sample_loop_progressive, "ddim": diffusion.ddim_sample_loop_progressive}
    options = {"noise": x_T, "clip_denoised": spec.get("clip", False), "randn_like": noise}
    with torch.no_grad():
        yielded = list(loops[spec["sampler"]](model, x_T.shape, model_kwargs={"y": y}, **options))
    assert timesteps == ARRAYS[f"{name}/timesteps_seen_by_model"].tolist()
    for step, golden in zip(ARRAYS[f"{name}/steps"], ARRAYS[f"{name}/x"], strict=True):
        assert rms_relative(thin(yielded[step]["sample"]), golden) <= 3e-4, f"the sample of step {step}"
    final = yielded[-1]["sample"][: len(spec["y"])]
    assert rms_relative(final, ARRAYS[f"{name}/final_kept"], case["final_rms"]) <= 3e-4


@pytest.mark.parametrize("name", [name for name in FORWARDS if "cfg" in CASES[name]["input"]])
def test_guidance_of_half_the_batch_is_the_published_one(name):
    """Its second half is that of no class, of the same samples."""
    case, spec = CASES[name], CASES[name]["input"]
    net, half = set_golden_weights(DiT(**case["config"])), len(spec["y"]) // 2
    guided = in_one_batch(net, net.num_classes, spec["cfg"], channels=3)
    x, t, y = random_input(spec["seed"], case["x_shape"]), torch.tensor(spec["t"]), torch.tensor(spec["y"])
    with torch.no_grad():
        out = guided(x[:half], t[:half], y[:half])
        all_four = in_one_batch(net, net.num_classes, spec["cfg"])(x[:half], t[:half], y[:half])
    assert max_abs(out, ARRAYS[f"{name}/out"][:half]) <= 5e-4
    changed = (all_four != out).any(dim=(0, 2, 3))
    assert changed.nonzero().flatten().tolist() == [3]


@pytest.mark.parametrize("name", ["dit_s_2_256", "dit_xl_2_256"])
def test_published_names_and_shapes(name):
    manifest, kind = load_manifest(name), name.split("_")[1].upper()
    with torch.device("meta"):
        net = DIT_MODELS[f"DiT-{kind}/2"]()
    assert {key: list(tensor.shape) for key, tensor in net.state_dict().items()} == manifest["shapes"]
    assert sum(parameter.numel() for parameter in net.parameters()) == manifest["parameters"]
