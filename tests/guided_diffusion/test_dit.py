"""DiT's files in both layouts, what is refused of them, and how the network begins. Its numbers:
test_golden_dit.py.
"""

import argparse
import json

import pytest
import torch
from goldens_util import load_manifest, set_golden_weights
from safetensors.torch import save_file

from guided_diffusion.dit import DIT_MODELS, DiT, load_dit
from guided_diffusion.files.diffusers_dit import original_names
from guided_diffusion.files.state_dicts import load_into

SMALL = {"input_size": 8, "hidden_size": 48, "depth": 2, "num_heads": 3, "num_classes": 10}
CONFIG = {
    "_class_name": "DiTTransformer2DModel",
    "num_attention_heads": 3,
    "sample_size": 8,
    "norm_type": "ada_norm_zero",
}
SHARED = {
    "t_embedder.mlp.0": "norm1.emb.timestep_embedder.linear_1",
    "t_embedder.mlp.2": "norm1.emb.timestep_embedder.linear_2",
    "y_embedder.embedding_table": "norm1.emb.class_embedder.embedding_table",
}
EMBEDDINGS = "transformer_blocks.1.norm1.emb"
RENAMED = {
    "x_embedder.proj": "pos_embed.proj",
    "final_layer.adaLN_modulation.1": "proj_out_1",
    "final_layer.linear": "proj_out_2",
    "adaLN_modulation.1": "norm1.linear",
    "attn.proj": "attn1.to_out.0",
    "mlp.fc1": "ff.net.0.proj",
    "mlp.fc2": "ff.net.2",
}


def as_diffusers(state, depth):
    """The state dict under diffusers' names, by the published table of names."""
    result = {}
    for name, tensor in state.items():
        stem, _, kind = name.rpartition(".")
        _, number, within = stem.split(".", 2) if stem.startswith("blocks.") else ("", "", stem)
        if stem in SHARED:
            result |= {f"transformer_blocks.{i}.{SHARED[stem]}.{kind}": tensor.clone() for i in range(depth)}
        elif within == "attn.qkv":
            for part, third in zip(("to_q", "to_k", "to_v"), tensor.chunk(3), strict=True):
                result[f"transformer_blocks.{number}.attn1.{part}.{kind}"] = third.clone()
        elif name != "pos_embed":
            result[f"{f'transformer_blocks.{number}.' if number else ''}{RENAMED[within]}.{kind}"] = tensor
    return result


@pytest.fixture(scope="module")
def net():
    return set_golden_weights(DiT(**SMALL))


