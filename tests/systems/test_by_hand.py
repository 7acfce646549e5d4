"""The scripts draw what the public functions draw when called by hand; and how a run tells its progress."""

import io
import re

import numpy as np
import pytest
import torch
from edm_pickles import TINY, dumps, random_net, snapshot
from helpers import (
    DIGITS_NETWORK,
    TINY_64,
    TINY_NOISY,
    flags_of,
    load_samples,
    make_noisy_classifier,
    make_unet,
    save_random,
    save_unet,
)
from samplers import BY_NAME, DDPM, DIGITS, EDM, PLAIN_ADM, RELEASED, SCORE

from classifiers import load_classifier
from guided_diffusion.denoisers import DiscreteDenoiser, GuidedDenoiser
from guided_diffusion.edm import EDMPrecond, edm_sampler, load_edm_network
from guided_diffusion.files.checkpoints import load_state_dict
from guided_diffusion.files.pixels import to_uint8
from guided_diffusion.files.run_folder import read_run
from guided_diffusion.guidance import ClassifierGuidance, released_edm_guidance
from guided_diffusion.runs import loop, workers
from guided_diffusion.runs.noise import SampleNoise
from guided_diffusion.solvers import SOLVERS


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def digits(respacing):
    model, diffusion = make_unet({**DIGITS_NETWORK, "timestep_respacing": respacing}, 11)
    model.load_state_dict(load_state_dict(DIGITS / "unet.safetensors"))
    return model.eval(), diffusion


@pytest.mark.parametrize("name", ["ddpm", "ddim", "euler", "heun"])
@pytest.mark.parametrize("respacing", ["3", "ddim3", "2,3"])
def test_adm_unguided(tmp_path, name, respacing):
    own_levels = ("--levels", "trained") if name in SOLVERS else ()
    flags = ("--timestep_respacing", respacing, "--sampler", name, "--num_samples", 2, *own_levels)
    BY_NAME[name].run(tmp_path, *flags, base=PLAIN_ADM)
    images, labels = load_samples(tmp_path)
    (model, diffusion), y, noise = digits(respacing), torch.from_numpy(labels), SampleNoise(0, range(2))
    if name in SOLVERS:
        sigmas = [diffusion.sigma(t) for t in range(diffusion.num_timesteps)][::-1]
        x = noise.randn((2, 3, 16, 16)) * (1 + sigmas[0] ** 2) ** 0.5
        x = SOLVERS[name](DiscreteDenoiser(model, diffusion, {"y": y}), x, [*sigmas, 0.0])
    else:
        draw = {"ddpm": diffusion.p_sample_loop, "ddim": diffusion.ddim_sample_loop}[name]
        x = draw(model, (2, 3, 16, 16), randn_like=noise, model_kwargs={"y": y})
    np.testing.assert_array_equal(images, to_uint8(x, "adm"))


def test_adm_compiled_is_asked_as_often(tmp_path, monkeypatch):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda model, **options: compiled.append(options) or model)
    for out, flags in ((tmp_path / "a", ()), (tmp_path / "b", ("--compile", True))):
        DDPM.run(out, "--timestep_respacing", 2, "--num_samples", 2, *flags, base=PLAIN_ADM)
    assert compiled == [{"dynamic": False}]
    assert read_run(tmp_path / "b")["totals"]["network_evaluations"] == 2 * 2
    np.testing.assert_array_equal(load_samples(tmp_path / "a")[0], load_samples(tmp_path / "b")[0])


