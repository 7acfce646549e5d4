"""The diffusion process: posterior tables, eps <-> x_0, the ancestral and the DDIM loop, and the training
loss.

Sources: Ho et al., 2020 (DDPM); Song et al., 2021 (DDIM); Nichol and Dhariwal, 2021 (learned variance,
respacing); Dhariwal and Nichol, 2021 (algorithms 1 and 2: `cond_fn`). Images are (N, C, H, W) in [-1, 1]; `t`
is (N,) int64, the index into the respaced process, T-1 the noisiest. Every model and `cond_fn` sees the
original timestep, `timestep_map[t]`.
"""

import enum
import math
from collections import deque
from functools import wraps

import numpy as np
import torch
from tqdm.auto import tqdm

from guided_diffusion.files.nonfinite import require_finite
from guided_diffusion.guidance import GuidanceStep
from guided_diffusion.losses import discretized_gaussian_log_likelihood, normal_kl


class ModelMeanType(enum.Enum):
    """What the network predicts."""

    START_X = enum.auto()
    EPSILON = enum.auto()


class ModelVarType(enum.Enum):
    """Where the variance of a reverse step comes from; LEARNED_RANGE interpolates between the two bounds in
    log space.
    """

    FIXED_SMALL = enum.auto()
    FIXED_LARGE = enum.auto()
    LEARNED_RANGE = enum.auto()


class LossType(enum.Enum):
    """MSE (plus the rescaled variational bound where the variance is learned), or the variational bound
    alone.
    """

    MSE = enum.auto()
    RESCALED_MSE = enum.auto()
    RESCALED_KL = enum.auto()


