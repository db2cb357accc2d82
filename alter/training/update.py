"""One optimizer with everything that belongs to its steps: schedule, gradient clipping, loss scaler."""

from typing import Any

import torch
from diffusers.optimization import get_scheduler
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from ..common.config import Config


class Update:
    """Steps of one optimizer on `parameters`.

    Its loss scaler is its own (and not accelerate's, which scales losses only in its `backward`), so that overflows of
    one of the two updates leave the other alone; disabled, it changes nothing.

    Attributes:
        skipped: steps in a row that the loss scaler left out.
    """

    def __init__(self, parameters: list[Any], optimizer: torch.optim.Optimizer, schedule: Any,
                 scaler: torch.amp.GradScaler, max_norm: float) -> None:
        self.parameters, self.optimizer, self.schedule = parameters, optimizer, schedule
        self.scaler, self.max_norm = scaler, max_norm
        self.skipped = 0

    @property
    def lr(self) -> float:
        """The learning rate now."""
        return self.schedule.get_last_lr()[0]

    def clip(self) -> Tensor:
        """Unscale and clip the gradient in place; its norm before, which is not finite if any entry is not."""
        self.scaler.unscale_(self.optimizer)
        return torch.nn.utils.clip_grad_norm_(self.parameters, self.max_norm)

    def step(self) -> None:
        """One step, or none where the scaler found a gradient that is not finite; then forget the gradient."""
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.schedule.step()
        self.optimizer.zero_grad(set_to_none=True)

    def state_dict(self) -> dict[str, Any]:
        return {"optimizer": self.optimizer.state_dict(), "schedule": self.schedule.state_dict(),
                "scaler": self.scaler.state_dict(), "skipped": self.skipped}

    def load_state_dict(self, state: dict[str, Any], lr: float, betas: tuple[float, float],
                        weight_decay: float) -> None:
        """Go on from `state`; a rate, decay or moment that was changed for the resumed run holds from here on."""
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        if state["scaler"]:  # a disabled one has no state
            self.scaler.load_state_dict(state["scaler"])
        self.skipped = state["skipped"]
        self.schedule.base_lrs = [lr]
        for group in self.optimizer.param_groups:
            group["lr"] *= lr / group["initial_lr"]
            group.update(initial_lr=lr, weight_decay=weight_decay, betas=betas)


def make_update(config: Config, parameters: list[Any], lr: float, steps: int, device: torch.device,
                eight_bit: bool = False) -> Update:
    """AdamW by the configuration's keys, with a schedule of `steps` steps."""
    optim = config.optim
    adamw: Any = torch.optim.AdamW
    extra: dict[str, Any] = {"fused": optim.fused or None}
    if eight_bit:
        import bitsandbytes

        adamw, extra = bitsandbytes.optim.AdamW8bit, {}
    optimizer = adamw(parameters, lr, betas=optim.betas, weight_decay=optim.weight_decay, **extra)
    name = "constant_with_warmup" if optim.lr_schedule == "constant" else optim.lr_schedule
    schedule = get_scheduler(name, optimizer, num_warmup_steps=optim.warmup_steps, num_training_steps=max(steps, 1))
    scaler = torch.amp.GradScaler(device.type, enabled=config.train.mixed_precision == "fp16")
    return Update(parameters, optimizer, schedule, scaler, config.train.max_grad_norm)


def keep_gradient(backbone: nn.Module, parameter: nn.Parameter) -> Any:
    """Let the output of `backbone` depend on a trained parameter, by zero, where no sample used any layer that has one;
    returns a handle that can `remove()` it.

    Without it such a batch, of adapters alone perhaps, could not be differentiated, and other processes would wait.
    """
    def depend(module: nn.Module, args: Any, output: Any) -> Any:
        def anchored(value: Tensor) -> Tensor:
            return value if value.requires_grad else value + 0 * parameter.sum().to(value.dtype)

        return tree_map_only(Tensor, anchored, output) if torch.is_grad_enabled() else output

    return backbone.register_forward_hook(depend)
