"""State dicts as people have them: which one, under which names, and into a network as torch does it."""

from collections import OrderedDict
from itertools import product

import pytest
import torch
import torchvision
from safetensors.torch import save_file
from torch import nn

from guided_diffusion.checkpoints import load_into, load_state_dict


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))


NET, OTHER = network(), network(1)
STATE = NET.state_dict()


def prefixed(prefix, state=STATE):
    return {prefix + name: tensor for name, tensor in state.items()}


def read(tmp_path, content, key=None):
    torch.save(content, tmp_path / "w.ckpt")
    return load_state_dict(tmp_path / "w.ckpt", key)


def assert_loads(tmp_path, content, key=None, state=STATE):
    module = network(2)
    load_into(module, read(tmp_path, content, key), "w.ckpt")
    assert all(torch.equal(module.state_dict()[name], tensor) for name, tensor in state.items())


def message(function, *args, **kwargs):
    with pytest.raises(ValueError) as caught:
        function(*args, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# Names


PREFIXES = [
    "module.",
    "_orig_mod.",
    "module._orig_mod.",
    "_orig_mod.module.",
    "model.",
    "net.",
    "model.module.",
]


@pytest.mark.parametrize("prefix", [*PREFIXES, "model._orig_mod.", "module.module.", "_fsdp_wrapped_module."])
def test_prefixes(tmp_path, prefix):
    assert_loads(tmp_path, prefixed(prefix))
    load_into(network(2), prefixed(prefix), "a state dict")


def test_wrappers_of_torch(tmp_path):
    averaged = torch.optim.swa_utils.AveragedModel(NET)
    for wrapper in (nn.DataParallel(NET), averaged, nn.DataParallel(averaged)):
        assert_loads(tmp_path, wrapper.state_dict())
        assert read(tmp_path, wrapper.state_dict()).keys() == STATE.keys()
    part = {name.replace("0.", "0._orig_mod."): tensor for name, tensor in STATE.items()}
    assert_loads(tmp_path, part)


def test_network_that_is_wrapped_itself(tmp_path):
    module = nn.DataParallel(network(2))
    for content in (STATE, prefixed("module.")):
        load_into(module, read(tmp_path, content), "w.ckpt")
        assert torch.equal(module.module[0].weight, STATE["0.weight"])


# Checkpoints


def optimiser(net):
    adam = torch.optim.Adam(net.parameters())
    net(torch.ones(4, 3)).sum().backward()
    adam.step()
    return adam.state_dict()


OPTIMISER = optimiser(network())


def lightning(state):
    return {
        "epoch": 1,
        "pytorch-lightning_version": "2.5.0",
        "state_dict": state,
        "loops": {"fit_loop": {"state_dict": {}, "epoch_progress": {"total": {"ready": 1}}}},
        "callbacks": {"ModelCheckpoint": {"best_model_score": torch.tensor(1.0), "best_model_path": ""}},
        "optimizer_states": [OPTIMISER],
        "lr_schedulers": [{"_last_lr": [0.1]}],
        "hyper_parameters": {"lr": 0.1},
    }


EMA = OTHER.state_dict()


@pytest.mark.parametrize(
    "content",
    [
        {"state_dict": STATE, "epoch": 3},
        {"state_dict": prefixed("module."), "best_prec1": 91.7},
        {"ema": STATE, "opt": OPTIMISER},
        {"checkpoint": {"model": STATE}, "optimizer": OPTIMISER},
        lightning(prefixed("model.")),
        OrderedDict((*NET.named_parameters(), *NET.named_buffers())),
    ],
    ids=["state_dict", "module", "ema", "nested", "lightning", "parameters"],
)
def test_one_state_dict_in_a_checkpoint(tmp_path, content):
    assert_loads(tmp_path, content)


SEVERAL = {"ema": EMA, "model": prefixed("module."), "opt": OPTIMISER}
BOTH = lightning({**prefixed("model."), **prefixed("model_ema.", EMA)})


@pytest.mark.parametrize(
    ("content", "key", "state"),
    [
        (SEVERAL, "model", STATE),
        (SEVERAL, "ema", EMA),
        (BOTH, "model", STATE),
        (BOTH, "state_dict.model_ema", EMA),
        (lightning({**prefixed("model."), "criterion.weight": torch.ones(2)}), "model", STATE),
        ({"teacher": {"net": EMA}, "net": STATE}, "teacher.net", EMA),
    ],
)
def test_one_of_several_is_chosen(tmp_path, content, key, state):
    assert_loads(tmp_path, content, key, state)


@pytest.mark.parametrize("key", [None, "opt", "emma"])
def test_several_are_listed(tmp_path, key):
    text = message(read, tmp_path, SEVERAL, key)
    assert "ema (7 tensors), model (7 tensors)" in text and "--checkpoint_key" in text


def test_several_in_one_are_listed(tmp_path):
    text = message(load_into, network(), read(tmp_path, BOTH), "w.ckpt")
    assert "choose one of model, model_ema with --checkpoint_key" in text and "architecture" not in text


@pytest.mark.parametrize("content", [OPTIMISER, {"optimizer": OPTIMISER, "step": 3}])
def test_optimisers_are_called_that(tmp_path, content):
    assert "is an optimiser's file" in message(read, tmp_path, content)


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (torch.ones(2), "a Tensor"),
        ([torch.ones(2)], "a list"),
        (3, "a int"),
        ({"epoch": 3, "w": torch.ones(2)}, "epoch, w"),
        ({"epoch": 3}, "epoch"),
    ],
)
def test_content_that_is_no_state_dict(tmp_path, content, what):
    assert what in message(read, tmp_path, content)


