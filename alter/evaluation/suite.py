"""A set of metrics of one image set."""

import json
import platform
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import PartialState
from accelerate.utils import gather_object

from ..common.errors import InputError
from ..common.process import peak_memory
from .distances import moments
from .features import extract
from .image_sets import ImageSet, load_npz
from .metrics import METRICS, Metric
from .networks import Demo, Network, OpenClip
from .preferences import PREFERENCES

LIBRARIES = ("torch", "torchvision", "pillow", "timm", "open_clip_torch", "clean-fid", "torch-fidelity",
             "transformers", "scipy", "numpy")
ADM = {"mu": "mean legacy pool", "sigma": "covariance legacy pool",
       "mu_s": "mean legacy spatial", "sigma_s": "covariance legacy spatial"}


class Features:
    """Features of image sets under lazily made networks, each extracted once.

    Args:
        make: from a network's key ("clean", "legacy", "dinov2", "clip", "cmmd") to the network.
    """

    def __init__(self, make: Callable[[str], Network], cache: Path, batch_size: int, workers: int,
                 state: PartialState) -> None:
        self.make, self.cache, self.batch_size, self.workers, self.state = make, cache, batch_size, workers, state
        self.networks: dict[str, Network] = {}
        self.warnings: list[str] = []
        self.peaks: list[tuple[int, int]] = []  # of every process, in main memory and on its GPU
        self.seconds: dict[str, float] = {}  # of extraction or reading, by network
        self._known: dict[tuple[str, str], dict[str, np.ndarray]] = {}

    def network(self, key: str) -> Network:
        if key not in self.networks:
            self.networks[key] = self.make(key)
        return self.networks[key]

    def __call__(self, images: ImageSet, key: str, name: str) -> np.ndarray:
        """float32 [N, D]."""
        known = (images.digest, key)
        if known not in self._known:
            network = self.network(key)
            started = time.perf_counter()
            found, odd = extract(images, network, self.cache, self.batch_size, self.workers, self.state)
            self.seconds[key] = self.seconds.get(key, 0.0) + time.perf_counter() - started
            self._known[known] = found
            self.warnings += [line for line in (*odd, *images.warnings()) if line not in self.warnings]
        if name not in self._known[known]:
            raise InputError(f"{self.network(key).name} has no {name} features: leave out the metrics that need them")
        return self._known[known][name]


