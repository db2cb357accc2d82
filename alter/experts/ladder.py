"""Experts as data: a family of masks, and a ladder of rungs, each of which says which mask serves which timestep."""

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any, Self

import numpy as np

from ..backbones.latency import Latency
from ..common.errors import InputError
from ..method.budget import timestep_weights
from ..method.measured import Measured

_TOLERANCE = 0.005  # of a keep ratio asked for


@dataclass(frozen=True, eq=False)
class Rung:
    """Which expert serves each training timestep, for one budget.

    Attributes:
        keep_ratio_target: what was asked for, in (0, 1], as a share of what the artefact's `budget_over` names.
        expert_T: int64 [T], the row of the artefact's masks that serves each training timestep.
        tuned: whether the weights were trained with it.
        error: predicted squared displacement of the samples (method/measured.py); None: not predicted.
        steps: of denoising, that it was planned for; None: any.
        interval: what the noise of the measured samples leaves of `error`, 90%, low and high; None: not known.
        cached: whether a layer that is skipped adds what it added to its input at the last denoising step that ran it,
            instead of nothing. At the first step every layer runs that any of the experts runs.
    """

    keep_ratio_target: float
    expert_T: np.ndarray = field(repr=False)
    tuned: bool = True
    error: float | None = None
    steps: int | None = None
    interval: tuple[float, float] | None = None
    cached: bool = False

    def __post_init__(self) -> None:
        if not np.issubdtype(self.expert_T.dtype, np.integer):
            raise InputError(f"expert_T: {self.expert_T.dtype}, expected whole numbers")
        object.__setattr__(self, "expert_T", self.expert_T.astype(np.int64, copy=False))

    @property
    def used(self) -> list[int]:
        """The experts that some timestep uses."""
        return np.unique(self.expert_T).tolist()

    def _plain(self) -> tuple[Any, ...]:
        return (self.keep_ratio_target, self.tuned, self.error, self.interval, self.steps, self.cached,
                self.expert_T.tobytes())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Rung) and self._plain() == other._plain()

    def __hash__(self) -> int:
        return hash(self._plain())


