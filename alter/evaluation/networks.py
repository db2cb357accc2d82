"""Feature networks: what each metric's protocol makes of an image, and the weights it needs.

Weights come from files that the user has put there; nothing is downloaded, and nothing is unpickled.
"""

import hashlib
import io
from collections.abc import Callable, Mapping
from functools import cache, partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

from ..common.errors import InputError
from ..data.images import square
from .classifier import SmallClassifier

HUB = Path(torch.hub.get_dir()) / "checkpoints"
INCEPTION_FILE = "weights-inception-2015-12-05-6726825d.pth"  # of torch-fidelity's release v0.2.0
ALEXNET_FILE = "alexnet-owt-7be5be79.pth"  # of torchvision
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))


class Network(Protocol):
    """An image to a tensor, and batches of tensors to named features.

    Attributes:
        name: of network and protocol. digest: of its weights.
    """

    name: str
    digest: str

    @property
    def prepare(self) -> Callable[[Image.Image], Tensor]:
        """From RGB to [C, H, W] of a fixed size; it can be pickled, and holds no weights."""
        ...

    def features(self, images: Tensor) -> Mapping[str, Tensor]:
        """From [B, C, H, W] to features [B, D] each."""
        ...

    def to(self, device: torch.device) -> Any:
        """Move it there."""
        ...


class Inception(nn.Module):
    """The Inception of 2015 that FID is defined by: "pool" [2048], "logits" [1008] without bias, "spatial" [2023].

    Args:
        weights: state dict as torch-fidelity names it (`INCEPTION_FILE`).
        resize: clean: clean-fid's (arXiv 2104.11222), antialiased bicubic of each channel; legacy: TensorFlow 1's
            bilinear without antialiasing, as the original FID and ADM's evaluator do inside the graph.
    """

    LAYERS = ("Conv2d_1a_3x3", "Conv2d_2a_3x3", "Conv2d_2b_3x3", "MaxPool_1", "Conv2d_3b_1x1", "Conv2d_4a_3x3",
              "MaxPool_2", "Mixed_5b", "Mixed_5c", "Mixed_5d", "Mixed_6a", "Mixed_6b", "Mixed_6c", "Mixed_6d",
              "Mixed_6e", "Mixed_7a", "Mixed_7b", "Mixed_7c", "AvgPool")

    def __init__(self, weights: Path, resize: str) -> None:
        super().__init__()
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

        state = read_weights(weights, "--inception-weights", f"{INCEPTION_FILE} (torch-fidelity's release v0.2.0)")
        checked = io.BytesIO()  # torch-fidelity unpickles what it is given: give it what was read without that
        torch.save(state, checked)
        checked.seek(0)
        try:
            self.net = FeatureExtractorInceptionV3("inception", ["2048"], feature_extractor_weights_path=checked)
        except (RuntimeError, TypeError) as error:
            raise InputError(f"--inception-weights {weights}: other weights than {INCEPTION_FILE} "
                             f"({' '.join(str(error).split())[:200]})") from None
        self.name, self.digest, self.resize = f"inception, {resize} resizing", file_digest(weights), resize
        self.prepare = _resized_clean if resize == "clean" else _resized_legacy

    def features(self, images: Tensor) -> dict[str, Tensor]:
        x, spatial = (images - 128) / 128, None
        for name in self.LAYERS:
            if name == "Mixed_6d":  # TensorFlow's mixed_6/conv, first 7 channels, channels last: 17·17·7 values
                spatial = getattr(self.net, name).branch1x1(x)[:, :7].permute(0, 2, 3, 1).flatten(1)
            x = getattr(self.net, name)(x)
        pool = x.flatten(1)
        assert spatial is not None
        return {"pool": pool, "logits": pool @ self.net.fc.weight.T, "spatial": spatial}