class Reference:
    """Real images, or their statistics: a folder, an ADM reference batch, or a file that `save` wrote."""

    def __init__(self, source: str | Path, features: Features, resize: int | None) -> None:
        self.source, self.features, self.resize = str(source), features, resize
        self.images: ImageSet | None = None
        self.statistics: dict[str, np.ndarray] = {}
        self.about: dict[str, Any] = {}
        if Path(source).suffix == ".npz":
            arrays = load_npz(Path(source))
            try:
                self.about = dict(json.loads(str(arrays.pop("about", "{}"))))
            except (TypeError, ValueError) as error:
                raise InputError(f"--reference {source}: what it says of itself is no JSON ({error}): make it again "
                                 "with --save-stats") from None
            self.statistics = {ADM.get(name, name): value for name, value in arrays.items() if name != "arr_0"}
            if "arr_0" not in arrays:
                return
        self.images = ImageSet(source, resize)

    def __call__(self, metric: Metric) -> Any:
        """Mean and covariance, or the features, whichever the metric is measured against."""
        key = f"{metric.network} {metric.features}"
        if self._has_statistics(metric):
            return self.statistics[f"mean {key}"], self.statistics[f"covariance {key}"]
        found = self.extract(metric)
        return moments(found) if metric.against == "statistics" else found

    def extract(self, metric: Metric) -> Any:
        """The features that the metric needs; None where statistics are there.

        Raises:
            InputError: if neither is to be had, or the statistics are of other weights or another resizing.
        """
        if self._has_statistics(metric):
            recorded = self.about.get("networks", {}).get(metric.network)
            if recorded is not None and recorded["sha256"] != self.features.network(metric.network).digest:
                raise InputError(f"--reference {self.source}: its statistics are of {recorded['name']} with other "
                                 "weights: make them again")
            if self.about.get("resize") != self.resize:
                raise InputError(f"--reference {self.source}: made with --resize {self.about.get('resize')}, not "
                                 f"{self.resize}: make it again")
            return None
        if self.images is None:
            raise InputError(f"--reference {self.source}: has no images and no statistics of {metric.network} "
                             f"{metric.features} features, which this metric needs: name a folder of images")
        return self.features(self.images, metric.network, metric.features)

    def _has_statistics(self, metric: Metric) -> bool:
        return metric.against == "statistics" and f"mean {metric.network} {metric.features}" in self.statistics

    def count(self, metric: Metric) -> int | None:
        """Images that the metric compares with; None where a file of statistics does not say it."""
        if self._has_statistics(metric):
            return self.about.get("images")
        return len(self.images) if self.images is not None else None

    def save(self, file: Path, metrics: Sequence[Metric]) -> None:
        """Write the statistics that these metrics need; read back as a reference without its images.

        Raises:
            InputError: if they need none, or this reference has no images itself.
        """
        if self.images is None or not any(metric.against == "statistics" for metric in metrics):
            raise InputError(f"--save-stats {file}: needs a --reference with images, and a metric of statistics (fid)")
        arrays: dict[str, np.ndarray] = {}
        networks = {}
        for metric in metrics:
            if metric.against == "statistics":
                key = f"{metric.network} {metric.features}"
                arrays[f"mean {key}"], arrays[f"covariance {key}"] = self(metric)
                network = self.features.network(metric.network)
                networks[metric.network] = {"name": network.name, "sha256": network.digest}
        about = {"images": len(self.images), "source": Path(self.source).name, "networks": networks,
                 "resize": self.resize}
        partial = file.with_name(f".{file.name}")
        with open(partial, "wb") as content:
            np.savez(content, **{"about": np.array(json.dumps(about)), **arrays})  # type: ignore[arg-type]
        partial.replace(file)


def evaluate(images: ImageSet, names: Sequence[str], features: Features, reference: Reference | None,
             prompts: list[str] | None, resamples: int,
             prefer: Callable[[str, list[str]], list[float]] | None = None) -> dict[str, dict[str, Any]]:
    """Every metric's value, and all that is needed to repeat it; on processes other than the first, nothing.

    Args:
        names: of METRICS or PREFERENCES. prompts: one an image. resamples: of the bootstrap; 0: no intervals.
        prefer: from one of PREFERENCES and the prompts to a score an image.

    Raises:
        InputError: if a metric lacks its reference or prompts.
    """
    for name in names:
        against = METRICS[name].against if name in METRICS else "texts"
        if against in ("statistics", "features") and reference is None:
            raise InputError(f"--metrics {name}: needs --reference")
        if against == "texts" and (prompts is None or len(prompts) != len(images)):
            raise InputError(f"--metrics {name}: needs a prompt for each of the {len(images)} images, in the order of "
                             f"their names, found {len(prompts or [])}: use --prompts")
    for each in (images, reference.images if reference else None):
        if each is not None and len(each) < 4:
            raise InputError(f"{each.source}: a set of {len(each)} images is too small for any of these metrics")
    wanted = [METRICS[name] for name in names if name in METRICS]
    if any(metric.against == "texts" for metric in wanted) and images.repeated_names:
        raise InputError(f"{images.source}: several images are named {images.repeated_names[0]}: which prompt is whose "
                         "cannot be told; put them in one folder, under one name each")
    for metric in wanted:
        features.network(metric.network)  # whatever is missing, before anything is computed
    for metric in wanted:  # on all processes
        features(images, metric.network, metric.features)
        if reference is not None and metric.against in ("statistics", "features"):
            reference.extract(metric)
    features.peaks = gather_object([peak_memory()])
    if not features.state.is_main_process:
        return {}
    results = {}
    for name in names:
        if name in METRICS:
            results[name] = _one(METRICS[name], images, features, reference, prompts, resamples)
        else:
            assert prefer is not None and prompts is not None
            results[name] = _preference(name, prefer, prompts) | about(images, features.peaks)
    return results


