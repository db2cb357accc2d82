"""A demo's data and dense teacher, made from scratch into ordinary folders, once."""

import dataclasses
import json
import shutil
import string
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import transformers
from diffusers import AutoencoderKL, DiffusionPipeline, DiTTransformer2DModel
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from torch import Tensor, nn
from tqdm import tqdm
from transformers import CLIPTextConfig, CLIPTokenizer

from ..backbones.dit import null_class, tie_embedders
from ..backbones.draws import draw, generator
from ..backbones.family import Backbone
from ..backbones.pretrained import absent_parts, component_of, export
from ..backbones.schedules import load_scheduler, make_noising, tokens_of
from ..common.config import Config
from ..common.errors import InputError
from ..common.files import one_at_a_time, write_text
from ..common.load import CONFIGS
from ..data import shapes
from ..data.batches import GlobalBatches, Order, make_loader, split
from ..data.glyphs import write_glyphs
from ..data.open import open_source
from ..method import losses

_SPECIAL = ("<|startoftext|>", "<|endoftext|>")
_WRITERS = {"shapes": shapes.write_shapes, "scenes": shapes.write_scenes, "glyphs": write_glyphs}
_DATA_SETTINGS = ("source", "resolution", "label_dropout", "holdout")  # that the dense model depends on


def make_demo(config: Config, device: torch.device) -> None:
    """Draw the data and train the architecture of `demo.model` into `backbone.pretrained`, unless they exist.

    The settings lie beside it; its seed is that of the run which made it.

    Call it on one process.
    """
    folder = Path(str(config.backbone.pretrained))
    with one_at_a_time(folder.with_name(f".making-{folder.name}")):  # runs of several seeds may begin together
        _make(config, folder, CONFIGS / "models" / str(config.demo.model), device)


def _make(config: Config, folder: Path, template: Path, device: torch.device) -> None:
    settings = {"demo": dataclasses.asdict(config.demo),
                "data": {name: getattr(config.data, name) for name in _DATA_SETTINGS}}
    record, made = folder.with_name(f"{folder.name}.json"), folder.is_dir()
    if made:
        _check_record(record, settings, folder)
    if config.data.path is not None and not Path(config.data.path).exists():
        _write_data(Path(config.data.path), config)
    if made:
        return
    torch.manual_seed(config.seed)
    make = _make_text_to_image if [*template.glob("text_encoder*")] else _make_dit
    make(config, folder, template, device)
    write_text(record, json.dumps(settings, indent=1) + "\n")


def drawn_kind(config: Config) -> str:
    """What `demo.model` was made to draw, the last part of its name: shapes, scenes, glyphs or digits."""
    return str(config.demo.model).rpartition("-")[2]


def _write_data(folder: Path, config: Config) -> None:
    kind = drawn_kind(config)
    if kind not in _WRITERS:
        raise InputError(f"data.path={str(folder)!r} does not exist, and demo.model={config.demo.model!r} draws "
                         f"nothing: set data.path to your data, or demo.model to one for {', '.join(_WRITERS)}")
    _WRITERS[kind](folder, config.demo.images, config.seed)


def _check_record(record: Path, settings: dict[str, dict[str, Any]], folder: Path) -> None:
    """Refuse a dense model that other settings have made than those of this run."""
    try:
        made_with = json.loads(record.read_text(encoding="utf-8"))
        changed = [f"{section}.{name}={made_with[section].get(name)!r}, not {value!r}" for section, values in
                   settings.items() for name, value in values.items() if made_with[section].get(name) != value]
    except (OSError, ValueError, LookupError, AttributeError):
        changed = [f"settings that are not written in {record}"]
    if changed:
        raise InputError(f"backbone.pretrained={str(folder)!r} was made with {'; '.join(changed)}: remove it to make "
                         "it again, or set demo.model=null to use it as it is")


