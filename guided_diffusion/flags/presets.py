"""Named sets of flags for the sampling scripts: what the paper's shell scripts spell out, and the small
digits problem.
"""

from guided_diffusion.files.checkpoints import PRETRAINED_DIR

_ADM_128 = {
    "attention_resolutions": "32,16,8",
    "class_cond": True,
    "image_size": 128,
    "learn_sigma": True,
    "num_channels": 256,
    "num_heads": 4,
    "num_res_blocks": 2,
    "resblock_updown": True,
    "use_fp16": True,
    "use_scale_shift_norm": True,
    "timestep_respacing": "250",
    "num_samples": 50000,
    "batch_size": 50,
    "model_path": str(PRETRAINED_DIR / "128x128_diffusion.pt"),
}

# The released recipe for off-the-shelf guidance on ImageNet 128x128.
_ELUCD = {
    "classifier_scale": 1.0,
    "softplus_beta": 3.0,
    "joint_temperature": 1.0,
    "margin_temperature_discount": 0.5,
    "gamma_factor": 0.3,
    "classifier_use_fp16": True,
}

PRESETS = {
    "digits": {
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
        "timestep_respacing": "25",
        "num_samples": 300,
        "batch_size": 50,
        "labels": "balanced",
        "model_path": str(PRETRAINED_DIR / "digits/unet.safetensors"),
        "classifier_type": "digits_guide",
        "classifier_scale": 2.0,
        "softplus_beta": 3.0,
        "margin_temperature_discount": 0.5,
        "gamma_factor": 0.3,
    },
    "imagenet128-unguided": _ADM_128,
    "imagenet128-finetuned": {
        **_ADM_128,
        "classifier_path": str(PRETRAINED_DIR / "128x128_classifier.pt"),
        "classifier_scale": 0.5,
        "classifier_attention_resolutions": "32,16,8",
        "classifier_depth": 2,
        "classifier_width": 128,
        "classifier_pool": "attention",
        "classifier_resblock_updown": True,
        "classifier_use_scale_shift_norm": True,
        "classifier_use_fp16": True,
    },
    "imagenet128-resnet50": {**_ADM_128, **_ELUCD, "classifier_type": "resnet50"},
    "imagenet128-resnet101": {**_ADM_128, **_ELUCD, "classifier_type": "resnet101"},
}


# For scripts/edm_sample.py. The ImageNet recipe is the released one; the strengths of the score form are
# ours.
_EDM_64 = {
    "network": str(PRETRAINED_DIR / "edm-imagenet-64x64-cond-adm.pkl"),
    "seeds": "0-49999",
    "steps": 10,
}
EDM_PRESETS = {
    "digits-edm": {
        "network": str(PRETRAINED_DIR / "digits/edm.safetensors"),
        "seeds": "0-299",
        "batch_size": 50,
        "format": "npz",
        "use_classifier": True,
        "classifier_type": "digits_guide",
        "softplus_beta": 5.0,
        "uncond_temperature": 0.0,
        "max_guidance": 0.03,
        "add_factor": 0.3,
    },
    "imagenet64-edm-unguided": _EDM_64,
    "imagenet64-edm-resnet101": {
        **_EDM_64,
        "use_classifier": True,
        "classifier_type": "resnet101",
        "softplus_beta": 5.0,
        "joint_temperature": 1.0,
        "uncond_temperature": 0.0,
        "max_guidance": 0.004,
        "add_factor": 0.3,
    },
}

SCRIPTS = {"classifier_sample.py": PRESETS, "edm_sample.py": EDM_PRESETS}


def script_of(preset: str) -> str:
    """The file in scripts/ that samples a preset. Raises ValueError for an unknown one."""
    for script, presets in SCRIPTS.items():
        if preset in presets:
            return script
    raise ValueError(
        f"unknown preset {preset!r}; choose {', '.join(name for presets in SCRIPTS.values() for name in presets)}"
    )
