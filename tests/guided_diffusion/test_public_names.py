"""The names that code outside this project relies on: order, names and defaults of their arguments."""

import importlib
import inspect
import math

import pytest
import torch

from guided_diffusion import script_util, solvers
from guided_diffusion.respace import SpacedDiffusion, space_timesteps

LOOP = """model, shape, noise=None, clip_denoised=True, denoised_fn=None, cond_fn=None, model_kwargs=None,
    device=None, progress=False"""
LOOP_KEYWORDS = "guidance=None, randn_like=None, variance_max='schedule'"
UNET = """image_size, in_channels, model_channels, out_channels, num_res_blocks, attention_resolutions,
    dropout=0, channel_mult=(1, 2, 4, 8), conv_resample=True, dims=2"""
UNET_TAIL = """use_checkpoint=False, use_fp16=False, num_heads=1, num_head_channels=-1, num_heads_upsample=-1,
    use_scale_shift_norm=False, resblock_updown=False, use_new_attention_order=False"""
EDM = "img_resolution, img_channels, label_dim=0, use_fp16=False"
# By module. What more a function takes must be optional, and stand behind these arguments.
SIGNATURES = {
    # openai/guided-diffusion
    "guided_diffusion.gaussian_diffusion": {
        "GaussianDiffusion.p_sample_loop": f"self, {LOOP}, *, {LOOP_KEYWORDS}",
        "GaussianDiffusion.p_sample_loop_progressive": f"self, {LOOP}, *, {LOOP_KEYWORDS}",
        "GaussianDiffusion.ddim_sample_loop": f"self, {LOOP}, eta=0.0, *, {LOOP_KEYWORDS}",
        "GaussianDiffusion.ddim_sample_loop_progressive": f"self, {LOOP}, eta=0.0, *, {LOOP_KEYWORDS}",
        "GaussianDiffusion.p_mean_variance": """self, model, x, t, clip_denoised=True, denoised_fn=None,
            model_kwargs=None""",
        "GaussianDiffusion.q_sample": "self, x_start, t, noise=None",
        "GaussianDiffusion.training_losses": "self, model, x_start, t, model_kwargs=None, noise=None",
        "get_named_beta_schedule": "schedule_name, num_diffusion_timesteps",
    },
    "guided_diffusion.respace": {
        "space_timesteps": "num_timesteps, section_counts",
        "SpacedDiffusion": "use_timesteps, **kwargs",
    },
    "guided_diffusion.resample": {
        "create_named_schedule_sampler": "name, diffusion",
        "UniformSampler": "diffusion",
        "LossSecondMomentResampler": "diffusion, history_per_term=10, uniform_prob=0.001",
        "ScheduleSampler.sample": "self, batch_size, device",
        "LossAwareSampler.update_with_local_losses": "self, local_ts, local_losses",
        "LossAwareSampler.update_with_all_losses": "self, ts, losses",
    },
    "guided_diffusion.image_datasets": {
        "load_data": """*, data_dir, batch_size, image_size, class_cond=False, deterministic=False,
            random_crop=False, random_flip=True""",
    },
    "guided_diffusion.train_util": {
        "TrainLoop": """*, model, diffusion, data, batch_size, microbatch, lr, ema_rate, log_interval,
            save_interval, resume_checkpoint, use_fp16=False, fp16_scale_growth=1e-3, schedule_sampler=None,
            weight_decay=0.0, lr_anneal_steps=0""",
        "TrainLoop.run_loop": "self",
        "parse_resume_step_from_filename": "filename",
        "log_loss_dict": "diffusion, ts, losses",
    },
    "guided_diffusion.fp16_util": {
        "MixedPrecisionTrainer": """*, model, use_fp16=False, fp16_scale_growth=1e-3,
            initial_lg_loss_scale=20.0""",
        "MixedPrecisionTrainer.backward": "self, loss",
        "MixedPrecisionTrainer.optimize": "self, opt",
    },
    "guided_diffusion.nn": {
        "mean_flat": "tensor",
        "update_ema": "target_params, source_params, rate=0.99",
        "timestep_embedding": "timesteps, dim, max_period=10000",
    },
    "guided_diffusion.unet": {
        "UNetModel": f"{UNET}, num_classes=None, {UNET_TAIL}",
        "UNetModel.convert_to_fp16": "self",
        "UNetModel.convert_to_fp32": "self",
        "EncoderUNetModel": f"{UNET}, {UNET_TAIL}, pool='adaptive'",
        "EncoderUNetModel.convert_to_fp16": "self",
        "EncoderUNetModel.convert_to_fp32": "self",
    },
    "guided_diffusion.script_util": {
        "args_to_dict": "args, keys",
        "add_dict_to_argparser": "parser, default_dict",
        "model_and_diffusion_defaults": "",
        "classifier_defaults": "",
        "classifier_and_diffusion_defaults": "",
    },
    "guided_diffusion.dist_util": {
        "setup_dist": "",
        "dev": "",
        "load_state_dict": "path, map_location='cpu'",
        "sync_params": "params",
    },
    "guided_diffusion.logger": {
        "logkv": "key, val",
        "logkv_mean": "key, val",
        "dumpkvs": "",
        "configure": "dir=None",
        "log": "*args",
        "get_dir": "",
    },
    # This project
    "guided_diffusion.guidance": {
        "log_prob": "logits, y, joint_temperature=1.0, marginal_temperature=1.0",
        "GuidanceStep": "index, num_steps, variance, variance_max, sigma, progress",
        "ClassifierGuidance": """classifier, *, joint_temperature=1.0, marginal_temperature=1.0,
            classifier_scale=1.0, gamma_factor=0.0""",
        "ClassifierGuidance.__call__": "self, x, y, step",
        "released_edm_guidance": """classifier, *, joint_temperature, marginal_temperature, max_guidance,
            add_factor""",
    },
    "guided_diffusion.denoisers": {
        "DiscreteDenoiser": "model, diffusion, model_kwargs=None, *, clip_denoised=True",
        "GuidedDenoiser": "net, guidance, y",
    },
    "guided_diffusion.edm": {
        "edm_sampler": """net, latents, class_labels=None, randn_like=torch.randn_like, *, guidance=None,
            y=None, num_steps=18, sigma_min=0.002, sigma_max=80, rho=7, S_churn=0, S_min=0, S_max=math.inf,
            S_noise=1""",
        "EDMPrecond": f"{EDM}, sigma_min=0, sigma_max=math.inf, sigma_data=0.5, model_type='DhariwalUNet'",
        "VPPrecond": f"{EDM}, beta_d=19.9, beta_min=0.1, M=1000, epsilon_t=1e-5, model_type='SongUNet'",
        "VEPrecond": f"{EDM}, sigma_min=0.02, sigma_max=100, model_type='SongUNet'",
        "iDDPMPrecond": f"{EDM}, C_1=0.001, C_2=0.008, M=1000, model_type='DhariwalUNet'",
    },
    "guided_diffusion.dit": {
        "DiT": """input_size=32, patch_size=2, in_channels=4, hidden_size=1152, depth=28, num_heads=16,
            mlp_ratio=4.0, class_dropout_prob=0.1, num_classes=1000, learn_sigma=True""",
        "DiT.forward": "self, x, t, y",
        "DiT.forward_with_cfg": "self, x, t, y, cfg_scale",
        "load_dit": "path",
    },
    "guided_diffusion.checkpoints": {"load_state_dict": "path"},
    "classifiers": {
        "load_classifier": """name, weights=None, *, num_classes=1000, softplus_beta=math.inf,
            classifier_input='paper'""",
    },
}


