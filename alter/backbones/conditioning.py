"""What conditions a backbone, and its latents, made by the pipeline that the backbone belongs to.

The pipeline is loaded with a backbone that has no weights, called as a user calls it, and stopped when it calls its
backbone: the arguments that it gives there are the conditioning. So no family of models needs code of its own.
"""

import inspect
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from ..common.errors import InputError
from .asking import Stopped
from .draws import generator
from .family import COMPONENTS, Backbone, backbone_class, floating_dtype, parameters, timestep_argument
from .guidance import guided, unguided
from .pretrained import absent_parts, component_of, hollow, load_backbone, precision, variant_of

_TEXT_MASKS = ("encoder_hidden_states_mask", "encoder_attention_mask")
_SIZES = "added_cond_kwargs.time_ids"  # also height and width of the part
_ZEROED = ("encoder_hidden_states", "added_cond_kwargs.text_embeds")  # of a prompt that SDXL leaves out
AS_GIVEN = {"use_resolution_binning": False, "clean_caption": False}


@dataclass(frozen=True)
class Conditioning:
    """A batch's arguments for the backbone, besides latents and timestep; those in dictionaries under dotted names.

    Attributes:
        rows: of each sample; tensors with the batch on the first axis, or lists of B.
        shared: of all samples: positions, sizes, settings.
    """

    rows: dict[str, Any]
    shared: dict[str, Any]

    def arguments(self, sizes: Tensor | None = None) -> dict[str, Any]:
        """As the backbone takes them.

        sizes: [B, 4], height and width of the image that each sample was cut from, top and left of the part, for a
            backbone that is told them (SDXL), in place of those of an image that is drawn.
        """
        nested: dict[str, Any] = {}
        rows = dict(self.rows)
        if sizes is not None and _SIZES in rows:
            rows[_SIZES] = torch.cat([sizes.to(rows[_SIZES]), rows[_SIZES][:, 4:]], dim=1)
        for name, value in {**self.shared, **rows}.items():
            place, parts = nested, name.split(".")
            for part in parts[:-1]:
                place = place.setdefault(part, {})
            place[parts[-1]] = value
        return nested