def write_folder(folder, state, config=CONFIG):
    folder.mkdir(parents=True)
    save_file(state, folder / "diffusion_pytorch_model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))


def answer(net):
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return net(x, torch.tensor([3, 700]), torch.tensor([4, 10]))


def test_both_layouts_give_the_same_output_bit_for_bit(net, tmp_path):
    torch.save(net.state_dict(), tmp_path / "plain.pt")
    training = {
        "model": DiT(**SMALL).state_dict(),
        "ema": net.state_dict(),
        "opt": {"state": {}, "param_groups": []},
    }
    torch.save({**training, "args": argparse.Namespace(model="DiT-S/2", lr=1e-4)}, tmp_path / "training.pt")
    write_folder(tmp_path / "pipeline/transformer", as_diffusers(net.state_dict(), 2))
    expected = answer(net)
    for path in ("plain.pt", "training.pt"):
        assert torch.equal(answer(load_dit(tmp_path / path, num_heads=3)), expected)
    folder = tmp_path / "pipeline/transformer"
    for path in (folder, folder.parent, folder / "diffusion_pytorch_model.safetensors"):
        loaded = load_dit(path)
        assert torch.equal(answer(loaded), expected)
    assert not loaded.training and not any(parameter.requires_grad for parameter in loaded.parameters())
    assert (loaded.num_classes, loaded.learn_sigma, loaded.input_size) == (10, True, 8)


def test_the_published_network_takes_both_layouts():
    shapes = load_manifest("dit_xl_2_256")["shapes"]
    state = {name: torch.zeros(1).expand(shape) for name, shape in shapes.items()}
    blocks = as_diffusers(state, 28)
    assert sum(tensor.numel() for tensor in blocks.values()) == pytest.approx(750e6, rel=0.01)
    for layout in (state, original_names(blocks, "it") | {"pos_embed": state["pos_embed"]}):
        with torch.device("meta"):
            network = DIT_MODELS["DiT-XL/2"]()
        load_into(network, layout, "it")


def test_diffusers_own_network_has_these_names(net):
    diffusers = pytest.importorskip("diffusers")
    theirs = diffusers.DiTTransformer2DModel(
        **{key: CONFIG[key] for key in ("num_attention_heads", "sample_size")},
        **{"attention_head_dim": 16, "in_channels": 4, "out_channels": 8, "num_layers": 2},
        **{"patch_size": 2, "num_embeds_ada_norm": 10},
    )
    shapes = {name: tensor.shape for name, tensor in theirs.state_dict().items()}
    assert shapes == {name: tensor.shape for name, tensor in as_diffusers(net.state_dict(), 2).items()}


@pytest.mark.parametrize(
    ("change", "config", "message"),
    [
        ({f"{EMBEDDINGS}.class_embedder.embedding_table.weight": 1}, {}, "that of another block"),
        ({f"{EMBEDDINGS}.timestep_embedder.linear_2.bias": 1}, {}, "that of another block"),
        ({"transformer_blocks.0.attn2.to_q.weight": 1}, {}, "is no parameter of diffusers' DiT"),
        ({"transformer_blocks.0.attn1.to_k.bias": None}, {}, "lacks to_k of blocks.0.attn.qkv.bias"),
        ({"proj_out_2.bias": None}, {}, "is no DiT"),
        ({}, {"sample_size": None}, "has sample_size None, and DiT needs a whole number"),
        ({}, {"norm_type": "layer_norm"}, "has norm_type 'layer_norm', and DiT has 'ada_norm_zero'"),
    ],
)  # fmt: skip
def test_a_folder_that_is_another_network_is_refused(net, tmp_path, change, config, message):
    state = as_diffusers(net.state_dict(), 2)
    for name, value in change.items():
        if value is None:
            del state[name]
        else:
            state[name] = state.get(name, torch.zeros(1)) + value
    write_folder(tmp_path / "it", state, {**CONFIG, **config})
    with pytest.raises(ValueError, match=message):
        load_dit(tmp_path / "it")


def test_what_a_file_alone_does_not_say_is_asked_for(net, tmp_path):
    torch.save(net.state_dict(), tmp_path / "plain.pt")
    with pytest.raises(ValueError, match="a DiT of width 48: name its heads"):
        load_dit(tmp_path / "plain.pt")
    save_file(as_diffusers(net.state_dict(), 2), tmp_path / "alone.safetensors")
    with pytest.raises(FileNotFoundError, match=r"has no config\.json"):
        load_dit(tmp_path / "alone.safetensors")
    with pytest.raises(FileNotFoundError, match=r"has no diffusion_pytorch_model\.safetensors"):
        load_dit(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json is not a configuration of diffusers"):
        load_dit(tmp_path / "alone.safetensors")
    with pytest.raises(ValueError, match="patches must divide the input"):
        DiT(**SMALL | {"patch_size": 3})


def test_it_begins_at_zero_and_drops_labels_in_training_alone():
    torch.manual_seed(0)
    net = DiT(**SMALL, class_dropout_prob=0.5)
    assert not answer(net).any()  # adaLN-Zero
    y = torch.arange(10).repeat(40)
    dropped = (net.y_embedder(y) == net.y_embedder.embedding_table.weight[10]).all(dim=1)
    assert 0.4 < dropped.float().mean() < 0.6
    net.eval()
    assert torch.equal(net.y_embedder(y), net.y_embedder.embedding_table(y))
    with torch.device("meta"):
        sizes = {name: make(input_size=32) for name, make in DIT_MODELS.items()}
    assert len(sizes) == 15 and len(sizes["DiT-L/4"].blocks) == 24
