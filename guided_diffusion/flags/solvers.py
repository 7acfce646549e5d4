"""The flags of the solvers, the same for every network, and what they build."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from inspect import signature
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from guided_diffusion.flags.fields import Flags, Need, at_least, flag
from guided_diffusion.schedules import LEVELS, named_levels
from guided_diffusion.solvers import (
    ORDERS,
    SOLVERS,
    STEPS,
    UNIPC_VARIANTS,
    Interval,
    falling_levels,
    recurrent,
    restart,
)

TRAINED = "trained"
_SLACK = 1e-6  # relative, of a level beside the network's lowest or highest
_SAID = 1e-3  # the same where a user writes the limit as messages say it


def _takes(sampler: str, option: str) -> bool:
    return sampler in SOLVERS and option in signature(SOLVERS[sampler]).parameters


def _taken(option: str, also: Callable[[Any], bool] = lambda config: True, what: str = "") -> Need:
    takers = " or ".join(name for name in SOLVERS if _takes(name, option))
    return Need(
        lambda config: _takes(config.sampler, option) and also(config),
        lambda config: (
            f"with --sampler {config.sampler}{what}: it is for {takers}{what and ' under one'}: drop it"
        ),
    )


BY_SOLVER = Need(
    lambda config: config.sampler in SOLVERS,
    lambda config: f"with --sampler {config.sampler}: add --sampler {', '.join(SOLVERS)}",
)
BY_ODE_SOLVER = Need(
    lambda config: config.sampler in SOLVERS and config.sampler != "dpmpp_2m_sde",
    lambda config: f"with --sampler {config.sampler}: it is for solvers of the ODE, such as heun: drop it",
)
RANGE = Need(
    lambda config: config.sampler == "edm" or (config.sampler in SOLVERS and config.levels in LEVELS),
    lambda config: (
        f"with --levels {config.levels}, which says all levels: drop it"
        if config.sampler in SOLVERS
        else f"with --sampler {config.sampler}, which has the process's levels: add --sampler heun"
    ),
)
SINGLE_STEPS = Need(
    lambda config: config.sampler in STEPS,
    lambda config: f"without a sampler that can repeat its steps: add --sampler {' or '.join(STEPS)}",
)


@dataclass(frozen=True, kw_only=True)
class SolverFlags(Flags):
    """Solvers."""

    levels: str = flag(
        TRAINED,
        "noise levels of a solver: karras (heun's own), logsnr, uniform (in t), trained (the process's), "
        "a list such as 80,10,1, or a file of scripts/optimize_levels.py",
        needs=BY_SOLVER,
    )
    sigma_min: float | None = flag(
        None,
        "lowest noise level; by default the network's, of EDM's sampler that of --disc",
        kind=float,
        needs=RANGE,
    )
    sigma_max: float | None = flag(
        None, "highest noise level, where the sample begins; by default as above", kind=float, needs=RANGE
    )
    solver_order: int | None = flag(
        None, "of ipndm, 1 to 4 (default 4), or unipc, 2 or 3 (default 2)", kind=int, needs=_taken("order")
    )
    unipc_variant: str = flag("bh2", "B(h) of unipc", choices=tuple(UNIPC_VARIANTS), needs=_taken("variant"))
    split_guidance: bool = flag(
        False,
        "keep guidance out of a solver's memory of earlier steps",
        needs=_taken("split_guidance", lambda config: config.guided_off_the_shelf, ", without a classifier"),
    )
    restart: str = flag(
        "",
        "go back to more noise and walk down again: LEVELS,REPEATS,SIGMA_MIN,SIGMA_MAX; several with ';'",
        needs=BY_ODE_SOLVER,
    )
    recurrence: int = flag(
        1, "do every step so many times, noise between them", check=at_least(1), needs=SINGLE_STEPS
    )

    @property
    def leaves_levels(self: Any) -> str:
        """The flag by which the sampler visits other noise levels than those of its run, or ""."""
        return "--restart" if self.restart and BY_ODE_SOLVER.met(self) else ""

    def build_solver(self: Any) -> Callable[..., Any]:
        """The solver that the flags describe, as contract 2 has it."""
        options: dict[str, Any] = {}
        if self.solver_order is not None:
            options["order"] = self.solver_order
        if _takes(self.sampler, "variant"):
            options["variant"] = self.unipc_variant
        if self.split_guidance:
            options["split_guidance"] = True
        solver = SOLVERS[self.sampler]
        if SINGLE_STEPS.met(self) and self.recurrence > 1:
            solver = recurrent(STEPS[self.sampler], self.recurrence)
        return partial(restart(solver, self.intervals()) if self.restart else solver, **options)

    def intervals(self) -> list[Interval]:
        """Those of --restart. Raises ValueError."""
        try:
            parts = [text.split(",") for text in self.restart.split(";") if text.strip()]
            return [Interval(int(n), int(k), float(low), float(high)) for n, k, low, high in parts]
        except ValueError:
            raise ValueError(
                f"--restart {self.restart!r} is not understood; write LEVELS,REPEATS,SIGMA_MIN,SIGMA_MAX, "
                "such as 4,1,1.09,1.92, and ; between several"
            ) from None

    def range_within(self: Any, low: float, high: float) -> tuple[float, float]:
        """(sigma_min, sigma_max), the network's where the flags say none. Raises ValueError outside of
        them.
        """
        given = (self.sigma_min, self.sigma_max) if RANGE.met(self) else (None, None)
        wanted = [("sigma_min", given[0], low), ("sigma_max", given[1], high)]
        for name, value, _ in wanted:
            if value is not None and not low * (1 - _SAID) <= value <= high * (1 + _SAID):
                raise ValueError(
                    f"--{name} {value:g} is outside the levels of this network, {low:.4g} to {high:.4g}"
                )
        low, high = (limit if value is None else min(max(value, low), high) for _, value, limit in wanted)
        if low >= high:
            raise ValueError(f"--sigma_min {low:g} must be below --sigma_max {high:g}")
        return low, high

    def solver_levels(
        self: Any,
        num_steps: int,
        ends: tuple[float, float],
        round_sigma: Callable[[Any], Any],
        *,
        trained: list[float] | None = None,
        log_sigmas: NDArray[np.float64] | None = None,
        rho: float = 7.0,
    ) -> tuple[list[float], list[str]]:
        """The levels of a run, the closing 0 included, and what the log should say of them.

        ends: the lowest and the highest level. round_sigma: as denoisers have it; levels that it makes equal
        are merged. trained: the levels of the process. log_sigmas: see `named_levels`. Raises ValueError for
        levels that the network does not know.
        """
        low, high = ends
        if self.levels == TRAINED:
            wanted = trained or []
        elif self.levels in LEVELS:
            wanted = named_levels(self.levels, num_steps, low, high, rho=rho, log_sigmas=log_sigmas).tolist()
        else:
            wanted = read_levels(self.levels)
        for level in wanted:
            if not low * (1 - _SLACK) <= level <= high * (1 + _SLACK):
                raise ValueError(
                    f"--levels {self.levels}: {level:g} is outside those of this network, "
                    f"{low:.4g} to {high:.4g}"
                )
        known = [float(round_sigma(np.float64(level))) for level in wanted]
        levels = falling_levels([*dict.fromkeys(known), 0.0])
        if (merged := len(known) + 1 - len(levels)) or "levels" in self.given:
            text = f"noise levels: {', '.join(f'{level:.4g}' for level in levels)}"
            return levels, [
                f"{text} ({merged} merged, which the network takes for the same)" if merged else text
            ]
        return levels, []

    def check(self: Any) -> None:
        super().check()
        if self.sampler not in SOLVERS:
            return
        if self.solver_order is not None and self.solver_order not in ORDERS[self.sampler]:
            orders = ", ".join(map(str, ORDERS[self.sampler]))
            raise ValueError(f"--solver_order {self.solver_order}: {self.sampler} has the orders {orders}")
        if self.restart:
            restart(SOLVERS[self.sampler], self.intervals())
        if self.levels not in (TRAINED, *LEVELS):
            count = len(read_levels(self.levels))
            if "timestep_respacing" in self.given:
                raise ValueError(
                    f"--timestep_respacing {self.timestep_respacing}, but --levels {self.levels} says all "
                    "levels: drop one"
                )
            if "steps" in self.given and self.steps != count:
                raise ValueError(
                    f"--steps {self.steps}, but --levels {self.levels} are {count} steps: drop --steps"
                )


def levels_file(levels: str) -> Path | None:
    """The file that --levels names; None where it is a word or a list."""
    return None if levels in (TRAINED, *LEVELS) or _is_list(levels) else Path(levels)


def read_levels(levels: str) -> list[float]:
    """The levels of a list or a file, noisiest first, without a closing 0. A file has numbers with spaces,
    commas or line ends between them, and comments after #. Raises ValueError and FileNotFoundError.
    """
    path = levels_file(levels)
    if path is not None and not path.is_file():
        raise FileNotFoundError(
            f"--levels {levels}: no such file; write {', '.join((TRAINED, *LEVELS))}, "
            "a list such as 80,10,1, or the path of one"
        )
    try:
        text = path.read_text() if path else levels
        words = re.sub(r"#.*", "", text).replace(",", " ").split()
        numbers = falling_levels([*(float(word) for word in words if float(word) != 0), 0.0])
    except (ValueError, UnicodeDecodeError) as error:
        raise ValueError(f"--levels {levels} is not understood ({error})") from error
    return numbers[:-1]


def _is_list(levels: str) -> bool:
    return re.fullmatch(r"[-+.\deE,\s]+", levels) is not None


def solver_files(config: Any) -> Mapping[str, Callable[[], Path | None]]:
    """The files that these flags name, as a Job has them."""
    return {"levels": lambda: levels_file(config.levels)} if config.sampler in SOLVERS else {}
