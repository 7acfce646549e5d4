"""ReLU -> Softplus: how many, which, and that nothing kinked is left."""

import copy

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

from classifiers import load_classifier
from classifiers.smoothing import SmoothFunctionalRelus, smooth_relus

BETA = 3.0


def relus(network):
    return [m for m in network.modules() if isinstance(m, nn.ReLU)]


def softpluses(network):
    return [m for m in network.modules() if isinstance(m, nn.Softplus)]


@pytest.mark.parametrize(
    ("name", "count"),
    [("resnet18", 9), ("resnet34", 17), ("resnet50", 17), ("resnet101", 34), ("resnet152", 51)],
)
def test_count_in_resnets(name, count):
    with torch.device("meta"):
        network = torchvision.models.get_model(name)
    assert smooth_relus(network, BETA) == count
    assert relus(network) == []
    assert all(m.beta == BETA for m in softpluses(network))
    assert len(softpluses(network)) == count


@pytest.mark.parametrize(
    "name",
    [
        "vgg11",
        "alexnet",
        "squeezenet1_0",
        "mnasnet0_5",
        "shufflenet_v2_x0_5",
        "densenet121",
        "resnext50_32x4d",
    ],
)
def test_no_relu_is_left(name):
    with torch.device("meta"):
        network = torchvision.models.get_model(name)
    before = len(relus(network))
    assert smooth_relus(network, BETA) == before > 0
    assert relus(network) == []


def test_sequential_of_relus():
    network = nn.Sequential(nn.ReLU(), nn.ReLU(inplace=True), nn.ReLU())
    assert smooth_relus(network, BETA) == 3
    assert len(softpluses(network)) == 3


def test_nested():
    network = nn.Sequential(
        nn.Sequential(nn.Linear(2, 2), nn.ModuleList([nn.ReLU(), nn.ModuleDict({"act": nn.ReLU()})])),
        nn.ReLU(),
    )
    assert smooth_relus(network, BETA) == 3
    assert relus(network) == []


class Shared(nn.Module):
    """One nn.ReLU under two names."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.act = nn.ReLU(inplace=True)
        self.also_act = self.act

    def forward(self, x):
        return self.also_act(-self.act(self.first(x)) + 0.5)


def test_relu_under_two_names_is_replaced_under_both():
    network = Shared()
    linear, x = network.first, torch.randn(5, 4)
    assert smooth_relus(network, BETA) == 2
    assert relus(network) == []
    expected = F.softplus(-F.softplus(linear(x), BETA) + 0.5, BETA)
    torch.testing.assert_close(network(x), expected)


def test_relu_under_two_parents_is_replaced_in_both():
    act = nn.ReLU()
    network = nn.ModuleList([nn.Sequential(act), nn.Sequential(nn.Linear(2, 2), act)])
    assert smooth_relus(network, BETA) == 2
    assert relus(network) == []


def test_network_without_relu():
    assert smooth_relus(nn.Sequential(nn.Linear(2, 2), nn.GELU()), BETA) == 0


@pytest.mark.parametrize("beta", [1.0, 3.0, 50.0])
def test_replacement_is_log_of_one_plus_exp(beta):
    network = nn.Sequential(nn.ReLU())
    smooth_relus(network, beta)
    x = torch.linspace(-4, 4, 81, dtype=torch.float64)
    # Softplus is x itself where beta x > 20: log(1 + exp(-20)) / beta = 2.1e-9 / beta.
    torch.testing.assert_close(
        network(x), torch.log1p(torch.exp(beta * x)) / beta, rtol=0, atol=2.1e-9 / beta
    )


def test_names_in_the_state_dict_are_unchanged():
    network = torchvision.models.resnet18()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    smooth_relus(network, BETA)
    after = network.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)


KINKED = [
    nn.ReLU6(),
    nn.LeakyReLU(),
    nn.PReLU(),
    nn.RReLU(),
    nn.Hardtanh(),
    nn.Hardswish(),
    nn.Hardsigmoid(),
    nn.Threshold(0.1, 0.0),
]


@pytest.mark.parametrize("activation", KINKED, ids=lambda m: type(m).__name__)
def test_other_kinks_are_refused_by_name_and_left_alone(activation):
    network = nn.Sequential(nn.ReLU(), nn.Sequential(activation))
    with pytest.raises(ValueError, match=rf"{type(activation).__name__}.*softplus_beta inf"):
        smooth_relus(network, BETA)
    assert len(relus(network)) == 1


# Activations called as functions


class Functional(nn.Module):
    """A small convolutional network that calls `act` as a function, between an nn.ReLU or none."""

    def __init__(self, act, module=None, classes=5):
        super().__init__()
        self.act, self.module = act, module or nn.Identity()
        self.conv, self.conv2, self.fc = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), nn.Linear(4, classes)

    def forward(self, x):
        x = self.act(self.conv(x))
        x = self.act(self.conv2(x))
        return self.fc(self.module(x).mean(dim=(2, 3)))


def statement(function):
    """An inplace activation whose result nobody looks at."""

    def act(x):
        function(x)
        return x

    return act


RELUS = {
    "F.relu": F.relu,
    "F.relu inplace": lambda x: F.relu(x, inplace=True),
    "F.relu by keyword": lambda x: F.relu(input=x),
    "F.relu_": F.relu_,
    "torch.relu": torch.relu,
    "torch.relu_": torch.relu_,
    "Tensor.relu": lambda x: x.relu(),
    "Tensor.relu_": lambda x: x.relu_(),
}
STATEMENTS = {
    "F.relu inplace": statement(lambda x: F.relu(x, inplace=True)),
    "torch.relu_": statement(torch.relu_),
    "Tensor.relu_": statement(lambda x: x.relu_()),
}


def load(monkeypatch, tmp_path, network, beta=BETA):
    """load_classifier of one's own builder that returns a copy of `network`."""
    path = tmp_path / "own.py"
    path.write_text("def build(num_classes):\n    return NETWORK()\n")
    monkeypatch.setattr("builtins.NETWORK", lambda: copy.deepcopy(network), raising=False)
    return load_classifier(f"{path}:build", num_classes=5, softplus_beta=beta, image_size=8)


