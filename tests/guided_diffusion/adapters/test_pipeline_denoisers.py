"""A pipeline as a denoiser: our sampler without guidance is the pipeline's own, on the same noise; guidance
in the pipeline's own loop is ours.
"""

import pytest
import torch
from tiny_pipelines import BETAS, FLOW, STEPS, levels_of, noise_like, own_loop, sampled, tiny, with_scheduler
from torch import nn

from classifiers.decoders import AutoencoderDecoder, DecodedClassifier
from guided_diffusion.adapters.callback import guided_step_callback
from guided_diffusion.adapters.diffusers import Pipeline, PipelineNetwork
from guided_diffusion.adapters.schedulers import TrainedSchedule
from guided_diffusion.denoisers import GuidedDenoiser
from guided_diffusion.guidance import ClassifierGuidance

diffusers = pytest.importorskip("diffusers")
# It cuts off the fractions of a flow's timesteps: of 1025 the four of these tests are whole.
BY_DPM_SOLVER = {"use_flow_sigmas": True, "solver_order": 1, "num_train_timesteps": 1025}
BY_DPM_SOLVER |= {"prediction_type": "flow_prediction"}
TRAILING = {"clip_sample": False, "timestep_spacing": "trailing"}


@pytest.fixture(scope="module")
def ddpm():
    return tiny("ddpm")


@pytest.fixture(scope="module")
def sd():
    return tiny("sd")


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("DDIMScheduler", TRAILING),
        ("DDIMScheduler", {"clip_sample": False}),
        ("DDIMScheduler", {**TRAILING, **BETAS, "prediction_type": "sample"}),
        (
            "DDIMScheduler",
            {**TRAILING, "beta_schedule": "squaredcos_cap_v2", "prediction_type": "v_prediction"},
        ),
        ("DDIMScheduler", {**TRAILING, "rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}),
        ("EulerDiscreteScheduler", {**BETAS, "prediction_type": "epsilon"}),
        ("EulerDiscreteScheduler", {**BETAS, "prediction_type": "v_prediction"}),
        (FLOW, {}),
        (FLOW, {"shift": 3.0}),
    ],
)
def test_our_euler_steps_are_the_schedulers_own(ddpm, name, options):
    pipe = with_scheduler(ddpm, name, **options)
    network = PipelineNetwork(Pipeline.of(pipe))
    noise = noise_like(network)
    theirs = own_loop(pipe, noise)
    denoise = network.denoiser(torch.zeros(2, dtype=torch.int64), clip_denoised=False)
    ours = sampled(denoise, noise, levels_of(network, pipe.scheduler), pipe.scheduler)
    assert (ours - theirs).abs().max() < 1e-4 * theirs.abs().max()


def test_the_levels_of_a_flow_are_its_timesteps(ddpm):
    pipe = with_scheduler(ddpm, FLOW)
    pipe.scheduler.set_timesteps(STEPS)
    process = PipelineNetwork(Pipeline.of(pipe)).process(STEPS)
    assert sorted(t + 1 for t in process.timestep_map) == sorted(pipe.scheduler.timesteps.round().tolist())


@pytest.mark.parametrize("name", ["DDIMScheduler", "EulerDiscreteScheduler"])
def test_a_text_and_its_classifier_free_guidance_are_the_pipelines_own(sd, name):
    pipe = with_scheduler(
        sd, name, **BETAS, timestep_spacing="trailing", **({"clip_sample": False} if "DDIM" in name else {})
    )
    network = PipelineNetwork(Pipeline.of(pipe), prompt="a cat", negative_prompt="dog")
    noise = noise_like(network)
    options = {"num_inference_steps": STEPS, "output_type": "latent", "guidance_scale": 3.0}
    theirs = pipe(["a cat"] * 2, negative_prompt=["dog"] * 2, latents=noise, **options).images
    ours = sampled(
        network.denoiser(torch.tensor([5, 7]), 3.0), noise, levels_of(network, pipe.scheduler), pipe.scheduler
    )
    assert (ours - theirs).abs().max() < 1e-4 * theirs.abs().max()


