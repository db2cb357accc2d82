"""The dense teacher of a demo: trained from scratch into an ordinary diffusers folder, once."""

import json
from pathlib import Path

import torch
from diffusers import DDPMScheduler, DiTTransformer2DModel
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from tqdm import tqdm

from . import losses
from .checkpoint import export
from .config import CONFIGS, Config
from .data import GlobalBatches, make_loader, open_source, split
from .diffusion import draw, generator, training_target
from .sites import null_class, tie_embedders


def make_teacher(config: Config, device: torch.device) -> None:
    """Train the architecture of `demo.model` on the run's data and save it at `backbone.pretrained`.

    Call it on one process; it does nothing when the folder exists.
    """
    folder = Path(str(config.backbone.pretrained))
    if folder.is_dir():
        return
    template = CONFIGS / "models" / str(config.demo.model)
    demo, source = config.demo, open_source(config)
    indices, _ = split(source, config.data.holdout, config.seed)
    torch.manual_seed(config.seed)
    model = DiTTransformer2DModel.from_config(DiTTransformer2DModel.load_config(template / "transformer"))
    tie_embedders(model)
    for block in model.transformer_blocks:  # adaLN-Zero (DiT, arXiv 2212.09748, Sec. 3.2)
        torch.nn.init.zeros_(block.norm1.linear.weight)
        torch.nn.init.zeros_(block.norm1.linear.bias)
    model.to(device).train()
    scheduler = DDPMScheduler.from_config(DDPMScheduler.load_config(template / "scheduler"))
    optimizer = torch.optim.AdamW(model.parameters(), demo.lr, weight_decay=0.0)
    schedule = get_scheduler(
        "cosine", optimizer, num_warmup_steps=min(100, demo.steps // 10), num_training_steps=demo.steps
    )
    ema = EMAModel(model.parameters(), decay=0.998, foreach=True)
    shape = (model.config.in_channels, model.config.sample_size, model.config.sample_size)

    batches = GlobalBatches(indices, demo.batch_size, 1, 0, 1, config.seed, 0, demo.steps)
    bar = tqdm(make_loader(source, batches, config.data.workers), desc=f"dense teacher → {folder}", unit="step",
               dynamic_ncols=True)
    for step, batch in enumerate(bar):
        noise = draw(demo.batch_size, shape, scheduler.config.num_train_timesteps, config.data.label_dropout,
                     generator(config.seed, step, 5))
        latents, timesteps = batch["latents"].to(device), noise.timesteps.to(device)
        labels = batch["labels"].masked_fill(noise.dropped, null_class(model)).to(device)
        added = noise.noise.to(device)
        pred = model(scheduler.add_noise(latents, added, timesteps), timesteps, class_labels=labels).sample
        loss = losses.mse_per_sample(pred, training_target(scheduler, latents, added, timesteps)).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        ema.step(model.parameters())
        if step % config.log.every == 0:
            bar.set_postfix(loss=f"{loss.item():.4f}")

    export(folder, template, model, ema.shadow_params)
    (folder / "model_index.json").write_text(json.dumps(
        {"_class_name": "DiTPipeline", "scheduler": ["diffusers", "DDPMScheduler"],
         "transformer": ["diffusers", "DiTTransformer2DModel"], "vae": [None, None]}, indent=2), encoding="utf-8")
