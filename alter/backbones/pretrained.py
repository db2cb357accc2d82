"""Pretrained diffusers folders: their backbone and VAE, read and written."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import AutoencoderKL, DiffusionPipeline, DiTTransformer2DModel
from packaging.version import Version
from safetensors.torch import load_file, save_file
from torch import nn

from ..common.errors import InputError
from ..common.files import publish
from .dit import tie_embedders
from .family import COMPONENTS, Backbone
from .inputs import check_supported
from .lora import Base

DTYPES = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
_EXACT = ["norm1.emb"]  # not quantised: a DiT's embedders, which are compared and shared
_UNNAMED = {"unet": "UNet2DConditionModel", "transformer": "DiTTransformer2DModel"}  # in configurations without a class
_TRANSFORMERS = ("Transformer1DModel", "Transformer2DModel", "Transformer3DModel", "DiT2DModel", "DiTModel")


class _AnyPipeline(DiffusionPipeline):
    """Downloads a pipeline of any class; DiffusionPipeline itself only those that diffusers knows, and so not ours."""


def base_of(pretrained: str, revision: str | None, folder: Path, component: str) -> Base:
    """What adapters trained on a component of `pretrained`, whose pipeline is in `folder`, belong to."""
    place, revision = root(pretrained, revision)
    local, fp16 = Path(place).is_dir(), any(variant_of(part) for part in folder.iterdir() if part.is_dir())
    return Base(str(Path(place).resolve()) if local else place, revision, component,
                {"variant": "fp16"} if fp16 else {})


def root(pretrained: str, revision: str | None = None) -> tuple[str, str | None]:
    """The folder or hub id, and the revision, of the pipeline with the weights: that of a run's adapters, or itself.

    Raises:
        InputError: if the adapters' pipeline is not there.
    """
    base = Base.beside(pretrained)
    return (pretrained, revision) if base is None else (base.place(pretrained), base.revision)


def local_folder(pretrained: str, revision: str | None = None, field: str = "backbone.pretrained") -> Path:
    """The folder of a pretrained pipeline, for a run's adapters of the one that they belong to; a hub id is downloaded
    into the hub's cache first.

    Raises:
        InputError: naming `field`, if there is neither such a folder nor such a hub id.
    """
    pretrained, revision = root(pretrained, revision)
    if Path(pretrained).is_dir():
        return Path(pretrained)
    if Path(pretrained).exists():
        raise InputError(f"{field}={pretrained!r} is a file: convert a single-file checkpoint with diffusers, "
                         f"StableDiffusionPipeline.from_single_file({pretrained!r}).save_pretrained('FOLDER'), and "
                         "give that folder")
    try:
        folder = Path(_AnyPipeline.download(pretrained, revision=revision))
        if not [*folder.glob("*/*.safetensors"), *folder.glob("*/*.bin")]:  # diffusers takes fp16 files if asked alone
            folder = Path(_AnyPipeline.download(pretrained, revision=revision, variant="fp16"))
        return folder
    except (AttributeError, OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(f"{field}={pretrained!r}: no such folder, and the hub gave nothing "
                         f"({reason}): give a diffusers folder or a hub id") from None


def component_of(folder: Path, field: str = "backbone.pretrained",
                 wanted: str | None = None) -> tuple[type[Backbone], str]:
    """The class and the sub-folder of a pipeline folder's backbone; reads JSON only.

    wanted: the sub-folder, where the pipeline has two backbones; None: the first.

    Raises:
        InputError: if there is none, it is of another class, or it needs what alter does not give it.
    """
    for component in COMPONENTS if wanted is None else (wanted,):
        if (folder / component / "config.json").is_file():
            config = read_config(folder / component / "config.json", field)
            found = config.get("_class_name") or _UNNAMED.get(component, "")
            if found == "Transformer2DModel" and config.get("norm_type") == "ada_norm_zero":  # DiT's former name
                found = DiTTransformer2DModel.__name__
            cls: Any = getattr(diffusers, found, None)
            if cls is None or not _is_backbone({"_class_name": found}):
                raise InputError(f"{field}={str(folder)!r}: a {found} is no backbone that this diffusers and alter "
                                 "know: use a UNet2DConditionModel or a transformer")
            check_supported(found, config, field)
            return cls, component
    if (folder / "config.json").is_file() and _is_backbone(read_config(folder / "config.json", field)):
        raise InputError(f"{field}={str(folder)!r} is the backbone alone: give the pipeline's folder, "
                         "which is the one above in most cases")
    if wanted is not None:
        raise InputError(f"{field}={str(folder)!r} has no {wanted}/: change backbone.component={wanted}, or leave it "
                         "out")
    raise InputError(f"{field}={str(folder)!r} has neither unet/ nor transformer/: "
                     "give a diffusers pipeline folder")


def told_component(folder: Path, component: str | None) -> str | None:
    """What an experts.json says of the component `component_of` finds: None for the first that the pipeline has."""
    found = component_of(folder, wanted=component)[1]
    return None if found == component_of(folder)[1] else found


def _is_backbone(config: dict[str, Any]) -> bool:
    return str(config.get("_class_name")).endswith(("UNet2DConditionModel", *_TRANSFORMERS))


def share_of(folder: Path, component: str) -> tuple[float, float] | None:
    """The part [low, high) of the timesteps, in units of T, that a component serves; None where it serves all.

    Of two backbones (Wan 2.2), the first has those from the pipeline's `boundary_ratio` on, T itself included.

    Raises:
        InputError: if the pipeline does not say where the border is.
    """
    second = COMPONENTS[-1]
    if not (folder / second).is_dir():
        return None
    file = folder / "model_index.json"
    ratio = read_config(file).get("boundary_ratio")
    if not isinstance(ratio, float) or not 0 < ratio < 1:
        raise InputError(f"backbone.pretrained={str(folder)!r}: has a second backbone, {second}, and {file} does not "
                         f"say which timesteps are whose (boundary_ratio={ratio!r}): use a pipeline that says so")
    return (0.0, ratio) if component == second else (ratio, math.inf)


def condition_of(folder: Path) -> str:
    """What a pipeline folder's backbone is conditioned on: "class" or "text"; raises as `component_of`."""
    return "class" if component_of(folder)[0].__name__ == "DiTTransformer2DModel" else "text"


