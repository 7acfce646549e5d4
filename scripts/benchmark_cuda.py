"""The guided step on a GPU: images per second over batch sizes, the share of the device's peak, and what each
way to compute it brings. `scripts/benchmark.py` calls it where there is one.
"""

import contextlib
import statistics
import time
from functools import cache

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from guided_diffusion.runs.noise import DrawnAhead, SampleNoise

STEPS = 6  # timed together, so that the processor runs ahead of the device as it does in a run
# Name -> memory format, attention in one kernel, in-place work, mode of torch.compile.
VARIANTS = {
    "as published: NCHW, attention in parts": (torch.contiguous_format, False, False, None),
    "fused attention": (torch.contiguous_format, True, False, None),
    "with in-place work, as it runs": (torch.contiguous_format, True, True, None),
    "channels_last": (torch.channels_last, True, True, None),
    "torch.compile of the network": (torch.contiguous_format, True, False, "default"),
    "torch.compile with CUDA graphs": (torch.contiguous_format, True, False, "reduce-overhead"),
}


def report(step, batch_sizes, repeats):
    """Print a line for each batch size. step: benchmark.py's GuidedStep."""
    peak = matrix_rate(step.device)
    print(f"a float16 product of two 8192x8192 matrices: {peak / 1e12:.0f} TFLOP/s")
    step.halve()
    for batch_size in batch_sizes:
        print(line_of(f"float16 step, batch {batch_size}", step, batch_size, repeats, peak), flush=True)


def compare(step, batch_sizes, repeats):
    """Print a line for each of VARIANTS and each batch size; images per second as multiples of the first."""
    peak = matrix_rate(step.device)
    step.halve()
    first = {}
    for name, (memory_format, fused, in_place, mode) in VARIANTS.items():
        step.model.to(memory_format=memory_format).reuse_activations(in_place)
        step.network = torch.compile(step.model, mode=mode, dynamic=False) if mode else step.model
        for batch_size in batch_sizes:
            torch._dynamo.reset()
            with contextlib.nullcontext() if fused else sdpa_kernel(SDPBackend.MATH):
                seconds, text = whole(step, batch_size, repeats, peak)
            ratio = first.setdefault(batch_size, seconds) / seconds
            print(f"{name}, batch {batch_size}: {ratio:.2f} times as fast, {text}", flush=True)


def line_of(title, step, batch_size, repeats, peak):
    _, text = whole(step, batch_size, repeats, peak)
    _, network, guidance, rest = step.time(batch_size, repeats)
    alone = f"network {network:.4f} s, guidance {guidance:.4f}, rest {rest:.4f}"
    return f"{title}: {text}; one at a time {alone}"


def whole(step, batch_size, repeats, peak):
    """The seconds of a guided step, and what to say of them."""
    torch.cuda.reset_peak_memory_stats()
    shape = (batch_size, 3, step.size, step.size)
    with contextlib.closing(DrawnAhead(SampleNoise(0, range(batch_size)), shape)) as noise:
        run = step.one(batch_size, noise)
        for _ in range(3):  # compilation, and the choice of kernels
            run()
        torch.cuda.synchronize()
        seconds = statistics.median(timed(run) for _ in range(repeats))
        memory = torch.cuda.max_memory_allocated() / 2**30
        busy = kernel_seconds(run) / seconds
    rate = batch_size / seconds / step.diffusion.num_timesteps
    share = batch_size * flops_of(step) / seconds / peak
    return seconds, (
        f"{seconds:.4f} s a step, {rate:.2f} images/s of {step.diffusion.num_timesteps} steps, "
        f"{share:.0%} of the matrix peak, kernels run {min(busy, 1):.0%} of the time, "
        f"peak memory {memory:.2f} GiB"
    )


def timed(run):
    """Seconds of one call, of STEPS in a row."""
    start = time.perf_counter()
    for _ in range(STEPS):
        run()
    torch.cuda.synchronize()
    return (time.perf_counter() - start) / STEPS


def kernel_seconds(run):
    """Seconds for which the device's kernels and copies ran, of one call."""
    with profile(activities=[ProfilerActivity.CUDA]) as recorded:
        run()
        torch.cuda.synchronize()
    return sum(event.self_device_time_total for event in recorded.key_averages()) / 1e6


def matrix_rate(device, size=8192, repeats=10):
    """FLOP/s of a float16 matrix product of random numbers: the best that one can hope for."""
    a, b = (torch.randn(size, size, device=device, dtype=torch.float16) for _ in range(2))
    times = []
    for _ in range(repeats + 3):
        start = time.perf_counter()
        a @ b
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return 2 * size**3 / statistics.median(times[3:])


@cache
def flops_of(step):
    """Floating-point operations of the guided step of one image: network, and classifier forward and back."""
    x = torch.randn(1, 3, step.size, step.size, device=step.device, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        # The counter's hooks cannot hold a leaf; a product is none.
        torch.autograd.grad(step.classifier(x * 1.0).logsumexp(1).sum(), x)
    return counter.get_total_flops() + step.gflop(1) * 1e9


@torch.no_grad()
def settled(classifier, size):
    """A classifier of random weights, its batch norms at the statistics of random images, as training would
    have left them: at their first values numbers grow from layer to layer, beyond float16.
    """
    norms = [each for each in classifier.modules() if isinstance(each, torch.nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = None  # the statistics of this one batch
        norm.train()
    parameter = next(classifier.parameters())
    classifier(torch.rand(16, 3, size, size, device=parameter.device) * 2 - 1)
    for norm in norms:
        norm.eval()
    return classifier
