"""CIFAR ResNets against a plain computation of He et al., section 4.2, from a file as the published ones."""

import pytest
import torch
import torch.nn.functional as F

from classifiers import load_classifier


def random_checkpoint(path, depth):
    """A file as the published ones: "state_dict", names with `module.`, no counters, torch's older format."""
    torch.manual_seed(depth)
    network = load_classifier(f"cifar_resnet{depth}", "random", num_classes=10).network
    state = {k: v for k, v in network.state_dict().items() if "num_batches_tracked" not in k}
    for name, tensor in state.items():
        if "running" in name or "bn" in name:
            tensor.uniform_(0.5, 1.5)
    content = {"best_prec1": 91.7, "state_dict": {f"module.{k}": v for k, v in state.items()}}
    torch.save(content, path, _use_new_zipfile_serialization=False)
    return state


def plain(state, x, n):
    """The same network by functions, from names alone."""

    def norm(x, name):
        values = [state[f"{name}.{key}"] for key in ("running_mean", "running_var", "weight", "bias")]
        return F.batch_norm(x, *values)

    x = F.relu(norm(F.conv2d(x, state["conv1.weight"], padding=1), "bn1"))
    for stage in (1, 2, 3):
        for block in range(n):
            name, stride = f"layer{stage}.{block}", 2 if stage > 1 and block == 0 else 1
            out = F.conv2d(x, state[f"{name}.conv1.weight"], stride=stride, padding=1)
            out = F.conv2d(F.relu(norm(out, f"{name}.bn1")), state[f"{name}.conv2.weight"], padding=1)
            out, zeros = norm(out, f"{name}.bn2"), torch.zeros(len(x), x.shape[1] // 2, *out.shape[2:])
            x = torch.cat([zeros, x[:, :, ::2, ::2], zeros], dim=1) if stride == 2 else x
            x = F.relu(out + x)
    return F.linear(x.mean(dim=(2, 3)), state["linear.weight"], state["linear.bias"])


@pytest.mark.parametrize("depth", [20, 56])
def test_file_in_the_published_form_computes_the_papers_network(tmp_path, depth):
    state = random_checkpoint(tmp_path / "resnet.th", depth)
    x = torch.rand(2, 3, 32, 32)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    with torch.no_grad():
        logits = load_classifier(f"cifar_resnet{depth}", tmp_path / "resnet.th", num_classes=10)(2 * x - 1)
        expected = plain(state, (x - mean) / std, (depth - 2) // 6)
        torch.testing.assert_close(logits, expected, rtol=1e-3, atol=1e-3)


def test_size_of_the_published_network():
    # The paper's table: 0.27 M parameters in 20 layers, 0.85 M in 56.
    for depth, count in ((20, 269_722), (56, 853_018)):
        network = load_classifier(f"cifar_resnet{depth}", "random", num_classes=10)
        assert sum(p.numel() for p in network.parameters()) == count
