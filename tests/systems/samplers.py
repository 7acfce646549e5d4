"""The table that the suite goes through: every way to draw an image of a digit. A new sampler is a row."""

import json
from dataclasses import dataclass
from importlib.util import find_spec

from helpers import DIGITS_NETWORK, call, flags_of, load_samples, load_script

from guided_diffusion.files.pretrained import PRETRAINED_DIR
from guided_diffusion.flags.presets import DIT_PRESETS, EDM_PRESETS, PRESETS

DIGITS, DIGITS_DIT = PRETRAINED_DIR / "digits", PRETRAINED_DIR / "digits_dit"
STEPS = 3
SCRIPTS = {name: load_script(name) for name in ("classifier_sample", "edm_sample", "dit_sample")}
# Two batches of two images.
IMAGES, BATCH = 4, 2
BATCHES = ([0, 2], [2, 4])


@dataclass(frozen=True)
class System:
    """What the rows of one script share. preset: its values. flag: what chooses the row. network: the flag
    that names it. files: all that a run reads, by flag. rounding: of its pixels. noise: a word of what the
    record says of it.
    """

    preset: dict
    flag: str
    network: str
    files: dict
    rounding: str
    noise: str


GUIDE = {"classifier_path": DIGITS / "guide.safetensors"}
ADM_FILES = {"model_path": DIGITS / "unet.safetensors", **GUIDE}
EDM_FILES = {"network": DIGITS / "edm.safetensors", **GUIDE}
DIT_FILES = {
    "ckpt": DIGITS_DIT / "dit.safetensors",
    "vae": DIGITS_DIT / "vae/diffusion_pytorch_model.safetensors",
    **GUIDE,
}
SYSTEMS = {
    "classifier_sample": System(PRESETS["digits"], "sampler", "model_path", ADM_FILES, "adm", "Philox"),
    "edm_sample": System(
        EDM_PRESETS["digits-edm"], "guidance_form", "network", EDM_FILES, "edm", "seed % 2**32"
    ),
    "dit_sample": System(DIT_PRESETS["digits-dit"], "sampler", "ckpt", DIT_FILES, "edm", "Philox"),
}


@dataclass(frozen=True)
class Sampler:
    """One row. choice: the value of the flag that chooses it. flags: a guided run of three steps. scale_0:
    what makes it unguided, the classifier still given. unguided: the same network without any classifier.
    levels, steps: sigma and the step's number at each call of guidance, as metrics.jsonl tells them.
    """

    name: str
    choice: str
    script: str
    flags: tuple
    scale_0: tuple
    unguided: tuple
    levels: tuple
    steps: tuple

    @property
    def system(self):
        return SYSTEMS[self.script]

    @property
    def main(self):
        return SCRIPTS[self.script].main

    def images(self, count, first=0):
        """The flags for so many images; another `first` is other noise."""
        if self.script == "edm_sample":
            return ("--seeds", f"{first}-{first + count - 1}")
        return ("--num_samples", count, "--seed", first)

    def call(self, folder, *flags, base=None):
        quick = (*self.images(IMAGES), "--batch_size", BATCH)
        return call(self.main, [*(base or self.flags), *quick, *flags, "--out", folder])

    def run(self, folder, *flags, base=None):
        """A finished run."""
        result = self.call(folder, *flags, base=base)
        assert result.code == 0, result.err
        return result


ADM = ("--preset", "digits", "--steps", STEPS)
# The digits' network without a preset, and so without a classifier.
NETWORK = flags_of({**DIGITS_NETWORK, "timestep_respacing": STEPS, "num_classes": 10, "null_class": True})
PLAIN_ADM = (*NETWORK, "--model_path", DIGITS / "unet.safetensors", "--labels", "balanced")
EDM = ("--preset", "digits-edm", "--steps", STEPS)
PLAIN_EDM = ("--network", DIGITS / "edm.safetensors", "--steps", STEPS)
DIT = ("--preset", "digits-dit", "--steps", STEPS)
SHOWN = ("ckpt", "vae", "image_size", "num_classes", "labels", "format", "cfg_scale", "cfg_channels")
PLAIN_DIT = flags_of({name: DIT_PRESETS["digits-dit"][name] for name in SHOWN} | {"steps": STEPS})
ADM_LEVELS, EDM_LEVELS = (157.407, 3.443, 0.01), (80, 2.515, 0.002)


def adm(name, levels=ADM_LEVELS, steps=(2, 1, 0), *more):
    flag = ("--sampler", name, *more)
    zero, plain = ("--classifier_scale", 0), (*PLAIN_ADM, *flag)
    return Sampler(name, name, "classifier_sample", (*ADM, *flag), zero, plain, levels, steps)


def edm(form, scale_0, levels, steps):
    flag = ("--guidance_form", form)
    plain = (*PLAIN_EDM, "--format", "npz")
    return Sampler(form, form, "edm_sample", (*EDM, *flag), (scale_0, 0), plain, levels, steps)


def dit(name, steps):
    """Latents, with classifier-free guidance, under a classifier that looks through the decoder."""
    flag = ("--sampler", name)
    zero, plain = ("--classifier_scale", 0), (*PLAIN_DIT, *flag)
    return Sampler(f"dit-{name}", name, "dit_sample", (*DIT, *flag), zero, plain, ADM_LEVELS, steps)


def twice(values):
    """Heun asks GuidedDenoiser twice in each step but the last."""
    return tuple(value for value in values for _ in range(2))[1:]


# GuidedDenoiser is told no step: it counts in timesteps of the linear process.
SAMPLERS = [
    adm("ddpm"),
    adm("ddim"),
    adm("euler", steps=(999, 500, 0)),
    adm("heun", twice(ADM_LEVELS), twice((999, 500, 0)), "--levels", "trained"),
    *(adm(name, steps=(999, 500, 0)) for name in ("dpmpp_2m", "dpmpp_2m_sde", "ipndm", "unipc")),
    edm("released", "--max_guidance", EDM_LEVELS, (0, 1, 2)),
    edm("score", "--classifier_scale", twice(EDM_LEVELS), twice((930, 441, 0))),
    *([dit("ddpm", (2, 1, 0)), dit("dpmpp_2m", (999, 500, 0))] if find_spec("diffusers") else []),
]
BY_NAME = {sampler.name: sampler for sampler in SAMPLERS}
ADM_SAMPLERS = [sampler for sampler in SAMPLERS if sampler.script == "classifier_sample"]
EDM_SAMPLERS = [sampler for sampler in SAMPLERS if sampler.script == "edm_sample"]
# None where diffusers is not installed.
DIT_SAMPLERS = [sampler for sampler in SAMPLERS if sampler.script == "dit_sample"]
DDPM, RELEASED, SCORE = (BY_NAME[name] for name in ("ddpm", "released", "score"))


def manifest(folder):
    return json.loads((folder / "run.json").read_text())


def metrics(folder):
    """The lines of metrics.jsonl as standard JSON, which knows no NaN and no infinity."""

    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line, parse_constant=refuse) for line in lines]


def levels_apart(folder, other):
    """The largest difference of a pixel for each image."""
    images, others = (load_samples(path)[0].astype(int) for path in (folder, other))
    return abs(images - others).max(axis=(1, 2, 3))
