"""The paper's search: the hypernetwork learns masks and routes, a step an iteration, beside the weights."""

from itertools import compress
from typing import Any

import numpy as np
import torch
from accelerate.utils import broadcast
from torch import Tensor

from ...backbones.draws import generator
from ...backbones.gates import SoftRows
from ...common.device import to_device
from ...common.process import on_main_process
from ...evaluation.report.records import SENSITIVITY, write_sensitivity
from ...experts.artefact import TemporalExperts
from ...method import losses
from ...method.hypernetwork import Logits
from ...method.sensitivity import start_near
from ..batch import Batch
from ..measure import measure_sensitivity
from ..update import Update, make_update


class HypernetworkSearch:
    """The hypernetwork update of Algorithm 1, and the masks that follow from it.

    Args:
        trainer: a `Trainer`, whose parts hold a hypernetwork.
    """

    less = "the sites allow nothing nearer"

    def __init__(self, trainer: Any) -> None:
        self.trainer, self.parts, self.config = trainer, trainer.parts, trainer.config
        self.hypernetwork = self.parts.hypernetwork
        train, accelerator = self.config.train, trainer.accelerator
        self.hyper_update = make_update(self.config, list(self.hypernetwork.parameters()),
                                        self.config.optim.hypernetwork_lr, train.t_end, accelerator.device)
        self._share()

    def begin(self) -> None:
        """Choose where a new search starts, unless it is the dense model by measuring (minutes)."""
        experts = self.config.experts
        if experts.start != "dense":
            apart = experts.start == "measured"
            table = measure_sensitivity(self.config, self.parts, max(10, 2 * experts.count) if apart else 10,
                                        shared=True)
            on_main_process(lambda: write_sensitivity(table, self.trainer.run_dir / SENSITIVITY))
            start_near(table, self.parts.budget, self.hypernetwork, apart)
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

    def tensors(self) -> dict[str, Tensor]:
        """Its state, for a checkpoint."""
        return self.hypernetwork.state_dict()

    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Go on from `tensors`."""
        self.hypernetwork.load_state_dict(tensors)

    def update(self, batches: list[Batch]) -> dict[str, float]:
        """One step of Φ on L_H, with θ as it is and a draw of masks and routes for each sample, or one for all; metrics
        to log."""
        trainer, parts, loss, update = self.trainer, self.parts, self.config.loss, self.hyper_update
        logits = self.hypernetwork()
        roots, gradients, totals = self.gradients(logits, batches)
        expected, target = parts.budget.expected(logits), self.target()
        ratio = losses.log_ratio(expected, target)
        balance = losses.load_balance(logits.router_TE, trainer.balance_T)
        weight = 0.0 if self.config.experts.router == "ordered" else loss.balance  # cut points need no balance
        outputs = [*roots, update.scaler.scale(loss.ratio * ratio + weight * balance)]
        torch.autograd.backward(outputs, [*gradients, None])
        trainer.readout.note("search", trainer.step, update, totals, ratio=ratio, balance=balance,
                             expected_keep_ratio=expected, gradient_norm=update.clip())
        update.step()
        return {"search/target": target}

    def gradients(self, logits: Logits, batches: list[Batch]) -> tuple[list[Tensor], list[Tensor], list[dict]]:
        """The scaled gradients of L_perf over all processes.

        Micro-batches send them to leaves, so that Φ itself is differentiated once, and processes exchange nothing
        larger than masks and routes. Weights of the backbone get no gradient here.

        Returns: what was drawn for all samples, or the logits, from which each sample's were; its gradients, without
            what is not learned; and the losses of every micro-batch.
        """
        each = self.config.search.draws == "sample"
        step, scaler = self.trainer.step, self.hyper_update.scaler
        roots = logits if each else self.hypernetwork.sample(logits, generator(self.config.seed, step, 1))
        leaves = Logits(*(root.detach().requires_grad_() for root in roots))
        totals, gradients = [], [torch.zeros_like(leaf) for leaf in leaves]
        for batch in batches:
            rows = to_device(batch.rows, leaves.mask_EL.device)
            mask_BL = self._sample_each(leaves, rows, batch, 0) if each else leaves.router_TE[rows] @ leaves.mask_EL
            terms = self.trainer.terms(self.trainer.backbone, batch, SoftRows(mask_BL))
            perf = losses.weighted_sum(terms, self.config.loss.weights)
            for total, gradient in zip(gradients, torch.autograd.grad(scaler.scale(perf), leaves), strict=True):
                total += gradient / len(batches)
            totals.append({name: value.detach() for name, value in {**terms, "perf": perf}.items()})
        gradients = [self.trainer.accelerator.reduce(gradient, "mean") for gradient in gradients]
        learned = [root.requires_grad for root in roots]
        return list(compress(roots, learned)), list(compress(gradients, learned)), totals

    def _sample_each(self, logits: Logits, rows: Tensor, batch: Batch, use: int) -> Tensor:
        """Masks of a micro-batch's samples, float [B, L]; `use` separates those for Φ from those for θ."""
        experts, sites = logits.mask_EL.shape
        return self.hypernetwork.sample_each(logits, rows, batch.drawn.uniform((experts, sites + 1), stream=1, use=use))

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
        logits, budget, read = self.hypernetwork(), self.parts.budget, self.trainer.readout.read
        if not self.config.search.supernet:
            return budget.masks(logits, read=read)
        known = torch.from_numpy(read(torch.cat([values.flatten().double() for values in logits])))
        split = known.split([values.numel() for values in logits])
        self._host_logits = Logits(*(values.view(like.shape) for values, like in zip(split, logits, strict=True)))
        return budget.masks(self._host_logits)

    @torch.no_grad()
    def drawn(self, batches: list[Batch]) -> list[Tensor] | None:
        """With `search.supernet`, after `masks`: a draw for each sample of the micro-batches, bool [B, L]."""
        if not self.config.search.supernet:
            return None
        return [self._sample_each(self._host_logits, batch.rows, batch, 1).bool() for batch in batches]

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
