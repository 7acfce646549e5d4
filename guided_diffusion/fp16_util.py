"""Mixed precision under the name and with the arguments of openai/guided-diffusion, for scripts that import
it. Training here uses torch's autocast, see training/loop.py.
"""

import torch


class MixedPrecisionTrainer:
    """Gradients in half precision, weights that the optimizer changes in float32 (Micikevicius et al., 2018).

    With use_fp16 the model's convolutions are halved by its convert_to_fp16, `master_params` are float32
    copies, and the loss is scaled by 2^lg_loss_scale, which grows by fp16_scale_growth a step and falls by 1
    where a gradient overflows; that step is left out. Without, `master_params` are the model's own.
    """

    def __init__(self, *, model, use_fp16=False, fp16_scale_growth=1e-3, initial_lg_loss_scale=20.0):
        self.model, self.use_fp16, self.fp16_scale_growth = model, use_fp16, fp16_scale_growth
        self.lg_loss_scale = initial_lg_loss_scale
        self.model_params = self.master_params = list(model.parameters())
        if use_fp16:
            self.master_params = [torch.nn.Parameter(p.detach().float().clone()) for p in self.model_params]
            model.convert_to_fp16()

    def zero_grad(self):
        """Forget the gradients of the last step."""
        for p in [*self.model_params, *self.master_params]:
            p.grad = None

    def backward(self, loss):
        """Add the gradients of a loss."""
        (loss * 2**self.lg_loss_scale if self.use_fp16 else loss).backward()

    def optimize(self, opt):
        """Take a step of the optimizer, which has `master_params`; False where it was left out."""
        if not self.use_fp16:
            opt.step()
            return True
        for own, halved in zip(self.master_params, self.model_params, strict=True):
            own.grad = None if halved.grad is None else halved.grad.float() / 2**self.lg_loss_scale
        if not all(p.grad.isfinite().all() for p in self.master_params if p.grad is not None):
            self.lg_loss_scale -= 1
            return False
        opt.step()
        self._copy_to_model()
        self.lg_loss_scale += self.fp16_scale_growth
        return True

    def master_params_to_state_dict(self, master_params):
        """The model's state dict with these in the place of its parameters."""
        state = self.model.state_dict()
        names = [name for name, _ in self.model.named_parameters()]
        return {**state, **{name: p.detach() for name, p in zip(names, master_params, strict=True)}}

    def state_dict_to_master_params(self, state_dict):
        """The parameters in a state dict, in the model's order."""
        return [state_dict[name] for name, _ in self.model.named_parameters()]

    @torch.no_grad()
    def _copy_to_model(self):
        for own, halved in zip(self.master_params, self.model_params, strict=True):
            halved.copy_(own)
