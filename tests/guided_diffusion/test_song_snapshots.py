"""SongUNet in EDM's own pickle format: read as data, and refused where a pickle asks for more."""

import os

import pytest
import torch
from edm_pickles import TINY, Call, random_net, refusal, snapshot, touch, write

from guided_diffusion.edm import EDMPrecond, VEPrecond, VPPrecond, iDDPMPrecond, load_edm_network
from guided_diffusion.files.checkpoints import load_edm_checkpoint

DDPMPP = {**TINY, "model_type": "SongUNet", "augment_dim": 9}
NCSNPP = {
    **DDPMPP,
    "embedding_type": "fourier",
    "encoder_type": "residual",
    "decoder_type": "standard",
    "channel_mult_noise": 2,
    "resample_filter": [1, 3, 3, 1],
    "label_dim": 0,
}
SKIP = {**NCSNPP, "encoder_type": "skip", "decoder_type": "skip"}


@pytest.mark.parametrize("arguments", [DDPMPP, NCSNPP, SKIP], ids=["ddpmpp", "ncsnpp", "skip"])
@pytest.mark.parametrize("network", [EDMPrecond, VPPrecond, VEPrecond, iDDPMPrecond])
def test_network_answers_as_the_pickled_one(tmp_path, network, arguments):
    net = random_net(network, arguments)
    path = write(tmp_path, snapshot(net, arguments, source="raise SystemExit('executed')"))
    checkpoint = load_edm_checkpoint(path)
    assert (checkpoint.class_name, checkpoint.arguments) == (network.__name__, arguments)
    loaded = load_edm_network(path)
    assert type(loaded) is network and not loaded.training
    x, labels = torch.randn(2, 3, 8, 8), torch.eye(2) if arguments["label_dim"] else None
    torch.testing.assert_close(loaded(x, 1.5, labels), net(x, 1.5, labels), rtol=0, atol=1e-6)


@pytest.mark.parametrize("place", ["beside", "argument", "attribute", "buffer"])
def test_hostile_snapshots_are_refused(tmp_path, place):
    canary = tmp_path / "canary"
    call = Call(os.system, touch(canary)[1])
    content = snapshot(
        random_net(VPPrecond, NCSNPP), {**NCSNPP, **({"M": call} if place == "argument" else {})}
    )
    state = content["ema"].reduced[1][0]["state"]
    if place == "beside":
        content["augment_pipe"] = call
    elif place == "attribute":
        state["sigma_min"] = call
    elif place == "buffer":
        state["_buffers"]["freqs"] = call
    assert "asks for posix.system," in refusal(write(tmp_path, content))
    assert not canary.exists()
