"""From latents to images: gradients through decoder and classifier against finite differences, the linear map
against least squares, and files of diffusers.
"""

import json
import shutil
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from classifiers.decoders import (
    PUBLIC_MAP,
    DecodedClassifier,
    LinearDecoder,
    fit_linear,
    load_decoder,
    present_name,
    require_diffusers,
)

LATENT = (2, 4, 4, 4)
KL = {"block_out_channels": (8, 16), "norm_num_groups": 4, "latent_channels": 4}
KL |= {
    f"{way}_block_types": (f"{name}Block2D",) * 2
    for way, name in (("down", "DownEncoder"), ("up", "UpDecoder"))
}
TINY = {f"{part}coder_block_out_channels": (8, 8) for part in ("en", "de")}
TINY |= {f"num_{part}coder_blocks": (1, 1) for part in ("en", "de")}
AUTOENCODERS = {"vae": ("AutoencoderKL", KL), "tiny": ("AutoencoderTiny", TINY)}


def latents(dtype=torch.float64):
    return torch.randn(LATENT, generator=torch.Generator().manual_seed(0), dtype=dtype)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A folder of each autoencoder, of random weights, as diffusers writes it."""
    diffusers, folder = pytest.importorskip("diffusers"), tmp_path_factory.mktemp("autoencoders")
    torch.manual_seed(1)
    for kind, (name, config) in AUTOENCODERS.items():
        getattr(diffusers, name)(**config).save_pretrained(folder / kind)
    return folder


def small_classifier():
    torch.manual_seed(2)
    return nn.Sequential(nn.Conv2d(3, 4, 3, stride=2), nn.Softplus(), nn.Flatten(), nn.LazyLinear(5)).double()


def decoder_of(kind, folders, **options):
    path = "" if kind == "linear" else folders / kind
    return load_decoder(kind, path, size=8, **options).double()


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", ["vae", "tiny", "linear"])
def test_the_gradient_equals_finite_differences(kind, checkpointing, folders):
    net = DecodedClassifier(small_classifier(), decoder_of(kind, folders, checkpointing=checkpointing))
    z = latents()
    net(z)  # the lazy layer takes its size
    assert torch.autograd.gradcheck(lambda z: net(z)[:, 3], z.requires_grad_(), fast_mode=True)


@pytest.mark.parametrize("kind", ["vae", "tiny"])
def test_checkpointing_changes_no_bit_and_keeps_fewer_activations(kind, folders):
    gradients, kept = [], []
    for checkpointing in (False, True):
        decoder, z, held = (
            decoder_of(kind, folders, checkpointing=checkpointing),
            latents().requires_grad_(),
            [],
        )

        def keep(tensor, held=held):
            held.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            total = decoder(z).square().sum()
        kept.append(sum(held))
        gradients.append(torch.autograd.grad(total, z)[0])
    assert torch.equal(*gradients)
    assert kept[1] < kept[0] / 2


def test_the_answer_is_the_autoencoders_own_for_scaled_latents(folders):
    diffusers, z = require_diffusers(), latents(torch.float32)
    for kind, (name, _) in AUTOENCODERS.items():
        theirs = getattr(diffusers, name).from_pretrained(folders / kind)
        with torch.no_grad():
            expected = theirs.decode(z / theirs.config.scaling_factor).sample
            assert torch.equal(load_decoder(kind, folders / kind)(z), expected)
            half = load_decoder(kind, folders / kind).to(torch.bfloat16)(z)
        assert half.dtype == torch.float32 and (half - expected).abs().max() < 0.2
    assert theirs.config.scaling_factor == 1  # tiny takes them as they are


def test_names_of_older_files_are_read(folders, tmp_path):
    state = load_file(folders / "vae/diffusion_pytorch_model.safetensors")
    new = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    old = {}
    for name, tensor in state.items():
        for now, then in new.items():
            name = name.replace(f".attentions.0.{now}.", f".attentions.0.{then}.")
        old[name] = tensor
    assert old.keys() != state.keys() and {present_name(name) for name in old} == state.keys()
    (tmp_path / "pipeline/vae").mkdir(parents=True)
    save_file(old, tmp_path / "pipeline/vae/diffusion_pytorch_model.safetensors")
    (tmp_path / "pipeline/vae/config.json").write_text((folders / "vae/config.json").read_text())
    z = latents(torch.float32)
    with torch.no_grad():
        assert torch.equal(
            load_decoder("vae", tmp_path / "pipeline")(z), load_decoder("vae", folders / "vae")(z)
        )


def test_the_linear_decoder_is_least_squares_and_enlarges(tmp_path):
    z = latents(torch.float32)
    matrix, offset = torch.randn(4, 3), torch.randn(3)
    images = torch.einsum("nchw,ck->nkhw", z, matrix) + offset.view(3, 1, 1)
    exact = fit_linear(z, images)
    torch.testing.assert_close(exact["weight"], matrix, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(exact["bias"], offset, rtol=1e-5, atol=1e-5)
    noisy = images + torch.randn(images.shape, generator=torch.Generator().manual_seed(3))
    fitted = fit_linear(z, noisy)
    residual = noisy - LinearDecoder(**fitted)(z)
    assert abs(residual.mean(dim=(0, 2, 3))).max() < 1e-6  # least squares: orthogonal to what it is made of
    assert abs(torch.einsum("nkhw,nchw->kc", residual, z)).max() < 1e-3
    save_file(dict(fitted), tmp_path / "linear.safetensors")
    assert torch.equal(load_decoder("linear", tmp_path / "linear.safetensors")(z), LinearDecoder(**fitted)(z))
    larger = load_decoder("linear", size=32)(z)
    assert larger.shape == (2, 3, 32, 32)
    plain = load_decoder("linear")(z)
    torch.testing.assert_close(plain[0, :, 1, 2], torch.tensor(PUBLIC_MAP).T @ z[0, :, 1, 2])


def test_what_cannot_be_loaded(tmp_path, folders):
    with pytest.raises(ValueError, match="unknown latent decoder 'big'; choose vae, tiny, linear"):
        load_decoder("big")
    with pytest.raises(FileNotFoundError, match="give diffusers' folder of an autoencoder"):
        load_decoder("vae", tmp_path)
    with pytest.raises(ValueError, match="holds a AutoencoderTiny, not an AutoencoderKL"):
        load_decoder("vae", folders / "tiny")
    with pytest.raises(ValueError, match=r"takes weight \(channels, 3\)"):
        LinearDecoder(torch.zeros(3, 4), torch.zeros(3))
    save_file({"weight": torch.zeros(4, 3)}, tmp_path / "half.safetensors")
    with pytest.raises(ValueError, match="is no linear decoder: it lacks bias"):
        load_decoder("linear", tmp_path / "half.safetensors")
    config = json.loads((folders / "vae/config.json").read_text())
    assert config["scaling_factor"] == 0.18215
    shutil.copytree(folders / "vae", tmp_path / "other")
    (tmp_path / "other/config.json").write_text(json.dumps(config | {"latents_mean": [0.5] * 4}))
    with pytest.raises(ValueError, match="other has latents_mean and latents_std, which are not known here"):
        load_decoder("vae", tmp_path / "other")


def test_without_diffusers_one_line_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(ValueError, match=r'an autoencoder needs diffusers: pip install -e "\.\[dit\]"'):
        load_decoder("vae", tmp_path)
    assert load_decoder("linear")(latents()).shape == (2, 3, 4, 4)
