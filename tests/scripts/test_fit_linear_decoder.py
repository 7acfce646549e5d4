"""scripts/fit_linear_decoder.py: the map that it writes is the best one, and --latent_decoder linear reads
it.
"""

import numpy as np
import pytest
import torch
from helpers import call, load_script

from classifiers.decoders import load_decoder

SCRIPT = load_script("fit_linear_decoder")


@pytest.fixture
def files(tmp_path):
    """An autoencoder of random weights, and images."""
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    blocks = {
        f"{way}_block_types": (f"{name}Block2D",) * 2
        for way, name in (("down", "DownEncoder"), ("up", "UpDecoder"))
    }
    vae = diffusers.AutoencoderKL(block_out_channels=(8, 8), norm_num_groups=4, latent_channels=4, **blocks)
    vae.save_pretrained(tmp_path / "vae")
    images = np.random.RandomState(0).randint(0, 256, (5, 8, 8, 3), dtype=np.uint8)
    np.savez(tmp_path / "images.npz", arr_0=images)
    return tmp_path, vae, images


def test_no_other_map_is_nearer(files):
    folder, vae, images = files
    flags = [
        folder / "images.npz",
        out := folder / "map.safetensors",
        "--vae",
        folder / "vae",
        "--batch_size",
        2,
    ]
    result = call(SCRIPT.main, [*flags, "--num_images", 3])
    assert result.code == 0, result.err
    assert f"{out}: 3 images, " in result.out and "% of the variance of their pixels explained" in result.out
    x = torch.from_numpy(images[:3]).permute(0, 3, 1, 2).float() / 127.5 - 1
    with torch.no_grad():
        z = vae.encode(x).latent_dist.mode() * 0.18215
    small = torch.nn.functional.avg_pool2d(x, 2)
    residual = small - load_decoder("linear", out)(z)
    for regressor in (torch.ones_like(z[:, :1]), z):
        assert torch.einsum("nkhw,nchw->kc", residual, regressor).abs().max() < 1e-3
    again = call(SCRIPT.main, flags)
    assert again.code == 1 and "be new or be replaced with --overwrite" in again.err
    assert call(SCRIPT.main, [*flags, "--overwrite"]).code == 0
    assert "must be at least 1" in call(SCRIPT.main, [*flags, "--overwrite", "--batch_size", 0]).err
    flags[1] = folder / "nowhere" / "map.safetensors"
    assert "there is no folder" in call(SCRIPT.main, flags).err