def pipeline_of(folder: Path) -> str:
    """The name of a pipeline folder's class; "" if it does not say."""
    file = folder / "model_index.json"
    return str(read_config(file).get("_class_name", "")) if file.is_file() else ""


def absent_parts(index: dict[str, Any]) -> dict[str, None]:
    """Those that a model_index.json says it lacks; diffusers must be told so of some, such as SD3's third encoder."""
    return {name: None for name, value in index.items() if isinstance(value, (list, tuple)) and value[-1] is None}


def read_config(file: Path, field: str = "backbone.pretrained") -> dict[str, Any]:
    """A JSON object of a pretrained folder.

    Raises:
        InputError: if it is none.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{field}: {file} cannot be read ({type(error).__name__}): "
                         "fetch it again") from None
    if not isinstance(content, dict):
        raise InputError(f"{field}: {file}: expected a JSON object")
    return content


def meta_backbone(folder: Path, field: str = "backbone.pretrained", component: str | None = None) -> Backbone:
    """The pipeline's backbone on the meta device, from its configuration alone; `component` as for `component_of`.

    Raises:
        InputError: if there is none, or diffusers cannot make it.
    """
    cls, component = component_of(folder, field, component)
    try:
        with torch.device("meta"):
            backbone = cls.from_config(cls.load_config(folder / component))
    except (AttributeError, NotImplementedError, RuntimeError, TypeError, ValueError, ZeroDivisionError) as error:
        raise InputError(f"{field}: {folder / component / 'config.json'}: diffusers cannot make this "
                         f"{cls.__name__} ({' '.join(str(error).split())[:200]}): fetch it again") from None
    tie_embedders(backbone)
    return backbone


def load_backbone(folder: Path, field: str = "backbone.pretrained", dtype: torch.dtype = torch.float32,
                  quantize: str | None = None, component: str | None = None) -> Backbone:
    """The pipeline's UNet or transformer, from safetensors (or, with `weights_only`, older weight files).

    Args:
        dtype: of its weights, but for the few that diffusers keeps in fp32.
        quantize: "int8" or "nf4" for the weights of its linear layers. component: as for `component_of`.

    Raises:
        InputError: if it cannot be loaded, or weights are missing.
    """
    cls, component = component_of(folder, field, component)
    return _load(cls, folder / component, dtype, field, **_quantized(quantize, dtype))


def hollow(cls: Any, folder: Path, device: torch.device | str, dtype: torch.dtype) -> Backbone:
    """A backbone whose parameters have no elements, on `device`, for pipelines that only ask where and what it is."""
    with torch.device("meta"):
        backbone = cls.from_config(cls.load_config(folder))
    for module in backbone.modules():
        for name, value in module._parameters.items():
            if value is not None:
                module._parameters[name] = nn.Parameter(torch.empty(0, dtype=dtype, device=device), False)
        for name, value in module._buffers.items():
            if value is not None:
                module._buffers[name] = torch.empty(0, dtype=value.dtype, device=device)
    return backbone


def _quantized(kind: str | None, dtype: torch.dtype) -> dict[str, Any]:
    """Arguments of diffusers' `from_pretrained`."""
    if kind == "int8":
        from torchao.quantization import Int8WeightOnlyConfig  # optional

        return {"quantization_config": diffusers.TorchAoConfig(Int8WeightOnlyConfig(), modules_to_not_convert=_EXACT)}
    if kind == "nf4":
        return {"quantization_config": diffusers.BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype, llm_int8_skip_modules=_EXACT)}
    return {}


