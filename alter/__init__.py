"""alter: turn a pretrained diffusion model into temporal experts (ALTER, NeurIPS 2025)."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .common.errors import InputError as InputError
    from .common.load import load_config as load_config
    from .experts.artefact import TemporalExperts as TemporalExperts
    from .experts.load import load_pipeline as load_pipeline
    from .experts.pipeline import ClassConditionalPipeline as ClassConditionalPipeline
    from .training.run import train as train

from .common.version import __version__

__all__ = ["ClassConditionalPipeline", "InputError", "TemporalExperts", "__version__", "load_config", "load_pipeline",
           "train"]
_HOME = {"ClassConditionalPipeline": ".experts.pipeline", "InputError": ".common.errors",
         "TemporalExperts": ".experts.artefact", "load_config": ".common.load", "load_pipeline": ".experts.load",
         "train": ".training.run"}


def __getattr__(name: str) -> Any:
    # Imported on first use, so that a configuration is checked without waiting for torch.
    if name in _HOME:
        return getattr(import_module(_HOME[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
