"""The keys of flow matching."""

from dataclasses import dataclass

from .schema import key


@dataclass(frozen=True)
class FlowConfig:
    """For pipelines of flow matching; the noise level sigma goes from 0 (clean) to 1 (pure noise)."""

    density: str = key(
        "uniform", "Density of sigma in training, before its shift. uniform; logit_normal: the sigmoid of a Gaussian; "
        "mode: SD3's, more in the middle (mode_scale above 0) or at the ends (below).",
        choices=("uniform", "logit_normal", "mode"))
    logit_mean: float = key(0.0, "Mean of the Gaussian of logit_normal; above 0: more noise.")
    logit_std: float = key(1.0, "Its standard deviation.", within="(0, inf)")
    mode_scale: float = key(1.29, "Scale of mode.", within="[-1, 1.75]")
    shift: float | None = key(
        None, "s of sigma' = s sigma / (1 + (s - 1) sigma): above 1, training sees more noise. null: that of the "
        "pipeline's scheduler, which may depend on the number of image tokens.", within="(0, inf)")
    weighting: str = key(
        "none", "Weight of the denoising error. none; sigma_sqrt: 1 / sigma^2; cosmap: "
        "2 / (pi (1 - 2 sigma + 2 sigma^2)).", choices=("none", "sigma_sqrt", "cosmap"))
