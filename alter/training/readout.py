"""What the host reads of the updates, in one read per iteration: losses, masks, and whether the run has to stop."""

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast
from torch import Tensor

from ..common.config import Config
from ..common.device import to_device
from ..common.errors import InputError
from ..common.process import Interruption, agreed_signal
from .update import Update

_COUNTED = ("skipped_samples", "truncated_prompts")  # in each process
_MOST_SKIPPED_UPDATES = 50  # in a row, by the loss scaler


class NonFiniteLoss(RuntimeError):
    """A loss or gradient was NaN or infinite; no checkpoint holds what came of it."""


@dataclass
class _Noted:
    phase: str
    step: int
    update: Update
    names: list[str]
    values: Tensor  # of all processes, on the device: one for each name, then the signal and this process's counts


class Readout:
    """Losses and counts of all processes, and the signals that any of them received.

    `note` leaves an update's numbers on the device; the next `read` brings all of them to the host. A GPU that has been
    given its next work in between does not stand still meanwhile.

    Attributes:
        metrics: what was read of the newest step.
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
        self.metrics: dict[str, float] = {}
        self._step = 0  # of the metrics
        self._noted: list[_Noted] = []
        self._before = dict(self.counts)  # when this process began

    def restore(self, counts: dict[str, int]) -> None:
        """Go on counting from there, in a process that has counted nothing yet."""
        self.counts |= counts
        self._before = dict(self.counts)
        self.own = dict.fromkeys(_COUNTED, 0)

    def note(self, phase: str, step: int, update: Update, totals: list[dict[str, Tensor]], **extra: Tensor) -> None:
        """Means of `totals` over micro-batches and processes, and `extra`: metrics under names that begin with `phase`.
        """
        means = [torch.stack([t[name].detach().float() for t in totals]).mean() for name in totals[0]]
        device, received = means[0].device, self.interruption.received
        own = to_device(torch.tensor([received > 0, received, *self.own.values()], dtype=torch.float), device)
        means += [value.detach().float().to(device) for value in extra.values()]
        values = torch.cat([torch.stack(means), own])
        self._noted.append(_Noted(phase, step, update, [*totals[0], *extra], self.accelerator.reduce(values, "mean")))

    def read(self, known: Tensor | None = None) -> np.ndarray:
        """Bring to the host, in one copy, all that was noted and `known`, a float64 vector, as process 0 has it.

        Returns: the values of `known`.

        Raises:
            NonFiniteLoss: where a noted value is not finite, or for the loss scaler too often in a row.
            InputError: for too many unusable samples.
        """
        noted, self._noted = self._noted, []
        vectors = [item.values.double() for item in noted] + ([] if known is None else [broadcast(known)])
        if not vectors:
            return np.empty(0)
        *values, rest = np.split(torch.cat(vectors).cpu().numpy(), np.cumsum([len(item.values) for item in noted]))
        for item, numbers in zip(noted, values, strict=True):
            self._take(item, numbers.tolist())
        return rest

    def _take(self, noted: _Noted, values: list[float]) -> None:
        phase, step, update = noted.phase, noted.step, noted.update
        *numbers, stopping, signum, skipped, truncated = values
        self.stop = self.stop or agreed_signal(stopping, signum)
        processes = self.accelerator.num_processes
        self.counts |= {name: self._before[name] + round(mean * processes) for name, mean in
                        zip(_COUNTED, (skipped, truncated), strict=True)}
        self._refuse_unreadable(step)
        metrics = {f"{phase}/{name}": number for name, number in zip(noted.names, numbers, strict=True)}
        finite = {name: number for name, number in metrics.items() if math.isfinite(number)}
        if step != self._step:
            self.metrics, self._step = {}, step
        self.metrics |= finite
        if update.scaler.is_enabled():  # which skips an update of non-finite gradients, and lowers its scale
            skips = len(finite) < len(metrics)
            self.counts["skipped_updates"] += skips
            update.skipped = update.skipped + 1 if skips else 0
            if update.skipped > _MOST_SKIPPED_UPDATES:
                raise NonFiniteLoss(f"{phase}: loss or gradient was not finite in {update.skipped} updates in a row up "
                                    f"to step {step + 1}: use train.mixed_precision=bf16, and resume")
            return
        for name, number in metrics.items():
            if name not in finite:
                remedy = "lower optim.backbone_lr" if phase == "train" else "lower optim.hypernetwork_lr"
                if self.config.train.mixed_precision != "no":
                    remedy += " or use train.mixed_precision=no"
                raise NonFiniteLoss(f"{name} is {number} at step {step + 1}: stopped; {remedy}, and resume from the "
                                    "last checkpoint")

    def _refuse_unreadable(self, step: int) -> None:
        """Stop once more than the allowed share of samples was unreadable: of an epoch, or of all drawn since."""
        data, skipped = self.config.data, self.counts["skipped_samples"]
        drawn = (step + 1) * self.config.train.batch_size
        if skipped > data.max_unreadable * max(drawn, self.samples):
            raise InputError(f"data.max_unreadable={data.max_unreadable}: {skipped} samples of data.path={data.path!r} "
                             f"could not be read (named in {self.run_dir / 'unreadable.jsonl'}): mend the data, or "
                             "allow more")
