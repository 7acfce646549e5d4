"""What the goldens of the networks do not show: bfloat16 on a CPU, and the memory that a step needs."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from guided_diffusion.flags.presets import PRESETS
from guided_diffusion.script_util import create_from_flags
from guided_diffusion.unet import _attention


@pytest.mark.parametrize("new_order", [False, True])
def test_bfloat16_attention_is_that_of_float32_up_to_rounding(new_order):
    qkv = torch.randn(2, 64, 3 * 32, generator=torch.Generator().manual_seed(0))
    exact = _attention(qkv, 4, new_order)
    torch.testing.assert_close(
        _attention(qkv.bfloat16(), 4, new_order).float(), exact, rtol=0, atol=0.02 * exact.abs().max().item()
    )


def test_float32_attention_uses_the_fused_kernel():
    class Names(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            met.add(func.overloadpacket.__name__)
            return func(*args, **(kwargs or {}))

    met = set()
    with torch.no_grad(), Names():
        _attention(torch.randn(2, 64, 3 * 32), 4, False)
    assert "_scaled_dot_product_flash_attention_for_cpu" in met


def test_sampling_records_no_graph():
    model, diffusion = create_from_flags(PRESETS["digits"] | {"timestep_respacing": "2"})
    seen = []

    def watched(x, t, y):
        output = model(x, t, y)
        seen.append(output.requires_grad)
        return output

    y = torch.tensor([1])
    diffusion.p_sample_loop(watched, (1, 3, 16, 16), model_kwargs={"y": y})
    assert seen == [False, False]
    assert model(torch.zeros(1, 3, 16, 16), torch.tensor([0]), y).requires_grad  # the watch can go off
