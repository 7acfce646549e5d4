"""The flags of guided-diffusion's networks and process, with its names and defaults."""

from dataclasses import dataclass

from guided_diffusion.flags.fields import Flags, Need, at_least, finite, flag

TRAINING = Need(lambda config: config.trains)
NOISY_CLASSIFIER = Need(lambda config: config.guided_by_noisy_classifier)
ANY_CLASSIFIER = Need(lambda config: config.guided_off_the_shelf or config.guided_by_noisy_classifier)


@dataclass(frozen=True, kw_only=True)
class UNetFlags(Flags):
    """The U-Net, as in guided-diffusion."""

    image_size: int = flag(64, "height and width of the images", check=at_least(1))
    num_channels: int = flag(128, "channels of the first level")
    num_res_blocks: int = flag(2, "residual blocks of each level")
    num_heads: int = flag(4, "heads of each attention, where --num_head_channels is -1")
    num_heads_upsample: int = flag(-1, "heads on the way up; -1: as many as on the way down")
    num_head_channels: int = flag(-1, "channels of each head; -1: --num_heads counts")
    attention_resolutions: str = flag("16,8", "sizes in pixels at which there is attention")
    channel_mult: str = flag("", "factor of --num_channels per level; empty: the published ones of this size")
    dropout: float = flag(0.0, "in training", check=finite, needs=TRAINING)
    class_cond: bool = flag(False, "the network takes labels")
    use_checkpoint: bool = flag(False, "gradient checkpointing in training", needs=TRAINING, compared=False)
    use_scale_shift_norm: bool = flag(True, "the embedding scales and shifts; else it is added")
    resblock_updown: bool = flag(False, "residual blocks resample; else convolutions do")
    use_fp16: bool = flag(False, "float16 blocks (bfloat16 on a CPU)")
    use_new_attention_order: bool = flag(False, "the published order of attention's channels at 64x64")


@dataclass(frozen=True, kw_only=True)
class DiffusionFlags(Flags):
    """The diffusion process, as in guided-diffusion."""

    learn_sigma: bool = flag(False, "the network predicts the variance too")
    diffusion_steps: int = flag(1000, "steps that the network was trained with")
    noise_schedule: str = flag("linear", "linear or cosine")
    timestep_respacing: str = flag("", "steps that are taken: 250, 10,10,20 or ddim25; empty: all")
    use_kl: bool = flag(False, "train by the variational bound", needs=TRAINING)
    predict_xstart: bool = flag(False, "the network predicts x_0, not eps")
    rescale_timesteps: bool = flag(False, "the network sees timesteps on a scale of 1000")
    rescale_learned_sigmas: bool = flag(False, "weigh the variance's loss as in training", needs=TRAINING)


@dataclass(frozen=True, kw_only=True)
class NoisyClassifierFlags(Flags):
    """The classifier of noisy images, as in guided-diffusion."""

    classifier_use_fp16: bool = flag(
        False, "float16 (an off-the-shelf classifier too; float32 on a CPU)", needs=ANY_CLASSIFIER
    )
    classifier_width: int = flag(128, "channels of the first level", needs=NOISY_CLASSIFIER)
    classifier_depth: int = flag(2, "residual blocks of each level", needs=NOISY_CLASSIFIER)
    classifier_attention_resolutions: str = flag(
        "32,16,8", "sizes in pixels at which there is attention", needs=NOISY_CLASSIFIER
    )
    classifier_use_scale_shift_norm: bool = flag(
        True, "the embedding scales and shifts", needs=NOISY_CLASSIFIER
    )
    classifier_resblock_updown: bool = flag(True, "residual blocks resample", needs=NOISY_CLASSIFIER)
    classifier_pool: str = flag(
        "attention", "attention, adaptive, spatial or spatial_v2", needs=NOISY_CLASSIFIER
    )


# From their text to numbers

CHANNEL_MULT = {
    512: (0.5, 1, 1, 2, 2, 4, 4),
    256: (1, 1, 2, 2, 4, 4),
    128: (1, 1, 2, 3, 4),
    64: (1, 2, 3, 4),
    32: (1, 2, 2, 2),
    16: (1, 2, 2),  # ours: guided-diffusion has none
}


def channel_multipliers(image_size: int, channel_mult: str) -> tuple[float, ...]:
    """The factors of --channel_mult, or the published ones of this size. Raises ValueError for what cannot
    be.
    """
    if image_size < 1:
        raise ValueError(f"image_size must be at least 1, got {image_size}")
    if channel_mult:
        try:
            multipliers = tuple(float(m) if "." in m else int(m) for m in channel_mult.split(","))
        except ValueError:
            raise ValueError(
                f"channel_mult {channel_mult!r} is not understood; write factors such as 1,2,2"
            ) from None
    elif image_size in CHANNEL_MULT:
        multipliers = CHANNEL_MULT[image_size]
    else:
        sizes = ", ".join(map(str, CHANNEL_MULT))
        raise ValueError(
            f"image_size {image_size} has no default channel_mult ({sizes} have); "
            "a U-Net takes --channel_mult, such as 1,2,2"
        )
    if image_size % 2 ** (len(multipliers) - 1):
        raise ValueError(
            f"image_size {image_size} cannot be halved {len(multipliers) - 1} times, "
            f"as channel_mult {multipliers} asks"
        )
    return multipliers


def downsampling_factors(image_size: int, resolutions: str) -> tuple[int, ...]:
    """Sizes in pixels, comma-separated, as factors of the image's size. Raises ValueError for other text."""
    try:
        return tuple(image_size // int(r) for r in resolutions.split(","))
    except (ValueError, ZeroDivisionError):
        raise ValueError(
            f"attention resolutions {resolutions!r} are not understood; write pixels such as 32,16,8"
        ) from None
