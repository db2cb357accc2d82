"""The text of experts.json: format 2, a family of masks and a ladder; format 1, which is still read, had one rung."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import numpy as np

from ..backbones.family import COMPONENTS
from ..backbones.latency import Latency
from ..common.errors import InputError
from ..method.measured import Measured
from .ladder import Experts, Rung

FORMAT = 2

_MOST_TIMESTEPS = 1_000_000


def to_text(experts: Experts) -> str:
    """JSON of format 2."""
    def plain(rung: Rung) -> dict[str, Any]:
        chosen = experts.choose(rung)
        return {"keep_ratio_target": rung.keep_ratio_target, "keep_ratio_of_total": chosen.keep_ratio,
                "time_ratio": chosen.time_ratio, "tuned": rung.tuned, "error": rung.error,
                "interval": rung.interval, "steps": rung.steps, **({"cached": True} if rung.cached else {}),
                "routes": runs(rung.expert_T)}

    measured = {"latency": experts.latency and asdict(experts.latency),
                "measured": experts.measured and experts.measured.to_plain()}
    named = {"backbone": experts.backbone, "component": experts.component}
    return _compact({
        "format": FORMAT,
        **{name: value for name, value in named.items() if value},
        "sites": [{"name": name, "macs": macs} for name, macs in zip(experts.sites, experts.macs, strict=True)],
        "macs_total": experts.macs_total,
        "budget": {"cost": "macs" if experts.latency is None else "latency", "over": experts.budget_over,
                   "timesteps": experts.timesteps},
        **{name: value for name, value in measured.items() if value},
        "masks": experts.mask_EL.astype(int).tolist(),
        "training_timesteps": len(experts.expert_T),
        "default": experts.keep_ratio_target,
        "ladder": [plain(rung) for rung in experts.ladder],
    })


def from_text(text: str) -> dict[str, Any]:
    """The arguments of `Experts`.

    Raises:
        InputError: naming the field that is missing or wrong.
    """
    try:
        content = json.loads(text)
    except ValueError as error:
        raise InputError(f"not valid JSON ({error})") from None
    found = content.get("format") if isinstance(content, dict) else content
    if type(found) is not int or found not in (1, FORMAT):
        raise InputError(f"format: found {found!r}, this version of alter reads 1 and {FORMAT}")
    with _field("sites"):
        sites = tuple(_text(site["name"]) for site in content["sites"])
        macs = tuple(_whole(site["macs"]) for site in content["sites"])
    with _field("macs_total"):
        total = _whole(content["macs_total"], 1)
        if total < sum(macs):
            raise ValueError(f"less than the {sum(macs)} of the sites")
    with _field("masks"):
        masks = [list(row) for row in content["masks"]]
        if not masks or any(len(row) != len(sites) for row in masks):
            raise ValueError(f"every expert needs {len(sites)} values, one a site")
        if any(value not in (0, 1) for row in masks for value in row):
            raise ValueError("values must be 0 or 1")
    with _field("budget"):
        budget = dict(content["budget"])
        if budget["over"] not in ("total", "prunable"):
            raise ValueError(f"over: expected total or prunable, found {budget['over']!r}")
        cost = budget.get("cost", "macs")
        if cost not in ("macs", "latency"):
            raise ValueError(f"cost: expected macs or latency, found {cost!r}")
    ladder, chosen = (_one_rung if found == 1 else _ladder)(content)
    with _field("budget.timesteps"):
        count, visited = len(ladder[0].expert_T), budget.get("timesteps")
        if visited is not None and not (visited and all(_whole(timestep) < count for timestep in visited)):
            raise ValueError(f"expected null or a list of timesteps 0 to {count - 1}")
    latency = measured = None
    if cost == "latency":
        with _field("latency"):
            latency = Latency.parse(content["latency"])
            if latency.sites != sites:
                raise ValueError("sites: are not those of `sites`")
    if content.get("measured") is not None:
        with _field("measured"):
            measured = Measured.from_plain(content["measured"])
    backbone, component = content.get("backbone"), content.get("component")
    if not isinstance(backbone, str | None):
        raise InputError(f"backbone: expected the name of a class, found {backbone!r}")
    if component not in (None, *COMPONENTS):
        raise InputError(f"component: expected one of {', '.join(COMPONENTS)}, found {component!r}")
    return {"sites": sites, "mask_EL": np.array(masks, dtype=bool), "macs": macs, "macs_total": total,
            "ladder": ladder, "chosen": chosen, "budget_over": budget["over"], "latency": latency,
            "timesteps": visited and tuple(visited), "backbone": backbone, "component": component,
            "measured": measured}


def runs(expert_T: np.ndarray) -> list[list[int]]:
    """Routes int [T] as [first timestep, expert] wherever they change."""
    firsts = [0, *(np.flatnonzero(np.diff(expert_T)) + 1).tolist()]
    return [[first, int(expert_T[first])] for first in firsts]


def from_runs(routes: list[list[int]], count: int) -> np.ndarray:
    """Int64 [count], the inverse.

    Raises:
        ValueError, TypeError: for what `runs` does not give.
    """
    firsts, experts = zip(*((_whole(first), _whole(expert)) for first, expert in routes), strict=True)
    lengths = np.diff([*firsts, count])
    if firsts[0] != 0 or any(lengths <= 0):
        raise ValueError(f"expected [first timestep, expert] from timestep 0, ascending below {count}")
    return np.repeat(np.array(experts, dtype=np.int64), lengths)


def _ladder(content: dict[str, Any]) -> tuple[tuple[Rung, ...], int]:
    with _field("training_timesteps"):
        count = _whole(content["training_timesteps"], 1)
        if count > _MOST_TIMESTEPS:
            raise ValueError(f"{count} are more than any scheduler has")
    rungs = []
    with _field("ladder"):
        for number, plain in enumerate(content["ladder"]):
            with _field(f"ladder[{number}]"):
                error, steps, interval = plain["error"], plain["steps"], plain.get("interval")
                tuned, cached = _flag(plain, "tuned"), _flag({"cached": False, **plain}, "cached")
                rungs.append(Rung(
                    _number(plain["keep_ratio_target"]), from_runs(plain["routes"], count), tuned,
                    None if error is None else _number(error), None if steps is None else _whole(steps),
                    None if interval is None else (_number(interval[0]), _number(interval[1])), cached))
    with _field("default"):
        targets = [rung.keep_ratio_target for rung in rungs]
        if content["default"] not in targets:
            raise ValueError(f"{content['default']!r} is the keep_ratio_target of no rung")
    return tuple(rungs), targets.index(content["default"])


def _one_rung(content: dict[str, Any]) -> tuple[tuple[Rung, ...], int]:
    """Of a file of format 1."""
    with _field("expert_of_timestep"):
        routes = [_whole(expert) for expert in content["expert_of_timestep"]]
        if not routes or max(routes) >= len(content["masks"]):
            raise ValueError(f"every timestep needs one of the experts 0 to {len(content['masks']) - 1}")
    with _field("budget"):
        target = _number(content["budget"]["keep_ratio_target"])
    return (Rung(target, np.array(routes, dtype=np.int64)),), 0


@contextmanager
def _field(name: str) -> Iterator[None]:
    """What goes wrong inside is said of that field, in one line."""
    try:
        yield
    except InputError:
        raise
    except KeyError as error:
        raise InputError(f"{name}: {'is missing' if error.args[0] == name else f'{error} is missing'}") from None
    except (AttributeError, IndexError, OverflowError, TypeError, ValueError) as error:
        raise InputError(f"{name}: {' '.join(str(error).split())[:200]}") from None


def _whole(value: Any, least: int = 0) -> int:
    if type(value) is not int or value < least:
        raise ValueError(f"expected a whole number of at least {least}, found {str(value)[:40]!r}")
    return value


def _number(value: Any) -> float:
    if type(value) not in (int, float):
        raise TypeError(f"expected a number, found {str(value)[:40]!r}")
    return float(value)


def _flag(plain: dict[str, Any], name: str) -> bool:
    if not isinstance(plain[name], bool):
        raise TypeError(f"{name}: expected true or false, found {plain[name]!r}")
    return plain[name]


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"expected a text, found {str(value)[:40]!r}")
    return value


def _compact(content: dict[str, Any]) -> str:
    """JSON with one line a key, a mask, a site or a rung, so that files can be read and compared."""
    def value(item: Any) -> str:
        if isinstance(item, list) and item and isinstance(item[0], (list, dict)):
            return "[\n    " + ",\n    ".join(json.dumps(part) for part in item) + "\n  ]"
        return json.dumps(item)
    return "{\n" + ",\n".join(f"  {json.dumps(name)}: {value(item)}" for name, item in content.items()) + "\n}\n"
