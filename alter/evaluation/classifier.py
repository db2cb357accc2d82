"""The demos' small classifier, and how far a student's output is from its teacher's."""

from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

from ..backbones.draws import gaussian
from ..backbones.noising import Noising

Predict: TypeAlias = Callable[[Tensor, Tensor, dict[str, Any]], Tensor]


class SmallClassifier(nn.Module):
    """A convolutional classifier of small images; `features` [N, 64] feed the Fréchet distance."""

    def __init__(self, channels: int, size: int, classes: int) -> None:
        super().__init__()
        layers, width = [nn.Conv2d(channels, 32, 3, padding=1), nn.ReLU()], 32
        while size > 4:
            wider = 64 if size <= 8 else 32
            layers += [nn.Conv2d(width, wider, 3, stride=2, padding=1), nn.ReLU()]
            width, size = wider, (size + 1) // 2
        self.body = nn.Sequential(*layers, nn.Flatten(), nn.Linear(width * size**2, 64), nn.ReLU())
        self.head = nn.Linear(64, classes)

    def features(self, images: Tensor) -> Tensor:
        return self.body(images)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.features(images))


def train_classifier(images: Tensor, targets: Tensor, seed: int, steps: int = 1000) -> SmallClassifier:
    """Fit the classifier to real images [N, C, S, S] in [-1, 1], with a little noise added.

    targets: one class an image, long [N]; or any set of K, float [N, K] of zeros and ones.
    """
    torch.manual_seed(seed)
    classes = int(targets.max()) + 1 if targets.dim() == 1 else targets.shape[1]
    model = SmallClassifier(images.shape[1], images.shape[-1], classes)
    criterion = nn.functional.cross_entropy if targets.dim() == 1 else nn.functional.binary_cross_entropy_with_logits
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3)
    for _ in range(steps):
        index = torch.randint(len(images), (128,))
        noisy = images[index] + 0.1 * torch.randn_like(images[index])
        loss = criterion(model(noisy), targets[index])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval().requires_grad_(False)


def accuracy(classifier: SmallClassifier, images: Tensor, targets: Tensor) -> float:
    """Share of images in which the classifier sees the class that was asked for, or exactly the set."""
    logits = classifier(images)
    right = logits.argmax(1) == targets if targets.dim() == 1 else ((logits > 0) == (targets > 0)).all(1)
    return float(right.float().mean())


@torch.no_grad()
def errors_by_timestep(student: Predict, teacher: Predict, noising: Noising, latents: Tensor,
                       conditioning: dict[str, Tensor], seed: int, bins: int = 20) -> np.ndarray:
    """Mean squared errors of the student's output at each of `bins` timesteps, float64 [2, bins].

    The first row is against the teacher's output (*output error*), the second against the noising's target
    (*denoising error*). Every sample of `latents` [N, C, h, w] is noised to the middle of each of `bins` equal
    intervals of the timesteps that are trained; one batch has one timestep. There are no more bins than timesteps.

    Args:
        student, teacher: what they predict of noisy latents, timesteps and conditioning.
        conditioning: arguments of both models for these samples.
    """
    trained, errors = noising.trained, []
    bins = min(bins, len(trained))
    for i in range(bins):
        timestep = noising.at(trained[(2 * i + 1) * len(trained) // (2 * bins)][None])
        noise = gaussian(tuple(latents.shape[1:]), range(len(latents)), seed, i, 4).to(latents)
        timesteps = timestep.expand(len(latents)).to(latents.device)
        noisy = noising.noised(latents, noise, timesteps)
        ours, theirs = (model(noisy, timesteps, conditioning).float() for model in (student, teacher))
        target = noising.target(latents, noise, timesteps).float()
        errors.append([(ours - theirs).square().mean().item(),
                       (ours[:, : target.shape[1]] - target).square().mean().item()])
    return np.array(errors).T