def assert_same_with_gradient(first, second):
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    results = []
    for network in (first, second):
        leaf = x.clone().requires_grad_()
        logits = network(leaf)
        results.append((logits, torch.autograd.grad(logits.square().sum(), leaf)[0]))
    torch.testing.assert_close(results[0], results[1])


@pytest.mark.parametrize("module", [None, nn.ReLU()], ids=["functions", "and a module"])
@pytest.mark.parametrize("act", RELUS.values(), ids=RELUS)
def test_functional_relus_are_smoothed(monkeypatch, tmp_path, act, module):
    torch.manual_seed(0)
    network = Functional(act, module)
    classifier = load(monkeypatch, tmp_path, network)
    by_hand = copy.deepcopy(network)
    by_hand.act, by_hand.module = (
        (lambda x: F.softplus(x, BETA)),
        nn.Softplus(BETA) if module else nn.Identity(),
    )
    assert_same_with_gradient(classifier, by_hand)


@pytest.mark.parametrize("act", STATEMENTS.values(), ids=STATEMENTS)
def test_inplace_relus_whose_result_is_dropped_are_smoothed_too(monkeypatch, tmp_path, act):
    torch.manual_seed(0)
    network = Functional(act)
    by_hand = copy.deepcopy(network)
    by_hand.act = lambda x: F.softplus(x, BETA)
    assert_same_with_gradient(load(monkeypatch, tmp_path, network), by_hand)


@pytest.mark.parametrize("act", RELUS.values(), ids=RELUS)
def test_infinite_beta_keeps_functional_relus(monkeypatch, tmp_path, act):
    torch.manual_seed(0)
    network = Functional(act)
    assert_same_with_gradient(load(monkeypatch, tmp_path, network, float("inf")), copy.deepcopy(network))


def test_smoothing_ends_with_the_classifiers_call(monkeypatch, tmp_path):
    classifier = load(monkeypatch, tmp_path, Functional(F.relu))
    classifier(torch.zeros(1, 3, 8, 8))
    assert F.relu(torch.tensor([-1.0, 2.0])).tolist() == [0, 2]


@pytest.mark.parametrize("name", ["relu6", "leaky_relu", "hardtanh", "hardswish", "hardsigmoid"])
@pytest.mark.parametrize("module", [None, nn.ReLU()], ids=["functions", "and a module"])
def test_other_functional_kinks_are_refused_by_name(monkeypatch, tmp_path, name, module):
    # "and a module": half smooth. Alone: there is nothing to smooth, as the message for networks without ReLU
    # says.
    with pytest.raises(ValueError, match=f"({name if module else ''}).*softplus_beta inf"):
        load(monkeypatch, tmp_path, Functional(getattr(F, name), module))


@pytest.mark.parametrize(
    ("clamp", "kinked"),
    [
        (lambda x: x.clamp(min=0), {"clamp"}),
        (lambda x: torch.clamp(x, 0), {"clamp"}),
        (lambda x: x.clamp_(min=0.0), {"clamp_"}),
        (lambda x: x.clamp_min(0), {"clamp_min"}),
        (lambda x: x.clamp(-1, 1), set()),
        (lambda x: x.clamp(max=0), set()),
        (lambda x: x.clamp(min=1e-6), set()),
    ],
)
def test_a_relu_written_as_a_clamp_is_seen(clamp, kinked):
    with SmoothFunctionalRelus(BETA) as functional:
        clamp(torch.zeros(2))
    assert functional.kinked == kinked


@pytest.mark.parametrize("name", ["densenet121", "googlenet"])
def test_torchvision_networks_that_call_relu_as_a_function(name):
    torch.manual_seed(0)
    classifier = load_classifier(name, "random", num_classes=5, softplus_beta=BETA, image_size=64)
    by_hand = copy.deepcopy(classifier.network)
    x = torch.rand(1, 3, 64, 64) * 2 - 1
    met = []

    def softplus(x, inplace=False):
        met.append(1)
        return F.softplus(x, BETA)

    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(F, "relu", softplus)
        expected = by_hand(x)
    with torch.no_grad():
        torch.testing.assert_close(classifier(x), expected)
    assert met