class Dino(nn.Module):
    """DINOv2's class token, for FD-DINOv2 (arXiv 2306.04675): "token" [D]."""

    def __init__(self, weights: Path, architecture: str) -> None:
        super().__init__()
        import timm

        read_weights(weights, "--dinov2-weights", f"timm's model.safetensors of {architecture}")
        try:
            self.net = timm.create_model(architecture, dynamic_img_size=True, num_classes=0,
                                         checkpoint_path=str(weights))
        except RuntimeError as error:
            raise InputError(f"--dinov2-weights {weights}: not of {architecture} "
                             f"({' '.join(str(error).split())[:200]})") from None
        self.name, self.digest = f"timm {architecture}, 224 px", file_digest(weights)
        self.prepare = partial(_normalized, size=224, statistics=IMAGENET)
        self.eval().requires_grad_(False)

    def features(self, images: Tensor) -> dict[str, Tensor]:
        return {"token": self.net(images)}


class ClipVision(nn.Module):
    """The image half of a CLIP in transformers' format, for CMMD: "embedding" [D].

    Args:
        option: by which the user named it, for messages.
    """

    def __init__(self, folder: Path, option: str = "--cmmd-model-path ") -> None:
        super().__init__()
        from transformers import CLIPVisionModelWithProjection

        if not (folder / "config.json").is_file():
            raise InputError(f"{option}{folder}: no such model: put a copy of "
                             "openai/clip-vit-large-patch14-336 there (config.json and model.safetensors)")
        try:
            self.net, found = CLIPVisionModelWithProjection.from_pretrained(
                folder, dtype=torch.float32, local_files_only=True, output_loading_info=True)
        except (OSError, RuntimeError, ValueError) as error:
            raise InputError(f"{option}{folder}: {' '.join(str(error).split())[:200]}") from None
        if found["missing_keys"]:  # which would be random
            raise InputError(f"{option}{folder}: its weights lack {sorted(found['missing_keys'])[0]} and "
                             "maybe more: name a CLIP with its image projection")
        self.size = self.net.config.image_size
        self.name = f"CLIP vision of {folder.name}, centre square of {self.size} px"
        files = sorted(file for file in folder.iterdir() if file.suffix in (".json", ".safetensors", ".bin"))
        self.digest = hashlib.sha256("".join(map(file_digest, files)).encode()).hexdigest()
        self.prepare = partial(_normalized_square, size=self.size)
        self.eval().requires_grad_(False)

    def features(self, images: Tensor) -> dict[str, Tensor]:
        return {"embedding": self.net(pixel_values=images).image_embeds}


class OpenClip(nn.Module):
    """An open_clip model: "embedding" [D] of images, and `embed` of captions."""

    def __init__(self, architecture: str, weights: Path) -> None:
        super().__init__()
        import open_clip

        read_weights(weights, "--clip-model-path", f"open_clip's weights of {architecture}")
        if architecture not in open_clip.list_models():
            raise InputError(f"--clip-model {architecture}: open_clip knows no such model: use for example ViT-g-14")
        text = open_clip.get_model_config(architecture)["text_cfg"]
        if "hf_tokenizer_name" in text or "hf_model_name" in text:
            raise InputError(f"--clip-model {architecture}: open_clip would download its tokenizer: use for example "
                             "ViT-g-14")
        try:
            self.net, _, self.prepare = open_clip.create_model_and_transforms(architecture, pretrained=str(weights))
        except RuntimeError as error:
            raise InputError(f"--clip-model-path {weights}: not of {architecture} "
                             f"({' '.join(str(error).split())[:200]})") from None
        self._tokenize = open_clip.get_tokenizer(architecture)
        self.name, self.digest = f"open_clip {architecture}", file_digest(weights)
        self.eval().requires_grad_(False)

    def features(self, images: Tensor) -> dict[str, Tensor]:
        return {"embedding": self.net.encode_image(images)}

    @torch.no_grad()
    def embed(self, captions: list[str]) -> np.ndarray:
        """Text embeddings [N, D]."""
        device = next(self.net.parameters()).device
        parts = [self.net.encode_text(self._tokenize(captions[first : first + 64]).to(device)).float().cpu()
                 for first in range(0, len(captions), 64)]
        return torch.cat(parts).numpy()


