"""EDM's pickles as data: names, tensors, arguments, and the networks that they make."""

import pytest
import torch
from edm_pickles import (
    TINY,
    dumps,
    module_state,
    network,
    persistent,
    random_net,
    refusal,
    snapshot,
    tiny_snapshots,
    write,
)

from guided_diffusion.edm import EDMPrecond, load_edm_network
from guided_diffusion.files.checkpoints import load_edm_checkpoint, load_state_dict


@pytest.mark.parametrize("protocol", [3, 4, 5])
@pytest.mark.parametrize("kind", [0, 1], ids=["EDMPrecond", "iDDPMPrecond"])
def test_names_tensors_and_arguments(tmp_path, kind, protocol):
    net, arguments, content = list(tiny_snapshots())[kind]
    content = content if protocol == 4 else dumps(snapshot(net, arguments), protocol)
    checkpoint = load_edm_checkpoint(write(tmp_path, content))
    assert (checkpoint.class_name, checkpoint.arguments) == (type(net).__name__, arguments)
    assert list(checkpoint.state_dict) == list(net.state_dict())
    assert list(load_state_dict(tmp_path / "network.pkl")) == list(net.state_dict())
    for name, tensor in net.state_dict().items():
        assert checkpoint.state_dict[name].dtype == tensor.dtype
        assert torch.equal(checkpoint.state_dict[name], tensor)


@pytest.mark.parametrize("kind", [0, 1], ids=["EDMPrecond", "iDDPMPrecond"])
def test_network_answers_as_the_pickled_one(tmp_path, kind):
    net, _, content = list(tiny_snapshots())[kind]
    loaded = load_edm_network(write(tmp_path, content))
    assert type(loaded) is type(net)
    assert not loaded.training and not any(p.requires_grad for p in loaded.parameters())
    x, labels = torch.randn(2, 3, 8, 8), torch.eye(2)
    torch.testing.assert_close(loaded(x, 1.5, labels), net(x, 1.5, labels), rtol=0, atol=1e-6)


# fmt: off
TENSORS = [
    torch.arange(24.0).view(2, 3, 2, 2).to(memory_format=torch.channels_last), torch.arange(24.0)[5:9],
    torch.arange(6.0).view(2, 3).T, torch.tensor(2.5), torch.ones(0, 3), torch.tensor([1.5, -2]).bfloat16(),
    torch.tensor([1.5, -2]).half(), torch.tensor([1.5, -2]).double(), torch.tensor([2**40, -1]),
    torch.tensor([True, False]), torch.tensor([200], dtype=torch.uint8),
]
# fmt: on


@pytest.mark.parametrize("tensor", TENSORS, ids=lambda t: f"{t.dtype} {list(t.shape)}")
def test_tensors_of_any_layout_and_type(tmp_path, tensor):
    parameter = torch.nn.Parameter(tensor, requires_grad=tensor.is_floating_point())
    read = load_state_dict(write(tmp_path, network({"w": parameter, "none": None})))
    assert list(read) == ["w"]
    assert read["w"].dtype == tensor.dtype and read["w"].is_contiguous() and not read["w"].requires_grad
    assert torch.equal(read["w"], tensor)


def test_arguments_without_names(tmp_path):
    state = module_state({"w": torch.ones(1)}, arguments={"channel_mult": (1, 2)}, args=(64, 3, 1000, True))
    checkpoint = load_edm_checkpoint(write(tmp_path, {"ema": persistent("EDMPrecond", state)}))
    first = {"img_resolution": 64, "img_channels": 3, "label_dim": 1000, "use_fp16": True}
    assert checkpoint.arguments == {**first, "channel_mult": [1, 2]}


@pytest.mark.parametrize(
    "arguments", [{"x": torch.ones(1)}, {"x": {"y": 1}}, {"x": [[1]]}, {"x\n": 1}, {"x": "y" * 200}]
)
def test_arguments_that_are_not_plain(tmp_path, arguments):
    state = module_state({"w": torch.ones(1)}, arguments=arguments)
    assert "the argument" in refusal(write(tmp_path, {"ema": persistent("EDMPrecond", state)}))


@pytest.mark.parametrize(
    ("class_name", "changes", "words"),
    [
        ("EDM2Precond", {}, "'EDM2Precond' is not supported; choose"),
        ("EDMPrecond", {"embedding_type": "positional"}, "embedding_type"),
        ("EDMPrecond", {"img_resolution": "8"}, "EDMPrecond cannot be built"),
        ("EDMPrecond", {"model_channels": -4}, "EDMPrecond cannot be built"),
        ("EDMPrecond", {"num_blocks": "1"}, "EDMPrecond cannot be built"),
        ("iDDPMPrecond", {"M": 2.5}, "iDDPMPrecond cannot be built"),
        ("EDMPrecond", {"num_blocks": 10**12}, "num_blocks between 1 and 100, got 1000000000000"),
        ("iDDPMPrecond", {"M": 10**12}, "M between 1 and 100,000"),
        ("EDMPrecond", {"model_channels": 8}, "network.pkl does not fit.* is .* in the file but"),
        ("iDDPMPrecond", {}, "network.pkl does not fit.*the file lacks u"),
    ],
)
def test_networks_that_cannot_be(tmp_path, class_name, changes, words):
    net = random_net(EDMPrecond, TINY)
    content = snapshot(net, {**TINY, **changes})
    content["ema"].reduced[1][0]["class_name"] = class_name
    with pytest.raises(ValueError, match=words):
        load_edm_network(write(tmp_path, content))
