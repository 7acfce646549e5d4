"""Flags <-> networks and processes. The names and defaults of the first half are openai/guided-diffusion's,
which much research imports.
"""

from guided_diffusion.flags.adm import NUM_CLASSES
from guided_diffusion.flags.fields import defaults_of
from guided_diffusion.flags.networks import (
    DiffusionFlags,
    NoisyClassifierFlags,
    UNetFlags,
    channel_multipliers,
    downsampling_factors,
)
from guided_diffusion.flags.parser import parse_bool as str2bool
from guided_diffusion.gaussian_diffusion import GaussianDiffusion, LossType, ModelMeanType, ModelVarType
from guided_diffusion.schedules import get_named_beta_schedule, space_timesteps
from guided_diffusion.unet import EncoderUNetModel, UNetModel


def diffusion_defaults():
    """Flags of the diffusion process with their defaults."""
    return defaults_of(DiffusionFlags)


def model_and_diffusion_defaults():
    """Flags of the U-Net and the diffusion process with their defaults."""
    return {**defaults_of(UNetFlags), **diffusion_defaults()}


def classifier_defaults():
    """Flags of the noisy classifier with their defaults."""
    return {"image_size": 64, **defaults_of(NoisyClassifierFlags)}


def classifier_and_diffusion_defaults():
    """Flags of the noisy classifier and of the diffusion process with their defaults."""
    return {**classifier_defaults(), **diffusion_defaults()}


def create_model_and_diffusion(
    image_size,
    class_cond,
    learn_sigma,
    num_channels,
    num_res_blocks,
    channel_mult,
    num_heads,
    num_head_channels,
    num_heads_upsample,
    attention_resolutions,
    dropout,
    diffusion_steps,
    noise_schedule,
    timestep_respacing,
    use_kl,
    predict_xstart,
    rescale_timesteps,
    rescale_learned_sigmas,
    use_checkpoint,
    use_scale_shift_norm,
    resblock_updown,
    use_fp16,
    use_new_attention_order,
    num_classes=NUM_CLASSES,
):
    """Return (UNetModel, GaussianDiffusion) for upstream's flags; `num_classes` counts if `class_cond`."""
    model = create_model(
        image_size,
        num_channels,
        num_res_blocks,
        channel_mult=channel_mult,
        learn_sigma=learn_sigma,
        class_cond=class_cond,
        use_checkpoint=use_checkpoint,
        attention_resolutions=attention_resolutions,
        num_heads=num_heads,
        num_head_channels=num_head_channels,
        num_heads_upsample=num_heads_upsample,
        use_scale_shift_norm=use_scale_shift_norm,
        dropout=dropout,
        resblock_updown=resblock_updown,
        use_fp16=use_fp16,
        use_new_attention_order=use_new_attention_order,
        num_classes=num_classes,
    )
    diffusion = create_gaussian_diffusion(
        steps=diffusion_steps,
        learn_sigma=learn_sigma,
        noise_schedule=noise_schedule,
        use_kl=use_kl,
        predict_xstart=predict_xstart,
        rescale_timesteps=rescale_timesteps,
        rescale_learned_sigmas=rescale_learned_sigmas,
        timestep_respacing=timestep_respacing,
    )
    return model, diffusion


def create_from_flags(flags):
    """Return (UNetModel, GaussianDiffusion) for a preset or for parsed flags, a mapping; flags that are not
    there take their defaults.

    With `null_class` the network has one label more than `num_classes`.
    """
    values = {**model_and_diffusion_defaults(), "num_classes": NUM_CLASSES, "null_class": False, **flags}
    known = {key: values[key] for key in model_and_diffusion_defaults()}
    return create_model_and_diffusion(**known, num_classes=values["num_classes"] + values["null_class"])


def create_model(
    image_size,
    num_channels,
    num_res_blocks,
    channel_mult="",
    learn_sigma=False,
    class_cond=False,
    use_checkpoint=False,
    attention_resolutions="16",
    num_heads=1,
    num_head_channels=-1,
    num_heads_upsample=-1,
    use_scale_shift_norm=False,
    dropout=0,
    resblock_updown=False,
    use_fp16=False,
    use_new_attention_order=False,
    num_classes=NUM_CLASSES,
):
    """Return the UNetModel for images of image_size x image_size x 3; attention_resolutions in pixels,
    comma-separated.
    """
    multipliers = channel_multipliers(image_size, channel_mult)
    return UNetModel(
        image_size=image_size,
        in_channels=3,
        model_channels=num_channels,
        out_channels=6 if learn_sigma else 3,
        num_res_blocks=num_res_blocks,
        attention_resolutions=downsampling_factors(image_size, attention_resolutions),
        dropout=dropout,
        channel_mult=multipliers,
        num_classes=num_classes if class_cond else None,
        use_checkpoint=use_checkpoint,
        use_fp16=use_fp16,
        num_heads=num_heads,
        num_head_channels=num_head_channels,
        num_heads_upsample=num_heads_upsample,
        use_scale_shift_norm=use_scale_shift_norm,
        resblock_updown=resblock_updown,
        use_new_attention_order=use_new_attention_order,
    )


