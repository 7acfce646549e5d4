"""Named sets of flags for the sampling scripts: what the paper's shell scripts spell out, and the small
digits problem.
"""

from guided_diffusion.files.pretrained import PRETRAINED_DIR
from guided_diffusion.flags.trained import NETWORKS

_ADM_128 = {
    **NETWORKS["128x128_diffusion.pt"],
    "use_fp16": True,
    "timestep_respacing": "250",
    "num_samples": 50000,
    "batch_size": 50,
    "model_path": str(PRETRAINED_DIR / "128x128_diffusion.pt"),
}

# Its temperatures and sine term, under the ancestral sampler.
_RECIPE = {"margin_temperature_discount": 0.5, "gamma_factor": 0.3}
# The released recipe for off-the-shelf guidance on ImageNet 128x128.
_ELUCD = {
    **_RECIPE,
    "classifier_scale": 1.0,
    "softplus_beta": 3.0,
    "joint_temperature": 1.0,
    "classifier_use_fp16": True,
}

_DIGITS = {
    **NETWORKS["digits/unet.safetensors"],
    "num_samples": 300,
    "batch_size": 50,
    "labels": "balanced",
    "model_path": str(PRETRAINED_DIR / "digits/unet.safetensors"),
    "classifier_type": "digits_guide",
}
_CIFAR10 = {
    **NETWORKS["cifar10/unet.safetensors"],
    "num_samples": 100,
    "batch_size": 50,
    "labels": "balanced",
    "model_path": str(PRETRAINED_DIR / "cifar10/unet.safetensors"),
    "classifier_type": "cifar_resnet20",
    "classifier_path": "CIFAR10_20K",
}
# Few steps, ours: the posterior's strength under a solver. On ImageNet the scale is not measured here.
_FEW_STEPS = {"sampler": "dpmpp_2m", "levels": "karras", "guidance_strength": "posterior"}


def _baselines(problem, base, scales):
    """What the paper's table sets beside its method, at about 25 evaluations: 12 steps of two networks."""
    file = str(PRETRAINED_DIR / problem)
    base = {**base, "timestep_respacing": "25"}
    own = {**base, "classifier_scale": 0.0}  # guided by networks that denoise
    noisy = {
        **base,
        **NETWORKS[f"{problem}/noisy.safetensors"],
        "classifier_type": "",
        "classifier_path": f"{file}/noisy.safetensors",
    }
    solver = {"sampler": "dpmpp_2m_sde", "levels": "karras"}
    return {
        f"{problem}-unguided": own,
        f"{problem}-noisy": {**noisy, "classifier_scale": scales["noisy"]},
        f"{problem}-noisy-ddim": {**noisy, "sampler": "ddim", "classifier_scale": scales["noisy-ddim"]},
        f"{problem}-cfg": {**own, **solver, "timestep_respacing": "12", "cfg_scale": scales["cfg"]},
        f"{problem}-autoguidance": {
            **own,
            **solver,
            "timestep_respacing": "12",
            "guide_model": f"{file}/small.safetensors",
            "guide_scale": scales["autoguidance"],
        },
    }


PRESETS = {
    "digits": {
        **_DIGITS,
        **_RECIPE,
        "timestep_respacing": "25",
        "classifier_scale": 2.0,
        "softplus_beta": 3.0,
    },
    "digits-fewstep": {
        **_DIGITS,
        **_FEW_STEPS,
        # This small network predicts eps, whose error counts sigma times: without new noise it stays in the
        # image, and above these levels it is larger than what is to be seen (docs/few-steps.md).
        "sampler": "dpmpp_2m_sde",
        "sigma_max": 5.0,
        "timestep_respacing": "10",
        "classifier_scale": 2.0,
        "softplus_beta": 5.0,
        "margin_temperature_discount": 0.0,
    },
    "cifar10": {
        **_CIFAR10,
        **_RECIPE,
        "timestep_respacing": "25",
        "classifier_scale": 0.5,
        "softplus_beta": 10.0,  # below, these networks lose their accuracy (docs/cifar10.md)
    },
    "cifar10-fewstep": {
        **_CIFAR10,
        **_FEW_STEPS,
        "sampler": "dpmpp_2m_sde",
        "sigma_max": 20.0,
        "timestep_respacing": "10",
        "classifier_scale": 0.5,
        "softplus_beta": 10.0,
        "margin_temperature_discount": 0.0,
    },
    # At the best scales of docs/results/digits-tuning.txt and docs/cifar10/tuning.txt, as far as these tell.
    **_baselines("digits", _DIGITS, {"noisy": 32.0, "noisy-ddim": 32.0, "cfg": 3.0, "autoguidance": 2.0}),
    **_baselines("cifar10", _CIFAR10, {"noisy": 8.0, "noisy-ddim": 4.0, "cfg": 2.0, "autoguidance": 2.0}),
    "imagenet128-unguided": _ADM_128,
    "imagenet128-finetuned": {
        **_ADM_128,
        "classifier_path": str(PRETRAINED_DIR / "128x128_classifier.pt"),
        "classifier_scale": 0.5,
        **NETWORKS["128x128_classifier.pt"],
        "classifier_use_fp16": True,
    },
    "imagenet128-resnet50": {**_ADM_128, **_ELUCD, "classifier_type": "resnet50"},
    "imagenet128-resnet101": {**_ADM_128, **_ELUCD, "classifier_type": "resnet101"},
    "imagenet128-resnet101-fewstep": {
        **_ADM_128,
        **_FEW_STEPS,
        "timestep_respacing": "25",
        "classifier_type": "resnet101",
        "classifier_scale": 2.0,
        "softplus_beta": 3.0,
        "margin_temperature_discount": 0.5,
        "classifier_use_fp16": True,
    },
}