def test_classes_learned_variance_and_decoder_are_the_dit_pipelines_own():
    pipe = tiny("dit")
    network = PipelineNetwork(Pipeline.of(pipe))
    noise = noise_like(network)
    theirs = pipe([3, 5], 2.0, torch.Generator().manual_seed(1), STEPS, output_type="np").images
    denoise = network.denoiser(torch.tensor([3, 5]), 2.0)
    ours = AutoencoderDecoder(pipe.vae)(
        sampled(denoise, noise, levels_of(network, pipe.scheduler), pipe.scheduler).float()
    )
    images = (ours / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1)
    assert (images - torch.from_numpy(theirs)).abs().max() < 1e-4
    _, variance = denoise.with_variance(noise.double(), 1.0)
    assert variance.shape == noise.shape and variance.min() >= 0 and variance.max() < 1


# With guidance


def decoded_guidance(pipe, **options):
    """A random classifier of decoded latents, and the rule around it, both float64."""
    torch.manual_seed(2)
    decoder = AutoencoderDecoder(tiny("dit").vae).double()
    head = nn.Sequential(nn.AvgPool2d(4), nn.Flatten(), nn.Tanh(), nn.Linear(3 * 4 * 4, 10)).double()
    classifier = DecodedClassifier(head, decoder).requires_grad_(False)

    def logits(z):
        return 3 * classifier(z.double())

    return ClassifierGuidance(logits, strength="posterior", sigma_data=1.0, **options), logits


def test_the_gradient_through_decoder_and_classifier_is_that_of_finite_differences(sd):
    with_scheduler(sd, "DDIMScheduler", **BETAS)
    network = PipelineNetwork(Pipeline.of(sd), prompt="a cat")
    guidance, logits = decoded_guidance(sd)
    y, sigma = torch.tensor([3, 8]), 2.0
    x = noise_like(network).double() * 3
    denoised, shift = GuidedDenoiser(network.denoiser(y, 2.0), guidance, y, clip_denoised=False).parts(
        x, sigma
    )

    def log_prob(z):
        return logits(z).log_softmax(1).gather(1, y[:, None]).sum()

    towards = torch.randn(x.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    step = 1e-5
    slope = (log_prob(denoised + step * towards) - log_prob(denoised - step * towards)) / (2 * step)
    strength = sigma**2 / (1 + sigma**2)
    assert abs((shift * towards).sum() / strength - slope) < 1e-6 * abs(slope)


@pytest.mark.parametrize(
    ("name", "options"),
    [("DDIMScheduler", {"clip_sample": False}), ("EulerDiscreteScheduler", {})],
)
def test_guidance_in_the_pipelines_own_loop_is_that_of_our_sampler(sd, name, options):
    pipe = with_scheduler(sd, name, **BETAS, timestep_spacing="trailing", **options)
    network, y = PipelineNetwork(Pipeline.of(pipe), prompt="a cat"), torch.tensor([3, 8])
    guidance, _ = decoded_guidance(pipe, classifier_scale=100.0)
    noise = noise_like(network)
    asked = {"num_inference_steps": STEPS, "output_type": "latent", "guidance_scale": 1.0, "latents": noise}
    unguided = pipe(["a cat"] * 2, **asked).images
    callback = guided_step_callback(guidance, y, noise)
    theirs, again = (pipe(["a cat"] * 2, **asked, callback_on_step_end=callback).images for _ in range(2))
    denoise = GuidedDenoiser(network.denoiser(y), guidance, y, clip_denoised=False)
    ours = sampled(denoise, noise, levels_of(network, pipe.scheduler), pipe.scheduler)
    assert (ours - theirs).abs().max() < 1e-4 * theirs.abs().max()
    assert torch.equal(theirs, again) and (theirs - unguided).abs().max() > 0.01 * theirs.abs().max()


@pytest.mark.parametrize(("name", "options"), [(FLOW, {}), ("DPMSolverMultistepScheduler", BY_DPM_SOLVER)])
def test_guidance_in_a_loop_of_a_flow_is_that_of_our_sampler(ddpm, name, options):
    pipe = with_scheduler(ddpm, name, **options)
    network, y = PipelineNetwork(Pipeline.of(pipe)), torch.tensor([1, 1])
    noise = noise_like(network)

    def guidance(x, y, step):
        return (0.3 / step.sigma * x.sin()).to(x.dtype)

    theirs = own_loop(pipe, noise, guided_step_callback(guidance, y, noise))
    denoise = GuidedDenoiser(network.denoiser(y, clip_denoised=False), guidance, y, clip_denoised=False)
    ours = sampled(denoise, noise, levels_of(network, pipe.scheduler), pipe.scheduler)
    assert (ours - theirs).abs().max() < 1e-4 * theirs.abs().max()
    assert (theirs - own_loop(pipe, noise)).abs().max() > 0.01 * theirs.abs().max()


def test_without_its_latents_a_pipelines_first_step_is_not_guided(sd):
    pipe = with_scheduler(sd, "DPMSolverMultistepScheduler", **BETAS)
    seen = []

    def guidance(x, y, step):
        seen.append(step.sigma)
        return torch.ones_like(x)

    y = torch.tensor([3])
    pipe(
        "a cat",
        num_inference_steps=STEPS,
        output_type="latent",
        callback_on_step_end=guided_step_callback(guidance, y),
    )
    assert seen == pytest.approx(pipe.scheduler.sigmas[1:STEPS].tolist())


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("DDPMScheduler", {}),
        ("EulerAncestralDiscreteScheduler", {}),
        ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
        ("DDIMScheduler", {"clip_sample": True}),
    ],
)
def test_a_step_that_is_not_a_sum_cannot_be_guided_from_outside(sd, name, options):
    pipe = with_scheduler(sd, name, **options)
    callback = guided_step_callback(decoded_guidance(pipe)[0], torch.tensor([3]))
    with pytest.raises(ValueError, match=f"{name}.* cannot be guided from outside"):
        pipe("a cat", num_inference_steps=2, output_type="latent", callback_on_step_end=callback)