def test_references_that_multiply_are_followed_once(tmp_path):
    content = {"w": 1}
    for _ in range(6):
        content = dict.fromkeys(map(str, range(2000)), content)
    assert "nothing but tensors by name" in message(read, tmp_path, content)


# Into a network, as torch does


def without_counters(state):
    return {name: tensor for name, tensor in state.items() if "num_batches_tracked" not in name}


SMALL = ("resnet18", "mnasnet0_5", "shufflenet_v2_x0_5")


@pytest.mark.parametrize(("name", "device"), [*product(SMALL, ("cpu", "meta")), ("vgg11_bn", "meta")])
def test_weights_from_before_batch_norm_counted(name, device):
    torch.manual_seed(0)
    source = torchvision.models.get_model(name, num_classes=4).eval()
    with torch.device(device):
        module = torchvision.models.get_model(name, num_classes=4).eval()
    load_into(module, without_counters(source.state_dict()), "old.pth")
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(module(x), source(x))
    assert all(int(t) == 0 for n, t in module.state_dict().items() if "num_batches_tracked" in n)


def test_counters_that_a_later_file_lacks_are_missed_as_torch_does(tmp_path):
    state = NET.state_dict()  # which says that its BatchNorm counts
    del state["1.num_batches_tracked"]
    assert "lacks 1.num_batches_tracked" in message(load_into, network(), read(tmp_path, state), "w.pt")
    save_file(state, tmp_path / "w.safetensors")  # which says nothing
    load_into(network(), load_state_dict(tmp_path / "w.safetensors"), "w.safetensors")


def test_names_that_torchvisions_modules_still_map():
    source, module = (torchvision.models.vision_transformer.MLPBlock(4, 8, 0.0) for _ in range(2))
    names = {"0.": "linear_1.", "3.": "linear_2."}
    old = {names[name[:2]] + name[2:]: tensor for name, tensor in source.state_dict().items()}
    load_into(module, old, "old.pth")
    assert all(torch.equal(module.state_dict()[name], t) for name, t in source.state_dict().items())


def test_versions_of_modules_survive_a_prefix(tmp_path):
    torch.manual_seed(0)
    source = torchvision.models.mnasnet0_5(num_classes=2)
    state = nn.DataParallel(source).state_dict()
    module = torchvision.models.mnasnet0_5(num_classes=2)
    load_into(module, read(tmp_path, state), "w.pth")
    assert torch.equal(module.classifier[1].weight, source.classifier[1].weight)
    assert read(tmp_path, state)._metadata == source.state_dict()._metadata


class Scalar(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(2.0))


def test_numbers_from_before_torch_had_them():
    module = Scalar()
    load_into(module, {"scale": torch.tensor([3.0])}, "old.pth")
    assert module.scale.shape == () and module.scale == 3
    assert "scale is [2]" in message(load_into, module, {"scale": torch.ones(2)}, "x")


# What does not fit


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"weight": torch.zeros(2, 5)}, ["weight is [2, 5] in the file but [2, 3] in the network"]),
        ({"weight": torch.zeros(2, 5), "bias": torch.zeros(7)}, ["weight is", "(and 1 more)"]),
        ({"bias": torch.zeros(1, 2)}, ["bias is [1, 2]"]),
        ({"bias": None}, ["the file lacks bias"]),
        ({"scale": torch.zeros(1)}, ["the network lacks scale"]),
        (
            {"weight": torch.zeros(4, 4), "bias": None, "scale": torch.zeros(1)},
            ["[4, 4]", "lacks bias", "lacks scale"],
        ),
    ],
)
def test_misfits_are_named_and_change_nothing(device, changes, words):
    with torch.device(device):
        module = nn.Linear(3, 2)
    before = [p.clone() for p in module.parameters()]
    state = {k: v for k, v in {**nn.Linear(3, 2).state_dict(), **changes}.items() if v is not None}
    text = message(load_into, module, state, "file.pt")
    assert text.startswith("file.pt does not fit the architecture flags: ") and all(
        word in text for word in words
    )
    if device == "meta":
        assert all(p.is_meta for p in module.parameters())
    else:
        assert all(torch.equal(p, b) for p, b in zip(module.parameters(), before, strict=True))


def test_another_network_is_not_blamed_on_flags():
    text = message(load_into, nn.Linear(3, 2), {"a.kernel": torch.ones(1), "a.offset": torch.ones(1)}, "f.pt")
    assert text.startswith("f.pt does not fit, it is of another network: the file lacks weight (and 1 more) ")
    assert text.endswith("and holds a.kernel (and 1 more)")


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_values_are_copied_and_cast(device):
    with torch.device(device):
        module = nn.Linear(3, 2)
    weights = {"weight": torch.ones(2, 3).half(), "bias": torch.zeros(2).double()}
    load_into(module, weights, "x")
    assert module.weight.dtype == module.bias.dtype == torch.float32
    weights["bias"] += 1
    assert (module.weight == 1).all() and (module.bias == 0).all()
