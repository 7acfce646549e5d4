"""The flags of denoisers that are made of denoisers, and what they build."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from guided_diffusion.flags.fields import Flags, Need, at_least, finite, flag
from guided_diffusion.mixed_denoisers import CFGDenoiser, CFGPlusPlusDenoiser, CFGZeroStarDenoiser

CFG_RULES = ("cfg", "cfg++", "cfg-zero")


def _not_mixable(config: Any) -> str:
    return f"with --sampler {config.sampler}, which takes one network: add a solver, such as --sampler heun"


MIXABLE = Need(lambda config: config.asks_denoiser, _not_mixable)


def _cfg_need(met: Callable[[Any], bool], missing: str) -> Need:
    return Need(
        lambda config: config.asks_denoiser and met(config),
        lambda config: missing if config.asks_denoiser else _not_mixable(config),
    )


CFG = _cfg_need(lambda config: config.uses_cfg, "without classifier-free guidance: add --cfg_scale")
CFG_ZERO = _cfg_need(
    lambda config: config.cfg_rule == "cfg-zero", "without --cfg_rule cfg-zero, to which it belongs: add it"
)
GUIDE_MODEL = _cfg_need(
    lambda config: bool(config.guide_model), "without the network that it is for: add --guide_model PATH"
)


@dataclass(frozen=True, kw_only=True)
class MixedFlags(Flags):
    """Guidance by the network itself, or by a worse one."""

    cfg_scale: float = flag(
        1.0,
        "weight of classifier-free guidance: 1 is none, 0 the network without labels",
        check=finite,
        needs=MIXABLE,
    )
    cfg_rule: str = flag(
        "cfg", "cfg; cfg++ (scale from 0 to 1); or cfg-zero, CFG-Zero*", choices=CFG_RULES, needs=MIXABLE
    )
    cfg_channels: int | None = flag(
        None, "guide only the first so many channels; by default all", kind=int, check=at_least(1), needs=CFG
    )
    cfg_zero_steps: int = flag(
        0, "of cfg-zero: in the first so many steps the prediction is zero", check=at_least(0), needs=CFG_ZERO
    )
    guide_model: str = flag(
        "",
        "autoguidance: a worse checkpoint of the same architecture, such as an earlier one, or a network "
        "that ships",
        needs=MIXABLE,
    )
    guide_scale: float = flag(2.0, "weight of autoguidance: 1 is none", check=finite, needs=GUIDE_MODEL)

    @property
    def asks_denoiser(self) -> bool:
        """Whether the sampler asks a denoiser, which may be made of several."""
        return True

    @property
    def uses_cfg(self) -> bool:
        """Whether the answer with labels and that without are mixed."""
        return self.asks_denoiser and (self.cfg_scale != 1 or self.cfg_rule != "cfg")

    @property
    def mixes(self) -> bool:
        """Whether the denoiser is made of several."""
        return self.uses_cfg or (self.asks_denoiser and bool(self.guide_model))

    def check(self: Any) -> None:
        super().check()
        if self.uses_cfg and self.cfg_rule == "cfg++" and not 0 <= self.cfg_scale <= 1:
            raise ValueError(
                f"--cfg_scale of --cfg_rule cfg++ must be from 0 to 1, got {self.cfg_scale}: 0.6 to 0.8 are "
                "usual, and stand for about 7 to 12 of --cfg_rule cfg"
            )
        by_level = {"cfg++": "--cfg_rule cfg++", "cfg-zero": self.cfg_zero_steps and "--cfg_zero_steps"}
        if self.uses_cfg and self.leaves_levels and (name := by_level.get(self.cfg_rule)):
            raise ValueError(
                f"{name} goes by the noise levels of the run, which {self.leaves_levels} leaves: drop one"
            )

    def refuse_for_run(self, num_steps: int, channels: int) -> None:
        """Raise ValueError for what cannot be in a run of so many steps, on images of so many channels."""
        if self.uses_cfg and self.cfg_rule == "cfg-zero" and self.cfg_zero_steps >= num_steps:
            raise ValueError(
                f"--cfg_zero_steps {self.cfg_zero_steps}: of {num_steps} steps some must be left"
            )
        if self.uses_cfg and self.cfg_channels is not None and self.cfg_channels > channels:
            raise ValueError(f"--cfg_channels {self.cfg_channels}: the images have {channels}")

    def mixed(
        self,
        conditional: Callable[..., Tensor],
        unconditional: Callable[..., Tensor] | None,
        guide: Callable[..., Tensor] | None,
        sigmas: Sequence[float],
        *,
        clip_denoised: bool,
    ) -> Callable[..., Tensor]:
        """The denoiser that the flags describe. Its parts are to answer without a clamp; clip_denoised clamps
        the whole. unconditional, guide: where `uses_cfg`, and where there is a --guide_model. sigmas: the
        levels of the run, ending with 0.
        """
        denoise = conditional
        if unconditional is not None:
            options = {"channels": self.cfg_channels, "clip_denoised": clip_denoised and guide is None}
            denoise = self._cfg(conditional, unconditional, sigmas, options)
        if guide is not None:
            denoise = CFGDenoiser(denoise, guide, self.guide_scale, clip_denoised=clip_denoised)
        return denoise

    def _cfg(self, conditional, unconditional, sigmas, options):
        parts = (conditional, unconditional, self.cfg_scale)
        if self.cfg_rule == "cfg++":
            return CFGPlusPlusDenoiser(*parts, sigmas, **options)
        if self.cfg_rule == "cfg-zero":
            zero_above = sigmas[self.cfg_zero_steps] if self.cfg_zero_steps else math.inf
            return CFGZeroStarDenoiser(*parts, zero_above=zero_above, **options)
        return CFGDenoiser(*parts, **options)
