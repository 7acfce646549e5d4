"""ADM networks as diffusers' UNet2DModel: the same function, and the same process."""

import pytest
import torch
from helpers import TINY, make_unet

from guided_diffusion.adapters.diffusers import load_pipeline
from guided_diffusion.adapters.export import diffusers_unet, export_pipeline

pytest.importorskip("diffusers")
WIDER = {**TINY, "channel_mult": "1,2,2", "attention_resolutions": "8,4", "num_head_channels": 16}
PLAIN = {"use_scale_shift_norm": False, "resblock_updown": False}
UPDOWN = {"learn_sigma": True, "resblock_updown": True, "num_res_blocks": 2}


def randomised(settings):
    torch.manual_seed(0)
    model, diffusion = make_unet(settings, num_classes=11)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    return model.eval().requires_grad_(False), diffusion


@pytest.mark.parametrize(
    "settings",
    [
        {**WIDER, **PLAIN},
        {**WIDER, **UPDOWN, "class_cond": True},
        {**WIDER, **UPDOWN, "use_new_attention_order": True},
        {**WIDER, **PLAIN, "attention_resolutions": "4"},
    ],
)
def test_the_network_is_the_same_function(settings):
    model, _ = randomised(settings)
    x, t = torch.randn(2, 3, 16, 16), torch.tensor([3.0, 871.0])
    labels = torch.tensor([4, 10]) if settings.get("class_cond") else None
    ours, theirs = model(x, t, labels), diffusers_unet(model)(x, t, labels).sample.detach()
    assert (ours - theirs).abs().max() < 1e-5 * ours.abs().max()


def test_a_folder_holds_the_weights_bit_for_bit_and_the_process(tmp_path):
    model, diffusion = randomised({**WIDER, **UPDOWN, "noise_schedule": "cosine", "diffusion_steps": 50})
    export_pipeline(model, diffusion, "cosine", tmp_path)
    pipeline, unet = load_pipeline(tmp_path), diffusers_unet(model)
    read = pipeline.network.state_dict()
    assert read.keys() == unet.state_dict().keys()
    assert all(torch.equal(tensor, read[name]) for name, tensor in unet.state_dict().items())
    # No number is lost on the way.
    assert sum(t.double().sum() for t in read.values()) == pytest.approx(
        sum(float(p.double().sum()) for p in model.parameters()), abs=1e-9
    )
    assert pipeline.scheduler.betas.double().numpy() == pytest.approx(diffusion.betas, rel=1e-4)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({**WIDER, "num_head_channels": -1, "num_heads": 1, "attention_resolutions": "16"}, "heads of"),
        ({**WIDER, "channel_mult": "2,2,2"}, "the first level has 64 channels"),
    ],
)
def test_what_diffusers_cannot_express_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        diffusers_unet(randomised(settings)[0])
