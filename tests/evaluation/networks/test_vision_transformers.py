"""DINOv2's and CLIP's features are those of the networks that transformers has saved, of images as Pillow
resizes them; and what is no such network.
"""

import json
import shutil
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from evaluation.networks import feature_network
from evaluation.networks.vision_transformers import (
    CLIPFeatures,
    DINOv2Features,
    pillow_resize,
    resize_positions,
)

transformers = pytest.importorskip("transformers")
RANDOM = np.random.RandomState(0)
SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28}
SIZES["patch_size"] = 14
TOWER = {**SIZES, "intermediate_size": 16, "projection_dim": 8}
WORDS = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
WORDS |= {"vocab_size": 20, "projection_dim": 8, "bos_token_id": 1, "eos_token_id": 2}
MEAN, STD = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
CLIP_MEAN, CLIP_STD = torch.tensor(CLIPFeatures.mean), torch.tensor(CLIPFeatures.std)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """{name: (the network, its folder)}."""
    torch.manual_seed(0)
    clip = transformers.CLIPConfig(text_config=WORDS, vision_config=TOWER, projection_dim=8)
    networks = {
        "dinov2": transformers.Dinov2Model(transformers.Dinov2Config(**SIZES)),
        "clip": transformers.CLIPModel(clip),
    }
    folders = {name: tmp_path_factory.mktemp(name) for name in networks}
    for name, network in networks.items():
        for parameter in network.parameters():  # biases and norms that matter
            torch.nn.init.normal_(parameter, 0, 0.3)
        network.eval().save_pretrained(folders[name])
    return {name: (network, folders[name]) for name, network in networks.items()}


@pytest.mark.parametrize(("before", "after"), [((32, 32), 224), ((64, 48), 28), ((28, 28), 28)])
def test_images_are_resized_as_pillow_does(before, after):
    image = RANDOM.randint(0, 256, (*before, 3), dtype=np.uint8)
    expected = np.asarray(Image.fromarray(image).resize((after, after), Image.Resampling.BICUBIC), np.float32)
    (actual,) = pillow_resize(torch.from_numpy(image).permute(2, 0, 1)[None].float(), after)
    difference = np.abs(actual.permute(1, 2, 0).numpy() - expected)
    assert difference.max() <= 1 and difference.mean() < 0.05  # Pillow rounds between its two passes


def test_dinov2_is_its_cls_token_of_224_pixels(saved):
    network, folder = saved["dinov2"]
    features = feature_network(f"dinov2:{folder}")
    images = RANDOM.randint(0, 256, (3, 224, 224, 3), dtype=np.uint8)
    x = torch.from_numpy((images / 255 - MEAN) / STD).permute(0, 3, 1, 2).float()
    same = transformers.Dinov2Model(transformers.Dinov2Config(**{**SIZES, "image_size": 224})).eval()
    positions = {
        "embeddings.position_embeddings": resize_positions(network.embeddings.position_embeddings, 16)
    }
    same.load_state_dict(network.state_dict() | positions)
    with torch.no_grad():
        expected = same(pixel_values=x).last_hidden_state[:, 0].numpy()
    result = features(images)
    assert (features.name, features.protocol, tuple(result)) == ("dinov2", "dinov2-224", ("pool3",))
    assert np.ptp(expected, axis=0).max() > 0.01  # the images differ
    assert np.abs(result["pool3"] - expected).max() < 1e-4
    assert features(images[:2, ::7, ::7])["pool3"].shape == (2, 16)  # 32x32, resized


