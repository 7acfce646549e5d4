"""Kinked activations -> smooth ones: how many, which, and that nothing kinked is left."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

from classifiers import load_classifier
from classifiers.smoothing import SmoothFunctions, smooth_activations

BETA = 3.0


def of_type(network, kind):
    return [m for m in network.modules() if isinstance(m, kind)]


NAMES = [
    "vgg11",
    "alexnet",
    "squeezenet1_0",
    "mnasnet0_5",
    "shufflenet_v2_x0_5",
    "densenet121",
    "resnext50_32x4d",
]
COUNTS = {
    "resnet18": 9,
    "resnet34": 17,
    "resnet50": 17,
    "resnet101": 34,
    "resnet152": 51,
    **dict.fromkeys(NAMES),
}


@pytest.mark.parametrize("name", COUNTS)
def test_no_relu_is_left_in_torchvisions_networks(name):
    with torch.device("meta"):
        network = torchvision.models.get_model(name)
    before, names = len(of_type(network, nn.ReLU)), list(network.state_dict())
    assert smooth_activations(network, BETA) == {"ReLU": COUNTS[name] or before}
    assert of_type(network, nn.ReLU) == [] and list(network.state_dict()) == names
    assert {m.beta for m in of_type(network, nn.Softplus)} == {BETA}


class Shared(nn.Module):
    """One nn.ReLU under two names."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.act = nn.ReLU(inplace=True)
        self.also_act = self.act

    def forward(self, x):
        return self.also_act(-self.act(self.first(x)) + 0.5)


ACT = nn.ReLU()


@pytest.mark.parametrize(
    ("network", "count"),
    [
        (nn.Sequential(nn.ReLU(), nn.ReLU(inplace=True), nn.ReLU()), 3),
        (nn.Sequential(nn.ModuleList([nn.ReLU(), nn.ModuleDict({"act": nn.ReLU()})]), nn.ReLU()), 3),
        (nn.ModuleList([nn.Sequential(ACT), nn.Sequential(nn.Linear(2, 2), ACT)]), 2),
        (Shared(), 2),
        (nn.Sequential(nn.Linear(2, 2), nn.GELU()), 0),
    ],
    ids=["in a row", "nested", "under two parents", "under two names", "none"],
)
def test_every_place_counts(network, count):
    network = copy.deepcopy(network)
    assert smooth_activations(network, BETA).total() == count and of_type(network, nn.ReLU) == []


def test_relu_under_two_names_is_replaced_under_both():
    network, x = Shared(), torch.randn(5, 4)
    smooth_activations(network, BETA)
    expected = F.softplus(-F.softplus(network.first(x), BETA) + 0.5, BETA)
    torch.testing.assert_close(network(x), expected)


@pytest.mark.parametrize("beta", [1.0, 3.0, 50.0])
def test_replacement_is_log_of_one_plus_exp(beta):
    network, x = nn.Sequential(nn.ReLU()), torch.linspace(-4, 4, 81, dtype=torch.float64)
    smooth_activations(network, beta)
    # Softplus is x itself where beta x > 20: log(1 + exp(-20)) / beta = 2.1e-9 / beta.
    expected = torch.log1p(torch.exp(beta * x)) / beta
    torch.testing.assert_close(network(x), expected, rtol=0, atol=2.1e-9 / beta)


SMOOTHED = {
    "relu": (nn.ReLU(), lambda s, x: s(x)),
    "relu6": (nn.ReLU6(), lambda s, x: s(x) - s(x - 6)),
    "hardsigmoid": (nn.Hardsigmoid(), lambda s, x: (s(x + 3) - s(x - 3)) / 6),
    "hardswish": (nn.Hardswish(), lambda s, x: x * (s(x + 3) - s(x - 3)) / 6),
}


@pytest.mark.parametrize("name", SMOOTHED)
def test_smooth_form_of_each_activation(name):
    module, formula = SMOOTHED[name]
    x = torch.linspace(-8, 8, 161, dtype=torch.float64)
    expected = formula(lambda x: torch.log1p(torch.exp(BETA * x)) / BETA, x)
    network = nn.Sequential(copy.deepcopy(module))
    assert smooth_activations(network, BETA) == {type(module).__name__: 1}
    torch.testing.assert_close(network(x), expected, rtol=0, atol=1e-8)
    with SmoothFunctions(BETA) as functional:
        torch.testing.assert_close(getattr(F, name)(x), expected, rtol=0, atol=1e-8)
        clone = x.clone()
        getattr(F, name)(clone, inplace=True)
    torch.testing.assert_close(clone, expected, rtol=0, atol=1e-8)
    assert functional.replaced == {type(module).__name__: 2}


@pytest.mark.parametrize("name", SMOOTHED)
def test_smooth_forms_have_no_kink_and_end_in_the_kinked_ones(name):
    module, _ = SMOOTHED[name]
    x = torch.linspace(-8, 8, 4001, dtype=torch.float64)
    curvatures = []
    for beta in (BETA, 300.0):
        network = nn.Sequential(copy.deepcopy(module))
        smooth_activations(network, beta)
        y = network(x)
        curvatures.append(y.diff(n=2).abs().max() / (x[1] - x[0]) ** 2)
        # S'' is at most beta / 4, and x S'' / 6 at 3 half of that, beside 2 S' / 6.
        assert curvatures[-1] <= 0.25 * beta + 1
    torch.testing.assert_close(y, module(x), rtol=0, atol=math.log(2) / 300)


