"""What a mask does to the dense model's output, and what that does to its samples."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from torch import Tensor
from tqdm import tqdm

from ..backbones.draws import gaussian
from ..backbones.family import backbone_class, predict
from ..backbones.gates import HardRows
from ..backbones.models import blocks_are_verified
from ..backbones.noising import Flow
from ..backbones.residual import not_residual
from ..backbones.schedules import solver_at
from ..common.config import Config
from ..common.errors import InputError
from ..common.process import summed
from ..data.batches import WithSubstitutes, collate, of_one_shape, split
from ..method.losses import mse_per_sample
from .setup.parts import Parts

# Of final latents [B, ...], noise like them and the backbone's conditioning arguments, any tensor [B, ...].
View = Callable[[Tensor, Tensor, dict[str, Tensor]], Tensor]
_LATENTS: Mapping[str, View] = {"latents": lambda latents, *_: latents}


class Probe:
    """Held-out samples (or, without any, training samples) with their noise, on which masks are tried.

    The same samples and noise for every range of timesteps, so that ranges differ by their timesteps alone.

    Args:
        shared: whether all processes of the launch try each a part of what is asked, by the same calls; all get the
            whole.

    Attributes:
        image_S: which image each of the S samples is of, int64; where few are held out, one image serves several.
    """

    def __init__(self, config: Config, parts: Parts, samples: int, batch_size: int = 16, shared: bool = False) -> None:
        self._process, self._processes = 0, 1
        if shared:
            state = PartialState()
            self._process, self._processes = state.process_index, state.num_processes
        train, held_out = split(parts.source, config.data.holdout, config.seed)
        indices = np.resize(held_out if len(held_out) else train, samples)
        source = WithSubstitutes(parts.source, indices, config.seed, parts.fit)
        self._batches = []
        buckets, first = parts.source.buckets, 0
        groups = [*of_one_shape(np.arange(samples), batch_size, None if buckets is None else buckets[indices])]
        self.parts, self.samples, self.image_S = parts, samples, indices[np.concatenate(groups)]
        for some in groups:
            keys = [(int(k), int(indices[k])) for k in some]
            batch: Any = {name: value.to(parts.backbone.device) if isinstance(value, Tensor) else value
                          for name, value in collate([source[key] for key in keys]).items()}
            gaussians = partial(gaussian, samples=range(first, first + len(keys)), seed=config.seed, step=0, stream=3)
            latents = parts.latents(batch, partial(gaussians, use=2))
            noise = gaussians(tuple(latents.shape[1:])).to(latents)
            dropped = torch.zeros(len(keys), dtype=torch.bool)
            self._batches.append((first, latents, noise, parts.conditioning(batch, dropped),
                                  parts.conditioning(batch, ~dropped)))
            first += len(keys)
        parts.backbone.eval()

    def noised(self, low: int, high: int) -> Iterator[tuple[Tensor, Tensor, dict[str, Tensor], Tensor]]:
        """Batches at rows spread evenly over those of low..high-1 that are trained: noisy latents, timesteps,
        conditioning and target."""
        noising, rows = self.parts.noising, self._trained(low, high)
        for first, latents, noise, conditioning, _ in self._batches:
            positions = np.arange(first, first + len(latents)) + 0.5
            spread = rows[torch.from_numpy((positions / self.samples * len(rows)).astype(np.int64))]
            timesteps = noising.at(spread).to(latents.device)
            yield (noising.noised(latents, noise, timesteps), timesteps, conditioning,
                   noising.target(latents, noise, timesteps))

    def _trained(self, low: int, high: int) -> Tensor:
        """The rows of low..high-1 that training visits; all of them where it visits none."""
        trained = self.parts.noising.trained
        inside = trained[(trained >= low) & (trained < high)]
        return inside if len(inside) else torch.arange(low, high)

    @torch.no_grad()
    def errors(self, masks: np.ndarray, low: int, high: int, weight_T: np.ndarray | None = None) -> tuple[
            np.ndarray, float]:
        """At timesteps spread evenly over low..high-1, of bool masks [M, L]: mean squared changes of the dense model's
        output (without a learned variance), float64 [M], each weighted by its timestep; and the dense model's own error
        against the target."""
        errors, denoise = np.zeros(len(masks)), 0.0
        for noisy, timesteps, conditioning, target in self.noised(low, high):
            rows = timesteps.long().cpu().numpy()
            weights = torch.from_numpy(np.ones(len(rows)) if weight_T is None else weight_T[rows])
            dense = self._predict(None, noisy, timesteps, conditioning)
            denoise += mse_per_sample(dense, target).sum().item()
            for m in self._part(len(masks)):
                changes = mse_per_sample(self._predict(masks[m], noisy, timesteps, conditioning), dense)
                errors[m] += (changes.cpu() * weights).sum().item()
        return self._whole(errors) / self.samples, denoise / self.samples

    @torch.no_grad()
    def against_teacher(self, masks: np.ndarray, edges: np.ndarray) -> np.ndarray:
        """Mean squared change of the output against the teacher's, of bool masks [M, L] in each bin of timesteps,
        float64 [M, B, S] for the S samples; both in the run's arithmetic, whether the backbone is wrapped or not.

        Args:
            edges: bin b holds the timesteps from edges[b] up to, not including, edges[b+1], int64 [B+1].
        """
        errors = np.zeros((len(masks), len(edges) - 1, self.samples))
        mine = self._part(errors.shape[1])
        bar = self._bar(len(mine) * len(self._batches), "batch", "errors of masks")
        parts = self.parts
        arithmetic = torch.autocast(parts.backbone.device.type, parts.precision, parts.precision != torch.float32)
        for b in mine:
            first = 0
            for noisy, timesteps, conditioning, _ in self.noised(int(edges[b]), int(edges[b + 1])):
                bar.update()
                with parts.dense() as teacher, arithmetic:
                    dense = predict(teacher, noisy, timesteps, conditioning)[:, : noisy.shape[1]].float()
                rows = slice(first, first + len(noisy))
                for m, mask_L in enumerate(masks):
                    with arithmetic:
                        change = mse_per_sample(self._predict(mask_L, noisy, timesteps, conditioning), dense)
                    errors[m, b, rows] = change.cpu().numpy()
                first = rows.stop
        self.parts.release_teacher()
        bar.close()
        return self._whole(errors)

    def amplification(self, masks: np.ndarray, edges: np.ndarray) -> np.ndarray:
        """Squared change of the dense model's final samples for a unit of squared change of its output, in each bin.

        Of DPM-Solver++ (of a flow: Euler's method) with two steps in each bin, without guidance, when each of the bool
        masks [M, L] is in force in that bin alone (`displacement`). It depends on the width of the bins. Steps are
        trained timesteps: one in a bin that has one alone.

        Args:
            edges: bin b holds the timesteps from edges[b] up to edges[b+1], [B+1]; one or more in each.

        Returns: float64 [B]; 1 where no mask changes the output.
        """
        bins = [(int(low), int(high)) for low, high in pairwise(edges)]
        steps: list[int] = []
        ranges = []
        for low, high in reversed(bins):
            rows = self._trained(low, high)
            own = sorted({int(rows[quarter * len(rows) // 4]) for quarter in (1, 3)}, reverse=True)
            ranges.append(range(len(steps), len(steps) + len(own)))
            steps += own
        mask_MNL = np.repeat(masks[:, None], len(steps), axis=1)
        moved, caused_B = self.displacement(mask_MNL, ranges[::-1], partial(solver_at, self.parts.scheduler, steps))
        return np.divide(moved["latents"], caused_B, out=np.ones(len(bins)), where=caused_B > 0)

    @torch.no_grad()
    def displacement(self, masks: np.ndarray, ranges: Sequence[range], prepare: Callable[[], Any],
                     guidance: float = 1.0, views: Mapping[str, View] = _LATENTS,
                     others: Sequence[Sequence[int]] = ()) -> tuple[dict[str, np.ndarray], np.ndarray]:
        """How far final samples move when masks are in force at some steps of a sampler alone.

        A backbone of less noise begins at noised samples; that of more noise ends where its last step leads.

        Args:
            masks: of each of a solver's steps, bool [M, N, L]. ranges: of consecutive steps, R of them. prepare: a
                solver with its steps set.
            guidance: of classifier-free guidance. views: what of the final latents is compared, under its name.
            others: further sets of steps, each in order, O of them.

        Returns: of each view the mean squared displacement by ranges and others, float64 [R+O]; and the mean squared
            change of the model's output (before guidance) at the steps of each range, float64 [R]; means over masks,
            samples and steps.
        """
        moved = {name: np.zeros(len(ranges) + len(others)) for name in views}
        caused_R, sets = np.zeros(len(ranges)), [*ranges, *others]
        mine = self._part(len(sets))
        bar = self._bar(len(mine) * len(self._batches), "range", "effect on samples")
        device = self.parts.backbone.device
        with torch.random.fork_rng([device] if device.type == "cuda" else []):  # a sampler may draw noise
            for batch in self._batches:
                samples, known, _ = self._sample(None, (), batch, [], prepare(), guidance)
                _, _, noise, given, _ = batch
                seen = {name: view(samples, noise, given) for name, view in views.items()}
                for r in mine:
                    bar.update()
                    for mask_NL in masks:
                        compared = r < len(ranges)
                        changed, _, caused = self._sample(mask_NL, sets[r], batch, known, prepare(), guidance, compared)
                        for name, view in views.items():
                            away = (view(changed, noise, given) - seen[name]).float().flatten(1)
                            moved[name][r] += away.square().mean(dim=1).sum().item()
                        if compared:
                            caused_R[r] += caused
        self.parts.release_teacher()  # of a view
        bar.close()
        moved, caused_R = {name: self._whole(value) for name, value in moved.items()}, self._whole(caused_R)
        if not all(np.isfinite(value).all() for value in moved.values()):
            raise InputError("the samples of this model are not finite where layers are skipped: use another "
                             "train.mixed_precision")
        count = self.samples * max(len(masks), 1)
        return {name: value / count for name, value in moved.items()}, caused_R / count

    def _sample(self, mask_NL: np.ndarray | None, masked: Sequence[int], batch: tuple,
                known: list[tuple[Tensor, Tensor]], solver: Any, guidance: float,
                compared: bool = False) -> tuple[Tensor, list[tuple[Tensor, Tensor]], float]:
        """Samples, the outputs of all steps before and after guidance, and, if that is to be compared, the summed
        change of the output where the masked steps find themselves, their mean.

        known: the dense model's outputs, which serve until the mask is in force for the first time.
        """
        _, clean, noise, given, nothing = batch
        latents, outputs, caused = self._begun(clean, noise, solver), [], 0.0
        torch.manual_seed(0)  # so that this noise is the same with and without the mask
        for step, timestep in enumerate(solver.timesteps):
            scaled = solver.scale_model_input(latents, timestep) if hasattr(solver, "scale_model_input") else latents
            if known and (not masked or step < masked[0]):
                outputs.append(known[step])
            else:
                there = timestep.expand(len(latents)).to(latents.device)
                mask = mask_NL[step] if mask_NL is not None and step in masked else None
                pred = guided = self._predict(mask, scaled, there, given)
                if guidance != 1:
                    base = self._predict(mask, scaled, there, nothing)
                    guided = base + guidance * (pred - base)
                outputs.append((pred, guided))
            if compared and step in masked:
                dense = known[step][0] if step == masked[0] else self._predict(None, scaled, there, given)
                caused += mse_per_sample(outputs[-1][0], dense).sum().item() / len(masked)
            latents = solver.step(outputs[-1][1], timestep, latents).prev_sample
        return latents, outputs, caused

    def _part(self, count: int) -> range:
        """Which of `count` things this process tries."""
        return range(self._process, count, self._processes)

    def _whole(self, values: np.ndarray) -> np.ndarray:
        return values if self._processes == 1 else summed(values)

    def _bar(self, total: int, unit: str, name: str) -> tqdm:
        return tqdm(total=total, unit=unit, desc=name, dynamic_ncols=True, disable=self._process > 0)

    def _begun(self, clean: Tensor, noise: Tensor, solver: Any) -> Tensor:
        """What sampling begins with at its first timestep."""
        noising = self.parts.noising
        if isinstance(noising, Flow) and noising.within and noising.within[1] <= noising.num_timesteps:
            timestep = solver.timesteps[:1].float().expand(len(clean)).to(clean.device)
            return noising.noised(clean, noise, timestep)
        return noise * float(getattr(solver, "init_noise_sigma", 1.0))

    def _predict(self, mask_L: np.ndarray | None, noisy: Tensor, timesteps: Tensor,
                 conditioning: dict[str, Tensor]) -> Tensor:
        rows = None if mask_L is None else HardRows(torch.from_numpy(mask_L)[None], noisy.device)
        with self.parts.simulator.use(rows):
            return predict(self.parts.backbone, noisy, timesteps, conditioning)[:, : noisy.shape[1]].float()


def check_blocks(config: Config, parts: Parts) -> None:
    """Refuse a backbone of a class that no test knows, on a sample of the run, if a skipped block is not a removed one.

    Raises:
        InputError: naming the blocks.
    """
    name = backbone_class(parts.backbone).__name__
    if blocks_are_verified(name):
        return
    noisy, timesteps, conditioning, _ = next(Probe(config, parts, samples=1).noised(0, parts.noising.num_timesteps))
    others = not_residual(parts.backbone, partial(predict, parts.backbone, noisy, timesteps, conditioning))
    if others:
        more = f" and {len(others) - 3} more" if len(others) > 3 else ""
        raise InputError(f"backbone.pretrained={config.backbone.pretrained!r}: of this {name}, "
                         f"{', '.join(others[:3])}{more} with zeros for weights give something else than they were "
                         "given, so that they cannot be skipped: use another backbone (`alter models` lists them)")