def test_positions_are_resized_by_the_factor_of_the_published_code():
    """Place i of 16 lies at (i + 1/2) 37 / 16.1 - 1/2 of 37; torch's cubic bends a line by 0.05 at most."""
    rows, columns = np.meshgrid(np.arange(37.0), np.arange(37.0), indexing="ij")
    table = torch.from_numpy(np.stack([rows.ravel(), columns.ravel()], axis=1))[None]
    table = torch.cat([torch.full((1, 1, 2), 9.0), table], dim=1)
    resized = resize_positions(table, 16)
    assert resized.shape == (1, 257, 2) and resized[0, 0].tolist() == [9, 9]
    row, column = resized[0, 1:].reshape(16, 16, 2).unbind(2)
    inside = (np.arange(16) + 0.5) * 37 / 16.1 - 0.5
    assert row[1:-1, 3].numpy() == pytest.approx(inside[1:-1], abs=0.06)
    assert column[3, 1:-1].numpy() == pytest.approx(inside[1:-1], abs=0.06)
    assert np.abs(inside - ((np.arange(16) + 0.5) * 37 / 16 - 0.5))[14] > 0.2  # what transformers has
    assert resize_positions(table, 37) is table


def test_clip_is_its_normalised_embedding_of_the_centre(saved):
    network, folder = saved["clip"]
    features = feature_network(f"clip:{folder}")
    images = RANDOM.randint(0, 256, (3, 28, 40, 3), dtype=np.uint8)
    x = (torch.from_numpy(images[:, :, 6:34]) / 255 - CLIP_MEAN) / CLIP_STD
    with torch.no_grad():
        tower = network.vision_model(pixel_values=x.permute(0, 3, 1, 2))
        expected = F.normalize(network.visual_projection(tower.pooler_output), dim=1).numpy()
    result = features(torch.from_numpy(images))
    assert (features.name, features.protocol) == ("clip", "clip-28")
    assert np.ptp(expected, axis=0).max() > 0.01
    assert np.abs(result["pool3"] - expected).max() < 1e-5


@pytest.mark.parametrize("name", ["dinov2", "clip"])
def test_a_file_is_read_as_its_folder_or_as_the_published_network(saved, tmp_path, monkeypatch, name):
    folder = saved[name][1]
    images = RANDOM.randint(0, 256, (2, 28, 28, 3), dtype=np.uint8)
    of_folder, of_file = (
        feature_network(f"{name}:{folder}"),
        feature_network(f"{name}:{folder / 'model.safetensors'}"),
    )
    assert of_folder.sha256 == of_file.sha256
    assert np.array_equal(of_folder(images)["pool3"], of_file(images)["pool3"])
    shutil.copy(folder / "model.safetensors", tmp_path / "alone.safetensors")
    kind, sizes = (DINOv2Features, SIZES) if name == "dinov2" else (CLIPFeatures, TOWER)
    monkeypatch.setattr(kind, "architecture", {**sizes, "hidden_size": 32})
    with pytest.raises(ValueError, match=r"alone.safetensors does not fit the config.json beside it, or"):
        feature_network(f"{name}:{tmp_path / 'alone.safetensors'}")
    monkeypatch.setattr(kind, "architecture", sizes)
    alone = feature_network(f"{name}:{tmp_path / 'alone.safetensors'}")
    assert np.array_equal(of_folder(images)["pool3"], alone(images)["pool3"])


def test_what_is_no_such_network(saved, tmp_path, monkeypatch):
    with pytest.raises(
        FileNotFoundError, match=r"no model.safetensors of dinov2 at .*none: give --features d"
    ):
        feature_network(f"dinov2:{tmp_path / 'none'}")
    with pytest.raises(
        ValueError, match="holds a network of model_type 'clip', not dinov2: give one like fac"
    ):
        feature_network(f"dinov2:{saved['clip'][1]}")
    folder = shutil.copytree(saved["dinov2"][1], tmp_path / "deeper")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 2}))
    with pytest.raises(ValueError, match=r"lacks 18 weights of dinov2, such as encoder.layer.1"):
        feature_network(f"dinov2:{folder}")
    network = feature_network(f"clip:{saved['clip'][1]}")
    with pytest.raises(
        ValueError, match=r"clip features need uint8 images \(N, H, W, 3\), not torch.float32"
    ):
        network(np.zeros((1, 28, 28, 3), np.float32))
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(
        ValueError, match=r'transformers, which is not installed: pip install -e "\.\[zoo\]"$'
    ):
        feature_network("dinov2")
