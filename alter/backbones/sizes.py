"""Pixels and latents: how large a pipeline folder's VAE makes them, and whether its backbone takes them."""

from pathlib import Path

from diffusers import AutoencoderKL, DiTTransformer2DModel

from ..common.errors import InputError
from .family import Backbone
from .inputs import is_class_conditional
from .pretrained import component_of, read_config


def latent_size(folder: Path, resolution: int) -> int:
    """Side of the latents: `resolution` in pixels, divided by the VAE's factor if the pipeline has a VAE.

    Raises:
        InputError: if the factor does not divide `resolution`.
    """
    factor = vae_factor(folder)
    if resolution % factor:
        raise InputError(f"data.resolution={resolution}: choose a multiple of the VAE's {factor}")
    return resolution // factor


def usual_resolution(folder: Path, component: str | None = None) -> int | None:
    """Side in pixels of the images that a pipeline's backbone was made for; None where its configuration does not say.
    """
    size = read_config(folder / component_of(folder, wanted=component)[1] / "config.json").get("sample_size")
    return size * vae_factor(folder) if isinstance(size, int) else None


def pixel_size(folder: Path, resolution: int, frames: int) -> tuple[int, ...]:
    """(height, width) of a pipeline's images; (frames, height, width) where it makes videos."""
    size = resolution, resolution
    return (frames, *size) if makes_videos(folder) else size


def makes_videos(folder: Path) -> bool:
    """Whether a pipeline's latents are of videos."""
    return "3D" in component_of(folder)[0].__name__


def latent_frames(folder: Path, frames: int) -> int:
    """Frames of the latents of a video.

    Raises:
        InputError: if the pipeline makes images, or its VAE takes no such number.
    """
    if frames == 1:
        return 1
    if not makes_videos(folder):
        raise InputError(f"data.frames={frames}: the backbone is of images: set 1")
    file = folder / "vae" / "config.json"
    config = read_config(file) if file.is_file() else {}
    factor = next((config[name] for name in ("temporal_compression_ratio", "scale_factor_temporal")
                   if config.get(name)), 4)
    for name in ("temperal_downsample", "spatio_temporal_scaling"):  # Wan; LTX-Video
        if name in config:
            factor = config.get("patch_size_t", 1) * 2 ** sum(config[name])
    if (frames - 1) % factor:
        raise InputError(f"data.frames={frames}: choose a multiple of the VAE's {factor}, and one more")
    return 1 + (frames - 1) // factor


def vae_factor(folder: Path) -> int:
    """Pixels a side of one latent pixel; 1 without a VAE."""
    file = folder / "vae" / "config.json"
    if not file.is_file():
        return 1
    config = read_config(file)
    for name in ("spatial_compression_ratio", "scale_factor_spatial"):
        if config.get(name):
            return config[name]
    if "spatio_temporal_scaling" in config:  # LTX-Video
        return config.get("patch_size", 4) * 2 ** sum(config["spatio_temporal_scaling"])
    if "temperal_downsample" in config:  # Wan, Qwen-Image; the key is spelt so
        return 2 ** len(config["temperal_downsample"])
    widths = config.get("encoder_block_out_channels") or config.get("block_out_channels", [64])
    return 2 ** (len(widths) - 1)


def check_latents(folder: Path, backbone: Backbone, resolution: int) -> None:
    """Refuse a VAE or a resolution that a backbone was not made for.

    Raises:
        InputError: naming both values.
    """
    file, channels = folder / "vae" / "config.json", backbone.config.in_channels
    if file.is_file():
        vae = read_config(file)
        name = vae.get("_class_name", AutoencoderKL.__name__)
        if is_class_conditional(backbone) and name != AutoencoderKL.__name__:
            raise InputError(f"{file}: a {name} beside a backbone of classes is not supported: use an AutoencoderKL")
        given = vae.get("latent_channels", vae.get("z_dim", 4))
        if channels not in (given, 4 * given):  # 4: packed by 2 x 2
            raise InputError(f"{file}: latent_channels={given} do not fit the backbone's in_channels={channels}: use "
                             "the VAE that it was trained with")
    if isinstance(backbone, DiTTransformer2DModel):  # its position embedding has one size
        made_for, size = backbone.config.sample_size, latent_size(folder, resolution)
        if size != made_for:
            raise InputError(f"data.resolution={resolution}: gives latents of {size}x{size}, and this DiT was made for "
                             f"{made_for}x{made_for}: use data.resolution={made_for * vae_factor(folder)}, or a DiT of "
                             "another size")


def check_bucket_step(folder: Path, step: int) -> None:
    """Refuse aspect-ratio buckets whose sides a pipeline cannot take; reads JSON only.

    Raises:
        InputError: about data.bucket_step.
    """
    cls, component = component_of(folder)
    if cls is DiTTransformer2DModel:
        raise InputError(f"data.bucket_step={step}: a DiT takes images of one shape: set null")
    config = read_config(folder / component / "config.json")
    patch = config.get("patch_size") or 1
    patch = max(2, *patch) if isinstance(patch, (list, tuple)) else max(2, patch)
    if "UNet" in cls.__name__:
        patch = 2 ** (len(config.get("block_out_channels", (320, 640, 1280, 1280))) - 1)
    multiple = vae_factor(folder) * patch
    if step % multiple:
        raise InputError(f"data.bucket_step={step}: choose a multiple of {multiple}, as the backbone and its VAE need")
