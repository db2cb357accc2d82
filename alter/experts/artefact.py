"""`TemporalExperts`: the finished artefact, a readable `experts.json` beside ordinary diffusers weights."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from huggingface_hub import _CACHED_NO_EXIST, HfApi, hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

from ..backbones.cost import CostTable
from ..backbones.family import COMPONENTS, backbone_class
from ..backbones.gates import Simulator
from ..backbones.latency import Latency
from ..common.errors import InputError
from ..common.files import write_text
from ..method.measured import Measured
from .apply import Applied, Installed, asking, backbone_of, check_fit, check_same, remove, serving
from .ladder import Experts, Rung
from .plan import Plan, Planner
from .prompts import usual_call
from .stored import from_text, to_text
from .trajectory import following
from .trim import trim_layers

FILE_NAME = "experts.json"


class NoExperts(InputError):
    """There is no experts.json where it was looked for."""


class TemporalExperts(Experts):
    """Which sites each expert runs, and which expert serves each training timestep, for one budget or several."""

    def save_pretrained(self, folder: str | Path) -> None:
        """Write `experts.json` into `folder`, or into the folder of their component in it."""
        file = Path(folder) / self._place(self.component)
        file.parent.mkdir(parents=True, exist_ok=True)
        write_text(file, to_text(self))

    @staticmethod
    def _place(component: str | None) -> str:
        """Of the file, in a pipeline's folder."""
        return f"{component}/{FILE_NAME}" if component else FILE_NAME

    def push_to_hub(self, repo_id: str, token: str | None = None, private: bool | None = None) -> str:
        """Upload `experts.json` to a model repository, made if there is none; returns the address of the commit.

        The weights go there with the pipeline's own `push_to_hub`.
        """
        api = HfApi(token=token)
        api.create_repo(repo_id, private=private, exist_ok=True)
        return api.upload_file(path_or_fileobj=to_text(self).encode(), path_in_repo=self._place(self.component),
                               repo_id=repo_id)

    @classmethod
    def from_pretrained(cls, source: str | Path, revision: str | None = None, component: str | None = None,
                        **hub: Any) -> "TemporalExperts":
        """Read `experts.json` from a folder or, if there is no such folder, from a hub id.

        Args:
            component: the second one, of a pipeline with two backbones; None: the first, whose file lies beside
                model_index.json, or the only one that has experts.
            hub: further arguments of huggingface_hub's `hf_hub_download`, for example `token` or `cache_dir`.

        Raises:
            NoExperts: if there is no such file.
            InputError: naming the field that is missing or wrong.
        """
        if Path(source).is_file():
            raise InputError(f"experts: {source} is a file: name the folder that holds {FILE_NAME}")
        missing = unknown = ""
        for place in (component,) if component else (None, COMPONENTS[-1]):
            try:
                file = fetch(source, cls._place(place), {"revision": revision, **hub})
            except EntryNotFoundError as error:
                missing = missing or str(error).splitlines()[0]
            except (OSError, ValueError) as error:
                unknown = unknown or (str(error).strip() or type(error).__name__).splitlines()[0]
            else:
                return cls._read(file, place)
        if unknown:
            raise InputError(f"experts: {source}: no such folder, and the hub gave no {cls._place(component)} "
                             f"({unknown}): load it once with a network")
        if Path(source).is_dir():
            raise NoExperts(f"{source}: holds no {cls._place(component)}: name a folder that training has finished")
        raise NoExperts(f"experts: {source}: no such folder, and the hub gave no {FILE_NAME} ({missing})")

    @classmethod
    def _read(cls, file: Path, component: str | None) -> "TemporalExperts":
        try:
            experts = cls(**from_text(file.read_text(encoding="utf-8")))
        except ValueError as error:  # InputError, or bytes that are no text
            raise InputError(f"{file}: {error}") from None
        if component not in (None, experts.component):
            raise InputError(f"{file}: component: found {experts.component!r}, and the folder is that of {component}")
        return experts

    @classmethod
    def build(cls, mask_EL: np.ndarray, expert_T: np.ndarray, cost: CostTable, keep_ratio_target: float,
              budget_over: str, timesteps: np.ndarray | None = None, latency: Latency | None = None,
              component: str | None = None, ladder: Sequence[Rung] = (),
              measured: Measured | None = None) -> "TemporalExperts":
        """Join deterministic masks and routes with the costs of the sites.

        Args:
            mask_EL: [E, L], of all rungs. expert_T: int [T], keep_ratio_target: of the chosen rung.
            ladder: further rungs, in any order; the chosen one may be among them, by its keep ratio.
            measured: errors of all E masks.

        Raises:
            InputError: if a rung or `measured` does not fit the masks, or two rungs have the same keep ratio.
        """
        given = [rung.keep_ratio_target for rung in ladder]
        chosen = Rung(keep_ratio_target, expert_T)
        if keep_ratio_target in given:
            found = ladder[given.index(keep_ratio_target)]
            if not np.array_equal(found.expert_T, chosen.expert_T):
                raise InputError(f"ladder: its rung of keep ratio {keep_ratio_target:g} has other routes than expert_T")
            chosen = found
        rungs = sorted({*ladder, chosen}, key=lambda rung: rung.keep_ratio_target)
        return cls(cost.sites, mask_EL.astype(bool), cost.macs, cost.macs_total, tuple(rungs), budget_over,
                   rungs.index(chosen), None if timesteps is None else tuple(timesteps.tolist()), latency,
                   cost.backbone, component, measured)

    def apply(self, target: Any, keep_ratio: float | Rung | None = None) -> Applied:
        """Skip layers in `target`, a diffusers pipeline or its backbone, until `remove`.

        The backbone's own `timestep` argument decides, read at most once a forward. Pipelines that share the
        backbone are all served. Applied again, they take another rung.

        Args:
            keep_ratio: that of a rung of the ladder; between two, the lower is taken. A Rung may be on no ladder. None:
                the chosen rung.

        Returns: a context manager that, at the end of its block, brings back what there was before.

        Raises:
            InputError: if the sites differ from this artefact's, other experts are applied, or no rung is that low.
        """
        return Applied(target, self._backbone(target), self, self.pick(keep_ratio))

    @contextmanager
    def at(self, keep_ratio: float | Rung) -> Iterator[Rung]:
        """Inside the block, calls of this thread or task use another rung than the one that is applied.

        A keep ratio holds for all experts that are applied to what is called (Wan 2.2 has two), each of which takes the
        rung of its own ladder as `apply` does; a Rung holds for these experts alone. Of nested blocks the inner
        one rules. Nothing is compiled, and other threads and tasks are not touched.

        Returns: a context manager that yields the rung.

        Raises:
            InputError: as `apply`; in the block, if other experts of this component are called at a Rung.
        """
        rung = self.pick(keep_ratio)
        with asking(self, keep_ratio):
            yield rung

    def following(self, pipe: Any) -> AbstractContextManager[None]:
        """Inside the block, calls of `pipe` by this thread or task may use cached rungs, of these experts and others.

        Such rungs go on from step to step of one call: the block tells them which steps these are, by the pipeline's
        scheduler, and keeps what layers added until the last one.
        """
        return following(pipe.scheduler)

    def plan(self, pipe: Any, call: Mapping[str, Any] | None = None, macs: float | None = None,
             seconds: float | None = None, quality: int | None = None, **measuring: Any) -> Plan:
        """How many steps, and which layers at each of them, for a budget or a quality of the backbone's part of `pipe`.

        It draws images first, to measure the sampler; a `Planner` that is kept does so once for all budgets.

        Args:
            call: arguments of `pipe`, for example {"prompt": [...], "guidance_scale": 5.0}; a few dozen images. None:
                plain prompts, or classes, at the pipeline's guidance.
            macs, seconds, quality: one of them, as of `Planner.plan`. measuring: further arguments of `Planner`.

        Returns: a plan, to be drawn with by
            `with experts.at(plan.rung), plan.stepping(pipe): pipe(..., num_inference_steps=plan.asked)`.

        Raises:
            InputError: as `Planner` and `Planner.plan`.
        """
        if sum(value is not None for value in (macs, seconds, quality)) != 1:  # before anything is drawn
            raise InputError("plan: give one of macs, seconds and quality")
        call = usual_call(pipe) if call is None else call
        return Planner(self, pipe, call, **measuring).plan(macs, seconds, quality)

    def remove(self, target: Any) -> None:
        """Undo `apply`; the backbone is dense again.

        Raises:
            InputError: if these experts are not applied to it.
        """
        remove(self._backbone(target), self)

    def compile(self, target: Any, **options: Any) -> None:
        """Apply the experts to `target`, if they are not, and torch.compile each of its prunable layers.

        Layers of one kind share a graph, and which of them run is chosen outside compiled code, so that a change of the
        expert or of the rung compiles nothing. `options` are those of torch.compile. `remove` undoes it.

        Raises:
            InputError: as `apply`, or if other experts are applied.
        """
        backbone = self._backbone(target)
        if not hasattr(backbone, "_alter_applied"):
            self.apply(target)
        check_same(backbone._alter_applied, self)
        backbone._alter_applied.simulator.compile(**options)

    def trim(self, target: Any) -> int:
        """Take the layers that no rung runs out of memory, for good, and apply the experts to the rest.

        It undoes `compile`. The backbone can then neither run dense nor be saved. `only` leaves fewer layers.

        Returns: bytes of parameters freed.
        """
        backbone = self._backbone(target)
        sites = check_fit(backbone, self, self.ladder)
        installed: Installed | None = vars(backbone).get("_alter_applied")
        rung = installed.chooser.rung if installed is not None and self.same(installed.experts) else self.rung
        if installed is not None:
            remove(backbone)
        freed = trim_layers(backbone, sites, self.mask_EL, sorted({*self.used_by_any, *rung.used}))
        self.apply(target, rung)
        return freed

    def serving(self, simulator: Simulator) -> AbstractContextManager[None]:
        """As `apply`, inside a `with` block, for a backbone that `simulator` has gates on already."""
        return serving(simulator, self)

    def _backbone(self, target: Any) -> Any:
        """The one that they are for, of a pipeline or alone; raises InputError for another class's."""
        backbone = backbone_of(target, self.component)
        found = backbone_class(backbone).__name__
        if self.backbone not in (None, found):
            raise InputError(f"experts: they were trained on a {self.backbone}, and this is a {found}: use the "
                             "backbone that they were trained on")
        return backbone


def fetch(source: str | Path, name: str, hub: dict[str, Any]) -> Path:
    """A file of a folder or, with further arguments of `hf_hub_download`, a hub id; raises EntryNotFoundError if it is
    not there, OSError where that cannot be known."""
    if not Path(source).is_dir():
        try:
            return Path(hf_hub_download(str(source), name, **hub))
        except LocalEntryNotFoundError as error:  # it may exist, unless the hub has said so before
            known = try_to_load_from_cache(str(source), name, hub.get("cache_dir"), hub.get("revision"))
            if known is _CACHED_NO_EXIST:
                raise
            raise OSError(str(error)) from None
    if not (Path(source) / name).is_file():
        raise LocalEntryNotFoundError(f"{source} holds no {name}")
    return Path(source) / name