class Lpips(nn.Module):
    """LPIPS (arXiv 1801.03924), version 0.1 with AlexNet: distances float32 [B] of images [B, 3, H, W] in [-1, 1].

    Its linear layers come with torchmetrics.

    Args:
        weights: state dict of torchvision's AlexNet (`ALEXNET_FILE`).
    """

    SMALLEST = 32  # sides in pixels that reach the last layer

    def __init__(self, weights: Path) -> None:
        super().__init__()
        from torchmetrics.functional.image.lpips import _LPIPS

        state = read_weights(weights, "--lpips-weights", f"torchvision's {ALEXNET_FILE}")
        self.net = _LPIPS(net="alex", pnet_rand=True)
        try:
            for part in self.net.net.children():
                part.load_state_dict({name: state[f"features.{name}"] for name in part.state_dict()})
        except (KeyError, RuntimeError) as error:
            raise InputError(f"--lpips-weights {weights}: other weights than {ALEXNET_FILE} "
                             f"({' '.join(str(error).split())[:200]})") from None
        self.name, self.digest = "LPIPS 0.1, AlexNet", file_digest(weights)
        self.eval().requires_grad_(False)

    def forward(self, images: Tensor, dense: Tensor) -> Tensor:
        return self.net(images, dense).flatten()


class Demo(nn.Module):
    """The demos' small classifier in Inception's place: "pool" [64] and "logits"; of any image, for whole dry runs."""

    def __init__(self, classifier: SmallClassifier, size: int, channels: int) -> None:
        super().__init__()
        self.net, self.prepare = classifier, partial(_small, size=size, channels=channels)
        weights = b"".join(value.cpu().numpy().tobytes() for value in classifier.state_dict().values())
        self.name, self.digest = "demo classifier", hashlib.sha256(weights).hexdigest()

    def features(self, images: Tensor) -> dict[str, Tensor]:
        pool = self.net.features(images)
        return {"pool": pool, "logits": self.net.head(pool)}


@torch.no_grad()
def embedded(network: ClipVision, images: Tensor) -> Tensor:
    """Embeddings float32 [B, D] of finite images [B, 1 or 3, H, W] in [-1, 1], as of their files."""
    pixels = ((images + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
    pictures = [Image.fromarray(np.broadcast_to(image, (*image.shape[:2], 3))) for image in pixels]
    prepared = torch.stack([network.prepare(picture) for picture in pictures])
    return network.features(prepared.to(network.net.device))["embedding"]


def read_weights(file: Path, option: str, wanted: str) -> dict[str, Tensor]:
    """A state dict, from safetensors or without unpickling."""
    if not file.is_file():
        raise InputError(f"{option} {file}: no such file: put {wanted} there, or name where it is")
    try:
        return load_file(file) if file.suffix == ".safetensors" else torch.load(
            file, map_location="cpu", weights_only=True)
    except Exception as error:  # of a damaged or hostile file: unpickling, zip and header errors of every kind
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"{option} {file}: not readable as plain weights ({reason})") from None


def file_digest(file: Path) -> str:
    with open(file, "rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def _normalized(image: Image.Image, size: int, statistics: tuple[tuple[float, ...], tuple[float, ...]]) -> Tensor:
    """The image squeezed to size × size (bicubic, antialiased), in [0, 1], normalised."""
    pixels = torch.from_numpy(np.array(image.resize((size, size), Image.Resampling.BICUBIC))).permute(2, 0, 1) / 255
    mean, deviation = (torch.tensor(values)[:, None, None] for values in statistics)
    return (pixels - mean) / deviation


def _normalized_square(image: Image.Image, size: int) -> Tensor:
    return _normalized(square(image, size), size, CLIP)


@cache
def _clean_resizer() -> Callable[[np.ndarray], np.ndarray]:
    from cleanfid.resize import build_resizer

    return build_resizer("clean")


def _resized_clean(image: Image.Image) -> Tensor:
    return torch.from_numpy(_clean_resizer()(np.asarray(image))).permute(2, 0, 1)


def _resized_legacy(image: Image.Image) -> Tensor:
    from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x

    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float()
    return interpolate_bilinear_2d_like_tensorflow1x(pixels, size=(299, 299), align_corners=False)[0]


def _small(image: Image.Image, size: int, channels: int) -> Tensor:
    """The image squeezed to size × size, in [-1, 1]."""
    small = np.array(image.convert("RGB" if channels == 3 else "L").resize((size, size), Image.Resampling.BICUBIC))
    return torch.from_numpy(small.reshape(size, size, channels)).permute(2, 0, 1).float() / 127.5 - 1
