"""What known networks were trained with: a wrong --num_heads or --noise_schedule fits every tensor, and
spoils the samples all the same.

The published ones are guided-diffusion's command lines.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from guided_diffusion.files.pretrained import PRETRAINED_DIR, read_table, recorded_hashes, sha256

_ADM = {
    "attention_resolutions": "32,16,8",
    "class_cond": True,
    "diffusion_steps": 1000,
    "learn_sigma": True,
    "noise_schedule": "linear",
    "num_channels": 256,
    "num_res_blocks": 2,
    "resblock_updown": True,
    "use_scale_shift_norm": True,
}
_CLASSIFIER = {
    "classifier_attention_resolutions": "32,16,8",
    "classifier_depth": 2,
    "classifier_width": 128,
    "classifier_pool": "attention",
    "classifier_resblock_updown": True,
    "classifier_use_scale_shift_norm": True,
}
_DIGITS = {
    "image_size": 16,
    "num_channels": 32,
    "num_res_blocks": 1,
    "channel_mult": "1,2,2",
    "attention_resolutions": "8,4",
    "num_heads": 4,
    "class_cond": True,
    "learn_sigma": True,
    "resblock_updown": True,
    "use_scale_shift_norm": True,
    "num_classes": 10,
    "null_class": True,
}
_CIFAR10 = {
    "image_size": 32,
    "num_channels": 64,
    "num_res_blocks": 2,
    "channel_mult": "1,2,2",
    "attention_resolutions": "16",
    "num_head_channels": 64,
    "class_cond": True,
    "learn_sigma": True,
    "num_classes": 10,
    "null_class": True,
}
NETWORKS: Mapping[str, Mapping[str, Any]] = {
    "64x64_diffusion.pt": {
        **_ADM,
        "image_size": 64,
        "noise_schedule": "cosine",
        "num_channels": 192,
        "num_head_channels": 64,
        "num_res_blocks": 3,
        "use_new_attention_order": True,
    },
    "128x128_diffusion.pt": {**_ADM, "image_size": 128, "num_heads": 4},
    "256x256_diffusion.pt": {**_ADM, "image_size": 256, "num_head_channels": 64},
    "256x256_diffusion_uncond.pt": {
        **_ADM,
        "image_size": 256,
        "class_cond": False,
        "num_head_channels": 64,
    },
    "512x512_diffusion.pt": {**_ADM, "image_size": 512, "num_head_channels": 64},
    "64x64_classifier.pt": {**_CLASSIFIER, "image_size": 64, "classifier_depth": 4},
    **{f"{size}x{size}_classifier.pt": {**_CLASSIFIER, "image_size": size} for size in (128, 256, 512)},
    "digits/unet.safetensors": _DIGITS,
    "digits/small.safetensors": {**_DIGITS, "channel_mult": "1,1,1", "attention_resolutions": "4"},
    "digits/noisy.safetensors": {
        "image_size": 16,
        "num_classes": 10,
        "classifier_attention_resolutions": "8",
        "classifier_depth": 1,
        "classifier_width": 32,
    },
    "cifar10/unet.safetensors": _CIFAR10,
    "cifar10/small.safetensors": {**_CIFAR10, "num_channels": 32, "num_head_channels": 32},
    "cifar10/noisy.safetensors": {
        "image_size": 32,
        "num_classes": 10,
        "classifier_attention_resolutions": "16,8",
        "classifier_depth": 2,
        "classifier_width": 32,
    },
}


def unlike_training(path: str | Path, config: Any) -> dict[str, Any]:
    """{flag: what the network in this file was trained with}, where a configuration says something else.

    Empty for files that are not known, by one of their names or by their content.
    """
    known = {**_defaults(config), **NETWORKS[name]} if (name := known_name(path)) else {}
    return {flag: value for flag, value in known.items() if getattr(config, flag) != value}


def known_name(path: str | Path) -> str | None:
    """The key of NETWORKS that a file is, None where it is none of them."""
    path = Path(path)
    row = read_table().find(path.name)
    if row and row.name in NETWORKS:
        return row.name
    size = path.stat().st_size
    candidates = {digest: name for name, digest, length in _recorded() if length == size}
    return candidates.get(sha256(path)) if candidates else None


def _recorded() -> Iterator[tuple[str, str, int]]:
    """(name, SHA-256, size) of the networks whose content is known."""
    for name in NETWORKS:
        place = PRETRAINED_DIR / name
        row, seen = read_table().find(place.name), recorded_hashes(place.parent).get(place.name)
        if seen:
            yield name, seen["sha256"], seen["bytes"]
        if row and row.bytes and len(row.sha256) == 64:
            yield name, row.sha256, row.bytes


def _defaults(config):
    """What guided-diffusion's command lines leave at its default, and no tensor shows."""
    quiet = (
        "use_new_attention_order",
        "predict_xstart",
        "rescale_timesteps",
        "diffusion_steps",
        "noise_schedule",
    )
    return {name: type(config).__dataclass_fields__[name].default for name in quiet}
