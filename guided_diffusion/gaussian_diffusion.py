"""Sampling and training of the discrete process: the ancestral and the DDIM loop, and the training losses.

Sources: Ho et al., 2020 (DDPM); Song et al., 2021 (DDIM); Nichol and Dhariwal, 2021 (the loss of a learned
variance); Dhariwal and Nichol, 2021 (algorithms 1 and 2: `cond_fn`). The tables and what a network says of a
step are in process.py. Every model and `cond_fn` sees the original timestep, `timestep_map[t]`.
"""

import math
from collections import deque
from functools import wraps

import torch
from tqdm.auto import tqdm

from guided_diffusion.guidance import GuidanceStep, ddim_strength, require_input
from guided_diffusion.losses import discretized_gaussian_log_likelihood, normal_kl
from guided_diffusion.nn import mean_flat
from guided_diffusion.process import DiffusionProcess, LossType, ModelMeanType, ModelVarType, extract
from guided_diffusion.schedules import get_named_beta_schedule

__all__ = ["GaussianDiffusion", "LossType", "ModelMeanType", "ModelVarType", "get_named_beta_schedule"]


class GaussianDiffusion(DiffusionProcess):
    """The process with its loops and losses, under guided-diffusion's names; built as `DiffusionProcess`
    is.
    """

    # One step down

    @torch.no_grad()
    def p_sample(
        self,
        model,
        x,
        t,
        clip_denoised=True,
        denoised_fn=None,
        cond_fn=None,
        model_kwargs=None,
        *,
        guidance=None,
        noise=None,
        first_pixel_max=None,
        memory=None,
    ):
        """One ancestral step: the dict of `p_mean_variance` and sample, x_{t-1}. noise: like x, drawn here if
        None. memory: the dict of the trajectory, for rules that remember.

        first_pixel_max: if a float, guidance's `variance_max` is the larger of it and of the variance at the
        first pixel of the batch, and the dict carries it on under that name; if None, the largest posterior
        variance of the steps T-1 .. t.
        """
        noise = torch.randn_like(x) if noise is None else noise
        out = self.p_mean_variance(model, x, t, clip_denoised, denoised_fn, model_kwargs)
        mean, index = out["mean"], int(t[0])
        variance_max = float(self.posterior_variance_max[index])
        if first_pixel_max is not None:
            variance_max = out["first_pixel_max"] = max(first_pixel_max, float(out["variance"].flatten()[0]))
        if cond_fn is not None:
            mean = (
                mean + out["variance"] * cond_fn(x, self._model_timesteps(t), **(model_kwargs or {})).float()
            )
        if guidance is not None:
            weight = float(self.posterior_mean_coef1[index])
            step = self._step(index, out, out["variance"], variance_max, weight, memory)
            mean = mean + guidance(out["pred_xstart"], model_kwargs["y"], step)
        keep_noise = (t != 0).view(-1, *[1] * (x.ndim - 1))
        return {**out, "sample": mean + keep_noise * torch.exp(0.5 * out["log_variance"]) * noise}

    @torch.no_grad()
    def ddim_sample(
        self,
        model,
        x,
        t,
        clip_denoised=True,
        denoised_fn=None,
        cond_fn=None,
        model_kwargs=None,
        eta=0.0,
        *,
        guidance=None,
        noise=None,
        memory=None,
    ):
        """One step of DDIM (Song et al., 2021, eq. 12): the dict of `p_mean_variance` and sample. noise: like
        x, drawn if None. memory: as in `p_sample`.
        """
        noise = torch.randn_like(x) if noise is None else noise
        out = self.p_mean_variance(model, x, t, clip_denoised, denoised_fn, model_kwargs)
        pred_xstart = out["pred_xstart"]
        alpha_bar = extract(self.alphas_cumprod, t, x)
        alpha_bar_prev = extract(self.alphas_cumprod_prev, t, x)
        if cond_fn is not None:
            gradient = cond_fn(x, self._model_timesteps(t), **(model_kwargs or {})).float()
            eps = self._eps_from_xstart(x, t, pred_xstart) - (1 - alpha_bar).sqrt() * gradient
            pred_xstart = self._xstart_from_eps(x, t, eps)
        if guidance is not None:
            index = int(t[0])
            variance = ddim_strength(self.sigma(index))  # the rule above for eps, written for x_0
            step = self._step(index, out, variance, variance, 1.0, memory)
            pred_xstart = pred_xstart + guidance(pred_xstart, model_kwargs["y"], step)
        eps = self._eps_from_xstart(x, t, pred_xstart)
        # Zero at t = 0, where alpha_bar_prev is 1.
        sigma = eta * ((1 - alpha_bar_prev) / (1 - alpha_bar) * (1 - alpha_bar / alpha_bar_prev)).sqrt()
        mean = alpha_bar_prev.sqrt() * pred_xstart + (1 - alpha_bar_prev - sigma**2).sqrt() * eps
        return {**out, "pred_xstart": pred_xstart, "sample": mean + sigma * noise}

    def _step(self, index, out, variance, variance_max, weight, memory):
        fraction = out["variance_fraction"]
        learned = None if fraction is None else self.denoised_variance(fraction, self.timestep_map[index])
        counts = (index, self.num_timesteps, variance, variance_max, self.sigma(index))
        more = {"denoised_weight": weight, "denoised_variance": learned}
        return GuidanceStep.counting_down(*counts, memory={} if memory is None else memory, **more)

    def sigma(self, index):
        """The noise level of x_t at respaced step `index` in EDM's units: standard deviation of the noise
        where x_0 has weight 1.
        """
        return float(self.sqrt_recipm1_alphas_cumprod[index])

    # The loops

    def p_sample_loop_progressive(
        self,
        model,
        shape,
        noise=None,
        clip_denoised=True,
        denoised_fn=None,
        cond_fn=None,
        model_kwargs=None,
        device=None,
        progress=False,
        *,
        guidance=None,
        randn_like=None,
        variance_max="schedule",
    ):
        """Yield the dict of `p_sample` for every step, T-1 first.

        noise: x_T, (N, C, H, W), drawn if None. cond_fn(x, t, **model_kwargs): gradient of a noisy
        classifier's log-probability.
        guidance: see the package guidance; its y is model_kwargs["y"]. randn_like: called once per step, the
        last included; x_T comes from its `randn(shape)` if it has one. variance_max: "schedule" takes the
        running maximum of the posterior variance, "first_pixel" that of the variance at the first pixel of
        the batch's first image: EluCD's released code, where an image depends on its batch.
        """
        if variance_max not in ("schedule", "first_pixel"):
            raise ValueError(f"unknown variance_max {variance_max!r}; choose schedule or first_pixel")
        _require_guidance(guidance, model_kwargs, "p_sample_loop")
        randn_like = randn_like or torch.randn_like
        x = _start(model, shape, noise, device, randn_like)
        first_pixel_max, memory = 0.0 if variance_max == "first_pixel" else None, {}
        for t in self._descending(x, progress):
            step_noise = randn_like(x)
            out = self.p_sample(
                model, x, t, clip_denoised, denoised_fn, cond_fn, model_kwargs,
                guidance=guidance, noise=step_noise, first_pixel_max=first_pixel_max, memory=memory,
            )  # fmt: skip
            yield out
            x, first_pixel_max = out["sample"], out.get("first_pixel_max")

    @wraps(p_sample_loop_progressive, assigned=())
    def p_sample_loop(self, *args, **kwargs):
        """Sample by the ancestral process; arguments as in `p_sample_loop_progressive`. Returns x_0, (N, C,
        H, W).
        """
        return _last(self.p_sample_loop_progressive(*args, **kwargs))["sample"]

    def ddim_sample_loop_progressive(
        self,
        model,
        shape,
        noise=None,
        clip_denoised=True,
        denoised_fn=None,
        cond_fn=None,
        model_kwargs=None,
        device=None,
        progress=False,
        eta=0.0,
        *,
        guidance=None,
        randn_like=None,
        variance_max="schedule",
    ):
        """Yield the dict of `ddim_sample` for every step, T-1 first. Arguments as in
        `p_sample_loop_progressive`.

        eta: 0 is deterministic, 1 has the ancestral variance. variance_max: only "schedule"; a DDIM step's
        maximum is its own variance.
        """
        if variance_max != "schedule":
            raise ValueError(f"variance_max {variance_max!r} has no meaning in DDIM; leave it at schedule")
        _require_guidance(guidance, model_kwargs, "ddim_sample_loop")
        randn_like = randn_like or torch.randn_like
        x, memory = _start(model, shape, noise, device, randn_like), {}
        for t in self._descending(x, progress):
            step_noise = randn_like(x)
            out = self.ddim_sample(
                model, x, t, clip_denoised, denoised_fn, cond_fn, model_kwargs, eta,
                guidance=guidance, noise=step_noise, memory=memory,
            )  # fmt: skip
            yield out
            x = out["sample"]

    @wraps(ddim_sample_loop_progressive, assigned=())
    def ddim_sample_loop(self, *args, **kwargs):
        """Sample by DDIM; arguments as in `ddim_sample_loop_progressive`. Returns x_0, (N, C, H, W)."""
        return _last(self.ddim_sample_loop_progressive(*args, **kwargs))["sample"]

    def _descending(self, x, progress):
        for index in tqdm(range(self.num_timesteps - 1, -1, -1), disable=not progress):
            yield torch.full((len(x),), index, dtype=torch.int64, device=x.device)

    # Training

    def training_losses(self, model, x_start, t, model_kwargs=None, noise=None):
        """Return a dict of (N,) float tensors: loss, and its parts mse and vb where there are two.

        x_start: (N, C, H, W) in [-1, 1]. Nichol and Dhariwal, 2021, eq. 16: the variance learns from the
        bound, the mean does not.
        """
        noise = torch.randn_like(x_start) if noise is None else noise
        x_t = self.q_sample(x_start, t, noise)
        prediction, fraction = self.ask(model, x_t, self._model_timesteps(t), model_kwargs)
        if self.loss_type is LossType.RESCALED_KL:
            return {"loss": self.num_timesteps * self._bound(prediction, fraction, x_start, x_t, t)}
        terms = {}
        if fraction is not None:
            vb = self._bound(prediction.detach(), fraction, x_start, x_t, t)
            # Without rescaling, the bound would drown the other term: it is weighed as 1/1000 of its sum over
            # the steps.
            terms["vb"] = vb * (self.num_timesteps / 1000) if self.loss_type is LossType.RESCALED_MSE else vb
        target = x_start if self.model_mean_type is ModelMeanType.START_X else noise
        terms["mse"] = mean_flat((target - prediction) ** 2)
        return {"loss": terms["mse"] + terms.get("vb", 0), **terms}

    def _bound(self, prediction, fraction, x_start, x_t, t):
        """One term of the variational bound per image, in bits per dimension: the decoder's likelihood at t =
        0, else a KL.
        """
        true_mean = self.q_posterior_mean(x_start, x_t, t)
        true_log_variance = extract(self.posterior_log_variance_clipped, t, x_t)
        out = self._p_mean_variance_of(prediction, fraction, x_t, t, clip_denoised=False)
        kl = normal_kl(true_mean, true_log_variance, out["mean"], out["log_variance"])
        log_likelihood = discretized_gaussian_log_likelihood(
            x_start, means=out["mean"], log_scales=0.5 * out["log_variance"]
        )
        return torch.where(t == 0, -mean_flat(log_likelihood), mean_flat(kl)) / math.log(2)


def _require_guidance(guidance, model_kwargs, sampler):
    """Raise ValueError for a rule that looks at the noisy sample, and for one without wanted classes."""
    require_input(guidance, "denoised", sampler)
    if guidance is not None and (model_kwargs or {}).get("y") is None:
        raise ValueError("guidance needs the wanted classes: pass model_kwargs={'y': (N,) int64 labels}")


def _start(model, shape, noise, device, randn_like):
    """Return x_T on the device that was asked for, else the noise's, else the parameters', else the CPU."""
    if noise is not None:
        if tuple(noise.shape) != tuple(shape):
            raise ValueError(f"noise has shape {tuple(noise.shape)}, but {tuple(shape)} was asked for")
        return noise if device is None else noise.to(device)
    if device is None:
        parameters = getattr(model, "parameters", lambda: iter(()))
        device = next((p.device for p in parameters()), torch.device("cpu"))
    if hasattr(randn_like, "randn"):
        return randn_like.randn(shape).to(device)
    return randn_like(torch.empty(shape, device=device))


def _last(steps):
    return deque(steps, maxlen=1)[0]
