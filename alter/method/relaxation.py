"""Sampling discrete masks and routes so that gradients reach their logits.

Every sample is straight-through: the forward value is the hard one, the gradient that of the soft one.
The noise is made of uniform numbers drawn on the CPU, so that processes which share a seed share their samples.
"""

import torch
from torch import Tensor

from ..common.device import to_device

_TINY = torch.finfo(torch.float32).tiny


def straight_through(soft: Tensor, hard: Tensor) -> Tensor:
    """`hard` in value, `soft` in gradient (Bengio et al. 2013, arXiv 1308.3432); any equal shapes."""
    return hard + (soft - soft.detach())


def gumbel_sigmoid(logits: Tensor, tau: float, uniform: Tensor) -> Tensor:
    """Sample 0 or 1 with P(1) = sigmoid(logit), straight-through.

    The noise is logistic, the difference of two Gumbels (Maddison et al. 2017, arXiv 1611.00712, Sec. 3.3):
    with the single Gumbel that ALTER's paper writes, P(1) would not be sigmoid(logit).

    Args:
        logits: float tensor of any shape, the log-odds of a one.
        tau: temperature > 0 of the soft value sigmoid((logits + noise) / tau).
        uniform: float32 in [0, 1), of a shape that broadcasts with that of `logits`.

    Returns: tensor of the common shape and the dtype of `logits`, exactly 0 or 1.
    """
    uniform = _inside(uniform, logits)
    noise = uniform.log() - (-uniform).log1p()
    soft = ((logits + noise) / tau).sigmoid()
    return straight_through(soft, (soft > 0.5).to(soft.dtype))


def gumbel_softmax(logits: Tensor, tau: float, uniform: Tensor) -> Tensor:
    """Sample one-hot vectors with P(i) = softmax(logits)_i, straight-through (Jang et al. 2017, arXiv 1611.01144).

    Args:
        logits: float tensor [..., E]; an entry of -inf is never drawn.
        tau: temperature > 0 of the soft value softmax((logits + Gumbel) / tau).
        uniform: float32 in [0, 1), of a shape that broadcasts with that of `logits`.

    Returns: tensor of the common shape and the dtype of `logits`, exactly one-hot along the last axis.
    """
    noise = -(-_inside(uniform, logits).log()).log()
    soft = ((logits + noise) / tau).softmax(dim=-1)
    return straight_through(soft, one_hot_argmax(soft))


def one_hot_argmax(values: Tensor) -> Tensor:
    """One-hot of the greatest entry along the last axis (the first of several), in the dtype of `values`."""
    return torch.nn.functional.one_hot(values.argmax(dim=-1), values.shape[-1]).to(values.dtype)


def _inside(uniform: Tensor, like: Tensor) -> Tensor:
    """In the open interval (0, 1), on the device and in the dtype of `like`."""
    return to_device(uniform.clamp(_TINY, 1 - 2**-24), like.device).to(like.dtype)
