"""The training loop, its batches and its averaged weights."""

import copy

import pytest
import torch

from guided_diffusion.files.nonfinite import NonFiniteError
from guided_diffusion.nn import mean_flat, update_ema
from guided_diffusion.training import Average, Optimization, drop_labels, random_batches, train

X = torch.linspace(-1, 1, 32)[:, None]
Y = 3 * X[:, 0] + 1  # what the networks below are to learn


def fit(iterations=300, average_rate=None, batches=None, factor=1.0):
    """Train a line on points of a line; returns (network, its average or None, figures)."""
    torch.manual_seed(0)
    net = torch.nn.Linear(1, 1)

    def losses_of(x, y):
        error = net(x)[:, 0] - y
        return {"loss": factor * error**2, "distance": error.detach().abs()}

    average = None if average_rate is None else Average(net, average_rate)
    batches = random_batches(X, Y, 16) if batches is None else batches
    optimization = Optimization(iterations, learning_rate=0.1)
    return net, average, train(net, losses_of, batches, optimization, average=average)


def test_the_loop_learns_and_records_its_figures():
    net, _, figures = fit()
    torch.testing.assert_close(net(X)[:, 0], Y, rtol=0, atol=0.01)
    assert (figures["iterations"], figures["parameters"]) == (300, 2)
    assert set(figures["loss_of_last_200"]) == {"loss", "distance"}
    assert 0 <= figures["loss_of_last_200"]["loss"] < 0.2


# With ten iterations the warm-up is one long, and PyTorch's schedule divides by zero.
@pytest.mark.parametrize("iterations", [1, 2, 10, 11, 20])
def test_any_number_of_iterations_repeats_with_its_seed(iterations):
    nets = [fit(iterations)[0] for _ in range(2)]
    assert torch.equal(nets[0].weight, nets[1].weight)
    assert not torch.equal(nets[0].weight, fit(iterations + 1)[0].weight)


def test_the_average_is_updated_after_each_step():
    net, average, _ = fit(50, average_rate=0.0)
    assert torch.equal(average.module.weight, net.weight)
    net, average, _ = fit(50, average_rate=0.9)
    assert not torch.equal(average.module.weight, net.weight)
    assert not average.module.weight.requires_grad


def test_the_average_weighs_old_values_by_powers_of_the_rate():
    net = torch.nn.BatchNorm1d(1)
    average = Average(net, 0.75)
    with torch.no_grad():
        for value in (2.0, 4.0):
            net.weight.fill_(value)
            net.running_mean.fill_(value)
            average.update()
    assert average.module.weight.item() == 0.75**2 * 1 + 0.25 * 0.75 * 2 + 0.25 * 4
    assert average.module.running_mean.item() == 4


def test_batches_keep_images_and_labels_together():
    batches = random_batches(X, Y, 8)
    drawn = [next(batches) for _ in range(30)]
    assert all(x.shape == (8, 1) and torch.equal(3 * x[:, 0] + 1, y) for x, y in drawn)
    assert len(torch.cat([x for x, _ in drawn]).unique()) == len(X)


@pytest.mark.parametrize("probability", [0.0, 0.25, 1.0])
def test_dropped_labels_become_the_null_class(probability):
    torch.manual_seed(0)
    labels = torch.arange(4000) % 10
    dropped = drop_labels(labels, 10, probability)
    assert dropped.dtype == torch.int64
    assert (dropped == 10).float().mean().item() == pytest.approx(probability, abs=0.03)
    assert torch.equal(dropped[dropped != 10], labels[dropped != 10])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: random_batches(X, Y, 0), "batch_size must be at least 1, got 0"),
        (lambda: random_batches(X, Y[:5], 4), "one label each, got 32 and 5"),
        (lambda: random_batches(X[:0], Y[:0], 4), "got 0 and 0"),
        (lambda: Optimization(0), "at least 1 iteration, got 0"),
        (lambda: Average(torch.nn.Linear(1, 1), 1.0), r"in \[0, 1\), got 1.0"),
        (lambda: fit(3, batches=[(X, Y)]), "the batches end after 1 of 3 iterations"),
    ],
)
def test_wrong_settings(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("factor", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_ends_the_training(factor):
    with pytest.raises(NonFiniteError, match="non-finite training loss at step 0"):
        fit(5, factor=factor)


# Upstream's helpers


def test_mean_flat():
    assert mean_flat(torch.arange(12.0).view(2, 3, 2)).tolist() == [2.5, 8.5]
    assert mean_flat(torch.tensor([1.0, 2.0])).tolist() == [1, 2]


def test_update_ema_takes_tensors_of_another_dtype_and_refuses_another_number():
    targets = [torch.ones(2), torch.zeros(1)]
    before = copy.deepcopy(targets)
    update_ema(targets, [torch.full((2,), 3.0, dtype=torch.float16), torch.ones(1)], rate=0.5)
    assert [t.tolist() for t in targets] == [[2, 2], [0.5]]
    with pytest.raises(ValueError):
        update_ema(before, [torch.ones(2)])