def arguments(signature, *kinds):
    """The arguments of these kinds, with their defaults, in order."""
    return {p.name: p.default for p in signature.parameters.values() if p.kind in kinds}


def assert_takes(function, expected):
    """The arguments that are written in `expected`, in their order, and no other that is required."""
    wanted = inspect.signature(eval(f"(lambda {expected}: None)", {"math": math, "torch": torch}))
    found = inspect.signature(function)
    P = inspect.Parameter
    ours, theirs = (list(arguments(s, P.POSITIONAL_OR_KEYWORD).items()) for s in (wanted, found))
    assert theirs[: len(ours)] == ours
    keywords, more = (arguments(s, P.KEYWORD_ONLY) for s in (wanted, found))
    assert {name: more.get(name, "missing") for name in keywords} == keywords
    rest = dict(theirs[len(ours) :]) | {name: more[name] for name in more.keys() - keywords.keys()}
    assert P.empty not in rest.values(), rest
    variable = (P.VAR_POSITIONAL, P.VAR_KEYWORD)
    assert arguments(wanted, *variable).keys() <= arguments(found, *variable).keys()


@pytest.mark.parametrize(
    ("module", "name"), [(module, name) for module, names in SIGNATURES.items() for name in names]
)
def test_arguments(module, name):
    function = importlib.import_module(module)
    for part in name.split("."):
        function = getattr(function, part)
    assert_takes(function, SIGNATURES[module][name])


@pytest.mark.parametrize("name", solvers.SOLVERS)
def test_solvers_have_one_form(name):
    assert_takes(solvers.SOLVERS[name], "denoise, x, sigmas, *, randn_like=None, on_step=None")


@pytest.mark.parametrize(
    ("builder", "defaults"),
    [
        ("create_model_and_diffusion", "model_and_diffusion_defaults"),
        ("create_classifier", "classifier_defaults"),
        ("create_classifier_and_diffusion", "classifier_and_diffusion_defaults"),
    ],
)
def test_builders_take_the_flags_and_the_number_of_classes(builder, defaults):
    found = inspect.signature(getattr(script_util, builder)).parameters
    assert set(found) == {*getattr(script_util, defaults)(), "num_classes"}
    assert found["num_classes"].default == 1000
    assert all(p.default is p.empty for key, p in found.items() if key != "num_classes")


def test_a_spaced_diffusion_is_the_one_that_the_flags_build():
    whole = script_util.create_gaussian_diffusion(steps=1000, learn_sigma=True)
    spaced = script_util.create_gaussian_diffusion(steps=1000, timestep_respacing="10")
    built = SpacedDiffusion(
        use_timesteps=space_timesteps(1000, "10"),
        betas=whole.betas,
        model_mean_type=whole.model_mean_type,
        model_var_type=whole.model_var_type,
        loss_type=whole.loss_type,
        rescale_timesteps=False,
    )
    assert built.num_timesteps == len(built.betas) == len(built.alphas_cumprod) == 10
    assert built.use_timesteps == set(built.timestep_map) == set(spaced.timestep_map)
    assert list(built.alphas_cumprod) == pytest.approx(list(spaced.alphas_cumprod), rel=1e-12)
