"""What the host reads of an update, in one read: its losses, and whether the run has to stop."""

import math
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor

from ..common.config import Config
from ..common.errors import InputError
from ..common.process import Interruption, agreed_signal
from .update import Update

_COUNTED = ("skipped_samples", "truncated_prompts")  # in each process
_MOST_SKIPPED_UPDATES = 50  # in a row, by the loss scaler


class NonFiniteLoss(RuntimeError):
    """A loss was NaN or infinite; no optimizer step was taken with it."""


class Readout:
    """Losses and counts of all processes, and the signals that any of them received.

    Attributes:
        counts: unusable samples, cut prompts and skipped updates of all processes, since the run began.
        own: samples and prompts of this process alone, since it began.
        stop: the signal that all processes have agreed to stop for; 0: none.
    """

    def __init__(self, config: Config, accelerator: Accelerator, run_dir: Path, samples: int) -> None:
        self.config, self.accelerator, self.run_dir, self.samples = config, accelerator, run_dir, samples
        self.counts = dict.fromkeys((*_COUNTED, "skipped_updates"), 0)
        self.own = dict.fromkeys(_COUNTED, 0)
        self.interruption = Interruption()
        self.stop = 0
        self._before = dict(self.counts)  # when this process began

    def restore(self, counts: dict[str, int]) -> None:
        """Go on counting from there, in a process that has counted nothing yet."""
        self.counts |= counts
        self._before = dict(self.counts)
        self.own = dict.fromkeys(_COUNTED, 0)

    def __call__(self, phase: str, step: int, update: Update, totals: list[dict[str, Tensor]],
                 **extra: Tensor) -> dict[str, float]:
        """Means of `totals` over micro-batches and processes, and `extra`, under names that begin with `phase`.

        Raises:
            NonFiniteLoss: where one is not finite, or for the loss scaler too often in a row.
            InputError: for too many unusable samples.
        """
        names = [*totals[0], *extra]
        means = [torch.stack([t[name].detach().float() for t in totals]).mean() for name in totals[0]]
        received = self.interruption.received
        own = [received > 0, received, *self.own.values()]
        values = torch.stack([*means, *(value.detach().float().to(means[0].device) for value in extra.values()),
                              *torch.tensor(own, dtype=torch.float, device=means[0].device)])
        *numbers, stopping, signum, skipped, truncated = self.accelerator.reduce(values, "mean").tolist()
        self.stop = self.stop or agreed_signal(stopping, signum)
        processes = self.accelerator.num_processes
        self.counts |= {name: self._before[name] + round(mean * processes) for name, mean in
                        zip(_COUNTED, (skipped, truncated), strict=True)}
        self._refuse_unreadable(step)
        metrics = {f"{phase}/{name}": number for name, number in zip(names, numbers, strict=True)}
        finite = {name: number for name, number in metrics.items() if math.isfinite(number)}
        if update.scaler.is_enabled():  # which skips an update of non-finite gradients, and lowers its scale
            skips = len(finite) < len(metrics)
            self.counts["skipped_updates"] += skips
            update.skipped = update.skipped + 1 if skips else 0
            if update.skipped > _MOST_SKIPPED_UPDATES:
                raise NonFiniteLoss(f"{phase}: loss or gradient was not finite in {update.skipped} updates in a row up "
                                    f"to step {step + 1}: use train.mixed_precision=bf16, and resume")
            return finite
        for name, number in metrics.items():
            if name not in finite:
                remedy = "lower optim.backbone_lr" if phase == "train" else "lower optim.hypernetwork_lr"
                if self.config.train.mixed_precision != "no":
                    remedy += " or use train.mixed_precision=no"
                raise NonFiniteLoss(f"{name} is {number} at step {step + 1}: stopped before the optimizer step; "
                                    f"{remedy}, and resume")
        return metrics

    def _refuse_unreadable(self, step: int) -> None:
        """Stop once more than the allowed share of samples was unreadable: of an epoch, or of all drawn since."""
        data, skipped = self.config.data, self.counts["skipped_samples"]
        drawn = (step + 1) * self.config.train.batch_size
        if skipped > data.max_unreadable * max(drawn, self.samples):
            raise InputError(f"data.max_unreadable={data.max_unreadable}: {skipped} samples of data.path={data.path!r} "
                             f"could not be read (named in {self.run_dir / 'unreadable.jsonl'}): mend the data, or "
                             "allow more")
