"""The terms of ALTER's objective (arXiv 2505.21817, Sec. 3), as pure functions (docs/method.md).

Reconstruction terms return one value per sample, [B], so that their mean over a batch is the same however the
batch is split into micro-batches and processes. All are computed in fp32 or better.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from .relaxation import one_hot_argmax


def mse_per_sample(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean squared error of each sample: [B, ...] and [B, ...] → [B]. Serves L_denoise and L_outKD."""
    return (_at_least_fp32(prediction) - _at_least_fp32(target)).square().flatten(1).mean(1)


def feature_kd(student: Sequence[Tensor], teacher: Sequence[Tensor], outliers: float | None = None) -> Tensor:
    """L_featKD: the mean over feature points of the MSE between the activations, [B].

    Args:
        student, teacher: one activation [B, ...] per feature point, in the same order.
        outliers: ignore the positions where the teacher's activation lies more than this many standard
            deviations from its mean over the sample (massive activations; TinyFusion, arXiv 2412.01199,
            Sec. 3.4); None keeps all.
    """
    total = torch.stack([_masked_mse(s, t, outliers) for s, t in zip(student, teacher, strict=True)])
    return total.mean(0)


def weighted_sum(terms: Mapping[str, Tensor], weights: Mapping[str, float]) -> Tensor:
    """L_perf = λ_denoise·L_denoise + λ_outKD·L_outKD + λ_featKD·L_featKD; terms of weight 0 may be missing."""
    return torch.stack([weight * terms[name] for name, weight in weights.items() if weight]).sum()


def log_ratio(keep_ratio: Tensor, target: float) -> Tensor:
    """L_ratio = log(max(S, p) / min(S, p)) = |log S - log p|, in fp32 or better.

    Args:
        keep_ratio: S in (0, 1], a scalar. target: p in (0, 1].
    """
    return (_at_least_fp32(keep_ratio).log() - torch.tensor(target, dtype=torch.float64).log()).abs()


def load_balance(logits_TE: Tensor, weight_T: Tensor | None = None) -> Tensor:
    """L_balance = E · Σ_i F_i·P_i (Switch Transformer, arXiv 2101.03961, eq. 4), over all timesteps.

    F_i is the share of timesteps whose most probable expert is i, P_i the mean probability of expert i.

    Args:
        logits_TE: float [T, E]. weight_T: float [T] of mean 1; None: all timesteps weigh the same.

    Returns: scalar; 1 if the experts are balanced, E at most.
    """
    probability_TE = logits_TE.softmax(dim=-1)
    experts = logits_TE.shape[-1]
    chosen_TE = one_hot_argmax(logits_TE)
    if weight_T is not None:
        probability_TE, chosen_TE = weight_T[:, None] * probability_TE, weight_T[:, None] * chosen_TE
    return experts * (chosen_TE.mean(0) * probability_TE.mean(0)).sum()


def _masked_mse(student: Tensor, teacher: Tensor, outliers: float | None) -> Tensor:
    if outliers is None:
        return mse_per_sample(student, teacher)
    student, teacher = _at_least_fp32(student).flatten(1), _at_least_fp32(teacher).flatten(1)
    deviation = (teacher - teacher.mean(1, keepdim=True)).abs()
    kept = deviation <= outliers * teacher.std(1, keepdim=True)
    squared = (student - teacher).square() * kept
    return squared.sum(1) / kept.sum(1).clamp(min=1)


def _at_least_fp32(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