@pytest.mark.parametrize("name", ["ddpm", "ddim"])
def test_adm_whose_off_the_shelf_classifier_is_shown_the_noisy_sample(tmp_path, name):
    flags = ("--timestep_respacing", 3, "--sampler", name, "--num_samples", 2, "--looks_at", "noisy")
    guide = ("--classifier_type", "digits_guide", "--classifier_scale", 5, "--joint_temperature", 2)
    BY_NAME[name].run(tmp_path, *flags, *guide, base=PLAIN_ADM)
    images, labels = load_samples(tmp_path)
    (model, diffusion), y, noise = digits("3"), torch.from_numpy(labels), SampleNoise(0, range(2))
    classifier = load_classifier("digits_guide", num_classes=10)

    def cond_fn(x, t, y):
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            logits = classifier(x)
            wanted = 2 * logits.gather(1, y[:, None])[:, 0] - torch.logsumexp(2 * logits, dim=1)
            return 5 * torch.autograd.grad(wanted.sum(), x)[0]

    draw = {"ddpm": diffusion.p_sample_loop, "ddim": diffusion.ddim_sample_loop}[name]
    x = draw(model, (2, 3, 16, 16), randn_like=noise, model_kwargs={"y": y}, cond_fn=cond_fn)
    np.testing.assert_array_equal(images, to_uint8(x, "adm"))


@pytest.mark.parametrize("name", ["ddpm", "ddim"])
def test_adm_under_a_noisy_classifier(tmp_path, name):
    unet, classifier = save_unet(tmp_path / "unet.pt", TINY_64), make_noisy_classifier(num_classes=10)
    noisy = save_random(tmp_path / "noisy.pt", classifier)
    base = [
        *flags_of({**TINY_64, **TINY_NOISY, "num_classes": 10, "timestep_respacing": 3}),
        "--model_path",
        unet,
    ]
    flags = ("--classifier_path", noisy, "--classifier_scale", 1e5, "--sampler", name, "--num_samples", 2)
    BY_NAME[name].run(tmp_path / "out", *flags, base=base)
    images, labels = load_samples(tmp_path / "out")
    classifier.load_state_dict(load_state_dict(noisy))
    classifier.eval()

    def cond_fn(x, t):
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            selected = classifier(x, t).log_softmax(dim=-1)[range(len(x)), torch.from_numpy(labels)]
            return torch.autograd.grad(selected.sum(), x)[0] * 1e5

    model, diffusion = make_unet({**TINY_64, "timestep_respacing": "3"})
    model.load_state_dict(load_state_dict(unet))
    draw = {"ddpm": diffusion.p_sample_loop, "ddim": diffusion.ddim_sample_loop}[name]
    x = draw(model.eval(), (2, 3, 64, 64), randn_like=SampleNoise(0, range(2)), cond_fn=cond_fn)
    assert np.abs(images.astype(int) - to_uint8(x, "adm").numpy()).max() <= 1


class Published:
    """What EDM draws for each seed, by generators that torch seeds; called, the noise of a step."""

    def __init__(self, seeds):
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        self.latents = torch.stack([torch.randn(3, 16, 16, generator=g) for g in self.generators])
        self.labels = torch.stack([torch.randint(10, (), generator=g) for g in self.generators])

    def __call__(self, x):
        return torch.stack([torch.randn(x.shape[1:], dtype=x.dtype, generator=g) for g in self.generators])


OTHER_COLUMNS = {
    "S_churn": 3,
    "S_noise": 1.003,
    "solver": "euler",
    "disc": "ve",
    "schedule": "vp",
    "scaling": "vp",
}


@pytest.mark.parametrize("options", [{}, OTHER_COLUMNS], ids=["defaults", "other columns"])
@pytest.mark.parametrize("form", ["unguided", "released", "score"])
def test_edm_is_the_public_sampler_with_the_published_noise(tmp_path, form, options):
    guided = {"unguided": ("--use_classifier", 0), "released": ("--guidance_form", "released")}
    guided["score"] = ("--guidance_form", "score", "--classifier_scale", 0.5, "--gamma_factor", 0.3)
    seeds = ("--seeds", "9,4,70000", "--batch", 3)
    RELEASED.run(tmp_path, *flags_of(options), *guided[form], *seeds, base=EDM)
    net, noise = load_edm_network(DIGITS / "edm.safetensors"), Published([9, 4, 70000])
    classifier = load_classifier("digits_guide", num_classes=10, softplus_beta=5.0, image_size=16)
    temperatures = {"joint_temperature": 1.0, "marginal_temperature": 0.0}
    score = ClassifierGuidance(classifier, classifier_scale=0.5, gamma_factor=0.3, **temperatures)
    released = released_edm_guidance(classifier, max_guidance=0.03, add_factor=0.3, **temperatures)
    levels = {"sigma_min": 0.02, "sigma_max": 100} if options else {}
    x = edm_sampler(
        GuidedDenoiser(net, score, noise.labels) if form == "score" else net,
        *(noise.latents, torch.eye(10)[noise.labels], noise),
        guidance=released if form == "released" else None,
        **{"num_steps": 3, **levels, **options},
    )
    images, labels = load_samples(tmp_path)
    np.testing.assert_array_equal(labels, noise.labels)
    np.testing.assert_array_equal(images, to_uint8(x, "edm"))