class Conditioner:
    """A pipeline folder without the weights of its backbone.

    Args:
        folder: of the pipeline. dtype: of text encoders and VAE.
        size: (height, width) of the images in pixels, or (frames, height, width) of videos.
        guidance: for backbones that are told their guidance (FLUX.1-dev): the value that they will sample with.
        max_tokens: the pipeline's `max_sequence_length`; None: its default.
        component: the backbone that `draw` is given, as for `pretrained.component_of`.

    Raises:
        InputError: if a part of the pipeline cannot be loaded, or it stops before it calls its backbone.
    """

    def __init__(self, folder: Path, device: torch.device | str, dtype: torch.dtype, size: tuple[int, ...],
                 guidance: float | None = None, max_tokens: int | None = None, component: str | None = None) -> None:
        self.folder, self.size, self.guidance, self.max_tokens = folder, size, guidance, max_tokens
        self.component = component_of(folder, wanted=component)[1]
        self.pipe, self.backbone = load_hollow(folder, device, dtype, self.component)
        self.is_told_guidance = bool(self.backbone.config.get("guidance_embeds"))
        one, two = self._call([""]), self._call(["", "a word"])
        # Qwen-Image's mask of text is told only where lengths differ.
        self.rows = frozenset(name for name in two if _length(two[name]) == 2 and (
            name not in one or _length(one[name]) == 1))
        self.same = frozenset(name for name in self.rows if _alike(*two[name]))  # whatever the prompt
        self._always = frozenset(one)
        self.zeroes = bool(getattr(self.pipe.config, "force_zeros_for_empty_prompt", False))

    @torch.no_grad()
    def __call__(self, prompts: Sequence[str], dropped: Tensor | None = None,
                 size: tuple[int, int] | None = None) -> Conditioning:
        """Of B `prompts`; those in `dropped`, bool [B], become what the pipeline guides away from: the empty prompt.

        size: height and width, if not the usual ones.
        """
        drops = [False] * len(prompts) if dropped is None else dropped.tolist()
        told = self._call(["" if drop else prompt for prompt, drop in zip(prompts, drops, strict=True)], size)
        rows = {name: value for name, value in told.items() if name in self.rows}
        if self.zeroes and any(drops):
            for name in _ZEROED:
                if name in rows:
                    rows[name][torch.tensor(drops, device=rows[name].device)] = 0
        return Conditioning(rows, {name: value for name, value in told.items() if name not in rows})

    def each(self, prompts: Sequence[str], dropped: Tensor | None = None) -> list[dict[str, Any]]:
        """The rows [1, ...] of each prompt as it is told alone, without those that are the `same` for all."""
        rows = {name: value for name, value in self(prompts, dropped).rows.items() if name not in self.same}
        masks = [rows.pop(name) for name in _TEXT_MASKS if name in rows and name not in self._always]
        alone = [{name: value[i : i + 1] for name, value in rows.items()} for i in range(len(prompts))]
        for mask in masks:  # that of text which is padded only beside longer ones
            for row, length in zip(alone, mask.sum(1).tolist(), strict=True):
                row["encoder_hidden_states"] = row["encoder_hidden_states"][:, :length]
        return alone

    @torch.no_grad()
    def draw(self, backbone: Backbone, prompts: Sequence[str], steps: int, guidance_scale: float, seed: int,
             scheduler: Any = None, batch_size: int = 8) -> Tensor:
        """What the pipeline draws for N `prompts` with a backbone that has weights, of any precision.

        Args:
            steps: denoising steps. guidance_scale: as the pipeline takes it; at 1 without, unless the backbone is told.
            seed: sample i depends on it, on i and on its prompt alone. scheduler: in place of the pipeline's own.
            batch_size: prompts of one call.

        Returns: float32 [N, C, H, W], of videos [N, F, C, H, W], in [-1, 1], on the CPU.
        """
        accepted = inspect.signature(self.pipe.__call__).parameters
        done = []
        with self._lent(backbone):
            self.pipe.scheduler = scheduler or self.pipe.scheduler
            for first in range(0, len(prompts), batch_size):
                some = list(prompts[first : first + batch_size])
                wanted = {**self._shape(), "prompt": some, "num_inference_steps": steps, "output_type": "pt",
                          "generator": [generator(seed, first + i, 7) for i in range(len(some))],
                          **AS_GIVEN, **guided(self.pipe, self.backbone, guidance_scale, len(some))}
                output = self.pipe(**{name: value for name, value in wanted.items() if name in accepted})
                done.append((output.frames if hasattr(output, "frames") else output.images).float().cpu() * 2 - 1)
        return torch.cat(done)

    @contextmanager
    def _lent(self, backbone: Backbone) -> Iterator[None]:
        """The pipeline with `backbone` in it, and with the weights of a second one that it has; tensors change their
        precision where theirs differ."""
        inside, outside = floating_dtype(backbone), floating_dtype(self.backbone)
        hollows = _backbones(self.pipe)
        lent = {name: backbone if name == self.component else load_backbone(
            self.folder, dtype=inside, component=name).requires_grad_(False).eval().to(backbone.device)
            for name in hollows}

        def recast(given: Any, before: torch.dtype, after: torch.dtype) -> Any:
            return tree_map_only(Tensor, lambda value: value.to(after) if value.dtype == before else value, given)

        hooks = []
        if inside != outside:
            hooks = [hook for each in lent.values() for hook in (
                each.register_forward_pre_hook(
                    lambda module, args, kwargs: recast((args, kwargs), outside, inside), with_kwargs=True),
                each.register_forward_hook(lambda module, args, output: recast(output, inside, outside)))]
        scheduler = self.pipe.scheduler
        backbone._alter_drawn_by = weakref.ref(self.pipe)  # whose scheduler knows timesteps before they are rounded
        for name, each in lent.items():
            setattr(self.pipe, name, each)
        try:
            yield
        finally:
            for name, each in hollows.items():
                setattr(self.pipe, name, each)
            del backbone._alter_drawn_by
            self.pipe.scheduler = scheduler
            for hook in hooks:
                hook.remove()

    def too_long(self, prompts: Sequence[str]) -> int:
        """How many of `prompts` are cut, being longer than the first tokenizer takes."""
        tokenizer = self.pipe.tokenizer
        if tokenizer is None:
            return 0
        return sum(len(ids) > tokenizer.model_max_length for ids in tokenizer(list(prompts), verbose=False).input_ids)

    def _call(self, prompts: list[str], size: tuple[int, int] | None = None) -> dict[str, Any]:
        """What the pipeline tells its backbone, under dotted names."""
        accepted = inspect.signature(self.pipe.__call__).parameters
        wanted = {**self._shape(size), "prompt": prompts, "num_inference_steps": 2, "output_type": "latent",
                  "generator": torch.Generator().manual_seed(0), **AS_GIVEN,
                  **unguided(self.pipe, self.backbone, self.guidance)}
        given = {name: value for name, value in wanted.items() if name in accepted}
        told = stop_at_backbone(self.pipe, self.backbone, given)
        cls = backbone_class(self.backbone)
        left_out = (parameters(cls)[0], timestep_argument(cls)[0], "return_dict")
        return _flat({name: value for name, value in told.items() if name not in left_out})

    def _shape(self, size: tuple[int, int] | None = None) -> dict[str, Any]:
        frames = {"num_frames": self.size[0]} if len(self.size) == 3 else {}
        tokens = {} if self.max_tokens is None else {"max_sequence_length": self.max_tokens}
        height, width = size or self.size[-2:]
        return {**frames, **tokens, "height": height, "width": width}


