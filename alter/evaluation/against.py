"""Images against the dense model's of the same seeds and prompts, two folders that `alter sample` drew."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from ..common.errors import InputError
from ..data.images import Unreadable
from .image_sets import ImageSet, read_manifest
from .networks import Demo, Lpips
from .pairs import Estimate, drifts, mean, psnr, ratio, ssim
from .pictures import Pair
from .suite import Features, about

_DRIFT = "mean squared distance of a pair, relative to that of two dense images of other seeds"
PAIRS = {
    "psnr": "peak signal-to-noise ratio of 8-bit images in dB, mean over the pairs that differ",
    "ssim": "structural similarity, Gaussian window of 1.5 pixels, mean over pairs",
    "lpips": "LPIPS 0.1 with AlexNet, mean over pairs",
    "drift": f"{_DRIFT}: pool features, clean-fid's resizing",
    "drift_dinov2": f"{_DRIFT}: class tokens",
    "drift_latents": f"{_DRIFT}: what the VAE decodes",
}
USUAL = ("psnr", "ssim", "drift")  # and drift_latents where there are latents
_FEATURES = {"drift": ("clean", "pool"), "drift_dinov2": ("dinov2", "token")}
_BY = ("drift", "drift_dinov2", "lpips", "drift_latents", "ssim", "psnr")  # the first measured finds the worst
_FREE = ("steps", "scheduler", "guidance", "dtype")  # settings that may differ, and are told
SHOWN = 6  # of the worst pairs


def compare(images: ImageSet, dense: ImageSet, names: list[str] | None, features: Features,
            make_lpips: Callable[[], Lpips]) -> tuple[dict[str, dict[str, Any]], list[Pair]]:
    """Every metric's mean over pairs with its interval, as `suite.evaluate` gives results, and the worst pairs.

    Args:
        names: of PAIRS; None: `USUAL`, and drift_latents if both folders have latents.

    Returns: nothing on processes other than the first.

    Raises:
        InputError: if the folders differ in images, seeds, prompts or sizes, or what a metric needs is missing.
    """
    titles, differing = check_pairs(images, dense)
    if names is None:
        stored = all(_latents_file(each, 0).is_file() for each in (images, dense))
        names = [*USUAL, *(["drift_latents"] if stored else [])]
    lpips = make_lpips().to(features.state.device) if "lpips" in names else None
    for name in set(names) & _FEATURES.keys():
        features.network(_FEATURES[name][0])  # whatever is missing, before anything is computed
    extracted = {name: [torch.from_numpy(features(each, *_FEATURES[name])) for each in (images, dense)]
                 for name in names if name in _FEATURES}
    if not features.state.is_main_process:
        return {}, []
    if "drift_latents" in names:
        extracted["drift_latents"] = [_read_latents(each) for each in (images, dense)]
    by_pixels = _by_pixels(images, dense, [name for name in names if name not in extracted], lpips, features)
    values, results = dict[str, Tensor](), dict[str, dict[str, Any]]()
    for name in names:
        if name in extracted:
            try:
                moved, spread = drifts(*extracted[name])
            except ValueError as error:
                raise InputError(f"--metrics {name}: {error}") from None
            values[name], found = moved / spread.mean(), _written(ratio(moved, spread))
        else:
            values[name] = by_pixels[name]
            differs = values[name].isfinite()
            found = _written(mean(values[name][differs])) if differs.any() else {"value": "inf"}
            found |= {"identical": int((~differs).sum())} if name == "psnr" else {}
        network = features.network(_FEATURES[name][0]) if name in _FEATURES else lpips if name == "lpips" else None
        demo = "of a demo classifier, " if isinstance(network, Demo) else ""
        results[name] = {
            **found, "protocol": demo + PAIRS[name],
            "reference": {"source": str(dense.source), "images": len(dense), "differs": differing},
            "network": network and {"name": network.name, "sha256": network.digest}, **about(images, features.peaks)}
    return results, _worst(images, dense, titles, values)


def check_pairs(images: ImageSet, dense: ImageSet) -> tuple[list[str], dict[str, Any]]:
    """The pairs' prompts or classes, and the settings in which the two differ: [here, there] by name.

    Raises:
        InputError: if they are not known to be of the same seeds and prompts.
    """
    manifests = []
    for each in (images, dense):
        found = read_manifest(each.source, "draw it again with `alter sample`")
        if found is None or not set(each.names) <= found[1].keys():
            raise InputError(f"{each.source}: no manifest.json tells the seeds and prompts of its images: draw it with "
                             "`alter sample`")
        manifests.append(found)
    if single := set(images.names) ^ set(dense.names):
        raise InputError(f"{images.source} and {dense.source}: {min(single)} and {len(single) - 1} more are in one of "
                         "them alone: draw the same images in both")
    (here, ours), (there, theirs) = manifests
    for name in images.names:
        for key in ("seed", "condition"):
            if ours[name][key] != theirs[name][key]:
                raise InputError(f"{images.source} and {dense.source}: {name} has {key} {ours[name][key]!r} here and "
                                 f"{theirs[name][key]!r} there: draw both with the same seed and prompts or labels")
    differing = {key: [here.get(key), there.get(key)] for key in _FREE if here.get(key) != there.get(key)}
    return [str(ours[name]["condition"]) for name in images.names], differing


def _by_pixels(images: ImageSet, dense: ImageSet, names: list[str], lpips: Lpips | None,
               features: Features) -> dict[str, Tensor]:
    """What the images' own pixels tell of each pair: float64 [N] by metric."""
    found: dict[str, list[float]] = {name: [] for name in names}
    for i in tqdm(range(len(images)), unit="pair", dynamic_ncols=True, disable=not names):
        pair = [_pixels(image).to(features.state.device) for image in load_pair(images, dense, i)]
        side = min(pair[0].shape[-2:])
        if lpips is not None and side < lpips.SMALLEST:
            raise InputError(f"--metrics lpips: {images.names[i]} has a side of {side} pixels: AlexNet takes "
                             f"{lpips.SMALLEST} and more: leave lpips out")
        measures: dict[str, Any] = {"psnr": psnr, "ssim": ssim, "lpips": lpips}
        with torch.no_grad():
            for name in names:
                try:
                    found[name].append(measures[name](*pair).item())
                except ValueError as error:
                    raise InputError(f"--metrics {name}: {images.names[i]}: {error}") from None
    return {name: torch.tensor(values, dtype=torch.float64) for name, values in found.items()}


