"""The paper's search: the hypernetwork learns masks and routes, a step an iteration, beside the weights."""

from typing import Any

import numpy as np
import torch
from accelerate.utils import broadcast

from ...backbones.gates import SoftRows
from ...common.device import to_device
from ...evaluation.report.records import SENSITIVITY, write_sensitivity
from ...experts.artefact import TemporalExperts
from ...method import losses
from ...method.diffusion import generator
from ...method.sensitivity import start_near
from ..batch import Batch
from ..measure import measure_sensitivity
from ..update import Update, make_update


class HypernetworkSearch:
    """The hypernetwork update of Algorithm 1, and the masks that follow from it.

    Args:
        trainer: a `Trainer`, whose parts hold a hypernetwork.
    """

    def __init__(self, trainer: Any) -> None:
        self.trainer, self.parts, self.config = trainer, trainer.parts, trainer.config
        self.hypernetwork = self.parts.hypernetwork
        train, accelerator = self.config.train, trainer.accelerator
        self.hyper_update = make_update(self.config, list(self.hypernetwork.parameters()),
                                        self.config.optim.hypernetwork_lr, train.t_end, accelerator.device)
        self._share()

    def begin(self) -> None:
        """Choose where a new search starts; with `experts.start=greedy` by measuring (minutes)."""
        if self.config.experts.start == "greedy" and self.trainer.accelerator.is_main_process:
            table = measure_sensitivity(self.config, self.parts)
            write_sensitivity(table, self.trainer.run_dir / SENSITIVITY)
            start_near(table, self.parts.budget, self.hypernetwork)
            self.trainer.backbone.train()
        self._share()

    def _share(self) -> None:
        """Give all processes the hypernetwork of the first."""
        if self.trainer.accelerator.num_processes > 1:
            for value in self.hypernetwork.state_dict().values():
                value.copy_(broadcast(value))

    @property
    def updates(self) -> dict[str, tuple[Update, float]]:
        """Its optimizers with their learning rates, by the names under which checkpoints hold them."""
        return {"hyper_update": (self.hyper_update, self.config.optim.hypernetwork_lr)}

    def tensors(self) -> dict[str, torch.Tensor]:
        """Its state, for a checkpoint."""
        return self.hypernetwork.state_dict()

    def load_tensors(self, tensors: dict[str, torch.Tensor]) -> None:
        """Go on from `tensors`."""
        self.hypernetwork.load_state_dict(tensors)

    def update(self, batches: list[Batch]) -> dict[str, float]:
        """One step of Φ on L_H, with θ as it is and one draw of the masks' noise; metrics to log."""
        trainer, parts, loss, update = self.trainer, self.parts, self.config.loss, self.hyper_update
        logits = self.hypernetwork()
        mask_EL, router_TE = self.hypernetwork.sample(logits, generator(self.config.seed, trainer.step, 1))
        # Micro-batches send their gradients to these leaves, so that Φ itself is differentiated once, and
        # processes exchange nothing larger than the masks. Weights of the backbone get no gradient here.
        leaves = [mask_EL.detach().requires_grad_(), router_TE.detach().requires_grad_()]
        totals, gradients = [], [torch.zeros_like(leaf) for leaf in leaves]
        for batch in batches:
            mask_BL = leaves[1][to_device(batch.rows, mask_EL.device)] @ leaves[0]
            terms = trainer.terms(trainer.backbone, batch, SoftRows(mask_BL))
            perf = losses.weighted_sum(terms, loss.weights)
            for total, gradient in zip(gradients, torch.autograd.grad(update.scaler.scale(perf), leaves), strict=True):
                total += gradient / len(batches)
            totals.append({name: value.detach() for name, value in {**terms, "perf": perf}.items()})
        gradients = [trainer.accelerator.reduce(gradient, "mean") for gradient in gradients]

        expected, target = parts.budget.expected(logits), self.target()
        ratio = losses.log_ratio(expected, target)
        balance = losses.load_balance(logits.router_TE, trainer.balance_T)
        sampled = [(out, grad) for out, grad in zip((mask_EL, router_TE), gradients, strict=True)
                   if out.requires_grad]
        outputs = [out for out, _ in sampled] + [update.scaler.scale(loss.ratio * ratio + loss.balance * balance)]
        torch.autograd.backward(outputs, [grad for _, grad in sampled] + [None])
        trainer.readout.note("search", trainer.step, update, totals, ratio=ratio, balance=balance,
                             expected_keep_ratio=expected, gradient_norm=update.clip())
        update.step()
        return {"search/target": target}

    def target(self) -> float:
        """What L_ratio drives the expected keep ratio to, at this step of the search."""
        budget, step = self.config.budget, self.trainer.step
        last = budget.descent * self.config.train.t_end
        left = 1 - step / last if step < last else 0.0
        return budget.range[0] + left * (1 - budget.range[0])

    @torch.no_grad()
    def masks(self) -> tuple[np.ndarray, np.ndarray]:
        """Masks bool [M, L] for the next update of the weights, and which of them each timestep has, int64 [T]: those
        of Φ now, at its expected keep ratio. Costs a host read."""
        return self.parts.budget.masks(self.hypernetwork(), read=self.trainer.readout.read)

    def finish(self) -> TemporalExperts:
        """T_end: the most probable masks at the target itself. Costs a host read."""
        return self.present(self.tried())

    def tried(self) -> tuple[np.ndarray, np.ndarray]:
        """Masks as `finish` would find them now, to try how much memory tuning takes."""
        with torch.no_grad():
            return self.parts.budget.masks(self.hypernetwork(), self.config.budget.range[0], self.trainer.readout.read)

    def present(self, masks: tuple[np.ndarray, np.ndarray]) -> TemporalExperts:
        """Experts to show, from what `masks` gave."""
        parts, budget = self.parts, self.parts.budget
        return TemporalExperts.build(*masks, parts.cost, budget.keep_ratio, budget.over, budget.timesteps,
                                     parts.latency, parts.told_component)
