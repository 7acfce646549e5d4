"""The discrete diffusion process: its tables, q(x_t | x_0), and what a network says of p(x_{t-1} | x_t).

Sources: Ho et al., 2020 (DDPM); Nichol and Dhariwal, 2021 (learned variance, respacing). Images are (N, C, H,
W) in [-1, 1]; `t` is (N,) int64, the index into the respaced process, T-1 the noisiest. Every model sees the
original timestep, `timestep_map[t]`.
"""

import enum
import math
from functools import lru_cache

import numpy as np
import torch

from guided_diffusion.files.nonfinite import require_finite


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


class DiffusionProcess:
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
                "betas must be above 0 and below 1; the linear schedule has such for diffusion_steps above 20"
            )
        self.model_mean_type = model_mean_type
        self.model_var_type = model_var_type
        self.loss_type = loss_type
        self.rescale_timesteps = rescale_timesteps
        self.original_num_steps = len(betas)
        self.timestep_map = np.array(sorted(range(len(betas)) if use_timesteps is None else use_timesteps))

        self.trained_alphas_cumprod = np.cumprod(1 - betas)
        kept = self.trained_alphas_cumprod[self.timestep_map]
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
            extract(self.sqrt_alphas_cumprod, t, x_start) * x_start
            + extract(self.sqrt_one_minus_alphas_cumprod, t, x_start) * noise
        )

    def q_posterior_mean(self, x_start, x_t, t):
        """The mean of q(x_{t-1} | x_t, x_0) (Ho et al., 2020, eq. 7)."""
        return (
            extract(self.posterior_mean_coef1, t, x_t) * x_start
            + extract(self.posterior_mean_coef2, t, x_t) * x_t
        )

    # What the network says

    def p_mean_variance(self, model, x, t, clip_denoised=True, denoised_fn=None, model_kwargs=None):
        """Return p(x_{t-1} | x_t) as a dict of tensors like x: mean, variance, log_variance, pred_xstart
        (clamped if asked for); and variance_fraction, what the network says of the variance, None where it is
        not learned.

        `model(x, timesteps, **model_kwargs)` answers (N, C, H, W), or (N, 2C, H, W) where the variance is
        learned. `denoised_fn` is applied to pred_xstart before the clamp. Raises NonFiniteError, since
        the clamp would hide an infinity.
        """
        prediction, fraction = self.ask(model, x, self._model_timesteps(t), model_kwargs)
        for said in (prediction, fraction):
            if said is not None:
                require_finite(said, "network output", int(t[0]))
        return self._p_mean_variance_of(prediction, fraction, x, t, clip_denoised, denoised_fn)

    def _p_mean_variance_of(self, prediction, fraction, x, t, clip_denoised, denoised_fn=None):
        """The dict above, of what the network said; not checked, so that training waits for no device."""
        if fraction is not None:
            low = extract(self.posterior_log_variance_clipped, t, x)
            high = extract(self.log_betas, t, x)
            log_variance = low + (fraction + 1) / 2 * (high - low)
            variance = torch.exp(log_variance)
        else:
            variance, log_variance = (
                extract(table, t, x).expand(x.shape) for table in self._fixed_variance()
            )
        pred_xstart = self._pred_xstart(prediction, x, t)
        if denoised_fn is not None:
            pred_xstart = denoised_fn(pred_xstart)
        if clip_denoised:
            pred_xstart = pred_xstart.clamp(-1, 1)
        mean = self.q_posterior_mean(pred_xstart, x, t)
        return {
            **{"mean": mean, "variance": variance, "log_variance": log_variance},
            **{"pred_xstart": pred_xstart, "variance_fraction": fraction},
        }

    def ask(self, model, x_t, timesteps, model_kwargs=None):
        """Call `model(x_t, timesteps, **model_kwargs)`, timesteps (N,) of the original process, int or float.

        Returns (prediction, fraction), tensors like x_t; the fraction between the two variances is None where
        the variance is not learned. Raises ValueError for an answer of another shape.
        """
        output = model(x_t, timesteps, **(model_kwargs or {}))
        learned = self.model_var_type is ModelVarType.LEARNED_RANGE
        channels = (1 + learned) * x_t.shape[1]
        if output.shape != (x_t.shape[0], channels, *x_t.shape[2:]):
            raise ValueError(
                f"the network answered {tuple(output.shape)} to an input of {tuple(x_t.shape)}; with "
                f"{self.model_var_type.name} variance it must have {channels} channels (check learn_sigma)"
            )
        return output.split(x_t.shape[1], dim=1) if learned else (output, None)

    def denoised_variance(self, fraction, t):
        """Var[x_0 | x_t] of every pixel, like `fraction`, by the learned variance of the trained process; t
        is an original timestep, a float.

        x_{t-1} is coef1 x_0 + coef2 x_t and noise of variance beta~, so the variance of p(x_{t-1} | x_t) is
        beta~ + coef1^2 Var[x_0 | x_t]. The network says it as beta~^(1-f) beta^f, f = (fraction + 1) / 2.
        With delta = beta / beta~ - 1, and beta~ / coef1^2 = (1 - alpha_bar) / delta, it follows that
        Var[x_0 | x_t] = (1 - alpha_bar) ((1 + delta)^f - 1) / delta, near f (1 - alpha_bar).
        """
        left = 1 - self.trained_alphas_cumprod  # 1 - alpha_bar
        times = np.arange(1, len(left))
        t = max(float(t), 1.0)  # at 0 there is no beta~; the network is told the next one
        log_ratio = float(np.interp(t, times, np.log(left[1:] / left[:-1])))
        noise_share = float(np.interp(t, np.arange(len(left)), left))
        f = ((fraction + 1) / 2).clamp(min=0)
        return noise_share / math.expm1(log_ratio) * torch.expm1(f * log_ratio)

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
        timesteps = _placed(_Identity(self.timestep_map), t.dtype, t.device)[t]
        return timesteps.float() * (1000 / self.original_num_steps) if self.rescale_timesteps else timesteps

    def _pred_xstart(self, prediction, x_t, t):
        if self.model_mean_type is ModelMeanType.START_X:
            return prediction
        return self._xstart_from_eps(x_t, t, prediction)

    def _xstart_from_eps(self, x_t, t, eps):
        return (
            extract(self.sqrt_recip_alphas_cumprod, t, x_t) * x_t
            - extract(self.sqrt_recipm1_alphas_cumprod, t, x_t) * eps
        )

    def _eps_from_xstart(self, x_t, t, x_start):
        return (extract(self.sqrt_recip_alphas_cumprod, t, x_t) * x_t - x_start) / extract(
            self.sqrt_recipm1_alphas_cumprod, t, x_t
        )


def extract(table, t, like):
    """Entries of a float64 table at (N,) indices t, shaped to broadcast against `like`; float32, or float64
    where `like` is.
    """
    # Not in half precision: 1 - alphas_cumprod would be 0 at the first steps.
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    values = _placed(_Identity(table), dtype, like.device)[t]
    return values.view(-1, *[1] * (like.ndim - 1))


class _Identity:
    """A table as a key: equal to itself alone."""

    def __init__(self, table):
        self.table = table

    def __hash__(self):
        return id(self.table)

    def __eq__(self, other):
        return self.table is other.table


@lru_cache(maxsize=256)
def _placed(key, dtype, device):
    """A table on a device. Kept: to copy it at every step would make the host wait for an accelerator."""
    with torch.inference_mode(False):
        return torch.as_tensor(key.table.copy(), dtype=dtype, device=device)


def _first_replaced(variance):
    return np.append(variance[1:2], variance[1:]) if len(variance) > 1 else np.ones(1)