def create_classifier(
    image_size,
    classifier_use_fp16,
    classifier_width,
    classifier_depth,
    classifier_attention_resolutions,
    classifier_use_scale_shift_norm,
    classifier_resblock_updown,
    classifier_pool,
    num_classes=NUM_CLASSES,
):
    """Return the EncoderUNetModel, a classifier of noisy images, for the flags of `classifier_defaults`."""
    return EncoderUNetModel(
        image_size=image_size,
        in_channels=3,
        model_channels=classifier_width,
        out_channels=num_classes,
        num_res_blocks=classifier_depth,
        attention_resolutions=downsampling_factors(image_size, classifier_attention_resolutions),
        channel_mult=channel_multipliers(image_size, ""),
        use_fp16=classifier_use_fp16,
        num_head_channels=64,
        use_scale_shift_norm=classifier_use_scale_shift_norm,
        resblock_updown=classifier_resblock_updown,
        pool=classifier_pool,
    )


def create_classifier_and_diffusion(
    image_size,
    classifier_use_fp16,
    classifier_width,
    classifier_depth,
    classifier_attention_resolutions,
    classifier_use_scale_shift_norm,
    classifier_resblock_updown,
    classifier_pool,
    learn_sigma,
    diffusion_steps,
    noise_schedule,
    timestep_respacing,
    use_kl,
    predict_xstart,
    rescale_timesteps,
    rescale_learned_sigmas,
    num_classes=NUM_CLASSES,
):
    """Return (EncoderUNetModel, GaussianDiffusion) for the flags of `classifier_and_diffusion_defaults`."""
    classifier = create_classifier(
        image_size,
        classifier_use_fp16,
        classifier_width,
        classifier_depth,
        classifier_attention_resolutions,
        classifier_use_scale_shift_norm,
        classifier_resblock_updown,
        classifier_pool,
        num_classes=num_classes,
    )
    diffusion = create_gaussian_diffusion(
        steps=diffusion_steps,
        learn_sigma=learn_sigma,
        noise_schedule=noise_schedule,
        use_kl=use_kl,
        predict_xstart=predict_xstart,
        rescale_timesteps=rescale_timesteps,
        rescale_learned_sigmas=rescale_learned_sigmas,
        timestep_respacing=timestep_respacing,
    )
    return classifier, diffusion


def create_gaussian_diffusion(
    *,
    steps=1000,
    learn_sigma=False,
    sigma_small=False,
    noise_schedule="linear",
    use_kl=False,
    predict_xstart=False,
    rescale_timesteps=False,
    rescale_learned_sigmas=False,
    timestep_respacing="",
):
    """Return the GaussianDiffusion for the flags of `diffusion_defaults`; without respacing all steps are
    kept.
    """
    fixed = ModelVarType.FIXED_SMALL if sigma_small else ModelVarType.FIXED_LARGE
    mse = LossType.RESCALED_MSE if rescale_learned_sigmas else LossType.MSE
    return GaussianDiffusion(
        betas=get_named_beta_schedule(noise_schedule, steps),
        model_mean_type=ModelMeanType.START_X if predict_xstart else ModelMeanType.EPSILON,
        model_var_type=ModelVarType.LEARNED_RANGE if learn_sigma else fixed,
        loss_type=LossType.RESCALED_KL if use_kl else mse,
        rescale_timesteps=rescale_timesteps,
        use_timesteps=space_timesteps(steps, timestep_respacing or [steps]),
    )


def add_dict_to_argparser(parser, default_dict):
    """Add one flag per key, of the type of its default; booleans are written True or False, None means a
    string.
    """
    for key, value in default_dict.items():
        kind = str if value is None else str2bool if isinstance(value, bool) else type(value)
        options = {"nargs": "?", "const": True} if isinstance(value, bool) else {}
        parser.add_argument(f"--{key}", default=value, type=kind, **options)


def args_to_dict(args, keys):
    """The attributes `keys` of parsed arguments as a dict."""
    return {key: getattr(args, key) for key in keys}