def _make_dit(config: Config, folder: Path, template: Path, device: torch.device) -> None:
    model = DiTTransformer2DModel.from_config(DiTTransformer2DModel.load_config(template / "transformer"))
    tie_embedders(model, new=True)
    for block in model.transformer_blocks:  # adaLN-Zero (DiT, arXiv 2212.09748, Sec. 3.2)
        nn.init.zeros_(block.norm1.linear.weight)
        nn.init.zeros_(block.norm1.linear.bias)
    model.to(device).train()

    def inputs(batch: dict[str, Any], dropped: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        labels = batch["labels"].masked_fill(dropped, null_class(model)).to(device)
        return batch["latents"].to(device), {"class_labels": labels}

    _train_dense(config, folder, template, model, model.parameters(), inputs)
    export(folder, template, model)


def _make_text_to_image(config: Config, folder: Path, template: Path, device: torch.device) -> None:
    """Autoencoder first; then backbone and text encoders together, on its latents, through the pipeline's own class."""
    parts = folder.with_name(f".parts-of-{folder.name}")
    shutil.rmtree(parts, ignore_errors=True)
    shutil.copytree(template, parts)
    source: Any = open_source(config)
    indices, _ = split(source, config.data.holdout, config.seed)
    images = torch.stack([source[0, int(i)]["images"] for i in indices])
    vae = _train_vae(config, template, images, device)
    vae.save_pretrained(parts / "vae")
    with torch.no_grad():
        moments = torch.cat([vae.encode(part.to(device)).latent_dist.parameters.cpu() for part in images.split(256)])
    row_of = {int(index): row for row, index in enumerate(indices)}

    cls, component = component_of(template)
    backbone = cls.from_config(cls.load_config(template / component))
    names = [_make_text_encoder(parts, path.name) for path in sorted(template.glob("text_encoder*"))]
    pipe: Any = DiffusionPipeline.from_pretrained(
        parts, **absent_parts(DiffusionPipeline.load_config(parts)), **{component: backbone}).to(device)
    encoders = [getattr(pipe, name).train() for name in names]
    backbone.train()

    class Encoded:
        """The data set with every image's latent moments in place of its pixels."""

        def __len__(self) -> int:
            return len(source)

        def __getitem__(self, key: tuple[int, int]) -> dict[str, Any]:
            return {"moments": moments[row_of[key[1]]], "captions": source.caption(key)}

    def inputs(batch: dict[str, Any], dropped: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        mean, logvar = batch["moments"].to(device).chunk(2, dim=1)
        latents = (mean + (0.5 * logvar).exp() * torch.randn_like(mean)) * vae.config.scaling_factor
        prompts = ["" if drop else caption for caption, drop in zip(batch["captions"], dropped.tolist(), strict=True)]
        if component == "unet":
            return latents, {"encoder_hidden_states": pipe.encode_prompt(prompts, device, 1, False)[0]}
        states, _, pooled, _ = pipe.encode_prompt(prompts, None, None, do_classifier_free_guidance=False,
                                                  max_sequence_length=config.data.max_tokens)
        return latents, {"encoder_hidden_states": states, "pooled_projections": pooled}

    parameters = [parameter for module in (backbone, *encoders) for parameter in module.parameters()]
    _train_dense(config, folder, template, backbone, parameters, inputs, Encoded())
    for name, encoder in zip(names, encoders, strict=True):
        encoder.save_pretrained(parts / name)
    export(folder, parts, backbone)
    shutil.rmtree(parts)


def _make_text_encoder(parts: Path, name: str) -> str:
    """A CLIP text encoder with random weights in `parts`, where its configuration is, and its tokenizer; its name."""
    configuration = CLIPTextConfig.from_pretrained(parts / name)
    make: Any = getattr(transformers, configuration.architectures[0])
    make(configuration).save_pretrained(parts / name)
    make_tokenizer(parts / name).save_pretrained(parts / name.replace("text_encoder", "tokenizer"))
    return name


def _train_dense(config: Config, folder: Path, template: Path, model: Backbone, parameters: Iterable[nn.Parameter],
                 inputs: Callable[[dict[str, Any], Tensor], tuple[Tensor, dict[str, Tensor]]],
                 source: Any = None) -> None:
    """Fit `parameters` to the denoising loss of `model`, and leave their average in them.

    inputs: from a batch and the samples that lose their condition to latents and the model's arguments.
    """
    demo, source = config.demo, source or open_source(config)
    parameters = list(parameters)
    indices, _ = split(source, config.data.holdout, config.seed)
    tokens = tokens_of(template, config.data.resolution)
    noising = make_noising(load_scheduler(template), tokens, config.flow).to(model.device)
    optimizer, schedule = _adamw(parameters, demo.lr, demo.steps)
    ema = EMAModel(parameters, decay=0.998, foreach=True)
    batches = GlobalBatches(Order(indices, config.seed), demo.batch_size, 1, 0, 1, 0, demo.steps)
    bar = tqdm(make_loader(source, batches, 0), desc=f"dense teacher → {folder}", unit="step", dynamic_ncols=True)
    for step, batch in enumerate(bar):
        drawn = draw(noising, demo.batch_size, config.data.label_dropout, config.seed, step, stream=5)
        latents, conditioning = inputs(batch, drawn.dropped)
        timesteps, noise = drawn.timesteps.to(latents.device), drawn.noise(tuple(latents.shape[1:])).to(latents)
        pred = model(noising.noised(latents, noise, timesteps), timestep=timesteps, **conditioning).sample
        loss = losses.mse_per_sample(pred, noising.target(latents, noise, timesteps)).mean()
        _step(loss, parameters, optimizer, schedule)
        ema.step(parameters)
        if step % config.log.every == 0:
            bar.set_postfix(loss=f"{loss.item():.4f}")
    ema.copy_to(parameters)


def _train_vae(config: Config, template: Path, images: Tensor, device: torch.device) -> AutoencoderKL:
    """An autoencoder of squared error and a slight pull to the unit Gaussian, its latents scaled to unit variance."""
    demo = config.demo
    vae = AutoencoderKL.from_config(AutoencoderKL.load_config(template / "vae")).to(device)
    parameters = list(vae.parameters())
    optimizer, schedule = _adamw(parameters, 2e-3, demo.vae_steps)
    bar = tqdm(range(demo.vae_steps), desc="autoencoder", unit="step", dynamic_ncols=True)
    for step in bar:
        source = generator(config.seed, step, 6)
        batch = images[torch.randint(len(images), (32,), generator=source)].to(device)
        posterior = vae.encode(batch).latent_dist
        error = losses.mse_per_sample(vae.decode(posterior.sample(source)).sample, batch).mean()
        _step(error + 1e-6 * posterior.kl().mean(), parameters, optimizer, schedule)
        if step % config.log.every == 0:
            bar.set_postfix(error=f"{error.item():.4f}")
    vae.eval().requires_grad_(False)
    spread = torch.cat([vae.encode(part.to(device)).latent_dist.mean for part in images[:1024].split(256)]).std()
    vae.register_to_config(scaling_factor=1 / float(spread))
    return vae


def _adamw(parameters: list[nn.Parameter], lr: float, steps: int) -> tuple[torch.optim.Optimizer, Any]:
    optimizer = torch.optim.AdamW(parameters, lr, weight_decay=0.0)
    return optimizer, get_scheduler(
        "cosine", optimizer, num_warmup_steps=min(100, steps // 10), num_training_steps=steps
    )


def _step(loss: Tensor, parameters: list[nn.Parameter], optimizer: torch.optim.Optimizer, schedule: Any) -> None:
    loss.backward()
    torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    optimizer.step()
    schedule.step()
    optimizer.zero_grad()


def make_tokenizer(encoder: Path) -> CLIPTokenizer:
    """A byte-pair encoding that makes one token of every word of the captions, for the text encoder in that folder."""
    words = {word for words in (*shapes.KINDS, *shapes.RADII, *shapes.RELATIONS, "a") for word in words.split()}
    encoding = Tokenizer(BPE(end_of_word_suffix="</w>"))
    letters = [*string.ascii_lowercase]
    trainer = BpeTrainer(special_tokens=[*_SPECIAL], initial_alphabet=letters,
                         end_of_word_suffix="</w>", show_progress=False)
    encoding.train_from_iterator([*sorted(words), *letters], trainer)
    model = json.loads(encoding.to_str())["model"]
    length = json.loads((encoder / "config.json").read_text(encoding="utf-8"))["max_position_embeddings"]
    merges = [tuple(pair) for pair in model["merges"]]
    # The trainer numbers single letters in another order each time; the text encoder learns the numbers.
    merged = ["".join(pair) for pair in merges]
    single = sorted(set(model["vocab"]) - {*_SPECIAL, *merged})
    vocabulary = {token: number for number, token in enumerate((*_SPECIAL, *single, *merged))}
    made: Any = CLIPTokenizer
    return made(vocabulary, merges, model_max_length=length)
