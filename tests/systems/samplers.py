"""The table that the suite goes through: every way to draw an image of a digit. A new sampler is a row."""

import json
from dataclasses import dataclass

from helpers import DIGITS_NETWORK, call, flags_of, load_samples, load_script

from guided_diffusion.files.pretrained import PRETRAINED_DIR

DIGITS = PRETRAINED_DIR / "digits"
STEPS = 3
SCRIPTS = {name: load_script(name) for name in ("classifier_sample", "edm_sample")}
# Two batches of two images.
IMAGES, BATCH = 4, 2
BATCHES = ([0, 2], [2, 4])


@dataclass(frozen=True)
class Sampler:
    """One row. flags: a guided run of three steps. scale_0: what makes it unguided, the classifier still
    given. unguided: the same network without any classifier. levels, steps: sigma and the step's number at
    each call of guidance, as metrics.jsonl tells them.
    """

    name: str
    script: str
    flags: tuple
    scale_0: tuple
    unguided: tuple
    levels: tuple
    steps: tuple

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
ADM_LEVELS, EDM_LEVELS = (157.407, 3.443, 0.01), (80, 2.515, 0.002)


def adm(name, levels=ADM_LEVELS, steps=(2, 1, 0), *more):
    flag = ("--sampler", name, *more)
    zero, plain = ("--classifier_scale", 0), (*PLAIN_ADM, *flag)
    return Sampler(name, "classifier_sample", (*ADM, *flag), zero, plain, levels, steps)


def edm(form, scale_0, levels, steps):
    flag = ("--guidance_form", form)
    plain = (*PLAIN_EDM, "--format", "npz")
    return Sampler(form, "edm_sample", (*EDM, *flag), (scale_0, 0), plain, levels, steps)


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
]
BY_NAME = {sampler.name: sampler for sampler in SAMPLERS}
ADM_SAMPLERS = [sampler for sampler in SAMPLERS if sampler.script == "classifier_sample"]
EDM_SAMPLERS = [sampler for sampler in SAMPLERS if sampler.script == "edm_sample"]
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