KINKED = [nn.LeakyReLU(), nn.PReLU(), nn.RReLU(), nn.SELU(), nn.Hardtanh(), nn.Hardshrink(), nn.Softshrink()]


@pytest.mark.parametrize("activation", [*KINKED, nn.Threshold(0.1, 0.0)], ids=lambda m: type(m).__name__)
def test_other_kinks_are_refused_by_name_and_left_alone(activation):
    network = nn.Sequential(nn.ReLU(), nn.Sequential(activation))
    with pytest.raises(ValueError, match=rf"{type(activation).__name__}.*softplus_beta inf"):
        smooth_activations(network, BETA)
    assert len(of_type(network, nn.ReLU)) == 1


# Activations called as functions


class Functional(nn.Module):
    """A small convolutional network that calls `act` as a function, between an nn.ReLU or none."""

    def __init__(self, act, module=None, classes=5):
        super().__init__()
        torch.manual_seed(0)
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
    "F.relu inplace, dropped": statement(lambda x: F.relu(x, inplace=True)),
    "torch.relu_, dropped": statement(torch.relu_),
    "Tensor.relu_, dropped": statement(lambda x: x.relu_()),
}


@pytest.fixture
def load(monkeypatch, tmp_path):
    """load_classifier of one's own builder that returns a copy of a network."""

    def load(network, beta=BETA):
        path = tmp_path / "own.py"
        path.write_text("def build(num_classes):\n    return NETWORK()\n")
        monkeypatch.setattr("builtins.NETWORK", lambda: copy.deepcopy(network), raising=False)
        return load_classifier(f"{path}:build", num_classes=5, softplus_beta=beta, image_size=8)

    return load


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
def test_functional_relus_are_smoothed_unless_beta_is_infinite(load, act, module):
    network = Functional(act, module)
    by_hand = copy.deepcopy(network)
    by_hand.act, by_hand.module = (
        lambda x: F.softplus(x, BETA),
        nn.Softplus(BETA) if module else nn.Identity(),
    )
    assert_same_with_gradient(load(network), by_hand)
    assert_same_with_gradient(load(network, float("inf")), copy.deepcopy(network))


class Mixed(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc, self.act, self.six = nn.Linear(12, 5), nn.ReLU(), nn.ReLU6()

    def forward(self, x):
        x = self.six(self.act(self.fc(F.avg_pool2d(x, 4).flatten(1))))
        return torch.tanh(F.relu(F.gelu(x)))


def test_what_was_replaced_by_what_is_told(load):
    (note,) = load(Mixed()).notes
    assert "2 ReLU -> S(x), 1 ReLU6 -> S(x) - S(x - 6) with S Softplus of beta 3" in note
    assert "smooth already: gelu, tanh" in note and "the raw image" in note
    (note,) = load(Mixed(), float("inf")).notes
    assert "activations as they are" in note


def test_smoothing_ends_with_the_classifiers_call(load):
    load(Functional(F.relu))(torch.zeros(1, 3, 8, 8))
    assert F.relu(torch.tensor([-1.0, 2.0])).tolist() == [0, 2]


@pytest.mark.parametrize("name", ["leaky_relu", "selu", "hardtanh", "hardshrink", "softshrink"])
@pytest.mark.parametrize("module", [None, nn.ReLU()], ids=["functions", "and a module"])
def test_other_functional_kinks_are_refused_by_name(load, name, module):
    # Alone, there is nothing to smooth, as the message for networks without ReLU says.
    with pytest.raises(ValueError, match=f"({name if module else ''}).*softplus_beta inf"):
        load(Functional(getattr(F, name), module))


@pytest.mark.parametrize(
    ("clamp", "kinked"),
    [
        (lambda x: x.clamp(min=0), {"clamp"}),
        (lambda x: torch.clamp(x, 0), {"clamp"}),
        (lambda x: x.clamp_(min=0.0), {"clamp_"}),
        (lambda x: x.clamp_min(0), {"clamp_min"}),
        (lambda x: x.clip(0), {"clip"}),
        (lambda x: torch.clip_(x, min=0), {"clip_"}),
        (lambda x: x.clamp(-1, 1), set()),
        (lambda x: x.clamp(max=0), set()),
        (lambda x: x.clamp(min=1e-6), set()),
    ],
)
def test_a_relu_written_as_a_clamp_is_seen(clamp, kinked):
    with SmoothFunctions(BETA) as functional:
        clamp(torch.zeros(2))
    assert functional.kinked == kinked


@pytest.mark.parametrize("name", ["densenet121", "googlenet"])
def test_torchvision_networks_that_call_relu_as_a_function(name, monkeypatch):
    torch.manual_seed(0)
    classifier = load_classifier(name, "random", num_classes=5, softplus_beta=BETA, image_size=64)
    x = torch.rand(1, 3, 64, 64) * 2 - 1
    with torch.no_grad():
        got = classifier(x)
        monkeypatch.setattr(F, "relu", lambda x, inplace=False: F.softplus(x, BETA))
        torch.testing.assert_close(got, copy.deepcopy(classifier.network)(x))
        monkeypatch.setattr(F, "relu", lambda x, inplace=False: x)
        assert not torch.allclose(got, classifier.network(x))  # it does call relu as a function
