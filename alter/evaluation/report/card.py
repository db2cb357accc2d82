"""The model card of a finished run: final/README.md."""

from pathlib import Path
from typing import Any

import diffusers
import yaml
from huggingface_hub import hf_hub_download

from ...backbones.family import COMPONENTS
from ...backbones.lora import FILE_NAME, Base
from ...common.config import Config
from ...experts.artefact import TemporalExperts
from ...experts.pipeline import ClassConditionalPipeline
from .words import summary_table

_OURS = """from alter import load_pipeline  # diffusers' own pipelines do not fit this model

pipe = load_pipeline("path/to/this/folder")
images = pipe([0, 1, 2], num_inference_steps=20).images"""
_DIFFUSERS = """from alter import TemporalExperts
from diffusers import {pipeline}

pipe = {pipeline}.from_pretrained("path/to/this/folder")
experts = TemporalExperts.from_pretrained("path/to/this/folder")
experts.apply(pipe)  # without this line all layers run"""
_ADAPTERS = """from alter import load_pipeline

pipe = load_pipeline("path/to/this/folder")  # the base pipeline, its adapters and its experts"""
_BY_HAND = ("Without it: `pipe.load_lora_weights(folder{second})` on a pipeline that is loaded already, and then "
            "`TemporalExperts.from_pretrained(folder).apply(pipe)`.")


def model_card(config: Config, experts: TemporalExperts, summary: dict[str, Any], pipeline: str,
               adapters_of: Base | None = None) -> str:
    """Markdown with the hub's metadata in front.

    Args:
        pipeline: class of the pipeline that loads the folder, or the one that its adapters belong to.
        adapters_of: what the folder's adapters belong to; None for a whole pipeline.
    """
    base = str(config.backbone.pretrained)
    known = _front_matter(base, config.backbone.revision)
    licence = known.get("license") if isinstance(known.get("license"), str) else None
    metadata: dict[str, Any] = {"library_name": "diffusers", "tags": ["diffusers", "alter", "temporal-experts"]}
    if licence is not None:
        metadata["license"] = licence
    origin = known.get("base_model") if Path(base).is_dir() else base  # a finished run names its base model
    if origin is not None:
        metadata["base_model"] = origin
    opening = f"`{base}`, tuned under the" if config.experts.pretrained else f"`{base}`, turned into"
    averaged = "the training timesteps" if experts.timesteps is None else f"{len(experts.timesteps)} sampling steps"
    if experts.latency is not None:
        averaged += f", and {experts.time_ratio:.1%} of its time ({experts.latency.place})"
    count, several = len(experts.used), ""
    if len(experts.ladder) > 1:
        several = (f"\n\nThe same weights serve {len(experts.ladder)} budgets: `experts.apply(pipe, keep_ratio=...)` "
                   "chooses another, `with experts.at(...):` for one call.")
    if adapters_of is not None:
        code = _ADAPTERS
        second = ", load_into_transformer_2=True" * (adapters_of.component == COMPONENTS[-1])
        lora = (f"This folder holds low-rank adapters of rank {config.lora.rank}, in `{FILE_NAME}`, for the "
                f"`{pipeline}` of `{base}`. `load_pipeline(..., base=FOLDER)` takes the base pipeline from elsewhere. "
                + _BY_HAND.format(second=second) * hasattr(getattr(diffusers, pipeline, None), "load_lora_weights")
                + "\n\n")
    else:
        code = _OURS if pipeline == ClassConditionalPipeline.__name__ else _DIFFUSERS.format(pipeline=pipeline)
        lora = "" if config.lora.rank is None else (
            f"The weights were trained as low-rank adapters of rank {config.lora.rank} and are merged here; "
            f"`{FILE_NAME}` holds only the adapters, for the base model.\n\n")
    return f"""---
{yaml.safe_dump(metadata, sort_keys=False).strip()}
---

# {config.name}: temporal experts of {base}

[ALTER](https://arxiv.org/abs/2505.21817): {opening} {count} temporal expert{'s' * (count > 1)}. Each serves
some of the denoising timesteps and skips some of the layers. They keep {experts.keep_ratio:.1%} of the dense model's
multiply-accumulate operations (MACs) per step ({round(experts.macs_mean):,} of {experts.macs_total:,}), averaged over
{averaged}.{several}

Licence: {licence or f"that of {base}; its card was not found or names none"}.

## Use

```python
{code}
```

{lora}## Experts

```
{experts.summary()}
```

## Measured at the end of training

```
{summary_table(summary)}
```

Trained for {config.train.steps} steps of batch {config.train.batch_size} at {config.data.resolution} px.
"""


def _front_matter(base: str, revision: str | None) -> dict[str, Any]:
    """The metadata of the base model's card, in its folder or on the hub; empty where there is none."""
    try:
        card = Path(base) / "README.md" if Path(base).is_dir() else Path(
            hf_hub_download(base, "README.md", revision=revision))
        _, fence, rest = card.read_text(encoding="utf-8").partition("---\n")
        front, closing, _ = rest.partition("\n---")
        found = yaml.safe_load(front) if fence and closing else None
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return found if isinstance(found, dict) else {}
