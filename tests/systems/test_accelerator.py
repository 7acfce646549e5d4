"""The accelerator's path without an accelerator: every sampler at full size on the meta device, whose tensors
have shape, type and place, but no numbers. A tensor left on the CPU or in the wrong precision fails here.
"""

from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from edm_pickles import ADM_64
from samplers import SAMPLERS
from torch.utils._python_dispatch import TorchDispatchMode

import classifiers
from guided_diffusion.edm import EDMPrecond
from guided_diffusion.files.pixels import to_uint8
from guided_diffusion.flags.adm import LOOPS, ADMFlags
from guided_diffusion.flags.edm import EDMFlags
from guided_diffusion.flags.fields import configure
from guided_diffusion.flags.presets import EDM_PRESETS, PRESETS
from guided_diffusion.runs import adm, edm
from guided_diffusion.runs.tally import Tally
from guided_diffusion.unet import EncoderUNetModel, UNetModel

META = torch.device("meta")
STEPS, BATCH = 2, 2
aten = torch.ops.aten


class Watch(TorchDispatchMode):
    """Answers for the scalars that a program asks its tensors for, and a look at every operation.

    All numbers are finite: `all` is True, `any` False. A whole number is that of the last tensor that was
    filled with one, as timesteps are; any fraction is 1. dtypes: (place, operation, dtype) -> how often.
    place: which network computes, if any. on_cpu: operations on images that are on the CPU.
    """

    def __init__(self):
        super().__init__()
        self.place, self.filled, self.truth = "sampler", 0, False
        self.dtypes, self.on_cpu = Counter(), set()

    def enter(self, place):
        """A module's hook, before or after its forward."""

        def hook(*_):
            self.place = place

        return hook

    def watch(self, module, place):
        module.register_forward_pre_hook(self.enter(place))
        module.register_forward_hook(self.enter("sampler"))
        return module

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        tensors = [x for x in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        if function is aten._local_scalar_dense.default and tensors[0].is_meta:
            return self._answer(tensors[0].dtype)
        if function is aten.full.default and isinstance(args[1], int):
            self.filled = args[1]
        places = {x.device.type for x in tensors if x.ndim}
        # Only a copy may have one end on the CPU: noise and labels come from there.
        assert len(places) < 2 or function is aten.copy_.default, f"{function} of tensors on {places}"
        name = function.overloadpacket.__name__
        if name in ("all", "any"):
            self.truth = name == "all"
        if tensors and tensors[0].is_meta:
            self.dtypes[self.place, name, tensors[0].dtype] += 1
        if any(x.ndim >= 3 and not x.is_meta for x in tensors):
            self.on_cpu.add(name)
        return function(*args, **kwargs)

    def _answer(self, dtype):
        if dtype == torch.bool:
            return self.truth
        return 1.0 if dtype.is_floating_point else self.filled

    def of(self, place, *names):
        """Counter of the dtypes in which a network does this."""
        found = Counter()
        for (where, name, dtype), count in self.dtypes.items():
            if where == place and name in names:
                found[dtype] += count
        return found


@pytest.fixture(scope="module")
def resnet101():
    """classifiers.load_classifier, which builds each network once."""
    built = {}

    def load(name, path, **options):
        key = (name, *options.items())
        if key not in built:
            built[key] = classifiers.load_classifier(name, "random", **options)
        return built[key].float()

    return load


@pytest.fixture
def watch(monkeypatch):
    """A Watch, under which networks are not filled from files."""
    watch = Watch()
    monkeypatch.setattr(adm, "load_state_dict", lambda *_: {})
    places = {UNetModel: "network", EncoderUNetModel: "classifier"}
    monkeypatch.setattr(adm, "load_into", lambda net, *_: watch.watch(net, places[type(net)]))
    monkeypatch.setattr(adm, "existing_file", lambda path, *_: path)

    def edm_network(*_):
        with META:
            return watch.watch(EDMPrecond(**ADM_64).eval().requires_grad_(False), "network")

    monkeypatch.setattr(edm, "load_edm_network", edm_network)
    return watch


def draw(sampler, preset, watch, load_classifier):
    """The images of one batch of a full-size run, before they are rounded."""
    package = SimpleNamespace(
        classifier_files=lambda name, path: {},
        classifier_packages=lambda name: [],
        load_classifier=lambda *args, **kw: watch.watch(load_classifier(*args, **kw), "classifier"),
    )
    given = {"preset": preset, "batch_size": BATCH, "steps": STEPS, "log_guidance": True}
    if sampler.script == "edm_sample":
        given |= {"guidance_form": sampler.name, "seeds": "0-1"}
        make_job, config = edm.make_job, configure(EDMFlags, EDM_PRESETS, given)
    else:
        given |= {"sampler": sampler.name, "num_samples": BATCH}
        make_job, config = adm.make_job, configure(ADMFlags, PRESETS, given)
    tally, steps, job = Tally(META, log_guidance=True), [], make_job(config, package)
    run = job.build(META, tally)
    with watch:
        images, y = run.sample(range(BATCH), lambda: steps.append(1))
        levels = to_uint8(images, job.rounding)
        tally.take_batch()
    assert len(steps) == run.num_steps == STEPS and y.dtype == torch.int64 and y.is_meta
    assert (levels.shape, levels.dtype) == ((BATCH, run.image_size, run.image_size, 3), torch.uint8)
    assert images.is_meta and levels.is_meta
    return images


def assert_noise_alone_was_on_the_cpu(watch):
    assert watch.on_cpu <= {"_to_copy", "stack", "cat", "unsqueeze"}, watch.on_cpu


@pytest.mark.parametrize(
    "sampler", [row for row in SAMPLERS if row.script != "dit_sample"], ids=lambda row: row.name
)
def test_networks_and_trajectory_are_on_the_accelerator_each_in_its_precision(sampler, watch, resnet101):
    edms = sampler.script == "edm_sample"
    preset = "imagenet64-edm-resnet101" if edms else "imagenet128-resnet101"
    images = draw(sampler, preset, watch, resnet101)
    assert images.dtype == (torch.float32 if sampler.name in LOOPS else torch.float64)
    network_calls = 3 if edms or sampler.name == "heun" else 2
    convolutions = watch.of("network", "convolution")
    assert convolutions.keys() == {torch.float16, torch.float32}
    # The blocks, and the output head.
    assert convolutions[torch.float16] > 100 * network_calls and convolutions[torch.float32] == network_calls
    for name in ("native_group_norm", "_safe_softmax", "addmm"):
        assert watch.of("network", name).keys() == {torch.float32}, name
    assert_guided_in(
        torch.float32 if edms else torch.float16, watch, 2 if sampler.name == "released" else network_calls
    )
    assert_noise_alone_was_on_the_cpu(watch)


def assert_guided_in(dtype, watch, calls):
    """The classifier computed so often in this precision, both ways; its logits became float32."""
    assert watch.of("classifier", "convolution") == {dtype: 104 * calls}
    assert watch.of("sampler", "convolution_backward") == {dtype: 104 * calls}
    assert watch.of("sampler", "logsumexp") == {torch.float32: calls}


@pytest.mark.parametrize("sampler", [row for row in SAMPLERS if row.name in LOOPS], ids=lambda row: row.name)
def test_a_noisy_classifier_too(sampler, watch, resnet101):
    assert draw(sampler, "imagenet128-finetuned", watch, resnet101).dtype == torch.float32
    for place in ("network", "classifier"):
        convolutions = watch.of(place, "convolution")
        assert convolutions[torch.float16] > 50
    assert watch.of("sampler", "logsumexp") == {torch.float32: STEPS}
    assert_noise_alone_was_on_the_cpu(watch)
