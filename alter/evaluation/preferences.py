"""Models of human preference, for users who have installed them: the mean score of image and prompt."""

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from ..common.errors import InputError
from .image_sets import ImageSet

PREFERENCES = {
    "image_reward": "mean ImageReward-v1.0 (arXiv 2304.05977)",
    "hpsv2": "mean HPS v2.1 (arXiv 2306.09341)",
    "pickscore": "mean PickScore v1 (arXiv 2305.01569), 100 times the cosine",
}


def preference_scores(name: str, images: ImageSet, prompts: list[str], device: torch.device,
                      pickscore: Path) -> list[float]:
    """A score for each image with its prompt.

    ImageReward and hpsv2 load their own weights, from the hub if they are not cached.

    Raises:
        InputError: if the package or the model that it needs is missing.
    """
    score = {"image_reward": _image_reward, "hpsv2": _hpsv2, "pickscore": _pickscore}[name](device, pickscore)
    return [score(images.load(i)[0], prompt) for i, prompt in enumerate(prompts)]


def _package(name: str, metric: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise InputError(f"--metrics {metric}: the package {name} cannot be imported ({error}): install it, or leave "
                         "the metric out") from None


def _image_reward(device: torch.device, _: Path) -> Callable[[Image.Image, str], float]:
    model = _package("ImageReward", "image_reward").load("ImageReward-v1.0", device=str(device))
    return lambda image, prompt: float(model.score(prompt, [image]))


def _hpsv2(device: torch.device, _: Path) -> Callable[[Image.Image, str], float]:
    package = _package("hpsv2", "hpsv2")
    return lambda image, prompt: float(package.score([image], prompt, hps_version="v2.1")[0])


def _pickscore(device: torch.device, folder: Path) -> Callable[[Image.Image, str], float]:
    from transformers import AutoProcessor, CLIPModel

    if not (folder / "config.json").is_file():
        raise InputError(f"--pickscore-path {folder}: no such model: put a copy of yuvalkirstain/PickScore_v1 there, "
                         "with its processor")
    processor: Any = AutoProcessor.from_pretrained(folder)
    model: Any = CLIPModel.from_pretrained(folder, use_safetensors=True).eval().to(device)

    @torch.no_grad()
    def score(image: Image.Image, prompt: str) -> float:
        given = processor(images=image, text=prompt, padding=True, truncation=True, return_tensors="pt").to(device)
        found = model(**given)
        return 100 * float(torch.nn.functional.cosine_similarity(found.image_embeds, found.text_embeds))

    return score
