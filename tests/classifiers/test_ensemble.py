"""Several classifiers as one: the mean of their log-probabilities, each with its input and its weights."""

import pytest
import torch

from classifiers import classifier_files, load_classifier
from guided_diffusion.flags.training import ClassifierTrainFlags
from guided_diffusion.guidance import input_gradient, log_prob

PAIR = "digits_guide+cifar_resnet20"  # the raw image; 32x32 and normalised


def images():
    return torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1


def pair(weights="+DIGITS", **options):
    return load_classifier(PAIR, weights, num_classes=10, image_size=16, **options)


def alone(**options):
    names = (("digits_guide", None), ("cifar_resnet20", "DIGITS"))
    return [load_classifier(*one, num_classes=10, image_size=16, **options) for one in names]


@pytest.mark.parametrize("beta", [float("inf"), 3.0])
def test_answer_is_the_mean_of_log_probabilities(beta):
    x = images()
    first, second = (one(x) for one in alone(softplus_beta=beta))
    expected = [torch.log(logits.exp() / logits.exp().sum(1, keepdim=True)) for logits in (first, second)]
    assert not torch.allclose(*expected)
    answer = pair(softplus_beta=beta)(x)
    torch.testing.assert_close(answer, (expected[0] + expected[1]) / 2, rtol=1e-5, atol=1e-4)


def test_gradient_is_the_mean_of_gradients():
    x, y = images(), torch.tensor([3, 7])
    each = [input_gradient(one, x, lambda logits: log_prob(logits, y))[0] for one in alone()]
    expected = (each[0] + each[1]) / 2
    # At tau_2 = 0 the direction is the mean log-probability of y itself.
    found, _ = input_gradient(pair(), x, lambda logits: log_prob(logits, y, 1.0, 0.0))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_members_need_not_all_have_something_to_smooth(tmp_path):
    own = tmp_path / "own.py"
    own.write_text(
        "from torch import nn\n"
        "build = lambda n: nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, n), nn.GELU())\n"
    )
    options = {"num_classes": 10, "softplus_beta": 3.0, "image_size": 16}
    both = load_classifier(f"digits_guide+{own}:build", **options)
    assert "ReLU -> S(x)" in both.notes[0] and "smooth already: gelu" in both.notes[1]
    with pytest.raises(ValueError, match=r"no ReLU to smooth \(smooth already: gelu; smooth already: gelu\)"):
        load_classifier(f"{own}:build+{own}:build", **options)


def test_files_of_each(tmp_path):
    own = tmp_path / "own.py"
    own.touch()
    found = {k: f() for k, f in classifier_files(f"{PAIR}+{own}:build", "+DIGITS+").items()}
    names = {key: path and path.name for key, path in found.items()}
    assert names == {
        "classifier_path": "guide.safetensors",
        "classifier_path_2": "resnet20.safetensors",
        "classifier_path_3": None,
        "classifier_code_3": "own.py",
    }


@pytest.mark.parametrize(
    ("name", "weights", "words"),
    [
        (PAIR, "random", "are 2 classifiers, but random the weights of 1"),
        (PAIR, "a+b+c", r"are 2 classifiers, but a\+b\+c the weights of 3"),
        (PAIR, {"a": torch.zeros(1)}, "a state dict given for several"),
        ("digits_guide+", "", "a name is empty"),
        ("digits_guide+nothing", None, "unknown classifier 'nothing'"),
    ],
)
def test_one_line_says_what_does_not_fit(name, weights, words):
    with pytest.raises(ValueError, match=words):
        load_classifier(name, weights, num_classes=10)


@pytest.mark.parametrize("name", [PAIR, "clip:folder"])
def test_one_network_is_trained(name):
    with pytest.raises(ValueError, match="one network of classes can be trained"):
        ClassifierTrainFlags.of({"classifier_type": name, "noised": False, "data_dir": "x"}, frozenset())
