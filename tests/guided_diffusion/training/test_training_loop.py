"""One step of training, and batches that are a function of the step."""

import pytest
import torch

from guided_diffusion.files.nonfinite import NonFiniteError
from guided_diffusion.flags.training import ImageTrainFlags
from guided_diffusion.training.data import EpochBatches, crop, flip_some, to_floats
from guided_diffusion.training.ema import Average
from guided_diffusion.training.images import build_network, build_objective
from guided_diffusion.training.loop import Loop, Precision
from guided_diffusion.training.randomness import seed_of
from guided_diffusion.training.run import Schedule

X = torch.linspace(-1, 1, 8)[:, None]


def loop_of(precision=None, microbatch=0, factor=1.0, averages=1):
    """A loop that fits a line to y = 3 x + 1."""
    torch.manual_seed(0)
    net = torch.nn.Linear(1, 1)

    def losses_of(x):
        error = net(x).float()[:, 0] - 3 * x[:, 0] - 1
        return {"loss": factor * error**2, "position": (x[:, 0] + 1) / 2}

    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    networks = [Average(net, 0.75) for _ in range(averages)]
    return Loop(net, losses_of, optimizer, networks, precision=precision, microbatch=microbatch)


def weights(loop):
    return torch.cat([p.detach().flatten() for p in loop.parameters])


@pytest.mark.parametrize("microbatch", [1, 3, 8])
def test_microbatches_give_the_step_and_the_figures_of_the_whole_batch(microbatch):
    whole, parts = loop_of(), loop_of(microbatch=microbatch)
    for _ in range(3):
        one, other = whole.advance((X,)), parts.advance((X,))
        torch.testing.assert_close(weights(parts), weights(whole))
        assert one.keys() == other.keys()
        for name in one:
            torch.testing.assert_close(other[name], one[name], rtol=1e-5, atol=1e-5)


def test_figures_are_sums_and_counts_by_quarter():
    loop = loop_of()
    with torch.no_grad():
        losses = loop.losses_of(X)["loss"]
    figures = loop.advance((X,))
    torch.testing.assert_close(figures["loss"], torch.tensor([losses.sum(), 8.0]).double())
    for i in range(4):
        expected = torch.tensor([losses[2 * i : 2 * i + 2].sum(), 2.0]).double()
        torch.testing.assert_close(figures[f"loss_q{i}"], expected)
    assert figures["grad_norm"][1] == 1 and figures["grad_norm"][0] > 0


def test_averages_follow_their_recurrence():
    loop = loop_of()
    expected = weights(loop)
    for _ in range(4):
        loop.advance((X,))
        expected = 0.75 * expected + 0.25 * weights(loop)
        ours = torch.cat([p.flatten() for p in loop.averages[0].module.parameters()])
        torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-7)


def test_bfloat16_trains_with_weights_in_float32():
    loop = loop_of(Precision(torch.bfloat16))
    for _ in range(200):
        loop.advance((X,))
    assert loop.parameters[0].dtype == torch.float32
    torch.testing.assert_close(weights(loop), torch.tensor([3.0, 1.0]), rtol=0, atol=0.02)


def test_the_step_of_the_first_loss_that_is_not_finite_is_named():
    loop = loop_of()
    loop.advance((X,))
    loop.require_finite()
    for batch in (X, X * torch.nan, X):
        loop.advance((batch,))
    with pytest.raises(NonFiniteError, match=r"^non-finite training loss at step 2$"):
        loop.require_finite()


def test_a_gradient_that_is_not_finite_is_named_though_the_loss_is():
    net = torch.nn.Linear(1, 1)
    loop = Loop(net, lambda x: {"loss": (net(x) * 0)[:, 0].abs().sqrt()}, torch.optim.SGD(net.parameters()))
    for _ in range(2):  # sqrt'(0) is infinite; the weights, and the next loss, are NaN
        loop.advance((X,))
    with pytest.raises(NonFiniteError, match=r"^non-finite gradient at step 0$"):
        loop.require_finite()


