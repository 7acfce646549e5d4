"""Training under the names and with the arguments of openai/guided-diffusion, for scripts that import them.

scripts/image_train.py does the same with flags, and resumes exactly: here the data come from an iterator,
whose place is not known.
"""

import torch

from guided_diffusion import dist_util, logger
from guided_diffusion.resample import LossAwareSampler, UniformSampler
from guided_diffusion.training.checkpoints import Checkpoints, step_of
from guided_diffusion.training.ema import Average
from guided_diffusion.training.loop import Loop, Precision
from guided_diffusion.training.objectives import DiscreteObjective
from guided_diffusion.training.run import Intervals, Run, Schedule


class TrainLoop:
    """Trains on data, an iterator of (images, {"y": labels}), by `run_loop`; checkpoints and progress.csv are
    written to logger's folder.

    batch_size: of each process. microbatch: -1 is the whole batch. ema_rate: a number, or several in text
    with commas. lr_anneal_steps: 0 trains without end. use_fp16: float16 on an accelerator, bfloat16 on a
    CPU, with weights in float32.
    """

    def __init__(
        self,
        *,
        model,
        diffusion,
        data,
        batch_size,
        microbatch,
        lr,
        ema_rate,
        log_interval,
        save_interval,
        resume_checkpoint,
        use_fp16=False,
        fp16_scale_growth=1e-3,
        schedule_sampler=None,
        weight_decay=0.0,
        lr_anneal_steps=0,
    ):
        model.convert_to_fp32()
        self.device = next(model.parameters()).device
        sampler = schedule_sampler or UniformSampler(diffusion)
        self.data, self.diffusion, self.batch_size = data, diffusion, batch_size
        self.objective = DiscreteObjective(model, diffusion, sampler, model.num_classes is not None)
        rates = [rate.strip() for rate in str(ema_rate).split(",")]
        averages = {rate: Average(model, float(rate)) for rate in rates}
        half = torch.bfloat16 if self.device.type == "cpu" else torch.float16
        loop = Loop(
            model,
            self.objective.losses,
            torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=weight_decay),
            averages.values(),
            precision=Precision(half if use_fp16 else torch.float32, fp16_scale_growth),
            microbatch=max(microbatch, 0),
        )
        self.run = Run(
            loop,
            self._next_batch,
            Schedule(lr, lr_anneal_steps, anneal=bool(lr_anneal_steps)),
            Intervals(log_interval, save_interval),
            Checkpoints(logger.get_dir()),
            averages=averages,
            batch_size=batch_size * loop.processes,
            learner=sampler if isinstance(sampler, LossAwareSampler) else None,
        )
        self.run.begin(resume_checkpoint)
        if loop.processes > 1:
            dist_util.sync_params([*model.parameters(), *model.buffers()])

    def run_loop(self):
        """Train to the end of lr_anneal_steps. Raises what `Run.run` raises."""
        self.run.run()

    def _next_batch(self, step):
        images, condition = next(self.data)
        images = images.to(self.device)
        labels = condition.get("y", torch.zeros(len(images), dtype=torch.int64)).to(self.device)
        t, weights = self.objective.sampler.sample(len(images), self.device)
        return images, labels, t, weights, torch.randn_like(images)


def parse_resume_step_from_filename(filename):
    """The number of steps in a name such as path/model000100.pt; 0 where there is none."""
    return step_of(filename)


def log_loss_dict(diffusion, ts, losses):
    """Give logger the mean of each of the losses, name -> (N,), and their means by quarter of the timesteps
    ts, (N,).
    """
    quarters = (4 * ts // diffusion.num_timesteps).tolist()
    for name, values in losses.items():
        logger.logkv_mean(name, values.mean().item())
        for quarter, value in zip(quarters, values.tolist(), strict=True):
            logger.logkv_mean(f"{name}_q{quarter}", value)
