"""Algorithm 1: search and backbone are updated in turn on the same mini-batch, until T_end; then the masks are frozen
and the backbone alone is tuned. One trainer for every backbone and every method of search (search/)."""

import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel
from torch import Tensor
from tqdm import tqdm

from ..backbones.draws import Draw, draw, generator
from ..backbones.family import predict
from ..backbones.gates import HardRows, Rows
from ..backbones.noising import Flow
from ..backbones.pretrained import trained_parameters
from ..common.config import Config
from ..common.device import reads_pinned, to_device
from ..common.process import Interrupted
from ..data.batches import GlobalBatches, Order, WithSubstitutes, make_loader, split, warn_while_waiting
from ..experts.artefact import TemporalExperts
from ..method import losses
from .batch import Batch
from .journal import Journal
from .readout import Readout
from .resume import link_latest
from .search.make import Search, make_search
from .setup.parts import Parts
from .state import fingerprint, save_state
from .update import Update, keep_gradient, make_update
from .validation import Validator


class Trainer:
    """Trains `parts` in `run_dir`; `run()` returns the finished experts.

    Args:
        config: the run's configuration.
        parts: from `build`, on the accelerator's device.
        accelerator: one of any number of processes.
        run_dir: exists; the same on all processes.
    """

    def __init__(self, config: Config, parts: Parts, accelerator: Accelerator, run_dir: Path) -> None:
        self.config, self.parts, self.accelerator, self.run_dir = config, parts, accelerator, run_dir
        optim, train, self.backbone = config.optim, config.train, parts.backbone.train()
        if config.backbone.gradient_checkpointing:
            parts.simulator.enable_gradient_checkpointing()
        if config.backbone.compile:
            parts.simulator.compile(dynamic=True)  # any number of a batch's samples may keep a layer
        self.parameters = list(trained_parameters(self.backbone).values())
        self.dtype = self.parameters[0].dtype
        self._anchor = keep_gradient(self.backbone, self.parameters[0])
        self.ema = EMAModel(self.parameters, decay=train.ema_decay, foreach=True) if train.ema_decay else None
        self.train_indices, _ = split(parts.source, config.data.holdout, config.seed)

        searched = 0 if parts.experts else train.t_end
        self.backbone_update = make_update(
            config, self.parameters, optim.backbone_lr,
            train.steps - (searched if train.schedule == "two_stage" else 0), accelerator.device,
            eight_bit=optim.optimizer == "adamw_8bit")
        self.wrapped = accelerator.prepare_model(self.backbone)
        # Of each timestep, of mean 1; None: all weigh the same.
        noising = parts.noising
        weight_T = parts.budget.weight_T(noising.num_timesteps)
        self.balance_T = None if weight_T is None else torch.tensor(
            weight_T * len(weight_T), dtype=torch.float32, device=accelerator.device)
        often = isinstance(noising, Flow) or len(noising.trained) < noising.num_timesteps
        self.weight_T = None if often else self.balance_T  # of losses, unless those that count are drawn more often
        self.inputs = fingerprint(parts)
        self.step = 0
        self.experts: TemporalExperts | None = parts.experts
        self.search = None if parts.experts else make_search(self)
        self._masks: tuple[np.ndarray, np.ndarray] | None = None  # of the last iteration
        self._linked = False  # by outputs/<name>/latest
        self.validator: Validator | None = None
        if config.validate.every and accelerator.is_main_process:
            self.validator = Validator(config, parts, accelerator, run_dir)
        self.journal = Journal(run_dir, accelerator)
        self.readout = Readout(config, accelerator, run_dir, len(self.train_indices))

    def run(self) -> TemporalExperts:
        """Train to the end.

        Raises:
            NonFiniteLoss: naming the step; the last checkpoint stays.
            Interrupted: after SIGINT, SIGTERM or SIGUSR1, with a checkpoint written.
            InputError: if the last checkpoint, or that for a signal, could not be written.
        """
        config, train = self.config, self.config.train
        micro_batches = self.micro_batches()
        bar = tqdm(total=train.steps, initial=self.step, desc=config.name, unit="step", dynamic_ncols=True,
                   disable=not self.accelerator.is_main_process)
        with self.readout.interruption, bar:
            if self.validator and self.step == 0:
                self._validate_start(self.validator)
            while self.step < train.steps:
                started, search = time.perf_counter(), self.experts is None
                metrics = self.iteration(micro_batches)
                self.step += 1
                bar.update()
                seconds, last = time.perf_counter() - started, self.step == train.steps
                if self.step % config.log.every == 0 or last:
                    self.readout.read()
                    self._log(metrics, seconds, bar)
                if search and (self.step % config.log.masks_every == 0 or self.step == train.t_end):
                    self.journal.masks(self.step, metrics["keep_ratio"], self._present_experts())
                if self.validator and self.step % self.validator.every == 0:
                    self._validate(self.validator)
                stop = self.readout.stop
                if self.step % config.checkpoint.every == 0 or last or stop:
                    self.readout.read()  # so that no checkpoint holds weights that are not finite
                    saved = save_state(self, needed=last or stop > 0)
                    if self.accelerator.is_main_process and saved.is_dir() and (last or not self._linked):
                        self._linked = True
                        with self.journal.dispensable("the link latest"):
                            link_latest(config, self.run_dir)
                    if stop and not last:
                        raise Interrupted(stop, saved)
        assert self.experts is not None
        return self.experts

    def micro_batches(self, steps: int | None = None) -> Iterator[dict[str, Any]]:
        """This process's raw micro-batches from the present step on: of `steps` steps, or of all that are left."""
        config, train = self.config, self.config.train
        last = train.steps if steps is None else self.step + steps
        order = Order(self.train_indices, config.seed, self.parts.source.shards, config.data.shuffle_shards)
        batches = GlobalBatches(order, train.batch_size, train.gradient_accumulation, self.accelerator.process_index,
                                self.accelerator.num_processes, self.step, last, self.parts.source.buckets)
        source = WithSubstitutes(self.parts.source, self.train_indices, config.seed, self.parts.fit)
        loader = make_loader(source, batches, config.data.workers, reads_pinned(self.accelerator.device))
        return warn_while_waiting(iter(loader), f"a batch of data.path={config.data.path!r}")

    def close(self) -> None:
        """Leave the weights to be exported in the backbone, and free all that training alone needed."""
        self.accelerator.unwrap_model(self.wrapped, keep_fp32_wrapper=False)  # without autocast from here on
        if self.ema:
            self.ema.copy_to(self.parameters)
        for parameter in self.parameters:
            parameter.grad = None
        self._anchor.remove()
        del self.wrapped, self.ema, self.backbone_update, self.search
        self.accelerator.free_memory()

    def iteration(self, micro_batches: Any) -> dict[str, float]:
        """One iteration of Algorithm 1, on one global batch, with one host read: it brings the search's masks and what
        `readout` has noted, θ's losses of the former iteration included. (A loss scaler reads once more an update.)"""
        torch.manual_seed(int(torch.randint(2**62, (), generator=generator(self.config.seed, self.step, 2))))
        search, metrics = self.experts is None, {}
        batches = self._prepare(micro_batches)
        if search:
            metrics = searching(self).update(batches)
            if self.step + 1 == self.config.train.t_end:
                self.freeze()
        else:
            self.readout.read()
        masks = self.masks()
        each = searching(self).drawn(batches) if self.experts is None else self._rungs(batches)
        if not search or self.config.train.schedule == "joint":
            self.update_backbone(batches, *masks, each)
        self._masks = masks
        metrics["keep_ratio"] = self.parts.budget.measured(*masks)
        metrics["experts_used"] = len(np.unique(masks[1]))
        return metrics

    def _prepare(self, micro_batches: Any) -> list[Batch]:
        """Noise the iteration's micro-batches and ask the teacher, once for both updates."""
        config, parts = self.config, self.parts
        count, size = config.train.gradient_accumulation, config.train.micro_batch(self.accelerator.num_processes)
        whole = draw(parts.noising, config.train.batch_size, config.data.label_dropout, config.seed, self.step)
        first = self.accelerator.process_index * count * size
        return [self.prepare_batch(next(micro_batches), whole[slice(first + k * size, first + (k + 1) * size)])
                for k in range(count)]

    def prepare_batch(self, raw: dict[str, Any], drawn: Draw) -> Batch:
        """One micro-batch from raw samples, as `data.collate` joins them, and what is random about them."""
        parts, device = self.parts, self.accelerator.device
        if skipped := raw.pop("skipped"):
            self.readout.own["skipped_samples"] += len(skipped)
            self.journal.unreadable(self.step + 1, skipped)
        if parts.conditioner is not None and "captions" in raw:
            self.readout.own["truncated_prompts"] += parts.conditioner.too_long(raw["captions"])
        raw = {name: value.to(device, non_blocking=True) if isinstance(value, Tensor) else value
               for name, value in raw.items()}
        latents = parts.latents(raw, drawn.posterior).to(self.dtype)
        timesteps = to_device(drawn.timesteps, device)
        noise = drawn.noise(tuple(latents.shape[1:]), self.config.train.noise_offset)
        noise = to_device(noise, device).to(self.dtype)
        noisy = parts.noising.noised(latents, noise, timesteps)
        conditioning = parts.conditioning(raw, drawn.dropped)
        if self.config.backbone.channels_last:
            noisy = noisy.contiguous(memory_format=torch.channels_last)
        target = parts.noising.target(latents, noise, timesteps)
        taught: Any = None, []
        if self.config.loss.distils:
            with self.accelerator.autocast():
                taught = parts.teach(noisy, timesteps, conditioning)
        return Batch(noisy, drawn, conditioning, target, *taught)

    def update_backbone(self, batches: list[Batch], mask_EL: np.ndarray, expert_T: np.ndarray,
                        each: list[Tensor] | None = None) -> None:
        """One step of θ on L_perf under the masks of the samples' timesteps, or `each` sample's own of every
        micro-batch, bool [B, L], paying only for the layers that they keep."""
        mask_TL, update = torch.from_numpy(mask_EL[expert_T]), self.backbone_update
        totals = []
        for k, batch in enumerate(batches):
            rows = HardRows(mask_TL[batch.rows] if each is None else each[k], self.accelerator.device)
            last = k + 1 == len(batches)
            with contextlib.nullcontext() if last else self.accelerator.no_sync(self.wrapped):
                terms = self.terms(self.wrapped, batch, rows)
                perf = losses.weighted_sum(terms, self.config.loss.weights)
                update.scaler.scale(perf / len(batches)).backward()
            totals.append({name: value.detach() for name, value in {**terms, "perf": perf}.items()})
        for parameter in self.parameters:
            if parameter.grad is None:  # a layer that no sample used: as in the dense simulation
                parameter.grad = torch.zeros_like(parameter)
        self.readout.note("train", self.step, update, totals, gradient_norm=update.clip())
        update.step()
        if self.ema:
            self.ema.step(self.parameters)

    @property
    def updates(self) -> dict[str, tuple[Update, float]]:
        """All optimizers with their learning rates, by the names under which checkpoints hold them."""
        return {"backbone_update": (self.backbone_update, self.config.optim.backbone_lr),
                **(self.search.updates if self.search else {})}

    def masks(self) -> tuple[np.ndarray, np.ndarray]:
        """Masks bool [M, L] for the next update of the weights, and which of them each timestep has, int64 [T]: the
        frozen ones, or those of the search."""
        if self.experts is not None:
            return self.experts.mask_EL, self.experts.expert_T
        return searching(self).masks()

    def _rungs(self, batches: list[Batch]) -> list[Tensor] | None:
        """Where several rungs are tuned: for each sample of the micro-batches the masks of one, bool [B, L]."""
        assert self.experts is not None
        routes_RT = torch.from_numpy(np.stack([rung.expert_T for rung in self.experts.ladder if rung.tuned]))
        if len(routes_RT) == 1:
            return None
        masks_EL = torch.from_numpy(self.experts.mask_EL)
        drawn = [(len(routes_RT) * batch.drawn.uniform((), stream=1)).long() for batch in batches]
        return [masks_EL[routes_RT[rung_B, batch.rows]] for rung_B, batch in zip(drawn, batches, strict=True)]

    def freeze(self) -> None:
        """T_end: take the experts that the search has found."""
        self.experts = searching(self).finish()
        if self.accelerator.is_main_process:
            missed = self.parts.budget.measured(self.experts.mask_EL, self.experts.expert_T) - \
                self.experts.keep_ratio_target
            if abs(missed) > 0.005:
                why = searching(self).less if missed < 0 else "the sites allow nothing nearer"
                tqdm.write(f"keep ratio misses its target by {missed:+.4f}: {why}")
            tqdm.write(self.experts.summary())

    def _present_experts(self) -> TemporalExperts:
        """The frozen ones, or those of the last iteration."""
        if self.experts is not None:
            return self.experts
        assert self._masks is not None
        return searching(self).present(self._masks)

    def _validate_start(self, validator: Callable) -> None:
        """Images to compare with: of the dense model, or of the finished run that is tuned further."""
        if self.parts.teacher is not None:
            with self.parts.dense() as teacher, self.journal.dispensable("samples/"):
                validator(teacher, 0, "dense")
            self.parts.release_teacher()
        elif self.experts is not None:
            self._validate(validator)

    def _validate(self, validator: Callable) -> None:
        """Images from the weights to be exported, under the masks of the last iteration."""
        experts = self._present_experts()
        if self.ema:
            self.ema.store(self.parameters)
            self.ema.copy_to(self.parameters)
        self.backbone.eval()
        with experts.serving(self.parts.simulator), self.journal.dispensable("samples/"):
            validator(self.backbone, self.step, "experts")
        self.backbone.train()
        if self.ema:
            self.ema.restore(self.parameters)

    def terms(self, model: torch.nn.Module, batch: Batch, rows: Rows) -> dict[str, Tensor]:
        """The reconstruction losses of one forward, scalars."""
        timesteps = to_device(batch.timesteps, batch.noisy_latents.device)
        with self.parts.simulator.use(rows), self.accelerator.autocast(), \
                self.parts.student_tap.capture() as features:
            pred = predict(model, batch.noisy_latents, timesteps, batch.conditioning)
        loss = self.config.loss
        denoise = losses.mse_per_sample(pred[:, : batch.target.shape[1]], batch.target)
        weight = self.parts.noising.weight(timesteps)
        terms = {"denoise": denoise if weight is None else denoise * weight}
        if batch.teacher_pred is not None:
            terms["output_kd"] = losses.mse_per_sample(pred, batch.teacher_pred)
            terms["feature_kd"] = losses.feature_kd(features, batch.teacher_features, loss.feature_kd_outliers)
        weight_B = 1 if self.weight_T is None else self.weight_T[to_device(batch.rows, pred.device)]
        return {name: (term * weight_B).mean() for name, term in terms.items()}

    def _log(self, metrics: dict[str, float], seconds: float, bar: tqdm) -> None:
        if self.backbone_update.scaler.is_enabled():
            metrics["loss_scale"] = self.backbone_update.scaler.get_scale()
        rates = {name.replace("update", "lr"): update.lr for name, (update, _) in self.updates.items()}
        found = {**self.readout.metrics, **metrics, **self.readout.counts}
        self.journal.metrics(self.step, {**found, "seconds_per_step": seconds, **rates}, bar)


def searching(trainer: Trainer) -> Search:
    """The search of a trainer whose experts were not given."""
    assert trainer.search is not None
    return trainer.search
