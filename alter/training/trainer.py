"""Algorithm 1: hypernetwork and backbone are updated in turn on the same mini-batch, until T_end; then the masks
are frozen and the backbone alone is tuned. One trainer for every backbone."""

import contextlib
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from torch import Tensor
from tqdm import tqdm

from ..backbones.gates import HardRows, Rows, SoftRows
from ..common.config import Config
from ..common.errors import InputError
from ..common.interruption import Interrupted, Interruption, agreed_signal
from ..data.batches import GlobalBatches, Order, Tolerant, make_loader, patiently, split
from ..experts.artefact import TemporalExperts
from ..method import losses
from ..method.diffusion import Draw, draw, generator, min_snr_weight, training_target
from ..method.hypernetwork import Logits
from . import checkpoint
from .journal import Journal
from .setup.parts import Parts
from .trainer_state import fingerprint, save_state
from .validation import Validator

_COUNTED = ("skipped_samples", "truncated_prompts")  # in each process
_MOST_SKIPPED_UPDATES = 50  # in a row, by the loss scaler


class NonFiniteLoss(RuntimeError):
    """A loss was NaN or infinite; no optimizer step was taken with it."""


@dataclass
class Batch:
    """One micro-batch, and the teacher's answer to it. `timesteps` stay on the CPU, where rows are chosen."""

    noisy_latents: Tensor
    timesteps: Tensor
    conditioning: dict[str, Tensor]
    target: Tensor
    teacher_pred: Tensor | None
    teacher_features: list[Tensor]


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
        optim, train = config.optim, config.train
        self.backbone = parts.backbone.train()
        if config.backbone.gradient_checkpointing:
            parts.simulator.enable_gradient_checkpointing()
        if config.backbone.compile:
            parts.simulator.compile(dynamic=True)  # any number of a batch's samples may keep a layer
        self.parameters = list(checkpoint.trained_parameters(self.backbone).values())
        self.dtype = self.parameters[0].dtype
        self.ema = EMAModel(self.parameters, decay=train.ema_decay, foreach=True) if train.ema_decay else None
        self.train_indices, _ = split(parts.source, config.data.holdout, config.seed)

        def schedule(optimizer: torch.optim.Optimizer, steps: int) -> Any:
            name = "constant_with_warmup" if optim.lr_schedule == "constant" else optim.lr_schedule
            return get_scheduler(
                name, optimizer, num_warmup_steps=optim.warmup_steps, num_training_steps=max(steps, 1)
            )

        adamw: Any = torch.optim.AdamW
        extra: dict[str, Any] = {"fused": optim.fused or None}
        shared: dict[str, Any] = {"betas": optim.betas, "weight_decay": optim.weight_decay}
        self.hyper_optim = adamw(parts.hypernetwork.parameters(), optim.hypernetwork_lr, **shared, **extra)
        if optim.optimizer == "adamw_8bit":
            import bitsandbytes

            adamw, extra = bitsandbytes.optim.AdamW8bit, {}
        self.backbone_optim = adamw(self.parameters, optim.backbone_lr, **shared, **extra)
        searched = 0 if parts.experts else train.t_end
        self.backbone_lr = schedule(
            self.backbone_optim, train.steps - (searched if train.schedule == "two_stage" else 0)
        )
        self.hyper_lr = schedule(self.hyper_optim, train.t_end)
        # Our own, not accelerate's, which scales losses only in its `backward`. Disabled, it changes nothing.
        self.scaler = torch.amp.GradScaler(accelerator.device.type, enabled=train.mixed_precision == "fp16")
        if accelerator.num_processes > 1:
            for value in parts.hypernetwork.state_dict().values():
                value.copy_(broadcast(value))
        self.wrapped = accelerator.prepare_model(self.backbone)
        self.inputs = fingerprint(parts)
        self.step = 0
        self.experts: TemporalExperts | None = parts.experts
        self.counts = dict.fromkeys((*_COUNTED, "skipped_updates"), 0)  # of all processes, since the run began
        self._counted = dict(self.counts)  # when this process began
        self._own = dict.fromkeys(_COUNTED, 0)  # of this process, since it began
        self._skipped_updates = 0  # in a row, by the loss scaler
        self._masks: tuple[np.ndarray, np.ndarray] | None = None  # of the last iteration
        self.validator: Validator | None = None
        if config.validate.every and accelerator.is_main_process:
            self.validator = Validator(config, parts, accelerator, run_dir)
        self.journal = Journal(run_dir, accelerator)
        self.interruption = Interruption()  # of this process alone
        self._stop = 0  # the signal that all processes have agreed to stop for

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
        with self.interruption, bar:
            if self.validator and self.step == 0:
                self._validate_start(self.validator)
            while self.step < train.steps:
                started, searching = time.perf_counter(), self.experts is None
                metrics = self.iteration(micro_batches)
                self.step += 1
                bar.update()
                if self.step % config.log.every == 0 or self.step == train.steps:
                    self._log(metrics, time.perf_counter() - started, bar)
                if searching and (self.step % config.log.masks_every == 0 or self.step == train.t_end):
                    self.journal.masks(self.step, metrics["keep_ratio"], self._present_experts())
                if self.validator and self.step % self.validator.every == 0:
                    self._validate(self.validator)
                if self.step % config.checkpoint.every == 0 or self.step == train.steps or self._stop:
                    saved = save_state(self, needed=self.step == train.steps or self._stop > 0)
                    if self._stop and self.step < train.steps:
                        raise Interrupted(self._stop, saved)
        assert self.experts is not None
        return self.experts

    def micro_batches(self, steps: int | None = None) -> Iterator[dict[str, Any]]:
        """This process's raw micro-batches from the present step on: of `steps` steps, or of all that are left."""
        config, train = self.config, self.config.train
        last = train.steps if steps is None else self.step + steps
        order = Order(self.train_indices, config.seed, self.parts.source.shards, config.data.shuffle_shards)
        batches = GlobalBatches(order, train.batch_size, train.gradient_accumulation, self.accelerator.process_index,
                                self.accelerator.num_processes, self.step, last)
        source = Tolerant(self.parts.source, self.train_indices, config.seed, self.parts.fit)
        loader = make_loader(source, batches, config.data.workers)
        return patiently(iter(loader), f"a batch of data.path={config.data.path!r}")

    def close(self) -> None:
        """Leave the weights to be exported in the backbone, and free all that training alone needed."""
        self.accelerator.unwrap_model(self.wrapped, keep_fp32_wrapper=False)  # without autocast from here on
        if self.ema:
            self.ema.copy_to(self.parameters)
        for parameter in self.parameters:
            parameter.grad = None
        del self.wrapped, self.ema, self.backbone_optim, self.hyper_optim, self.backbone_lr, self.hyper_lr
        self.accelerator.free_memory()

    def iteration(self, micro_batches: Any) -> dict[str, float]:
        """One iteration of Algorithm 1, on one global batch."""
        torch.manual_seed(int(torch.randint(2**62, (), generator=generator(self.config.seed, self.step, 2))))
        searching = self.experts is None
        batches = self._prepare(micro_batches)
        metrics: dict[str, float] = {}
        if searching:
            metrics |= self.update_hypernetwork(batches)
        masks = self.current_masks()
        if searching and self.step + 1 == self.config.train.t_end:
            masks = self.freeze()
        if not searching or self.config.train.schedule == "joint":
            metrics |= self.update_backbone(batches, *masks)
        self._masks = masks
        metrics["keep_ratio"] = self.parts.budget.measured(*masks)
        metrics["experts_used"] = len(np.unique(masks[1]))
        return metrics

    def _prepare(self, micro_batches: Any) -> list[Batch]:
        """Noise the iteration's micro-batches and ask the teacher, once for both updates."""
        config, parts = self.config, self.parts
        count, processes = config.train.gradient_accumulation, self.accelerator.num_processes
        size = config.train.batch_size // (count * processes)
        whole = draw(config.train.batch_size, parts.latent_shape, parts.scheduler.config.num_train_timesteps,
                     config.data.label_dropout, generator(config.seed, self.step), config.train.noise_offset)
        first = self.accelerator.process_index * count * size
        return [
            self.prepare_batch(next(micro_batches), whole[slice(first + k * size, first + (k + 1) * size)])
            for k in range(count)
        ]

    def prepare_batch(self, raw: dict[str, Any], noise: Draw) -> Batch:
        """One micro-batch from raw samples, as `data.collate` joins them, and their noise."""
        parts, device = self.parts, self.accelerator.device
        if skipped := raw.pop("skipped"):
            self._own["skipped_samples"] += len(skipped)
            self.journal.unreadable(self.step + 1, skipped)
        if parts.text is not None and "captions" in raw:
            self._own["truncated_prompts"] += parts.text.too_long(raw["captions"])
        raw = {name: value.to(device, non_blocking=True) if isinstance(value, Tensor) else value
               for name, value in raw.items()}
        latents = parts.latents(raw, noise.posterior).to(self.dtype)
        timesteps = noise.timesteps.to(device, non_blocking=True)
        added = noise.noise.to(device, self.dtype, non_blocking=True)
        noisy = parts.scheduler.add_noise(latents, added, timesteps)
        conditioning = {
            name: value.to(self.dtype) if value.is_floating_point() else value
            for name, value in parts.conditioning(raw, noise.dropped).items()
        }
        if self.config.backbone.channels_last:
            noisy = noisy.contiguous(memory_format=torch.channels_last)
        target = training_target(parts.scheduler, latents, added, timesteps)
        if not self.config.loss.distils:
            return Batch(noisy, noise.timesteps, conditioning, target, None, [])
        with self.accelerator.autocast():
            return Batch(noisy, noise.timesteps, conditioning, target, *parts.teach(noisy, timesteps, conditioning))

    def update_hypernetwork(self, batches: list[Batch]) -> dict[str, float]:
        """One step of Φ on L_H, with θ as it is and one draw of the masks' noise."""
        parts, loss = self.parts, self.config.loss
        logits = self.logits()
        mask_EL, router_TE = parts.hypernetwork.sample(logits, generator(self.config.seed, self.step, 1))
        # Micro-batches send their gradients to these leaves, so that Φ itself is differentiated once, and
        # processes exchange nothing larger than the masks. Weights of the backbone get no gradient here.
        leaves = [mask_EL.detach().requires_grad_(), router_TE.detach().requires_grad_()]
        totals, gradients = [], [torch.zeros_like(leaf) for leaf in leaves]
        for batch in batches:
            mask_BL = leaves[1][batch.timesteps.to(mask_EL.device)] @ leaves[0]
            terms = self._terms(self.backbone, batch, SoftRows(mask_BL))
            perf = self._perf(terms)
            for total, gradient in zip(gradients, torch.autograd.grad(self.scaler.scale(perf), leaves), strict=True):
                total += gradient / len(batches)
            totals.append({name: value.detach() for name, value in {**terms, "perf": perf}.items()})
        gradients = [self.accelerator.reduce(gradient, "mean") for gradient in gradients]

        expected = parts.budget.expected(logits)
        ratio = losses.log_ratio(expected, self.target())
        balance = losses.load_balance(logits.router_TE)
        sampled = [(out, grad) for out, grad in zip((mask_EL, router_TE), gradients, strict=True)
                   if out.requires_grad]
        outputs = [out for out, _ in sampled] + [self.scaler.scale(loss.ratio * ratio + loss.balance * balance)]
        torch.autograd.backward(outputs, [grad for _, grad in sampled] + [None])
        metrics = self._read("search", totals, ratio=ratio, balance=balance, expected_keep_ratio=expected,
                             gradient_norm=self._clip(self.hyper_optim, list(parts.hypernetwork.parameters())))
        self._step(self.hyper_optim, self.hyper_lr)
        return {**metrics, "search/target": self.target()}

    def logits(self) -> Logits:
        """Φ's, annealed as far as this step of the search is."""
        return self.parts.hypernetwork(1 + (self.config.experts.annealing - 1) * self.step / self.config.train.t_end)

    def target(self) -> float:
        """What L_ratio drives the expected keep ratio to, at this step of the search."""
        budget = self.config.budget
        last = budget.descent * self.config.train.t_end
        left = 1 - self.step / last if self.step < last else 0.0
        return budget.keep_ratio + left * (1 - budget.keep_ratio)

    def update_backbone(self, batches: list[Batch], mask_EL: np.ndarray, expert_T: np.ndarray) -> dict[str, float]:
        """One step of θ on L_perf under deterministic masks, paying only for the layers that they keep."""
        mask_TL = torch.from_numpy(mask_EL[expert_T])
        totals = []
        for k, batch in enumerate(batches):
            rows = HardRows(mask_TL[batch.timesteps], self.accelerator.device)
            last = k + 1 == len(batches)
            with contextlib.nullcontext() if last else self.accelerator.no_sync(self.wrapped):
                terms = self._terms(self.wrapped, batch, rows)
                perf = self._perf(terms)
                self.scaler.scale(perf / len(batches)).backward()
            totals.append({name: value.detach() for name, value in {**terms, "perf": perf}.items()})
        for parameter in self.parameters:
            if parameter.grad is None:  # a layer that no sample used: as in the dense simulation
                parameter.grad = torch.zeros_like(parameter)
        metrics = self._read("train", totals, gradient_norm=self._clip(self.backbone_optim, self.parameters))
        self._step(self.backbone_optim, self.backbone_lr)
        if self.ema:
            self.ema.step(self.parameters)
        return metrics

    def current_masks(self) -> tuple[np.ndarray, np.ndarray]:
        """Deterministic masks and routes: the frozen ones, or those of Φ now at its expected keep ratio."""
        if self.experts is not None:
            return self.experts.mask_EL, self.experts.expert_T
        with torch.no_grad():
            logits = self.logits()
            return self._agreed(self.parts.budget.masks(logits, float(self.parts.budget.expected(logits))))

    def freeze(self) -> tuple[np.ndarray, np.ndarray]:
        """T_end: the most probable masks at the target itself."""
        budget = self.config.budget
        with torch.no_grad():
            masks = self._agreed(self.parts.budget.masks(self.logits(), budget.keep_ratio))
        self.experts = self._experts(masks)
        if self.accelerator.is_main_process:
            missed = self.parts.budget.measured(*masks) - budget.keep_ratio
            if abs(missed) > 0.005:
                tqdm.write(f"keep ratio misses its target by {missed:+.4f}: the sites allow nothing nearer")
            tqdm.write(self.experts.summary())
        return masks

    def _experts(self, masks: tuple[np.ndarray, np.ndarray]) -> TemporalExperts:
        budget = self.parts.budget
        return TemporalExperts.build(*masks, self.parts.cost, budget.keep_ratio, budget.over, budget.timesteps,
                                     self.parts.latency)

    def _present_experts(self) -> TemporalExperts:
        """The frozen ones, or those of the last iteration."""
        if self.experts is not None:
            return self.experts
        assert self._masks is not None
        return self._experts(self._masks)

    def _validate_start(self, validator: Validator) -> None:
        """Images to compare with: of the dense model, or of the finished run that is tuned further."""
        if self.parts.teacher is not None:
            with self.journal.dispensable("samples/"):
                validator(self.parts.teacher, 0, "dense")
            self.parts.release_teacher()
        else:
            self._validate(validator)

    def _validate(self, validator: Validator) -> None:
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

    def _agreed(self, masks: tuple[np.ndarray, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """Process 0's masks, on every process."""
        if self.accelerator.num_processes == 1:
            return masks
        mask_EL, expert_T = masks
        flat = torch.from_numpy(np.concatenate([mask_EL.ravel().astype(np.int64), expert_T]))
        flat = broadcast(flat.to(self.accelerator.device)).cpu().numpy()
        return flat[: mask_EL.size].reshape(mask_EL.shape).astype(bool), flat[mask_EL.size:]

    def _terms(self, model: torch.nn.Module, batch: Batch, rows: Rows) -> dict[str, Tensor]:
        """The reconstruction losses of one forward, scalars."""
        timesteps = batch.timesteps.to(batch.noisy_latents.device, non_blocking=True)
        with self.parts.simulator.use(rows), self.accelerator.autocast(), \
                self.parts.student_tap.capture() as features:
            pred = model(batch.noisy_latents, timesteps, **batch.conditioning).sample
        loss = self.config.loss
        denoise = losses.mse_per_sample(pred[:, : batch.target.shape[1]], batch.target)
        if loss.min_snr_gamma is not None:
            denoise = denoise * min_snr_weight(self.parts.scheduler, timesteps, loss.min_snr_gamma)
        terms = {"denoise": denoise.mean()}
        if batch.teacher_pred is not None:
            terms["output_kd"] = losses.mse_per_sample(pred, batch.teacher_pred).mean()
            terms["feature_kd"] = losses.feature_kd(features, batch.teacher_features, loss.feature_kd_outliers).mean()
        return terms

    def _perf(self, terms: dict[str, Tensor]) -> Tensor:
        """L_perf = λ_denoise·L_denoise + λ_outKD·L_outKD + λ_featKD·L_featKD."""
        loss = self.config.loss
        weights = {"denoise": loss.denoise, "output_kd": loss.output_kd, "feature_kd": loss.feature_kd}
        return torch.stack([weight * terms[name] for name, weight in weights.items() if weight]).sum()

    def _read(self, phase: str, totals: list[dict[str, Tensor]], **extra: Tensor) -> dict[str, float]:
        """Means over micro-batches and processes, and whether to stop: the update's one host read."""
        names = [*totals[0], *extra]
        means = [torch.stack([t[name].detach().float() for t in totals]).mean() for name in totals[0]]
        received = self.interruption.received
        own = [received > 0, received, *self._own.values()]
        values = torch.stack([*means, *(value.detach().float().to(means[0].device) for value in extra.values()),
                              *torch.tensor(own, dtype=torch.float, device=means[0].device)])
        *numbers, stopping, signum, skipped, truncated = self.accelerator.reduce(values, "mean").tolist()
        self._stop = self._stop or agreed_signal(stopping, signum)
        processes = self.accelerator.num_processes
        self.counts |= {name: self._counted[name] + round(mean * processes) for name, mean in
                        zip(_COUNTED, (skipped, truncated), strict=True)}
        self._refuse_unreadable()
        metrics = {f"{phase}/{name}": number for name, number in zip(names, numbers, strict=True)}
        finite = {name: number for name, number in metrics.items() if math.isfinite(number)}
        if self.scaler.is_enabled():  # which skips an update of non-finite gradients, and lowers its scale
            skipped_now = len(finite) < len(metrics)
            self.counts["skipped_updates"] += skipped_now
            self._skipped_updates = self._skipped_updates + 1 if skipped_now else 0
            if self._skipped_updates > _MOST_SKIPPED_UPDATES:
                raise NonFiniteLoss(f"{phase}: loss or gradient was not finite in {self._skipped_updates} updates in "
                                    f"a row up to step {self.step + 1}: use train.mixed_precision=bf16, and resume")
            return finite
        for name, number in metrics.items():
            if name not in finite:
                raise NonFiniteLoss(f"{name} is {number} at step {self.step + 1}: stopped before the optimizer "
                                    "step; lower optim.backbone_lr or use train.mixed_precision=no, and resume")
        return metrics

    def _refuse_unreadable(self) -> None:
        """Stop once more than the allowed share of samples was unreadable: of an epoch, or of all drawn since."""
        data, skipped = self.config.data, self.counts["skipped_samples"]
        drawn = (self.step + 1) * self.config.train.batch_size
        if skipped > data.max_unreadable * max(drawn, len(self.train_indices)):
            raise InputError(f"data.max_unreadable={data.max_unreadable}: {skipped} samples of data.path={data.path!r} "
                             f"could not be read (named in {self.run_dir / 'unreadable.jsonl'}): mend the data, or "
                             "allow more")

    def _clip(self, optimizer: torch.optim.Optimizer, parameters: list[Any]) -> Tensor:
        """Unscale and clip the gradient in place; its norm before, which is not finite if any entry is not."""
        self.scaler.unscale_(optimizer)
        return torch.nn.utils.clip_grad_norm_(parameters, self.config.train.max_grad_norm)

    def _step(self, optimizer: torch.optim.Optimizer, schedule: Any) -> None:
        self.scaler.step(optimizer)
        self.scaler.update()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)

    def _log(self, metrics: dict[str, float], seconds: float, bar: tqdm) -> None:
        if self.scaler.is_enabled():
            metrics["loss_scale"] = self.scaler.get_scale()
        rates = {"backbone_lr": self.backbone_lr.get_last_lr()[0], "hypernetwork_lr": self.hyper_lr.get_last_lr()[0]}
        self.journal.metrics(self.step, {**metrics, **self.counts, "seconds_per_step": seconds, **rates}, bar)