def load_pair(images: ImageSet, dense: ImageSet, i: int) -> list[Image.Image]:
    """The two RGB images of a pair.

    Raises:
        InputError: if one cannot be read, or their sizes differ.
    """
    loaded, sizes = [], []
    for each in (images, dense):
        try:
            image, about_it = each.load(i)
        except Unreadable as error:
            raise InputError(f"{each.source}: {each.names[i]} cannot be read ({error}): draw it again") from None
        loaded.append(image)
        sizes.append(about_it["size"])
    if sizes[0] != sizes[1]:
        raise InputError(f"{images.source} and {dense.source}: {images.names[i]} has {sizes[0]} pixels here and "
                         f"{sizes[1]} there: draw both at one size")
    return loaded


def _pixels(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 127.5 - 1


def _latents_file(images: ImageSet, i: int) -> Path:
    return (images.source / images.names[i]).with_suffix(".npy")


def _read_latents(images: ImageSet) -> Tensor:
    """[N, ...], of all images."""
    rows = []
    for i in range(len(images)):
        file = _latents_file(images, i)
        try:
            rows.append(torch.from_numpy(np.load(file, allow_pickle=False)).float())
        except (OSError, ValueError, TypeError) as error:
            raise InputError(f"--metrics drift_latents: {file}: no latents ({' '.join(str(error).split())[:200]}): "
                             "draw with `alter sample --latents`") from None
    try:
        return torch.stack(rows)
    except RuntimeError:
        raise InputError(f"--metrics drift_latents: {images.source}: its latents have several shapes: leave "
                         "drift_latents out") from None


def _written(estimate: Estimate) -> dict[str, Any]:
    return {"value": estimate.value, "standard_error": estimate.error, "ci95": [estimate.low, estimate.high]}


def _worst(images: ImageSet, dense: ImageSet, titles: list[str], values: dict[str, Tensor]) -> list[Pair]:
    """The pairs that differ most, the worst first."""
    measure = next(name for name in _BY if name in values)
    order = values[measure].argsort(descending=measure not in ("ssim", "psnr"))[:SHOWN].tolist()
    return [Pair(images.names[i], titles[i], {name: float(value[i]) for name, value in values.items()},
                 *load_pair(images, dense, i)) for i in order]