@pytest.mark.parametrize(
    ("kind", "scheduler", "options", "message"),
    [
        ("ddpm", "EDMEulerScheduler", {}, "process of EDMEulerScheduler is not known"),
        ("ddpm", "DDPMScheduler", {"prompt": "a cat"}, "told nothing: drop it"),
        ("sd", "DDPMScheduler", {}, "told a text: give a prompt"),
        (
            "sd",
            "DDPMScheduler",
            {"prompt": "far too many letters"},
            "19 tokens, and the text encoder reads 12",
        ),
    ],
)
def test_what_a_pipeline_does_not_take_is_refused(ddpm, sd, kind, scheduler, options, message):
    pipe = with_scheduler({"ddpm": ddpm, "sd": sd}[kind], scheduler)
    with pytest.raises(ValueError, match=message):
        PipelineNetwork(Pipeline.of(pipe), **options)


def test_guidance_without_labels_needs_a_network_that_knows_none(ddpm):
    network = PipelineNetwork(Pipeline.of(with_scheduler(ddpm, "DDPMScheduler")))
    with pytest.raises(ValueError, match="trained without labels too"):
        network.denoiser(torch.tensor([1]), 2.0)


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("steps", [3, 7, 300])
def test_timesteps_are_those_of_ddim(spacing, steps):
    scheduler = diffusers.DDIMScheduler(timestep_spacing=spacing, steps_offset=1)
    scheduler.set_timesteps(steps)
    assert sorted(TrainedSchedule(scheduler).timesteps(steps)) == sorted(scheduler.timesteps.tolist())


def test_an_offset_does_not_lead_beyond_the_last_timestep():
    schedule = TrainedSchedule(diffusers.DDIMScheduler(timestep_spacing="leading", steps_offset=1))
    assert schedule.timesteps(1000) == set(range(1000))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("EulerDiscreteScheduler", {"timestep_type": "continuous", "prediction_type": "v_prediction"}),
        ("DDPMScheduler", {"variance_type": "learned"}),
        (FLOW, {"invert_sigmas": True}),
    ],
)
def test_another_process_of_a_known_scheduler_is_refused(name, options):
    with pytest.raises(ValueError, match=f"process of a {name} with {next(iter(options))}"):
        TrainedSchedule(getattr(diffusers, name)(**options))


@pytest.mark.parametrize(("steps", "spacing"), [(0, ""), (1001, ""), (4, "odd")])
def test_steps_that_cannot_be_are_refused(ddpm, steps, spacing):
    network = PipelineNetwork(Pipeline.of(with_scheduler(ddpm, "DDPMScheduler")))
    with pytest.raises(ValueError, match=r"steps must be from 1|unknown timestep spacing"):
        network.schedule.timesteps(steps, spacing)
