"""A run's configuration: frozen dataclasses, filled from YAML and then from `key.path=value` overrides.

Every key is declared once, here, in backbone.py (`backbone.*`, `lora.*`) or in flow.py (`flow.*`), with its default,
its range and its documentation; `reference()` prints them.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

from .backbone import BackboneConfig as BackboneConfig
from .backbone import LoraConfig as LoraConfig
from .errors import Faults
from .flow import FlowConfig as FlowConfig
from .schema import key
from .search import ExpertsConfig as ExpertsConfig
from .search import SearchConfig as SearchConfig


@dataclass(frozen=True)
class TeacherConfig:
    pretrained: str | None = key(
        None, "Folder or hub id of the teacher's pipeline; null: that of `backbone.pretrained`. With `lora.rank` that "
        "is the backbone itself without its adapters: no second copy.")
    precision: str = key("fp32", "The teacher's weights: fp32, or bf16 to save memory.", choices=("fp32", "bf16"))
    offload: bool = key(False, "Keep the teacher in host memory and move it to the device for each use.")


@dataclass(frozen=True)
class DataConfig:
    source: str = key(
        "image_folder",
        "digits: scikit-learn's 8x8 digits. image_folder: images with a metadata.jsonl or metadata.csv (`file_name` "
        "and captions), or .txt files beside them, or one sub-folder of images per class. datasets: a Hugging Face "
        "data set, parquet or arrow. webdataset: tar files as img2dataset writes them. video_folder: videos, or "
        "folders of frames, with .txt files beside them. latents: of `alter encode`, fast-DiT or REPA.",
        choices=("digits", "image_folder", "datasets", "webdataset", "video_folder", "latents"))
    path: str | None = key(None, "Folder of the data set (not used by digits).")
    split: str | None = key("train", "Part of a Hugging Face data set that has several; null takes every file.")
    stream: bool = key(
        False, "Read the parquet files of a Hugging Face data set as they are, without unpacking them first; `path` "
        "may then be an address such as hf://datasets/OWNER/NAME.")
    shuffle_shards: int = key(
        8, "Shuffle shards (tar files, or row groups of streamed parquet), then shuffle samples within windows of this "
        "many shards; every loader process holds as many row groups in memory.", within="[1, inf)")
    image_column: str = key("image", "Column of a Hugging Face data set that holds the images.")
    caption_column: str = key(
        "text", "Column with a caption, or a list of them, of which one is drawn each time. webdataset: text is the "
        ".txt file, anything else that key of the .json file.")
    label_column: str = key(
        "label", "Column with class numbers, for backbones conditioned on them, or where there are no captions.")
    prompt: str | None = key(
        None, "One caption for all images of a folder, in place of their own (DreamBooth's instance prompt).")
    prior_path: str | None = key(
        None, "Folder of images of the same class, half of every epoch, against forgetting (DreamBooth's prior).")
    prior_prompt: str | None = key(None, "Caption of the images in `prior_path`.")
    resolution: int = key(256, "Side of the square images, in pixels.", within="[1, inf)")
    frames: int = key(1, "Frames of a clip, for a backbone of videos; 1: images.", within="[1, inf)")
    bucket_step: int | None = key(
        None, "Aspect-ratio buckets: frame images to the nearest of the shapes of about resolution² pixels whose sides "
        "are multiples of this (64 is usual); a batch has one shape. null: squares.", within="[1, inf)")
    crop: str = key("center", "Square that is cut from an image.", choices=("center", "random"))
    flip: bool = key(False, "Mirror half of the images; of latents encoded with their mirror images, draw either.")
    max_unreadable: float = key(
        0.01, "Share of unusable samples (replaced, and listed in unreadable.jsonl) above which a run stops.",
        within="[0, 1]")
    max_tokens: int | None = key(
        None, "Tokens to which a prompt is padded or cut, as the pipeline's `max_sequence_length`; null: its own "
        "default. Sample with the same.", within="[1, inf)")
    label_dropout: float = key(
        0.1, "Probability of dropping a label or prompt (for classifier-free guidance).", within="[0, 1]")
    holdout: int | None = key(
        None, "Samples kept out of training, on which `output_error` is measured; null: 5% of them, at most 256.",
        within="[0, inf)")
    workers: int = key(4, "Loader processes per training process.", within="[0, inf)")


@dataclass(frozen=True)
class BudgetConfig:
    keep_ratio: float | tuple[float, float] = key(
        0.65, "p, the share of the cost to keep, averaged over timesteps. [low, high], with search.method=elastic: one "
        "run for every budget between them; experts.json then uses the low one unless told otherwise.",
        within="(0, 1]")
    descent: float = key(
        0.0, "Share of the search in which the ratio loss's target falls from 1 to p, linearly; 0: it is p at once, as "
        "in the paper.", within="[0, 1]",
    )
    over: str = key(
        "total",
        "What p is a share of. total: the whole backbone. prunable: only its prunable layers.",
        choices=("total", "prunable"))
    cost: str = key(
        "macs", "What p counts. macs: multiply-accumulate operations. latency: seconds, measured per layer on the "
        "run's device in its precision when the run begins, and kept in latency.json.", choices=("macs", "latency"),
    )
    batch: int = key(2, "Batch at which latency is measured; guidance doubles a pipeline's.", within="[1, inf)")
    latency_file: str | None = key(
        None, "Latencies measured by `alter latency` on the device that will use the experts; null: measured here."
    )
    sampler: str | None = key(
        None, "Weigh each training timestep in the budget (and, where noise goes by betas, in the losses) as the one "
        "nearest to it that this diffusers scheduler visits, for example DPMSolverMultistepScheduler. uniform: all "
        "timesteps alike. null: uniform for noise by betas; for flow matching, the pipeline's own scheduler."
    )
    sampling_steps: int = key(20, "Denoising steps of `sampler`.", within="[1, 1000]")

    @property
    def range(self) -> tuple[float, float]:
        """The lowest and the highest p."""
        return self.keep_ratio if isinstance(self.keep_ratio, tuple) else (self.keep_ratio, self.keep_ratio)


@dataclass(frozen=True)
class LossConfig:
    denoise: float = key(1e-4, "Weight of the error against the scheduler's target.", within="[0, inf)")
    min_snr_gamma: float | None = key(
        None, "Weight the denoising error by min(SNR, gamma) in the prediction type's terms (arXiv 2303.09556); "
        "null weights all timesteps equally.", within="(0, inf)",
    )
    output_kd: float = key(1.0, "Weight of the error against the teacher's output.", within="[0, inf)")
    feature_kd: float = key(1.0, "Weight of the error against the teacher's activations.", within="[0, inf)")
    feature_kd_outliers: float | None = key(
        None,
        "Leave out activations of the teacher more than this many standard deviations from their mean "
        "(TinyFusion's masked KD); null keeps all.",
        within="(0, inf)",
    )
    ratio: float = key(5.0, "Weight of the budget's log-ratio loss.", within="[0, inf)")
    balance: float = key(
        1.0, "Weight of the router's load-balancing loss; an ordered router has none.", within="[0, inf)")

    @property
    def weights(self) -> dict[str, float]:
        """λ of each term of L_perf."""
        return {"denoise": self.denoise, "output_kd": self.output_kd, "feature_kd": self.feature_kd}

    @property
    def distils(self) -> bool:
        """Whether the teacher is used at all."""
        return self.output_kd > 0 or self.feature_kd > 0


@dataclass(frozen=True)
class TrainConfig:
    steps: int = key(32_000, "Optimizer steps in total, search included.", within="[1, inf)")
    search_steps: int | None = key(
        None, "Steps in which the hypernetwork is trained; then its masks are frozen. null: a quarter of `steps`.",
        within="[1, inf)",
    )
    schedule: str = key(
        "joint",
        "joint: hypernetwork and backbone are updated in turn during the search. two_stage: the backbone is tuned "
        "only after the search (the paper's ablation `TwoStage`).",
        choices=("joint", "two_stage"))
    batch_size: int = key(64, "Samples per update, of all processes and micro-batches together.", within="[1, inf)")
    gradient_accumulation: int = key(1, "Micro-batches per update: more need less memory.", within="[1, inf)")
    timesteps: str = key(
        "all", "all: as `flow.density` or, by betas, uniformly. sampled: only those that `budget.sampler` visits in "
        "`budget.sampling_steps` steps, each as often, for few-step models; training timesteps between them are served "
        "by the expert of the nearest.", choices=("all", "sampled"))
    mixed_precision: str = key(
        "bf16", "Arithmetic of the backbone: no (fp32), bf16, or fp16 with a loss scaler (GPUs only).",
        choices=("no", "bf16", "fp16"),
    )
    noise_offset: float = key(
        0.0, "Add this much noise that is constant over each channel, so that brightness is learned too.",
        within="[0, inf)",
    )
    tf32: bool = key(True, "Let fp32 matrix products use TensorFloat-32 on GPUs.")
    max_grad_norm: float = key(1.0, "Clip each update's gradient to this norm.", within="(0, inf]")
    ema_decay: float | None = key(
        None, "Average the backbone's weights with this decay, and export the average.", within="(0, 1)"
    )

    @property
    def t_end(self) -> int:
        """T_end: the number of steps after which the masks are frozen."""
        return self.search_steps or max(1, self.steps // 4)

    def micro_batch(self, processes: int) -> int:
        """Samples of one forward on one of so many processes."""
        return self.batch_size // (self.gradient_accumulation * processes)


@dataclass(frozen=True)
class OptimConfig:
    optimizer: str = key(
        "adamw", "adamw, or adamw_8bit for the backbone (needs bitsandbytes; a quarter of the state's memory).",
        choices=("adamw", "adamw_8bit"),
    )
    fused: bool = key(False, "AdamW as one kernel for all parameters.")
    backbone_lr: float = key(1e-5, "Learning rate of the backbone (AdamW).", within="(0, inf)")
    hypernetwork_lr: float = key(7e-5, "Learning rate of the hypernetwork (AdamW).", within="(0, inf)")
    betas: tuple[float, float] = key((0.9, 0.999), "AdamW's decay rates.", within="[0, 1)")
    weight_decay: float = key(1e-2, "AdamW's weight decay.", within="[0, inf)")
    lr_schedule: str = key(
        "constant", "Course of both rates after warm-up.", choices=("constant", "cosine", "polynomial")
    )
    warmup_steps: int = key(250, "Steps over which both rates rise from zero.", within="[0, inf)")


@dataclass(frozen=True)
class CheckpointConfig:
    every: int = key(1_000, "Steps between checkpoints.", within="[1, inf)")
    keep: int = key(3, "Newest checkpoints kept.", within="[1, inf)")


@dataclass(frozen=True)
class LogConfig:
    every: int = key(10, "Steps between lines of metrics.jsonl.", within="[1, inf)")
    masks_every: int = key(
        100, "Steps of the search between records of masks and routes: lines of history.jsonl, and pictures to the "
        "tracker.", within="[1, inf)",
    )
    tracker: str = key(
        "tensorboard", "Where logged values go besides metrics.jsonl.", choices=("tensorboard", "wandb", "none")
    )


@dataclass(frozen=True)
class ValidateConfig:
    every: int | None = key(
        None, "Steps between validation images (of the dense model too, before the first step); null: none.",
        within="[1, inf)",
    )
    prompts: tuple[str, ...] = key((), "Prompts of the validation images, for a model conditioned on text.")
    labels: tuple[int, ...] = key((), "Labels of the validation images, for a model conditioned on class labels.")


@dataclass(frozen=True)
class EvaluateConfig:
    sampling_steps: int = key(20, "Denoising steps of the samples at the end of a run.", within="[1, 1000]")
    guidance_scale: float = key(1.0, "Classifier-free guidance; 1 is without.", within="[1, inf)")
    dense: bool = key(True, "Draw the dense model's images too, with as many steps and with 50 (demos only).")
    samples: int = key(1_000, "Images for the Frechet distance and class accuracy (demos only).", within="[100, inf)")


@dataclass(frozen=True)
class DemoConfig:
    model: str | None = key(
        None,
        "Folder under configs/models/ whose architecture is trained from scratch into `backbone.pretrained` "
        "when nothing is there yet; null: `backbone.pretrained` must exist.",
    )
    images: int = key(6_000, "Images drawn into `data.path`, for a demo that draws them.", within="[1, inf)")
    vae_steps: int = key(800, "Steps of training the autoencoder, for a model that has one.", within="[1, inf)")
    steps: int = key(2_000, "Steps of training the dense model.", within="[1, inf)")
    lr: float = key(1e-3, "Learning rate of the dense model's training (AdamW, cosine).", within="(0, inf)")
    batch_size: int = key(64, "Batch size of the dense model's training.", within="[1, inf)")


@dataclass(frozen=True)
class Config:
    name: str = key("run", "Name of the run; the configuration file's stem unless set.")
    output_dir: str | None = key(
        None, "Run directory. Unset: outputs/<name>/<UTC time>, with a link outputs/<name>/latest."
    )
    paper: bool = key(
        False, "Take the paper's value of every key of the search where the file or the defaults have another; the "
        "command line has the last word. The run's own config.yaml then holds these values, and false here.")
    seed: int = key(0, "Seed of everything random.", within="[0, 4294967295]")
    resume: str | None = key(
        None, "latest, or a checkpoint's folder: continue from there. latest looks in `output_dir`, or in "
        "outputs/<name>/latest."
    )
    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    data: DataConfig = field(default_factory=DataConfig)
    experts: ExpertsConfig = field(default_factory=ExpertsConfig)
    budget: BudgetConfig = field(default_factory=BudgetConfig)
    search: SearchConfig = field(default_factory=SearchConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    flow: FlowConfig = field(default_factory=FlowConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    log: LogConfig = field(default_factory=LogConfig)
    validate: ValidateConfig = field(default_factory=ValidateConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    demo: DemoConfig = field(default_factory=DemoConfig)

    def __post_init__(self) -> None:
        faults = Faults()
        faults.lines += self._faults()
        faults.refuse()

    def _faults(self) -> Iterator[str]:
        """What the keys say together."""
        train = self.train
        if self.paper:
            yield "paper=true is resolved by load_config: pass it there, or set the keys themselves"
        if not re.fullmatch(r"[^/\\\0]+", self.name) or self.name in (".", ".."):
            yield f"name={self.name!r}: it names a folder below outputs/: use a word without / and \\"
        if self.backbone.pretrained is None:
            yield "backbone.pretrained is not set: give a diffusers folder or a hub id"
        if train.t_end > train.steps and self.experts.pretrained is None:
            yield (
                f"train.search_steps={train.search_steps} is longer than train.steps={train.steps}: "
                "search at most as long as you train"
            )
        if train.batch_size % train.gradient_accumulation:
            yield (
                f"train.batch_size={train.batch_size} cannot be split into "
                f"train.gradient_accumulation={train.gradient_accumulation} equal micro-batches: "
                "choose a multiple"
            )
        if self.loss.denoise == self.loss.output_kd == self.loss.feature_kd == 0:
            yield ("loss.denoise, loss.output_kd and loss.feature_kd are all 0: nothing would train the "
                             "backbone; set one of them above 0")
        if self.budget.latency_file is not None and self.budget.cost != "latency":
            yield (f"budget.latency_file={self.budget.latency_file!r} has no effect with budget.cost=macs: "
                             "set budget.cost=latency")
        yield from self._faults_of_search()
        if self.experts.start != "dense" and (self.experts.offset <= 0 or self.budget.descent > 0):
            yield (f"experts.start={self.experts.start} with experts.offset={self.experts.offset} and budget.descent="
                             f"{self.budget.descent}: it needs an offset above 0, and no descent, since it starts at "
                             "the budget")
        if self.lora.rank is not None and self.teacher.pretrained is None and self.teacher != TeacherConfig():
            yield (f"teacher.precision={self.teacher.precision}, teacher.offload={self.teacher.offload}: with "
                   "lora.rank the teacher is the backbone itself without its adapters, and takes no memory: leave them "
                   "out")
        if self.lora.rank is None and (self.backbone.precision != "fp32" or self.backbone.quantize):
            yield (f"backbone.precision={self.backbone.precision}, backbone.quantize={self.backbone.quantize}: only "
                   "weights that stay frozen can be stored so: set lora.rank, or leave them out")
        if self.data.source != "digits" and self.data.path is None:
            yield (f"data.path is not set: data.source={self.data.source!r} needs a folder")

    def _faults_of_search(self) -> Iterator[str]:
        (low, high), elastic = self.budget.range, self.search.method == "elastic"
        if low > high:
            yield f"budget.keep_ratio=[{low}, {high}]: give the lower one first"
        if low < high and not elastic and self.experts.pretrained is None:
            yield f"budget.keep_ratio=[{low}, {high}]: a range needs search.method=elastic: set it, or give one ratio"
        if self.search.supernet and self.train.schedule == "two_stage":
            yield ("search.supernet=true has no effect with train.schedule=two_stage, which leaves the weights alone "
                   "while it searches: leave it out")
        if elastic:
            settings = {"experts.start": (self.experts.start, "dense"), "budget.descent": (self.budget.descent, 0.0),
                        "train.schedule": (self.train.schedule, "joint"),
                        "search.supernet": (self.search.supernet, False)}
            for name, (value, without) in settings.items():
                if value != without:
                    yield f"{name}={value} has no effect with search.method=elastic: set {name}={str(without).lower()}"
