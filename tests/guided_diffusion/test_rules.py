"""What each guidance rule does, in closed form: a linear classifier on small images in float64."""

import math

import pytest
import torch

from guided_diffusion.guidance import ClassifierGuidance, GuidanceStep, log_prob, no_shift
from guided_diffusion.guidance import directions as d
from guided_diffusion.guidance import stateful as s
from guided_diffusion.guidance import wrappers as w

N, CLASSES, SHAPE = 4, 5, (3, 8, 8)
Y = torch.tensor([0, 4, 2, 2])


def draws(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


WEIGHT = draws(CLASSES, math.prod(SHAPE), seed=1) / 10
X, SHIFT = draws(N, *SHAPE, seed=2), draws(N, *SHAPE, seed=3)
LOGITS = 2 * draws(N, CLASSES, seed=4)


def steps(*sigmas, memory=None):
    """The steps of one trajectory."""
    memory = {} if memory is None else memory
    n = len(sigmas)
    return [GuidanceStep(i, n, 1.0, 1.0, sigma, i / n, memory=memory) for i, sigma in enumerate(sigmas)]


[STEP] = steps(1.0)


def given(x, y, step):
    """A guidance whose shift is known; image 1 gets none."""
    shift = SHIFT.clone()
    shift[1] = -0.0
    return shift


def shifts_of(rule):
    """(the given shifts, what the rule makes of them) of the images that have one."""
    kept = [0, 2, 3]
    return SHIFT[kept], rule(X, Y, STEP)[kept], X[kept]


def dot(a, b):
    return (a * b).sum(dim=(1, 2, 3))


def rms(x):
    return x.square().mean(dim=(1, 2, 3)).sqrt()


# Directions: their value, and the gradient with respect to the logits

P = LOGITS.softmax(dim=1)
Q = 0.9 * torch.eye(CLASSES, dtype=torch.float64)[Y] + 0.1 / CLASSES
M = (P + Q) / 2


def kl(a, b):
    return (a * (a / b).log()).sum(dim=1)


DIVERGENCES = {
    "reverse_kl": (d.reverse_kl, kl(P, Q)),
    "forward_kl": (d.forward_kl, kl(Q, P)),
    "jensen_shannon": (d.jensen_shannon, (kl(P, M) + kl(Q, M)) / 2),
}


@pytest.mark.parametrize("name", DIVERGENCES)
def test_a_divergence_term_is_that_divergence_and_is_none_at_the_wanted_answer(name):
    make, expected = DIVERGENCES[name]
    regularised = make(log_prob, 0.7, 0.1)
    torch.testing.assert_close(regularised(LOGITS, Y), log_prob(LOGITS, Y) - 0.7 * expected)
    wanted = Q.log().requires_grad_()
    [gradient] = torch.autograd.grad(make(lambda logits, y: 0 * logits[:, 0], 1.0)(wanted, Y).sum(), wanted)
    # No pull where p = q: it does not push the confidence beyond that.
    assert gradient.abs().max() < 1e-12
    with pytest.raises(ValueError, match=r"smoothing.*got 1"):
        make(log_prob, 0.7, 1.0)


def test_the_terms_take_half_precision_and_overflowing_logits():
    logits = torch.tensor([[30000.0, -30000.0, 0.0]], dtype=torch.float16)
    for make, _ in DIVERGENCES.values():
        value = make(log_prob, 1.0)(logits, torch.tensor([0]))
        assert value.dtype == torch.float32 and value.isfinite().all()


def test_the_contrast_is_with_the_strongest_other_class():
    contrasted = d.reference_contrast(lambda logits, y: 0 * logits[:, 0], 2.0)
    leaf = LOGITS.clone().requires_grad_()
    [gradient] = torch.autograd.grad(contrasted(leaf, Y).sum(), leaf)
    for i, y in enumerate(Y.tolist()):
        others = LOGITS[i].clone()
        others[y] = -math.inf
        expected = torch.zeros(CLASSES, dtype=torch.float64)
        expected[y], expected[others.argmax()] = 2, -2
        assert torch.equal(gradient[i], expected)
    with pytest.raises(ValueError, match="2 classes or more"):
        contrasted(LOGITS[:, :1], torch.zeros(N, dtype=torch.int64))


def test_entropy_scaling_divides_the_gradient_by_the_share_of_the_entropy():
    def gradient(direction, logits):
        leaf = logits.clone().requires_grad_()
        return torch.autograd.grad(direction(leaf, Y).sum(), leaf)[0]

    sure = torch.cat([LOGITS[:3], torch.tensor([[90.0, 0, 0, 0, 0]], dtype=torch.float64)])
    share = (-(P * P.log()).sum(dim=1) / math.log(CLASSES)).clone()
    share[3] = 0.05  # the floor
    got = gradient(d.entropy_scaling(log_prob, 0.05), sure)
    torch.testing.assert_close(got, gradient(log_prob, sure) / share[:, None])
    uniform = torch.zeros_like(LOGITS)
    torch.testing.assert_close(
        gradient(d.entropy_scaling(log_prob, 0.05), uniform), gradient(log_prob, uniform)
    )


# Shifts


def test_the_parallel_part_goes_and_the_orthogonal_part_stays():
    before, after, x = shifts_of(w.parallel_part(given, 0.0))
    torch.testing.assert_close(dot(after, x), torch.zeros(3).double(), rtol=0, atol=1e-12)
    torch.testing.assert_close(after + (dot(before, x) / dot(x, x)).view(3, 1, 1, 1) * x, before)
    before, after, x = shifts_of(w.parallel_part(given, 0.3))
    torch.testing.assert_close(dot(after, x), 0.3 * dot(before, x))
    assert torch.equal(w.parallel_part(given, 0.0)(0 * X, Y, STEP)[2], SHIFT[2])  # zeros have no direction


def test_the_cap_binds_where_the_shift_is_longer():
    most = float(rms(SHIFT)[[0, 2, 3]].median())
    before, after, _ = shifts_of(w.max_shift(given, most))
    torch.testing.assert_close(rms(after), rms(before).clamp(max=most))
    torch.testing.assert_close(dot(after, before), rms(after) * rms(before) * math.prod(SHAPE))


def test_a_fixed_length_keeps_the_direction_alone():
    _, after, _ = shifts_of(w.fixed_length(given, 0.05))
    torch.testing.assert_close(rms(after), torch.full((3,), 0.05).double())
    tiny = w.fixed_length(lambda x, y, step: (1e-30 * SHIFT).float(), 0.05)(X.float(), Y, STEP)
    torch.testing.assert_close(tiny[[0, 2, 3]], after.float())


def test_damping_is_small_for_small_shifts_and_bounds_large_ones():
    before, after, x = shifts_of(w.damping(given, 8.0))
    torch.testing.assert_close(rms(after), rms(before) * torch.exp(-8 * rms(before) / rms(x)))
    large = w.damping(lambda x, y, step: 100 * SHIFT, 8.0)(X, Y, STEP)
    assert (rms(large) <= rms(X) / (8 * math.e)).all()  # the largest value of r exp(-8 r)


def test_band_weights_split_the_shift():
    before, both, _ = shifts_of(w.band_weights(given, 1.0, 1.0))
    torch.testing.assert_close(both, before)
    low, high = (shifts_of(w.band_weights(given, *weights))[1] for weights in ((2, 0), (0, 3)))
    torch.testing.assert_close(low / 2 + high / 3, before)
    flat = w.band_weights(lambda x, y, step: torch.full_like(x, 0.5), 2.0, 7.0)(X, Y, STEP)
    torch.testing.assert_close(flat, torch.ones_like(X))  # constants are all low
    board = torch.full((1, 3, 8, 8), 1.0).double()
    board[..., ::2, 1::2] = board[..., 1::2, ::2] = -1
    checks = w.band_weights(lambda x, y, step: board, 7.0, 1.0)(board, Y[:1], STEP)
    torch.testing.assert_close(checks[..., 2:-2, 2:-2], board[..., 2:-2, 2:-2])  # the finest is all high


@pytest.mark.parametrize(
    "rule",
    [
        lambda g: w.max_shift(g, 0.1),
        lambda g: w.parallel_part(g, 0.0),
        lambda g: w.band_weights(g, 1.0, 2.0),
        lambda g: w.fixed_length(g, 1.0),
        lambda g: w.damping(g, 8.0),
    ],
)
def test_an_image_without_a_shift_keeps_none_bit_for_bit(rule):
    for signed in (torch.tensor([0.0, -0.0]).repeat(N, 3, 8, 4).double(), torch.zeros_like(X)):
        after = signed + rule(lambda x, y, step: no_shift(x))(signed, Y, STEP)
        assert torch.equal(after.signbit(), signed.signbit()) and torch.equal(after, signed)


# Gradients


def test_the_augmented_gradient_is_that_of_the_mean_over_shifted_copies():
    seen = []

    def classifier(x):
        seen.append(x.detach())
        return x.tanh().flatten(1) @ WEIGHT.T

    def change(gradient):
        return w.augmentations(gradient, 4)

    got = ClassifierGuidance(classifier, gradient=change)(X, Y, STEP)
    leaf, copies = X.clone().requires_grad_(), list(seen)
    offsets = w._offsets(4, (8, 8), STEP.index)
    moved = [w._moved(leaf, *offset) for offset in offsets]
    for copy, mine in zip(copies, moved, strict=True):
        assert torch.equal(copy, mine)
    value = sum(log_prob(classifier(each), Y).sum() for each in moved) / 4
    torch.testing.assert_close(got, torch.autograd.grad(value, leaf)[0])
    assert any(not torch.equal(copy, X) for copy in copies)
    down = w._moved(X, 1, 0)
    assert torch.equal(down[:, :, 1:], X[:, :, :-1]) and torch.equal(down[:, :, 0], X[:, :, 0])


def test_momentum_is_a_sum_that_fades():
    rule, gradients = s.momentum(in_turn(1.0, 0.0, 4.0, 1.0), -0.5), steps(9.0, 5.0, 2.0, 1.0)
    got = [float(rule(X, Y, step)[0, 0, 0, 0]) for step in gradients]
    assert got == [1.0, 0.0, 3.5, -0.75]  # a zero gradient gets none, and the memory waits
    with pytest.raises(ValueError, match="got 1"):
        s.momentum(given, 1.0)


def in_turn(*values):
    """A gradient that is each of these constants in turn."""
    coming = iter(values)
    return lambda x, y, step: torch.full_like(x, next(coming))


def test_adam_is_torchs():
    gradients = [draws(N, *SHAPE, seed=seed) for seed in range(5, 9)]
    coming = iter(gradients)
    rule = s.adam(lambda x, y, step: next(coming), 0.32, 0.51)
    parameter = torch.nn.Parameter(torch.zeros_like(X))
    optimizer = torch.optim.Adam([parameter], lr=1.0, betas=(0.32, 0.51), eps=1e-8, maximize=True)
    for gradient, step in zip(gradients, steps(9.0, 5.0, 2.0, 1.0), strict=True):
        before, parameter.grad = parameter.detach().clone(), gradient
        optimizer.step()
        torch.testing.assert_close(rule(X, Y, step), parameter.detach() - before)
    with pytest.raises(ValueError, match=r"got 0\.9,1"):
        s.adam(given, 0.9, 1.0)


def test_adam_counts_the_guided_steps_of_each_image():
    """Image 1 has no gradient at the first of two steps: its second is as a first one."""
    sparse, full = draws(N, *SHAPE, seed=5), draws(N, *SHAPE, seed=6)
    sparse[1] = 0
    coming = iter([sparse, full])
    rule = s.adam(lambda x, y, step: next(coming), 0.9, 0.9)
    first, second = (rule(X, Y, step) for step in steps(2.0, 1.0))
    assert not first[1].any()
    torch.testing.assert_close(second[1], full[1] / (full[1].abs() + 1e-8))


@pytest.mark.parametrize(("k", "asked"), [(1, [0, 1, 2, 3, 4, 5]), (4, [0, 4]), (9, [0])])
def test_every_kth_gradient_is_taken_and_used_until_the_next(k, asked):
    taken = []

    def gradient(x, y, step):
        taken.append(step.index)
        return torch.full_like(x, step.index)

    rule = s.every(gradient, k)
    got = [float(rule(X, Y, step)[0, 0, 0, 0]) for step in steps(6.0, 5.0, 4.0, 3.0, 2.0, 1.0)]
    assert taken == asked
    assert got == [max(i for i in asked if i <= index) for index in range(6)]


def test_a_reused_gradient_has_the_strength_of_its_own_step():
    rule = ClassifierGuidance(
        lambda x: x.flatten(1) @ WEIGHT.T,
        gradient=lambda gradient: s.every(gradient, 2),
        strength=lambda step: step.sigma,
    )
    first, second = (rule(X, Y, step) for step in steps(4.0, 1.0))
    torch.testing.assert_close(second, first / 4)