# For scripts/edm_sample.py. The ImageNet recipe is the released one; the strengths of the score form are
# ours.
_EDM_64 = {
    "network": str(PRETRAINED_DIR / "edm-imagenet-64x64-cond-adm.pkl"),
    "seeds": "0-49999",
    "steps": 10,
}
# EDM's own line for CIFAR-10 (18 steps, 50,000 images); the strength of its guidance is ImageNet's, not
# tuned.
_EDM_CIFAR10 = {
    "network": str(PRETRAINED_DIR / "edm-cifar10-32x32-cond-vp.pkl"),
    "seeds": "0-49999",
    "steps": 18,
}
_EDM_ELUCD = {
    "use_classifier": True,
    "classifier_type": "resnet101",
    "softplus_beta": 5.0,
    "joint_temperature": 1.0,
    "uncond_temperature": 0.0,
    "max_guidance": 0.004,
    "add_factor": 0.3,
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
    "cifar10-edm-unguided": _EDM_CIFAR10,
    "cifar10-edm-resnet56": {
        **_EDM_CIFAR10,
        "use_classifier": True,
        "classifier_type": "cifar_resnet56",
        "softplus_beta": 10.0,
        "joint_temperature": 1.0,
        "uncond_temperature": 0.0,
        "max_guidance": 0.004,
        "add_factor": 0.3,
    },
    "imagenet64-edm-unguided": _EDM_64,
    "imagenet64-edm-resnet101": {**_EDM_64, **_EDM_ELUCD},
    # EluCD's line for 256 steps, with EDM's churn for ImageNet.
    "imagenet64-edm-resnet101-256": {
        **_EDM_64,
        **_EDM_ELUCD,
        "steps": 256,
        "max_guidance": 0.001,
        "S_churn": 40.0,
        "S_min": 0.05,
        "S_max": 50.0,
        "S_noise": 1.003,
    },
    "imagenet64-edm-resnet101-fewstep": {
        **_EDM_64,
        **_FEW_STEPS,
        "steps": 18,
        "use_classifier": True,
        "guidance_form": "score",
        "classifier_type": "resnet101",
        "classifier_scale": 2.0,
        "softplus_beta": 5.0,
        "uncond_temperature": 0.0,
    },
}

# For scripts/dit_sample.py. Without guidance and with 3 channels it is sample_ddp.py's run of the published
# figure; the scales of the guided ones are ours, not measured here.
_DIT = {
    "ckpt": str(PRETRAINED_DIR / "DiT-XL-2-256x256.pt"),
    "model": "DiT-XL/2",
    "num_samples": 50000,
    "steps": 250,
    "cfg_scale": 1.5,
}
_DIT_GUIDED = {
    "classifier_type": "resnet101",
    "classifier_scale": 1.0,
    "softplus_beta": 3.0,
    "margin_temperature_discount": 0.5,
}
# Its autoencoder's channels are no colours: guidance without a classifier is for all of them.
_DIGITS_DIT = {
    "ckpt": str(PRETRAINED_DIR / "digits_dit/dit.safetensors"),
    "vae": str(PRETRAINED_DIR / "digits_dit/vae"),
    "image_size": 16,
    "num_classes": 10,
    "num_samples": 300,
    "batch_size": 50,
    "labels": "balanced",
    "format": "npz",
    "cfg_channels": 4,
    "classifier_type": "digits_guide",
}
DIT_PRESETS = {
    "digits-dit": {
        **_DIGITS_DIT,
        "steps": 25,
        "cfg_scale": 1.25,
        "classifier_scale": 0.25,
        "softplus_beta": 3.0,
        "margin_temperature_discount": 0.5,
        "gamma_factor": 0.3,
    },
    "digits-dit-fewstep": {
        **_DIGITS_DIT,
        **_FEW_STEPS,
        "sampler": "dpmpp_2m_sde",  # for a small network that predicts eps, as above
        "steps": 10,
        "cfg_scale": 1.25,
        "classifier_scale": 1.0,
        "softplus_beta": 5.0,
        "margin_temperature_discount": 0.0,
    },
    "imagenet256-dit": _DIT,
    # With all channels guided, the scale of the authors' better figure.
    "imagenet256-dit-cfg4": {**_DIT, "cfg_channels": 4, "cfg_scale": 1.375},
    "imagenet256-dit-resnet101": {**_DIT, **_DIT_GUIDED, "gamma_factor": 0.3},
    "imagenet256-dit-resnet101-fewstep": {
        **_DIT,
        **_DIT_GUIDED,
        **_FEW_STEPS,
        "steps": 25,
        "guidance_every": 4,
    },
}

SCRIPTS = {"classifier_sample.py": PRESETS, "edm_sample.py": EDM_PRESETS, "dit_sample.py": DIT_PRESETS}


def script_of(preset: str) -> str:
    """The file in scripts/ that samples a preset. Raises ValueError for an unknown one."""
    for script, presets in SCRIPTS.items():
        if preset in presets:
            return script
    raise ValueError(f"unknown preset {preset!r}; python scripts/presets.py lists them")
