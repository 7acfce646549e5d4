"""Writes K_solvers.json: the steps of the few-step solvers on D(x, sigma) = a(sigma) x + b(sigma), of one pixel.

    python tests/goldens/solvers_by_hand.py

The formulas stand here as the papers have them, each in its own terms, in 50 digits, and share nothing with
guided_diffusion.solvers.
"""

import json
from pathlib import Path

from mpmath import exp, expm1, factorial, log, lu_solve, matrix, mp, mpf, sqrt

mp.dps = 50
SIGMAS = [mpf(text) for text in ("80", "30", "9", "2.5", "1", "0.4", "0.1", "0.02")]
X, NOISE = mpf("60"), [mpf(text) for text in ("0.3", "-1.2", "0.7", "2", "-0.4", "0.1", "1.5", "-0.8")]


def denoise(x, sigma):
    """Gaussian data of mean 0.3 and standard deviation 0.5."""
    return (x / 4 + sigma**2 * mpf("0.3")) / (sigma**2 + mpf(1) / 4)


def dpmpp_2m(sde):
    """Lu et al., 2022: eq. 18 with lambda = log(alpha / sigma), alpha = 1; SDE-DPM-Solver++(2M), appendix A.2."""
    x, lambdas, answers, steps = X, [-log(s) for s in SIGMAS], [], []
    for i, s in enumerate(SIGMAS):
        answers.append(denoise(x, s))
        if i == len(SIGMAS) - 1:
            x = answers[-1]
        else:
            t, h, D = SIGMAS[i + 1], lambdas[i + 1] - lambdas[i], answers[i]
            if i > 0:
                r = (lambdas[i] - lambdas[i - 1]) / h
                D = (1 + 1 / (2 * r)) * answers[i] - 1 / (2 * r) * answers[i - 1]
            if sde:
                x = t / s * exp(-h) * x + (1 - exp(-2 * h)) * D + t * sqrt(1 - exp(-2 * h)) * NOISE[i]
            else:
                x = t / s * x - expm1(-h) * D
        steps.append(x)
    return steps


def ipndm(order):
    """Zhang and Chen, 2023, appendix: Adams-Bashforth for the slope of the probability flow."""
    x, d, steps = X, [], []
    for s, t in zip(SIGMAS, [*SIGMAS[1:], mpf(0)], strict=True):
        d.append((x - denoise(x, s)) / s)
        k = min(order, len(d))
        if k == 1:
            slope = d[-1]
        elif k == 2:
            slope = (3 * d[-1] - d[-2]) / 2
        elif k == 3:
            slope = (23 * d[-1] - 16 * d[-2] + 5 * d[-3]) / 12
        else:
            slope = (55 * d[-1] - 59 * d[-2] + 37 * d[-3] - 9 * d[-4]) / 24
        x = x + (t - s) * slope
        steps.append(x)
    return steps


def unipc(order, variant):
    """Zhao et al., 2023, algorithms 1 and 2 and appendix A, data prediction: hh = -h, R rho = b with
    b_k = k! phi_(k+1)(hh) / B(hh) hh, the single weight 1/2 where there is one difference.
    """
    x, lambdas, answers, steps, before = X, [-log(s) for s in SIGMAS], [], [], None

    def solved(rks, hh, B):
        if len(rks) == 1:
            return [mpf(1) / 2]
        phi, b = expm1(hh) / hh, []
        for k in range(1, len(rks) + 1):
            phi = (phi - 1 / factorial(k)) / hh  # phi_(k+1)
            b.append(phi * factorial(k) * hh / B)
        rows = [[r**k for r in rks] for k in range(len(rks))]
        return list(lu_solve(matrix(rows), matrix(b)))

    for i, s in enumerate(SIGMAS):
        D = denoise(x, s)
        if before:
            x_linear, m0, rks, others, hh, B = before
            rhos = solved([*rks, mpf(1)], hh, B)
            differences = [(m - m0) / r for m, r in zip(others, rks, strict=True)] + [D - m0]
            x = x_linear - B * sum(rho * d for rho, d in zip(rhos, differences, strict=True))
        answers.append(D)
        if i == len(SIGMAS) - 1:
            steps.append(D)
            break
        p = min(order, i + 1, len(SIGMAS) - i)
        h = lambdas[i + 1] - lambdas[i]
        hh = -h
        B = hh if variant == "bh1" else expm1(hh)
        rks = [(lambdas[i - k] - lambdas[i]) / h for k in range(1, p)]
        others = [answers[i - k] for k in range(1, p)]
        x_linear = SIGMAS[i + 1] / s * x - expm1(hh) * D
        before = (x_linear, D, rks, others, hh, B)
        differences = [(m - D) / r for m, r in zip(others, rks, strict=True)]
        rhos = solved(rks, hh, B) if rks else []
        x = x_linear - B * sum(rho * d for rho, d in zip(rhos, differences, strict=True))
        steps.append(x)
    return steps


CASES = {
    "dpmpp_2m": ({}, dpmpp_2m(sde=False)),
    "dpmpp_2m_sde": ({}, dpmpp_2m(sde=True)),
    **{f"ipndm {k}": ({"order": k}, ipndm(k)) for k in (1, 2, 3, 4)},
    **{f"unipc {k} {v}": ({"order": k, "variant": v}, unipc(k, v)) for k in (2, 3) for v in ("bh1", "bh2")},
}

if __name__ == "__main__":
    content = {
        "sigmas": [float(s) for s in SIGMAS],
        "x": float(X),
        "noise": [float(z) for z in NOISE],
        "cases": {
            name: {"options": o, "steps": [float(x) for x in steps]} for name, (o, steps) in CASES.items()
        },
    }
    Path(__file__).with_name("K_solvers.json").write_text(json.dumps(content, indent=1) + "\n")
