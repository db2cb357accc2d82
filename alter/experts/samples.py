"""The same samples, drawn by a pipeline in any number of denoising steps, so that they can be compared."""

import contextlib
import threading
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..backbones.conditioning import stop_at_backbone
from ..backbones.latents import final_latents
from ..backbones.schedules import as_rows
from ..backbones.stepping import only_steps, outputs_given
from ..common.errors import InputError
from .apply import backbone_of
from .trajectory import following


class Samples:
    """Draws one call of a pipeline, or of another of the same kind.

    Args:
        call: arguments of the pipeline; lists of one length are of as many images. seed: of them. batch_size: images of
            one call. component: what the pipeline calls the backbone that is watched; None: the first.

    Attributes:
        forwards: of the backbone, in a step; 0 until something is drawn.
        gram: by number of steps N, where they were watched, the inner products of the outputs at the steps, float64
            [N, N], a mean over the images.
    """

    def __init__(self, call: Mapping[str, Any], seed: int, batch_size: int, component: str | None) -> None:
        self.call, self.seed, self.batch_size, self.component = dict(call), seed, batch_size, component
        self.forwards, self.gram = 0, dict[int, np.ndarray]()
        self.count = max((len(value) for value in call.values() if isinstance(value, (list, tuple))), default=1)
        self._noise_left: Tensor | None = None

    def visited(self, pipe: Any, steps: int) -> np.ndarray:
        """The training timesteps at which the pipeline calls its backbone, int64 [steps], decreasing.

        Raises:
            InputError: if they are not as many, or do not decrease.
        """
        self.told(pipe, steps)
        scheduler = pipe.scheduler
        visited = as_rows(np.asarray([float(value) for value in scheduler.timesteps]), scheduler)
        if len(visited) != steps or (np.diff(visited) >= 0).any():
            raise InputError(f"plan: with num_inference_steps={steps} {type(scheduler).__name__} visits {len(visited)} "
                             f"timesteps, {len(np.unique(visited))} of them distinct, not {steps} that decrease: use "
                             "one that does, with one call a step")
        return visited

    def told(self, pipe: Any, steps: int) -> dict[str, Any]:
        """The arguments of the backbone's first forward, for the first image alone."""
        with following(pipe.scheduler):  # a cached rung may be applied
            return stop_at_backbone(pipe, backbone_of(pipe, self.component), self._arguments(steps, range(1)), "plan")

    def latents(self, pipe: Any, steps: int, of: int, chosen: tuple[int, ...] | None = None,
                watched: bool = False) -> Tensor:
        """The final latents, float32 [N, ...] on the CPU; sample i depends on the seed, on i and on its prompt.

        Args:
            chosen: as many of the `of` steps that the scheduler prepares for; None: `steps` of its own.
            watched: whether `gram` of these steps is wanted.

        Raises:
            InputError: if the backbone was called more or less often in a step than before, or noise was added.
        """
        calls, thread = 0, threading.get_ident()
        watching = outputs_given if watched else contextlib.nullcontext
        backbone = backbone_of(pipe, self.component)

        def count(*_: Any) -> None:
            nonlocal calls
            calls += threading.get_ident() == thread

        hook = backbone.register_forward_pre_hook(count)
        done, parts, gram_NN = [], list(self._parts()), np.zeros((steps, steps))
        try:
            for part in parts:
                arguments = self._arguments(of if chosen else steps, part)
                with (torch.random.fork_rng(), only_steps(pipe.scheduler, chosen, of), following(pipe.scheduler),
                      final_latents(pipe.scheduler) as stepped, watching(pipe.scheduler) as outputs):
                    torch.manual_seed(self.seed)
                    output = pipe(**arguments, output_type="latent")
                    left = [arguments["generator"][0].get_state(), torch.get_rng_state()]
                    if backbone.device.type == "cuda":
                        left.append(torch.cuda.get_rng_state(backbone.device))
                latents = output.frames if hasattr(output, "frames") else output.images
                if not isinstance(latents, Tensor) and [*map(len, stepped)] in ([len(part)], [2 * len(part)]):
                    latents = stepped[0][: len(part)]  # a DiTPipeline; with guidance both halves are alike
                done.append(latents)
                if watched:
                    for image in range(len(part)):  # one at a time, for the memory of double precision
                        flat_ND = torch.stack([output[image].flatten() for output in outputs]).double()
                        gram_NN += (flat_ND @ flat_ND.T).numpy() / self.count
        finally:
            hook.remove()
        self._compare(type(pipe.scheduler).__name__, steps, calls / len(parts) / steps, torch.cat(left))
        if watched:
            self.gram[steps] = gram_NN
        if not all(isinstance(images, Tensor) for images in done):
            raise InputError(f"plan: a {type(pipe).__name__} gives no latents of these arguments with "
                             "output_type='latent', in which displacements are measured")
        return torch.cat(done).float().cpu()

    def _compare(self, scheduler: str, steps: int, forwards: float, noise_left: Tensor) -> None:
        """Refuse what makes numbers of steps incomparable: other calls of the backbone, noise drawn at each step."""
        self.forwards = self.forwards or int(forwards)
        if forwards != self.forwards:
            raise InputError(f"plan: in {steps} steps the pipeline calls its backbone {forwards * steps:g} times: it "
                             "has to be as often at every step: leave out strength, and intervals of guidance")
        if self._noise_left is None:
            self._noise_left = noise_left
        if not torch.equal(noise_left, self._noise_left):
            raise InputError(f"plan: {scheduler} adds noise at its steps, so that samples of few and of many steps "
                             "differ in any case: use one that adds none, such as DPMSolverMultistepScheduler")

    def _parts(self) -> Iterator[range]:
        """Images of one call."""
        for first in range(0, self.count, self.batch_size):
            yield range(first, min(first + self.batch_size, self.count))

    def _arguments(self, steps: int, part: range) -> dict[str, Any]:
        """Of a call that draws the images of `part`."""
        own = {name: list(value[part.start : part.stop]) if isinstance(value, (list, tuple)) and
               len(value) == self.count else value for name, value in self.call.items()}
        return {**own, "num_inference_steps": steps,
                "generator": [torch.Generator().manual_seed(self.seed + i) for i in part]}
