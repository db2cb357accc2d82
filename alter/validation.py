"""Images of fixed prompts (or labels) and seeds while a run goes on, to disk and to the trackers."""

from pathlib import Path

import torch
from accelerate import Accelerator

from .build import Parts
from .config import Config
from .report import plot_samples
from .sampling import sample_latents


class Validator:
    """Draws the same images from whatever weights and masks a backbone has now.

    Args:
        run_dir: pictures go to `run_dir`/samples/step-NNNNNN-<title>.png.
    """

    def __init__(self, config: Config, parts: Parts, accelerator: Accelerator, run_dir: Path) -> None:
        self.config, self.parts, self.accelerator = config, parts, accelerator
        assert config.validate.every is not None
        self.every, self.folder = config.validate.every, run_dir / "samples"
        device = parts.backbone.device
        prompts, labels = list(config.validate.prompts), list(config.validate.labels)
        batch = {"captions": prompts} if prompts else {"labels": torch.tensor(labels, device=device)}
        self.titles = prompts or [str(label) for label in labels]
        everything = torch.ones(len(self.titles), dtype=torch.bool)
        self.conditioning = parts.conditioning(batch, ~everything)
        self.unconditional = parts.conditioning(batch, everything)

    def __call__(self, backbone, step: int, title: str) -> None:
        evaluate = self.config.evaluate
        latents = sample_latents(
            backbone, self.parts.scheduler, self.parts.latent_shape, self.conditioning, self.unconditional,
            evaluate.sampling_steps, self.config.seed, evaluate.guidance_scale, batch_size=8,
        )
        images = self.parts.images(latents)
        self.folder.mkdir(exist_ok=True)
        plot_samples({title: images}, self.titles, self.folder / f"step-{step:06d}-{title}.png")
        pixels = ((images.permute(0, 2, 3, 1) + 1) * 127.5).round().byte().numpy()
        for tracker in self.accelerator.trackers:
            layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
            tracker.log_images({f"samples/{title}": pixels}, step=step, **layout)