def _one(metric: Metric, images: ImageSet, features: Features, reference: Reference | None,
         prompts: list[str] | None, resamples: int) -> dict[str, Any]:
    started = time.perf_counter()
    x, network = features(images, metric.network, metric.features), features.network(metric.network)
    against: Any = None
    if metric.against == "texts":
        assert prompts is not None
        assert isinstance(network, OpenClip)
        against = network.to(features.state.device).embed(prompts)
    elif metric.against:
        assert reference is not None
        against = reference(metric)
    if metric.against == "statistics":
        assert reference is not None
        if against[0].shape != x.shape[1:]:
            raise InputError(f"--reference {reference.source}: statistics of {len(against[0])} features, "
                             f"{network.name} has {x.shape[1]}: use a reference made with it")
        for which, count in ((str(images.source), len(x)), ("the reference", reference.count(metric))):
            if count is not None and count <= x.shape[1]:
                features.warnings.append(f"{which}: {count} images for {x.shape[1]} features: its covariance is "
                                         "rank-deficient, and the distance is biased")
    result: dict[str, Any] = metric.measure(x, against)
    if resamples > 1:
        margin = 1.96 * metric.deviation(x, against, result["value"], resamples)
        result["ci95"] = [result["value"] - margin, result["value"] + margin]
    return {
        **result, "protocol": f"{'of a demo classifier, ' if isinstance(network, Demo) else ''}{metric.protocol}",
        "reference": {"source": reference.source, "images": reference.count(metric)} if reference and (
            metric.against in ("statistics", "features")) else None,
        "network": {"name": network.name, "sha256": network.digest}, "seconds": time.perf_counter() - started,
        "seconds_of_features": features.seconds[metric.network], **about(images, features.peaks),
    }


def _preference(name: str, prefer: Callable[[str, list[str]], list[float]], prompts: list[str]) -> dict[str, Any]:
    started = time.perf_counter()
    scores = np.array(prefer(name, prompts))
    margin = 1.96 * float(scores.std()) / len(scores) ** 0.5
    return {"value": float(scores.mean()), "ci95": [scores.mean() - margin, scores.mean() + margin],
            "protocol": PREFERENCES[name], "reference": None, "network": {"name": name, "sha256": None},
            "seconds": time.perf_counter() - started}


def about(images: ImageSet, peaks: list[tuple[int, int]]) -> dict[str, Any]:
    """What every result says of the images, the memory that the features took (of each process), and the libraries."""
    main, gpu = (max(values) for values in zip(peak_memory(), *peaks, strict=True))
    return {
        "images": len(images), "images_protocol": images.protocol, "peak_memory_bytes": main,
        "peak_gpu_memory_bytes": gpu,
        "libraries": {name: version(name) for name in LIBRARIES} | {"python": platform.python_version()},
    }


def table(results: dict[str, dict[str, dict[str, Any]]]) -> str:
    """A row a metric, a column a set of results by name; value ± 1.96 standard deviations where they are known."""
    names = list(dict.fromkeys(name for result in results.values() for name in result))
    rows = [["", *results]]
    for name in names:
        keys = ["precision", "recall"] if name == "prc" else ["value"]
        for key in keys:
            cells = (_cell(result.get(name), key) for result in results.values())
            rows.append([name if key == "value" else key, *cells])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
                     for row in rows)


def _cell(result: dict[str, Any] | None, key: str) -> str:
    if result is None:
        return "-"
    interval = f" ± {(result['ci95'][1] - result['ci95'][0]) / 2:.3g}" if "ci95" in result and key == "value" else ""
    return f"{float(result[key]):.5g}{interval}"