def load_vae(folder: Path, device: torch.device | str, dtype: torch.dtype) -> AutoencoderKL:
    """The pipeline's VAE, frozen.

    Raises:
        InputError: if it cannot be loaded.
    """
    return _load(AutoencoderKL, folder / "vae", dtype).requires_grad_(False).eval().to(device)


def shift_of(vae: AutoencoderKL) -> float:
    return getattr(vae.config, "shift_factor", None) or 0.0


def check_text(folder: Path, width: int) -> None:
    """Refuse a tokenizer or text encoder that does not fit a backbone with cross-attention of `width`; reads JSON only.

    Raises:
        InputError: naming the file and the value.
    """
    encoder = read_config(folder / "text_encoder" / "config.json")
    tokenizer = read_config(folder / "tokenizer" / "tokenizer_config.json")
    if encoder.get("hidden_size") != width:
        raise InputError(f"{folder / 'text_encoder'}: hidden_size={encoder.get('hidden_size')} does not fit the "
                         f"backbone's cross_attention_dim={width}: use the text encoder it was trained with")
    length, most = tokenizer.get("model_max_length", 0), encoder.get("max_position_embeddings", 0)
    if not 0 < length <= most:
        raise InputError(f"{folder / 'tokenizer'}: model_max_length={length} does not fit the text encoder's "
                         f"max_position_embeddings={most}: use the tokenizer it was trained with")


def precision(arguments: dict[str, Any]) -> dict[str, Any]:
    """Arguments for diffusers' `from_pretrained`, in which the precision has the name that this diffusers knows."""
    known, other = ("dtype", "torch_dtype") if Version(diffusers.__version__) >= Version("0.40") else (
        "torch_dtype", "dtype")
    return {known if name == other else name: value for name, value in arguments.items()}


def variant_of(folder: Path) -> str | None:
    """"fp16" for a model folder whose only weights are of this variant, else None."""
    names = [file.name for file in folder.glob("*") if file.suffix in (".safetensors", ".bin")]
    return "fp16" if names and all(".fp16" in name for name in names) else None


def _load(cls: Any, folder: Path, dtype: torch.dtype, field: str = "backbone.pretrained", **options: Any) -> Any:
    """A diffusers model, with all of its weights; diffusers would fill missing ones at random."""
    try:
        model, info = cls.from_pretrained(folder, variant=variant_of(folder), output_loading_info=True, **options,
                                          **precision({"dtype": dtype}))
    except (ImportError, OSError, RuntimeError, ValueError) as error:
        raise InputError(f"{field}: {folder} cannot be loaded "
                         f"({' '.join(str(error).split())[:300]})") from None
    if info["missing_keys"]:
        raise InputError(f"{field}: {folder} lacks {len(info['missing_keys'])} weights, such as "
                         f"{sorted(info['missing_keys'])[0]}: fetch or convert it again")
    return model


def export(folder: Path, pretrained: Path, backbone: Backbone, left_out: tuple[str, ...] = (),
           component: str | None = None) -> None:
    """Write a diffusers pipeline folder: `pretrained` with the backbone's weights replaced.

    Args:
        folder: replaced if it exists. pretrained: the pipeline folder to copy.
        backbone: without adapters; shared modules are written as equal copies.
        left_out: files of `pretrained` that are not copied. component: as for `component_of`.
    """
    component = component_of(pretrained, wanted=component)[1]
    partial = folder.with_name(f".partial-{folder.name}")
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(pretrained, partial, ignore=lambda place, names: {
        name for name in names if name in (component, *left_out) and Path(place) == pretrained})
    for part in partial.iterdir():
        if part.is_dir() and variant_of(part):
            _whole_precision(part)
    plain = type(backbone).from_config(backbone.config)
    plain.load_state_dict(backbone.state_dict())
    plain.save_pretrained(partial / component)
    shutil.rmtree(folder, ignore_errors=True)
    publish(partial, folder)


def _whole_precision(folder: Path) -> None:
    """Write a model's fp16 safetensors as fp32 under their usual names, where pipelines look for them."""
    for file in folder.glob("*.fp16*"):
        plain = file.with_name(file.name.replace(".fp16", "", 1))
        if file.suffix == ".safetensors":
            save_file({name: value.float() if value.is_floating_point() else value
                       for name, value in load_file(file).items()}, plain, metadata={"format": "pt"})
            file.unlink()
        elif file.suffix == ".json":  # the index of shards
            plain.write_text(file.read_text(encoding="utf-8").replace(".fp16", ""), encoding="utf-8")
            file.unlink()


def trained_parameters(backbone: nn.Module) -> dict[str, nn.Parameter]:
    """Name → parameter that is trained, shared ones once."""
    return {name: value for name, value in backbone.named_parameters() if value.requires_grad}


def set_tf32(allow: bool) -> None:
    """Whether float32 matrix products and convolutions may use TensorFloat-32 on GPUs."""
    torch.backends.cuda.matmul.allow_tf32 = allow
    torch.backends.cudnn.allow_tf32 = allow