@pytest.mark.parametrize(
    ("schedule", "step", "seconds", "rate"),
    [
        (Schedule(2.0, 10), 0, 0, 2.0),
        (Schedule(2.0, 10), 5, 0, 1.0),
        (Schedule(2.0, 10, anneal=False), 9, 0, 2.0),
        (Schedule(2.0, 10, seconds=100), 2, 75, 0.5),  # the clock is ahead
        (Schedule(2.0, 10, warmup=3), 0, 0, 0.5),
        (Schedule(2.0, 0), 10**6, 10**6, 2.0),
    ],
)
def test_the_rate(schedule, step, seconds, rate):
    assert schedule.rate_at(step, seconds) == pytest.approx(rate)


# Batches


def batches_of(n=10, size=4, seed=0):
    images = torch.arange(n, dtype=torch.uint8)[:, None, None, None].expand(n, 2, 2, 3)
    return EpochBatches(images, torch.arange(n), size, seed)


def test_every_epoch_has_every_image_once_and_its_label():
    batches = batches_of()
    order = torch.cat([batches.indices(step) for step in range(10)])
    assert all(sorted(epoch.tolist()) == list(range(10)) for epoch in order.split(10))
    assert len({tuple(epoch.tolist()) for epoch in order.split(10)}) == 4
    images, labels = batches.batch(3, slice(1, 3))
    assert images[:, 0, 0, 0].tolist() == labels.tolist() == batches.indices(3)[1:3].tolist()


def test_a_batch_is_a_function_of_the_step_and_the_seed():
    later = [batches_of().indices(step) for step in (7, 2)]
    batches = batches_of()
    for step in range(8):
        batches.indices(step)
    assert torch.equal(batches.indices(7), later[0]) and torch.equal(batches.indices(2), later[1])
    assert not torch.equal(batches_of(seed=1).indices(7), later[0])
    assert sorted(batches_of(n=3, size=6).indices(0).tolist()) == [0, 0, 1, 1, 2, 2]


def test_seeds_differ_by_stream_index_and_rank():
    seeds = {seed_of(0, i, stream=s, rank=r) for i in (0, 1) for s in ("epoch", "step") for r in (0, 1)}
    assert len(seeds) == 8 and all(0 <= seed < 2**63 for seed in seeds)


def test_pixels_flips_and_crops():
    images = to_floats(torch.tensor([0, 255, 51, 102], dtype=torch.uint8).view(1, 2, 2, 1).expand(2, 2, 2, 3))
    torch.testing.assert_close(images[0, 0], torch.tensor([[-1, 1], [-0.6, -0.2]]))
    flipped = flip_some(images, torch.tensor([True, False]))
    assert torch.equal(flipped[0], images[0].flip(2)) and torch.equal(flipped[1], images[1])
    shifted = crop(images, torch.tensor([[1, 1], [0, 2]]), margin=1)
    assert torch.equal(shifted[0], images[0])
    torch.testing.assert_close(shifted[1, 0], torch.tensor([[0, 0], [1.0, 0]]))


# Nothing makes the host wait: tensors without data raise where it looks at one


@pytest.mark.parametrize("loss", ["ddpm", "edm"])
def test_a_step_looks_at_no_number(loss):
    flags = {"image_size": 8, "num_channels": 32, "num_res_blocks": 1, "channel_mult": "1,2"}
    flags |= {
        "attention_resolutions": "4",
        "learn_sigma": loss == "ddpm",
        "class_cond": True,
        "data_dir": "x",
    }
    config = ImageTrainFlags(**flags, loss=loss, num_classes=3)
    network = build_network(config)[0].to("meta")
    objective = build_objective(config, network)
    loop = Loop(network, objective.losses, torch.optim.AdamW(network.parameters()), [Average(network, 0.9)])
    images, labels = torch.zeros(4, 3, 8, 8, device="meta"), torch.zeros(4, dtype=torch.int64, device="meta")
    drawn = objective.sampler.sample(4, "meta") if loss == "ddpm" else [torch.zeros(4, device="meta")]
    figures = loop.advance((images, labels, *drawn, torch.zeros_like(images)))
    assert figures["loss_q3"].is_meta