def load_hollow(folder: Path, device: torch.device | str, dtype: torch.dtype,
                component: str | None = None) -> tuple[Any, Backbone]:
    """A pipeline whose backbones have no weights, and the `component` of them, as for `component_of`.

    Raises:
        InputError: if another part of it cannot be loaded.
    """
    found = {name: folder / name for name in COMPONENTS if (folder / name / "config.json").is_file()}
    cls, component = component_of(folder, wanted=component)
    hollows = {name: hollow(cls, path, device, dtype) for name, path in found.items()}
    try:
        index = DiffusionPipeline.load_config(folder)
        unwanted = absent_parts(index) | {name: None for name in ("safety_checker", "image_encoder") if name in index}
        parts = [path for path in folder.iterdir() if path.is_dir() and path.name not in found and variant_of(path)]
        # DiffusionPipeline itself would load a backbone that the pipeline's own class calls optional (Wan).
        kind: Any = getattr(diffusers, index["_class_name"], DiffusionPipeline)
        pipe: Any = kind.from_pretrained(folder, variant="fp16" if parts else None, **hollows, **unwanted,
                                         **precision({"dtype": dtype}))
        pipe.to(device)
    except (AttributeError, ImportError, OSError, RuntimeError, TypeError, ValueError) as error:
        raise InputError(f"backbone.pretrained: {folder}: its pipeline cannot be loaded "
                         f"({' '.join(str(error).split())[:300]})") from None
    for name, part in pipe.components.items():
        if isinstance(part, nn.Module):
            part.requires_grad_(False).eval()
        if name.startswith("tokenizer") and part is not None:
            _check_vocabulary(folder, name, part, getattr(pipe, name.replace("tokenizer", "text_encoder"), None))
    pipe.set_progress_bar_config(disable=True)
    return pipe, hollows[component]


def _check_vocabulary(folder: Path, name: str, tokenizer: Any, encoder: Any) -> None:
    known = encoder and (getattr(encoder.config, "vocab_size", None) or encoder.config.get_text_config().vocab_size)
    if known and len(tokenizer) > known:
        raise InputError(f"{folder / name}: {len(tokenizer)} tokens do not fit the text encoder's vocab_size={known}: "
                         "use the tokenizer it was trained with")


def _backbones(pipe: Any) -> dict[str, Any]:
    return {name: getattr(pipe, name) for name in COMPONENTS if isinstance(getattr(pipe, name, None), nn.Module)}


def stop_at_backbone(pipe: Any, backbone: Backbone, given: dict[str, Any],
                     field: str = "backbone.pretrained") -> dict[str, Any]:
    """The arguments, by name, with which `pipe(**given)` calls its backbone for the first time; it does not run.

    Raises:
        InputError: about `field`, if the pipeline refuses, or ends without calling it.
    """
    names = parameters(backbone_class(backbone))
    told: dict[str, Any] = {}

    def stop(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        told.update({**dict(zip(names, args, strict=False)), **kwargs})
        raise Stopped

    hooks = [each.register_forward_pre_hook(stop, with_kwargs=True) for each in _backbones(pipe).values()]
    try:
        pipe(**given)
    except Stopped:
        return {name: value for name, value in told.items() if value is not None}
    except (AttributeError, RuntimeError, TypeError, ValueError) as error:
        raise InputError(f"{field}: its {type(pipe).__name__} refuses to encode a prompt "
                         f"({' '.join(str(error).split())[:300]})") from None
    finally:
        for hook in hooks:
            hook.remove()
    raise InputError(f"{field}: its {type(pipe).__name__} drew without calling its backbone")


def join(samples: Sequence[dict[str, Any]], backbone: Backbone) -> dict[str, Any]:
    """The rows of a batch from those of samples [1, ...]; text of several lengths is padded with zeros, and masked.

    Raises:
        InputError: if the backbone takes no mask, without which padded text would count.
    """
    texts = [name for name in samples[0] if len({_tokens(sample[name]) for sample in samples}) > 1]
    mask = next((name for name in _TEXT_MASKS if name in parameters(backbone_class(backbone))), None)
    if texts and mask is None:
        raise InputError(f"data.path: prompts of several lengths ({', '.join(texts)}), and a "
                         f"{type(backbone).__name__} takes no mask of text: encode them at one length")
    if texts and mask is not None and mask not in samples[0]:
        samples = [{**sample, mask: torch.ones(1, _tokens(sample[texts[0]]), dtype=torch.bool)} for sample in samples]
        texts = [*texts, mask]
    joined: dict[str, Any] = {}
    for name, first in samples[0].items():
        values = [sample[name] for sample in samples]
        if isinstance(first, list):
            joined[name] = [item for value in values for item in value]
        elif name in texts:
            most = max(map(_tokens, values))
            joined[name] = torch.cat([nn.functional.pad(
                value, (0,) * (2 * (value.dim() - 2)) + (0, most - _tokens(value))) for value in values])
        else:
            joined[name] = torch.cat(values)
    return joined


def _tokens(value: Any) -> int:
    return value.shape[1] if isinstance(value, Tensor) and value.dim() > 1 else 0


def _flat(told: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in told.items():
        if isinstance(value, Mapping) and value:
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat


def _alike(one: Any, other: Any) -> bool:
    return torch.equal(one, other) if isinstance(one, Tensor) else one == other


def _length(value: Any) -> int | None:
    """Of the first axis of a tensor or list."""
    if isinstance(value, Tensor):
        return len(value) if value.dim() else None
    return len(value) if isinstance(value, list) else None