def test_listed_labels_of_edm_leave_its_noise_alone(tmp_path):
    """Balanced over the seeds; a seed's image is that of --class."""
    RELEASED.run(tmp_path / "all", "--labels", "balanced", "--seeds", "0-9", "--batch", 10)
    images, labels = load_samples(tmp_path / "all")
    assert sorted(labels) == list(range(10))
    one = ("--class", labels[4], "--seeds", "0-9", "--batch", 10)
    RELEASED.run(tmp_path / "one", *one)
    same = load_samples(tmp_path / "one")[0]
    assert np.abs(images[4].astype(int) - same[4]).max() <= 1
    assert [i for i in range(10) if (images[i] != same[i]).any() and i != 4]


def test_one_step_is_the_networks_answer_at_sigma_max(tmp_path):
    RELEASED.run(tmp_path, "--steps", 1, "--batch", 4, "--use_classifier", 0, base=EDM)
    noise, net = Published(range(4)), load_edm_network(DIGITS / "edm.safetensors")
    denoised = net(80 * noise.latents.double(), 80, torch.eye(10)[noise.labels])
    np.testing.assert_array_equal(load_samples(tmp_path)[0], to_uint8(denoised.double(), "edm"))


@pytest.mark.parametrize("half", [False, True], ids=["float32 weights", "float16 weights"])
def test_a_float16_pickle_samples_directly_and_its_source_is_not_executed(tmp_path, half):
    path, arguments = tmp_path / "edm.pkl", {**TINY, "img_resolution": 16, "label_dim": 10, "use_fp16": True}
    net = random_net(EDMPrecond, arguments)
    source = "raise SystemExit('executed')"
    path.write_bytes(dumps(snapshot(net.half() if half else net, arguments, source=source)))
    result = SCORE.run(tmp_path / "out", "--network", path, "--device", "cpu")
    assert "on a CPU that is bfloat16" in result.err
    images, labels = load_samples(tmp_path / "out")
    assert all(image.std() > 0 for image in images)
    np.testing.assert_array_equal(labels, Published(range(4)).labels)


# Progress


@pytest.fixture
def often(monkeypatch):
    """The processes tell how far they are after a few steps, not twice a second."""
    monkeypatch.setattr(workers, "PROGRESS_SECONDS", 0.01)
    monkeypatch.setattr(loop, "LINE_SECONDS", 0.05)


def test_a_long_run_says_from_time_to_time_how_far_it_is(tmp_path, often):
    said = DDPM.run(tmp_path, "--num_samples", 12, "--steps", 5, base=("--preset", "digits")).err
    pattern = r"(\d+)/12 images, [\d.]+ images/s, 0:00:\d\d left"
    about, *rest = said.splitlines()
    assert about.startswith("classifier digits_guide: sees ")
    lines = [re.fullmatch(pattern, line) for line in rest]
    assert lines and all(lines), said
    assert (tmp_path / "log.txt").read_text() == said
    images = [int(line[1]) for line in lines]
    assert images == sorted(images) and images[-1] <= 12


def test_on_a_terminal_there_is_one_bar_for_the_run(tmp_path, often, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setattr(io, "StringIO", Terminal)
    said = DDPM.run(tmp_path, "--num_samples", 12).err
    states = said.split("\r")
    assert all("/12 images [" in state for state in states[1:]) and len(states) > 2
    assert "100%" in states[-1] and "12/12 images [" in states[-1]
    assert said.startswith("classifier ") and said.count("\n") == 2  # its line, and the bar's
