"""Solvers: functions that walk from noise to an image along dx/dsigma = (x - D(x, sigma)) / sigma.

    x = solver(denoise, x, sigmas, *, randn_like=None, on_step=None)

denoise(x, sigma): see denoisers.py. x: (N, C, H, W), a sample at the level sigmas[0]. sigmas: (n + 1,),
falling, the last one 0. randn_like(x): for solvers that add noise, called once per step, in order. on_step(i,
x): called after each step. Returns the image, (N, C, H, W) float64. Raises ValueError for levels that do not
fall to 0, NonFiniteError where the trajectory leaves the finite numbers.

Solvers that remember earlier answers take split_guidance=True: then guidance stays out of their memory, and
the shift acts as a step of first order (Wizadwongsa and Suwajanakorn, 2023, arXiv 2301.11558). High orders
under strong guidance are otherwise unstable.

A new solver is one function under `@solver` (walk.py), and one entry of SOLVERS.
"""

from guided_diffusion.solvers.multistep import ADAMS_BASHFORTH, dpmpp_2m, dpmpp_2m_sde, ipndm
from guided_diffusion.solvers.recurrence import recurrent
from guided_diffusion.solvers.restart import Interval, restart
from guided_diffusion.solvers.single_step import STEPS, euler, euler_step, heun, heun_step
from guided_diffusion.solvers.unipc import ORDERS as UNIPC_ORDERS
from guided_diffusion.solvers.unipc import VARIANTS as UNIPC_VARIANTS
from guided_diffusion.solvers.unipc import unipc
from guided_diffusion.solvers.walk import falling_levels, solver

SOLVERS = {
    "euler": euler,
    "heun": heun,
    "dpmpp_2m": dpmpp_2m,
    "dpmpp_2m_sde": dpmpp_2m_sde,
    "ipndm": ipndm,
    "unipc": unipc,
}
# Of those that have several.
ORDERS = {"ipndm": tuple(range(1, len(ADAMS_BASHFORTH) + 1)), "unipc": UNIPC_ORDERS}

__all__ = [
    "ORDERS",
    "SOLVERS",
    "STEPS",
    "UNIPC_VARIANTS",
    "Interval",
    "dpmpp_2m",
    "dpmpp_2m_sde",
    "euler",
    "euler_step",
    "falling_levels",
    "heun",
    "heun_step",
    "ipndm",
    "recurrent",
    "restart",
    "solver",
    "unipc",
]
