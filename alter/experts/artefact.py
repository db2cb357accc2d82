"""`TemporalExperts`: the finished artefact, a readable `experts.json` beside ordinary diffusers weights."""

import json
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

from ..backbones.cost import CostTable
from ..backbones.family import COMPONENTS, backbone_class
from ..backbones.gates import Simulator
from ..backbones.latency import Latency
from ..common.errors import InputError
from ..common.files import write_text
from ..method.budget import timestep_weights
from .apply import Applied, backbone_of, check_fit, check_same, remove, serving
from .trim import trim_layers

FILE_NAME = "experts.json"
FORMAT = 1


class NoExperts(InputError):
    """There is no experts.json where it was looked for."""


@dataclass(frozen=True)
class TemporalExperts:
    """Which sites each expert runs, and which expert serves each training timestep.

    Attributes:
        sites: name of every site, its module path, [L].
        mask_EL: bool [E, L]; True runs the site.
        expert_T: int64 [T], the expert of each training timestep.
        macs: MACs of every site for batch 1, [L]; macs_total: of the dense backbone.
        keep_ratio_target: what was asked for, as a share of `budget_over` ("total" or "prunable").
        timesteps: those that the budget's sampler visits; each training timestep has the weight of the nearest of them
            (method/budget.py). None: all weigh the same.
        latency: the measured times that `keep_ratio_target` is a share of; None: it is one of MACs.
        backbone: the name of its diffusers class; None: not recorded.
        component: what the pipeline calls the backbone, where it is not the first of unet, transformer, transformer_2.
    """

    sites: tuple[str, ...]
    mask_EL: np.ndarray
    expert_T: np.ndarray
    macs: tuple[int, ...]
    macs_total: int
    keep_ratio_target: float
    budget_over: str
    timesteps: tuple[int, ...] | None = None
    latency: Latency | None = None
    backbone: str | None = None
    component: str | None = None

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

    @property
    def used(self) -> list[int]:
        """The experts that some timestep uses."""
        return np.unique(self.expert_T).tolist()

    def summary(self) -> str:
        """A few lines for the terminal."""
        lines = [f"{len(self.mask_EL)} experts over {len(self.sites)} sites, {self.keep_ratio:.1%} of all MACs"]
        if self.latency is not None:
            lines[0] += f", {self.time_ratio:.1%} of the time ({self.latency.place})"
        for expert, mask_L in enumerate(self.mask_EL):
            timesteps = np.flatnonzero(self.expert_T == expert)
            served = f"{len(timesteps)} timesteps in [{timesteps[0]}, {timesteps[-1]}]" if len(timesteps) else "unused"
            lines.append(f"  expert {expert}: {mask_L.sum()} of {len(mask_L)} sites, {served}")
        return "\n".join(lines)

    def __repr__(self) -> str:
        return self.summary()

    def save_pretrained(self, folder: str | Path) -> None:
        """Write `experts.json` into `folder`, or into the folder of their component in it."""
        file = Path(folder) / self._place(self.component)
        file.parent.mkdir(parents=True, exist_ok=True)
        write_text(file, self._to_json())

    @staticmethod
    def _place(component: str | None) -> str:
        """Of the file, in a pipeline's folder."""
        return f"{component}/{FILE_NAME}" if component else FILE_NAME

    def _to_json(self) -> str:
        measured = {} if self.latency is None else {"latency": {**asdict(self.latency), "time_ratio": self.time_ratio}}
        return _compact({
            "format": FORMAT,
            **{name: value for name, value in (("backbone", self.backbone), ("component", self.component)) if value},
            "sites": [{"name": name, "macs": macs} for name, macs in zip(self.sites, self.macs, strict=True)],
            "macs_total": self.macs_total,
            "budget": {"cost": "macs" if self.latency is None else "latency",
                       "keep_ratio_target": self.keep_ratio_target, "over": self.budget_over,
                       "timesteps": self.timesteps, "keep_ratio_of_total": self.keep_ratio},
            **measured,
            "masks": self.mask_EL.astype(int).tolist(),
            "expert_of_timestep": self.expert_T.tolist(),
        })

    def push_to_hub(self, repo_id: str, token: str | None = None, private: bool | None = None) -> str:
        """Upload `experts.json` to a model repository, made if there is none; returns the address of the commit.

        The weights go there with the pipeline's own `push_to_hub`.
        """
        api = HfApi(token=token)
        api.create_repo(repo_id, private=private, exist_ok=True)
        return api.upload_file(path_or_fileobj=self._to_json().encode(), path_in_repo=self._place(self.component),
                               repo_id=repo_id)

    @classmethod
    def from_pretrained(cls, source: str | Path, revision: str | None = None, component: str | None = None,
                        **hub: Any) -> "TemporalExperts":
        """Read `experts.json` from a folder or, if there is no such folder, from a hub id.

        Args:
            component: the one that they are for, of a pipeline with two backbones; None: the first, or the only one
                that has experts.
            hub: further arguments of huggingface_hub's `hf_hub_download`, for example `token` or `cache_dir`.

        Raises:
            NoExperts: if there is no such file.
            InputError: naming the field that is missing or wrong.
        """
        if Path(source).is_file():
            raise InputError(f"experts: {source} is a file: name the folder that holds {FILE_NAME}")
        missing = ""
        for place in (component,) if component else (None, COMPONENTS[-1]):
            try:
                file = fetch(source, cls._place(place), {"revision": revision, **hub})
            except EntryNotFoundError as error:
                missing = missing or str(error).splitlines()[0]
            except (OSError, ValueError) as error:
                reason = (str(error).strip() or type(error).__name__).splitlines()[0]
                raise InputError(f"experts: {source}: no such folder, and the hub gave no {FILE_NAME} "
                                 f"({reason})") from None
            else:
                return cls._read(file, place)
        if Path(source).is_dir():
            raise NoExperts(f"{source}: holds no {cls._place(component)}: name a folder that training has finished")
        raise NoExperts(f"experts: {source}: no such folder, and the hub gave no {FILE_NAME} ({missing})")

    @classmethod
    def _read(cls, file: Path, component: str | None) -> "TemporalExperts":
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise InputError(f"{file}: not valid JSON ({error})") from None
        experts = cls._parse(file, content)
        if component not in (None, experts.component):
            raise InputError(f"{file}: component: found {experts.component!r}, and the folder is that of {component}")
        return experts

    @classmethod
    def build(cls, mask_EL: np.ndarray, expert_T: np.ndarray, cost: CostTable, keep_ratio_target: float,
              budget_over: str, timesteps: np.ndarray | None = None,
              latency: Latency | None = None, component: str | None = None) -> "TemporalExperts":
        """Join deterministic masks and routes with the costs of the sites."""
        return cls(cost.sites, mask_EL.astype(bool), expert_T.astype(np.int64), cost.macs, cost.macs_total,
                   keep_ratio_target, budget_over, None if timesteps is None else tuple(timesteps.tolist()), latency,
                   cost.backbone, component)

    def apply(self, target: Any) -> Applied:
        """Skip layers in `target`, a diffusers pipeline or its backbone, until `remove`.

        The backbone's own `timestep` argument decides, read at most once a forward. Pipelines that share the
        backbone are all served.

        Returns: a context manager that removes the experts at the end of its block.

        Raises:
            InputError: if the sites differ from this artefact's, or other experts are applied.
        """
        return Applied(target, self._backbone(target), self.sites, self.mask_EL, self.expert_T)

    def remove(self, target: Any) -> None:
        """Undo `apply`; the backbone is dense again.

        Raises:
            InputError: if these experts are not applied to it.
        """
        remove(self._backbone(target), self.mask_EL, self.expert_T)

    def compile(self, target: Any, **options: Any) -> None:
        """Apply the experts to `target`, if they are not, and torch.compile each of its prunable layers.

        Layers of one kind share a graph, and which of them run is chosen outside compiled code, so that a change of the
        expert compiles nothing. `options` are those of torch.compile. `remove` undoes it.

        Raises:
            InputError: as `apply`, or if other experts are applied.
        """
        backbone = self._backbone(target)
        if not hasattr(backbone, "_alter_applied"):
            self.apply(target)
        check_same(backbone._alter_applied, self.mask_EL, self.expert_T)
        backbone._alter_applied.simulator.compile(**options)

    def trim(self, target: Any) -> int:
        """Take the layers that no used expert runs out of memory, for good, and apply the experts to the rest.

        It undoes `compile`. The backbone can then neither run dense nor be saved.

        Returns: bytes of parameters freed.
        """
        backbone = self._backbone(target)
        sites = check_fit(backbone, self.sites, self.mask_EL, self.expert_T)
        if hasattr(backbone, "_alter_applied"):
            remove(backbone)
        freed = trim_layers(backbone, sites, self.mask_EL, self.used)
        self.apply(target)
        return freed

    def serving(self, simulator: Simulator) -> AbstractContextManager[None]:
        """As `apply`, inside a `with` block, for a backbone that `simulator` has gates on already."""
        return serving(simulator, self.mask_EL, self.expert_T)

    def _backbone(self, target: Any) -> Any:
        """The one that they are for, of a pipeline or alone; raises InputError for another class's."""
        backbone = backbone_of(target, self.component)
        found = backbone_class(backbone).__name__
        if self.backbone not in (None, found):
            raise InputError(f"experts: they were trained on a {self.backbone}, and this is a {found}: use the "
                             "backbone that they were trained on")
        return backbone

    @classmethod
    def _parse(cls, file: Path, content: Any) -> "TemporalExperts":
        def refuse(field: str, problem: str) -> InputError:
            return InputError(f"{file}: {field}: {problem}")

        if not isinstance(content, dict) or content.get("format") != FORMAT:
            found = content.get("format") if isinstance(content, dict) else content
            raise refuse("format", f"found {found!r}, this version of alter reads {FORMAT}")
        try:
            sites, macs = [tuple(site[name] for site in content["sites"]) for name in ("name", "macs")]
            masks, routes = content["masks"], content["expert_of_timestep"]
            total, budget = int(content["macs_total"]), content["budget"]
            target, over, averaged = float(budget["keep_ratio_target"]), str(budget["over"]), budget.get("timesteps")
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise refuse(str(error).strip("'"), "missing or of the wrong type") from None
        if not masks or any(len(row) != len(sites) for row in masks):
            raise refuse("masks", f"every expert needs {len(sites)} values, one a site")
        if any(value not in (0, 1) for row in masks for value in row):
            raise refuse("masks", "values must be 0 or 1")
        if not routes or any(not isinstance(e, int) or not 0 <= e < len(masks) for e in routes):
            raise refuse("expert_of_timestep", f"every timestep needs one of the experts 0 to {len(masks) - 1}")
        if averaged is not None and not (isinstance(averaged, list) and averaged and all(
                isinstance(t, int) and 0 <= t < len(routes) for t in averaged)):
            raise refuse("budget.timesteps", f"expected null or a list of timesteps 0 to {len(routes) - 1}")
        latency = None
        if budget.get("cost", "macs") != "macs":
            try:
                latency = Latency.parse(content["latency"])
            except (KeyError, TypeError, ValueError) as error:
                raise refuse("latency", f"missing or of the wrong type ({error})") from None
            if latency.sites != sites:
                raise refuse("latency.sites", "are not those of `sites`")
        backbone, component = content.get("backbone"), content.get("component")
        if not isinstance(backbone, str | None):
            raise refuse("backbone", "expected the name of a class")
        if component not in (None, *COMPONENTS):
            raise refuse("component", f"expected one of {', '.join(COMPONENTS)}")
        return cls(sites, np.array(masks, dtype=bool), np.array(routes, dtype=np.int64), macs, total, target, over,
                   averaged and tuple(averaged), latency, backbone, component)


def fetch(source: str | Path, name: str, hub: dict[str, Any]) -> Path:
    """A file of a folder or, with further arguments of `hf_hub_download`, a hub id; raises EntryNotFoundError if it is
    not there."""
    if not Path(source).is_dir():
        return Path(hf_hub_download(str(source), name, **hub))
    if not (Path(source) / name).is_file():
        raise LocalEntryNotFoundError(f"{source} holds no {name}")
    return Path(source) / name


def _compact(content: dict[str, Any]) -> str:
    """JSON with one line a key, a mask or a site, so that files can be read and compared."""
    def value(item: Any) -> str:
        if isinstance(item, list) and item and isinstance(item[0], (list, dict)):
            return "[\n    " + ",\n    ".join(json.dumps(part) for part in item) + "\n  ]"
        return json.dumps(item)
    return "{\n" + ",\n".join(f"  {json.dumps(name)}: {value(item)}" for name, item in content.items()) + "\n}\n"