@dataclass(frozen=True, eq=False)
class Experts:
    """Masks, a ladder of rungs over them, and what they cost. Costs and `used` are those of the chosen rung.

    Attributes:
        sites: name of every site, its module path, [L].
        mask_EL: bool [E, L]; True runs the site. Rows may be used by no rung.
        macs: MACs of every site for batch 1, [L]; macs_total: of the dense backbone.
        ladder: the rungs, of ascending keep ratio. chosen: the index of the one that `apply` takes unless told another.
        budget_over: "total" or "prunable", of which keep ratios are shares.
        timesteps: those that the budget's sampler visits; each training timestep has the weight of the nearest of them
            (method/budget.py). None: all weigh the same.
        latency: the measured times that keep ratios are shares of; None: they are shares of MACs.
        backbone: the name of its diffusers class; None: not recorded.
        component: what the pipeline calls the backbone, where it is not the first of unet, transformer, transformer_2.
        measured: errors of all E masks; None: not measured.

    Raises:
        InputError: if a rung or `measured` does not fit the masks, or keep ratios do not ascend.
    """

    sites: tuple[str, ...]
    mask_EL: np.ndarray
    macs: tuple[int, ...]
    macs_total: int
    ladder: tuple[Rung, ...]
    budget_over: str
    chosen: int = 0
    timesteps: tuple[int, ...] | None = None
    latency: Latency | None = None
    backbone: str | None = None
    component: str | None = None
    measured: Measured | None = None

    def __post_init__(self) -> None:
        targets = [rung.keep_ratio_target for rung in self.ladder]
        if not self.ladder or any(low >= high for low, high in zip(targets, targets[1:], strict=False)):
            raise InputError(f"ladder: expected rungs of ascending keep ratio, found {_listed(targets) or 'none'}")
        for rung in self.ladder:
            self._check(rung, f"ladder: keep ratio {rung.keep_ratio_target:g}: ")
        if self.measured is None:
            return
        edges, rows = self.measured.edges, len(self.measured.error_MB)
        if rows != len(self.mask_EL):
            raise InputError(f"measured.error: has {rows} rows, and there are {len(self.mask_EL)} masks")
        if (edges[0], edges[-1]) != (0, len(self.expert_T)) or any(np.diff(edges) <= 0):
            raise InputError(f"measured.edges: expected to ascend from 0 to {len(self.expert_T)}")

    def _check(self, rung: Rung, where: str) -> None:
        count = len(self.ladder[0].expert_T)
        if not 0 < rung.keep_ratio_target <= 1:
            raise InputError(f"{where}keep_ratio_target={rung.keep_ratio_target}: expected a share in (0, 1]")
        if rung.expert_T.shape != (count,):
            raise InputError(f"{where}expert_T: of shape {list(rung.expert_T.shape)}, expected [{count}], as the other "
                             "rungs have")
        if not count or rung.expert_T.min() < 0 or rung.expert_T.max() >= len(self.mask_EL):
            raise InputError(f"{where}every timestep needs one of the experts 0 to {len(self.mask_EL) - 1}")
        if rung.error is not None and not 0 <= rung.error < math.inf:
            raise InputError(f"{where}error={rung.error}: expected a finite number of at least 0")
        if rung.interval is not None and not 0 <= rung.interval[0] <= rung.interval[1] < math.inf:
            raise InputError(f"{where}interval={list(rung.interval)}: expected two finite numbers, the lower one first")
        if rung.steps is not None and rung.steps < 1:
            raise InputError(f"{where}steps={rung.steps}: expected at least 1")

    @property
    def rung(self) -> Rung:
        """The chosen one."""
        return self.ladder[self.chosen]

    @property
    def expert_T(self) -> np.ndarray:
        """Int64 [T], the expert of each training timestep."""
        return self.rung.expert_T

    @property
    def keep_ratio_target(self) -> float:
        """What was asked for, as a share of what `budget_over` names."""
        return self.rung.keep_ratio_target

    @property
    def used(self) -> list[int]:
        """The experts that some timestep uses."""
        return self.rung.used

    @property
    def used_by_any(self) -> list[int]:
        """The experts that some rung of the ladder uses."""
        return sorted({expert for rung in self.ladder for expert in rung.used})

    @property
    def macs_T(self) -> np.ndarray:
        """MACs of one forward at each training timestep, float64 [T]."""
        macs_L = np.array(self.macs, dtype=np.float64)
        return (self.macs_total - (~self.mask_EL) @ macs_L)[self.expert_T]

    @property
    def macs_mean(self) -> float:
        """MACs of one forward, the weighted mean over the training timesteps."""
        return self._mean(self.macs_T)

    @property
    def keep_ratio(self) -> float:
        """Share of the *total* MACs kept, the weighted mean over the training timesteps."""
        return self.macs_mean / self.macs_total

    @property
    def time_ratio(self) -> float | None:
        """Share of the dense forward's measured time that is left, the same mean; None if not measured."""
        if self.latency is None:
            return None
        return self._mean((1 - ~self.mask_EL @ self.latency.share_L)[self.expert_T])

    def _mean(self, value_T: np.ndarray) -> float:
        visited = None if self.timesteps is None else np.array(self.timesteps)
        return float(np.average(value_T, weights=None if visited is None else timestep_weights(len(value_T), visited)))

    def pick(self, keep_ratio: float | Rung | None) -> Rung:
        """The rung of the largest keep ratio that is not above `keep_ratio` (by more than 0.005); None: the chosen one.

        A Rung stands for itself, whether or not it is on the ladder.

        Raises:
            InputError: if all rungs are above `keep_ratio`, it is no share, or the Rung does not fit the masks.
        """
        if keep_ratio is None:
            return self.rung
        if isinstance(keep_ratio, Rung):
            self._check(keep_ratio, "experts: ")
            return keep_ratio
        if not 0 < keep_ratio <= 1:
            raise InputError(f"experts: keep_ratio={keep_ratio}: ask for a share in (0, 1]")
        below = [rung for rung in self.ladder if rung.keep_ratio_target <= keep_ratio + _TOLERANCE]
        if not below:
            rungs = _listed([rung.keep_ratio_target for rung in self.ladder])
            raise InputError(f"experts: keep_ratio={keep_ratio:g}: is below the lowest rung of their ladder, which "
                             f"has {rungs}: ask for at least {self.ladder[0].keep_ratio_target:g}")
        return next((rung for rung in below if rung.keep_ratio_target == keep_ratio), below[-1])

    def choose(self, keep_ratio: float | Rung) -> Self:
        """The same masks and ladder with another rung of it chosen.

        Raises:
            InputError: as `pick`, or if the Rung is not on the ladder.
        """
        rung = self.pick(keep_ratio)
        if rung not in self.ladder:
            raise InputError("experts: the rung is not on their ladder: use `only`")
        return dataclasses.replace(self, chosen=self.ladder.index(rung))

    def only(self, keep_ratio: float | Rung | None = None) -> Self:
        """One rung alone, with the masks that it uses, numbered anew.

        Raises:
            InputError: as `pick`.
        """
        rung = self.pick(keep_ratio)
        used, expert_T = np.unique(rung.expert_T, return_inverse=True)
        measured = self.measured and dataclasses.replace(self.measured, error_MB=self.measured.error_MB[used])
        return dataclasses.replace(self, mask_EL=self.mask_EL[used], chosen=0, measured=measured,
                                   ladder=(dataclasses.replace(rung, expert_T=expert_T.astype(np.int64)),))

    def same(self, other: "Experts") -> bool:
        """Whether masks and ladder are equal."""
        return self.same_masks(other) and self.ladder == other.ladder

    def same_masks(self, other: "Experts") -> bool:
        """Whether a Rung of the one is a Rung of the other: masks, backbone's place and sites are equal."""
        return (self.component == other.component and self.sites == other.sites
                and np.array_equal(self.mask_EL, other.mask_EL))

    def table(self) -> str:
        """The ladder for the terminal, a line per rung; the chosen one is marked."""
        each = [self.choose(rung) for rung in self.ladder]
        of = f" ({self.measured.space})" if self.measured is not None and self.measured.space != "latents" else ""
        columns = {
            "keep ratio": [f"{one.keep_ratio_target:g}" for one in each],
            "MACs": [f"{one.keep_ratio:.1%}" for one in each],
            "GMACs a forward": [f"{one.macs_mean / 1e9:.4g}" for one in each],
            "seconds a forward": ["" if one.latency is None or one.time_ratio is None
                                  else f"{one.time_ratio * one.latency.seconds_total:.3g}" for one in each],
            # That of a plan is of latents.
            f"predicted error{of}": ["" if rung.error is None or of and rung.steps else f"{rung.error:.3g}"
                                     for rung in self.ladder],
            "90%": ["" if rung.interval is None else "{:.3g} to {:.3g}".format(*rung.interval) for rung in self.ladder],
            "steps": [str(rung.steps or "") for rung in self.ladder],
            "skipped layers": ["cached" if rung.cached else "" for rung in self.ladder],
            "tuned": ["yes" if rung.tuned else "no" for rung in self.ladder],
            "": ["chosen" if rung is self.rung else "" for rung in self.ladder],
        }
        shown = [[head, *cells] for head, cells in columns.items() if any(cells)]
        widths = [max(map(len, column)) for column in shown]
        return "\n".join("  ".join(map(str.rjust, line, widths)).rstrip() for line in zip(*shown, strict=True))

    def summary(self) -> str:
        """A few lines for the terminal: the chosen rung's experts, and the ladder if it has several rungs."""
        count, some = len(self.used), len(self.used_by_any)
        others = [f"{some - count} more in other rungs"] * (some > count)
        others += [f"{len(self.mask_EL) - some} unused"] * (len(self.mask_EL) > some)
        lines = [f"{count} expert{'s' * (count > 1)} over {len(self.sites)} sites"
                 + f" ({', '.join(others)})" * bool(others) + f", {self.keep_ratio:.1%} of all MACs"]
        if self.latency is not None:
            lines[0] += f", {self.time_ratio:.1%} of the time ({self.latency.place})"
        for expert in self.used:
            timesteps, mask_L = np.flatnonzero(self.expert_T == expert), self.mask_EL[expert]
            lines.append(f"  expert {expert}: {mask_L.sum()} of {len(mask_L)} sites, {len(timesteps)} timesteps in "
                         f"[{timesteps[0]}, {timesteps[-1]}]")
        if len(self.ladder) > 1:
            lines += [f"ladder of {len(self.ladder)} rungs:", *(f"  {line}" for line in self.table().splitlines())]
        return "\n".join(lines)

    def __repr__(self) -> str:
        return self.summary()


def _listed(targets: list[float]) -> str:
    return ", ".join(f"{target:g}" for target in targets)