class GaussianDiffusion:
    """A diffusion over `use_timesteps` (default: all) of the process that `betas`, (T_original,) float64 in
    (0, 1), defines.

    Attributes, all float64 arrays over the respaced steps: betas, alphas_cumprod, alphas_cumprod_prev,
    posterior_variance, ...; `timestep_map` holds the original timestep of each.
    """

    def __init__(
        self,
        *,
        betas,
        model_mean_type,
        model_var_type,
        loss_type=LossType.MSE,
        rescale_timesteps=False,
        use_timesteps=None,
    ):
        betas = np.asarray(betas, dtype=np.float64)
        if betas.ndim != 1 or not ((betas > 0) & (betas < 1)).all():
            raise ValueError(
                "betas must be numbers above 0 and below 1; the linear schedule has such for diffusion_steps above 20"
            )
        self.model_mean_type = model_mean_type
        self.model_var_type = model_var_type
        self.loss_type = loss_type
        self.rescale_timesteps = rescale_timesteps
        self.original_num_steps = len(betas)
        self.timestep_map = np.array(sorted(range(len(betas)) if use_timesteps is None else use_timesteps))

        kept = np.cumprod(1 - betas)[self.timestep_map]
        # The betas of the kept steps leave alphas_cumprod at those steps as it was.
        self.betas = 1 - kept / np.append(1.0, kept[:-1])
        self.log_betas = np.log(self.betas)
        self.num_timesteps = len(self.betas)
        alphas = 1 - self.betas
        self.alphas_cumprod = np.cumprod(alphas)
        self.alphas_cumprod_prev = np.append(1.0, self.alphas_cumprod[:-1])
        self.sqrt_alphas_cumprod = np.sqrt(self.alphas_cumprod)
        self.sqrt_one_minus_alphas_cumprod = np.sqrt(1 - self.alphas_cumprod)
        self.sqrt_recip_alphas_cumprod = np.sqrt(1 / self.alphas_cumprod)
        self.sqrt_recipm1_alphas_cumprod = np.sqrt(1 / self.alphas_cumprod - 1)

        # q(x_{t-1} | x_t, x_0). The variance is 0 at t = 0: the logarithm takes the next one in its place.
        self.posterior_variance = self.betas * (1 - self.alphas_cumprod_prev) / (1 - self.alphas_cumprod)
        self.posterior_log_variance_clipped = np.log(_first_replaced(self.posterior_variance))
        self.posterior_mean_coef1 = self.betas * np.sqrt(self.alphas_cumprod_prev) / (1 - self.alphas_cumprod)
        self.posterior_mean_coef2 = (
            (1 - self.alphas_cumprod_prev) * np.sqrt(alphas) / (1 - self.alphas_cumprod)
        )
        # The largest variance met on the way down from T-1 to t.
        self.posterior_variance_max = np.maximum.accumulate(self.posterior_variance[::-1])[::-1]

    # The forward process

    def q_sample(self, x_start, t, noise=None):
        """Draw x_t from q(x_t | x_0): a tensor like x_start."""
        if noise is None:
            noise = torch.randn_like(x_start)
        return (
            _extract(self.sqrt_alphas_cumprod, t, x_start) * x_start
            + _extract(self.sqrt_one_minus_alphas_cumprod, t, x_start) * noise
        )

    def q_posterior_mean(self, x_start, x_t, t):
        """The mean of q(x_{t-1} | x_t, x_0) (Ho et al., 2020, eq. 7)."""
        return (
            _extract(self.posterior_mean_coef1, t, x_t) * x_start
            + _extract(self.posterior_mean_coef2, t, x_t) * x_t
        )

    # What the network says

    def p_mean_variance(self, model, x, t, clip_denoised=True, denoised_fn=None, model_kwargs=None):
        """Return p(x_{t-1} | x_t) as a dict of tensors like x: mean, variance, log_variance, pred_xstart
        (clamped if asked for).

        `model(x, timesteps, **model_kwargs)` answers (N, C, H, W), or (N, 2C, H, W) where the variance is
        learned. `denoised_fn` is applied to pred_xstart before the clamp. Raises NonFiniteError, since
        the clamp would hide an infinity.
        """
        output = self._output(model, x, t, model_kwargs)
        require_finite(output, "network output", int(t[0]))
        if self.model_var_type is ModelVarType.LEARNED_RANGE:
            output, fraction = output.split(x.shape[1], dim=1)
            low = _extract(self.posterior_log_variance_clipped, t, x)
            high = _extract(self.log_betas, t, x)
            log_variance = low + (fraction + 1) / 2 * (high - low)
            variance = torch.exp(log_variance)
        else:
            variance, log_variance = (
                _extract(table, t, x).expand(x.shape) for table in self._fixed_variance()
            )
        pred_xstart = (
            output if self.model_mean_type is ModelMeanType.START_X else self._xstart_from_eps(x, t, output)
        )
        if denoised_fn is not None:
            pred_xstart = denoised_fn(pred_xstart)
        if clip_denoised:
            pred_xstart = pred_xstart.clamp(-1, 1)
        mean = self.q_posterior_mean(pred_xstart, x, t)
        return {"mean": mean, "variance": variance, "log_variance": log_variance, "pred_xstart": pred_xstart}

    def _output(self, model, x, t, model_kwargs):
        output = model(x, self._model_timesteps(t), **(model_kwargs or {}))
        channels = 2 * x.shape[1] if self.model_var_type is ModelVarType.LEARNED_RANGE else x.shape[1]
        if output.shape != (x.shape[0], channels, *x.shape[2:]):
            raise ValueError(
                f"the network answered {tuple(output.shape)} to an input of {tuple(x.shape)}; "
                f"with {self.model_var_type.name} variance it must have {channels} channels (check learn_sigma)"
            )
        return output

    def _fixed_variance(self):
        if self.model_var_type is ModelVarType.FIXED_LARGE:
            # Of beta and the posterior's variance, the latter is used at t = 0: beta would leave visible
            # noise there.
            table = (
                np.append(self.posterior_variance[1], self.betas[1:])
                if self.num_timesteps > 1
                else self.betas
            )
            return table, np.log(table)
        return self.posterior_variance, self.posterior_log_variance_clipped

    def _model_timesteps(self, t):
        timesteps = torch.as_tensor(self.timestep_map, device=t.device, dtype=t.dtype)[t]
        return timesteps.float() * (1000 / self.original_num_steps) if self.rescale_timesteps else timesteps

    def _xstart_from_eps(self, x_t, t, eps):
        return (
            _extract(self.sqrt_recip_alphas_cumprod, t, x_t) * x_t
            - _extract(self.sqrt_recipm1_alphas_cumprod, t, x_t) * eps
        )

    def _eps_from_xstart(self, x_t, t, x_start):
        return (_extract(self.sqrt_recip_alphas_cumprod, t, x_t) * x_t - x_start) / _extract(
            self.sqrt_recipm1_alphas_cumprod, t, x_t
        )

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
    ):
        """One ancestral step: the dict of `p_mean_variance` and sample, x_{t-1}. noise: like x, drawn here if
        None.

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
            step = GuidanceStep(index, self.num_timesteps, out["variance"], variance_max, self.sigma(index))
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
    ):
        """One step of DDIM (Song et al., 2021, eq. 12): the dict of `p_mean_variance` and sample. noise: like
        x, drawn if None.
        """
        noise = torch.randn_like(x) if noise is None else noise
        out = self.p_mean_variance(model, x, t, clip_denoised, denoised_fn, model_kwargs)
        pred_xstart = out["pred_xstart"]
        alpha_bar = _extract(self.alphas_cumprod, t, x)
        alpha_bar_prev = _extract(self.alphas_cumprod_prev, t, x)
        if cond_fn is not None:
            gradient = cond_fn(x, self._model_timesteps(t), **(model_kwargs or {})).float()
            eps = self._eps_from_xstart(x, t, pred_xstart) - (1 - alpha_bar).sqrt() * gradient
            pred_xstart = self._xstart_from_eps(x, t, eps)
        if guidance is not None:
            index = int(t[0])
            # The rule above for eps, written for x_0.
            variance = float((1 - self.alphas_cumprod[index]) / self.sqrt_alphas_cumprod[index])
            step = GuidanceStep(index, self.num_timesteps, variance, variance, self.sigma(index))
            pred_xstart = pred_xstart + guidance(pred_xstart, model_kwargs["y"], step)
        eps = self._eps_from_xstart(x, t, pred_xstart)
        # Zero at t = 0, where alpha_bar_prev is 1.
        sigma = eta * ((1 - alpha_bar_prev) / (1 - alpha_bar) * (1 - alpha_bar / alpha_bar_prev)).sqrt()
        mean = alpha_bar_prev.sqrt() * pred_xstart + (1 - alpha_bar_prev - sigma**2).sqrt() * eps
        return {**out, "pred_xstart": pred_xstart, "sample": mean + sigma * noise}

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
        guidance: see guidance.py; its y is model_kwargs["y"]. randn_like: called once per step, the last included; x_T comes from
        its `randn(shape)` if it has one. variance_max: "schedule" takes the running maximum of the posterior variance, "first_pixel"
        that of the variance at the first pixel of the batch's first image: EluCD's released code, where an image depends on its batch.
        """
        if variance_max not in ("schedule", "first_pixel"):
            raise ValueError(f"unknown variance_max {variance_max!r}; choose schedule or first_pixel")
        _require_labels(guidance, model_kwargs)
        randn_like = randn_like or torch.randn_like
        x = _start(model, shape, noise, device, randn_like)
        first_pixel_max = 0.0 if variance_max == "first_pixel" else None
        for t in self._descending(x, progress):
            step_noise = randn_like(x)
            out = self.p_sample(
                model, x, t, clip_denoised, denoised_fn, cond_fn, model_kwargs,
                guidance=guidance, noise=step_noise, first_pixel_max=first_pixel_max,
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
        _require_labels(guidance, model_kwargs)
        randn_like = randn_like or torch.randn_like
        x = _start(model, shape, noise, device, randn_like)
        for t in self._descending(x, progress):
            step_noise = randn_like(x)
            out = self.ddim_sample(
                model,
                x,
                t,
                clip_denoised,
                denoised_fn,
                cond_fn,
                model_kwargs,
                eta,
                guidance=guidance,
                noise=step_noise,
            )
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
        if self.loss_type is LossType.RESCALED_KL:
            return {"loss": self.num_timesteps * self._bound(model, x_start, x_t, t, model_kwargs)}
        output = self._output(model, x_t, t, model_kwargs)
        terms = {}
        if self.model_var_type is ModelVarType.LEARNED_RANGE:
            prediction, fraction = output.split(x_t.shape[1], dim=1)
            frozen = torch.cat([prediction.detach(), fraction], dim=1)
            vb = self._bound(lambda *_, **__: frozen, x_start, x_t, t, None)
            # Without rescaling, the bound would drown the other term: it is weighed as 1/1000 of its sum over
            # the steps.
            terms["vb"] = vb * (self.num_timesteps / 1000) if self.loss_type is LossType.RESCALED_MSE else vb
            output = prediction
        target = x_start if self.model_mean_type is ModelMeanType.START_X else noise
        terms["mse"] = _mean_flat((target - output) ** 2)
        return {"loss": terms["mse"] + terms.get("vb", 0), **terms}

    def _bound(self, model, x_start, x_t, t, model_kwargs):
        """One term of the variational bound per image, in bits per dimension: the decoder's likelihood at t =
        0, else a KL.
        """
        true_mean = self.q_posterior_mean(x_start, x_t, t)
        true_log_variance = _extract(self.posterior_log_variance_clipped, t, x_t)
        out = self.p_mean_variance(model, x_t, t, clip_denoised=False, model_kwargs=model_kwargs)
        kl = normal_kl(true_mean, true_log_variance, out["mean"], out["log_variance"])
        log_likelihood = discretized_gaussian_log_likelihood(
            x_start, means=out["mean"], log_scales=0.5 * out["log_variance"]
        )
        return torch.where(t == 0, -_mean_flat(log_likelihood), _mean_flat(kl)) / math.log(2)


def _extract(table, t, like):
    """Entries of a float64 table at (N,) indices t, shaped to broadcast against `like`; float32, or float64
    where `like` is.
    """
    # Not in half precision: 1 - alphas_cumprod would be 0 at the first steps.
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    values = torch.as_tensor(table.copy(), dtype=dtype, device=like.device)[t]
    return values.view(-1, *[1] * (like.ndim - 1))


def _first_replaced(variance):
    return np.append(variance[1:2], variance[1:]) if len(variance) > 1 else np.ones(1)


def _mean_flat(x):
    return x.flatten(1).mean(dim=1)


def _require_labels(guidance, model_kwargs):
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
