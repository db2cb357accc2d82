"""Images of fixed prompts (or labels) and seeds while a run goes on, to disk and to the trackers."""

from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator

from ..common.config import Config
from ..evaluation.report.samples import save_strip
from .setup.parts import Parts


class Validator:
    """Draws the same images from whatever weights and masks a backbone has now.

    Args:
        run_dir: images go to `run_dir`/samples/step-NNNNNN-<title>.png, side by side in the order of the prompts, which
            the PNG's text field "captions" holds.
    """

    def __init__(self, config: Config, parts: Parts, accelerator: Accelerator, run_dir: Path) -> None:
        self.config, self.parts, self.accelerator = config, parts, accelerator
        assert config.validate.every is not None
        self.every, self.folder = config.validate.every, run_dir / "samples"
        device = parts.backbone.device
        prompts, labels = list(config.validate.prompts), list(config.validate.labels)
        self.captions = prompts or [f"class {label}" for label in labels]
        self.batch = {"captions": prompts} if prompts else {"labels": torch.tensor(labels, device=device)}

    def images(self, backbone, steps: int) -> torch.Tensor:
        """Float32 [N, C, H, W] in [-1, 1], on the CPU, drawn in `steps` steps."""
        return self.parts.draw(backbone, self.batch, steps, self.config.seed, 8)

    def __call__(self, backbone, step: int, title: str) -> None:
        images = self.images(backbone, self.config.evaluate.sampling_steps)
        if images.dim() == 5:  # of a video its middle frame
            images = images[:, images.shape[1] // 2]
        pixels = ((images.permute(0, 2, 3, 1) + 1) * 127.5).round().byte().numpy()
        self.folder.mkdir(exist_ok=True)
        save_strip(pixels, self.captions, self.folder / f"step-{step:06d}-{title}.png")
        log_pictures(self.accelerator, f"samples/{title}", pixels, step)


def log_pictures(accelerator: Accelerator, title: str, pixels: np.ndarray, step: int) -> None:
    """Images uint8 [N, H, W, C] to every tracker."""
    for tracker in accelerator.trackers:
        layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
        tracker.log_images({title: pixels}, step=step, **layout)
