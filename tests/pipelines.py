"""The real pipelines of diffusers with tiny random components, made without a network."""

import inspect
import string

import diffusers
import torch
import transformers
from diffusers import (
    AutoencoderDC,
    AutoencoderKL,
    AutoencoderKLFlux2,
    AutoencoderKLLTXVideo,
    AutoencoderKLQwenImage,
    AutoencoderKLWan,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
)
from tokenizers import AddedToken, Regex, Tokenizer, models, pre_tokenizers, processors

from alter.common.load import CONFIGS
from alter.data import shapes
from alter.training.demo import make_tokenizer

PROMPTS = ["a red circle", "a small green triangle above a blue square"]
SIZE = {"height": 32, "width": 32}  # of their images, in pixels
VIDEOS = ("wan", "wan22", "ltx")  # of 5 frames
_WIDTH = 16  # of text states
_CLIP = CONFIGS / "models/demo/sd-shapes/text_encoder"
# What Qwen-Image's pipeline puts around a prompt, of which it drops as many tokens as its own tokenizer makes.
_TEMPLATE = ("system user assistant Describe the image by detailing color shape size texture quantity text spatial "
             "relationships of objects and background")
_CHAT = ("{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
         "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")


def make_pipeline(name, folder=None):
    """One of PIPELINES, the same weights every time; saved in `folder` as well, if one is named."""
    torch.manual_seed(0)
    pipe = PIPELINES[name]()
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):
            part.eval().requires_grad_(False)
    for component in ("unet", "transformer", "transformer_2"):
        if getattr(pipe, component, None) is not None:
            randomise(getattr(pipe, component))
    pipe.set_progress_bar_config(disable=True)
    if folder is not None:
        pipe.save_pretrained(folder)
    return pipe


def unguided(name):
    """How it is told to draw without guidance, or with a distilled one."""
    other = {"flux": {"guidance_scale": 3.5}, "qwen": {"true_cfg_scale": 1.0}, "z_image": {"guidance_scale": 0.0}}
    return other.get(name, {"guidance_scale": 1.0})


def backbones(pipe):
    """By component."""
    names = ("unet", "transformer", "transformer_2")
    return {name: getattr(pipe, name) for name in names if getattr(pipe, name, None) is not None}


def draw(pipe, prompts=PROMPTS[1], **arguments):
    """Images or frames of 32 x 32 pixels, from one seed, as an array."""
    settings = {**SIZE, "num_inference_steps": 3, "output_type": "np", "generator": torch.Generator().manual_seed(0)}
    kind = type(pipe).__name__
    if kind.startswith(("Wan", "LTX")):
        settings["num_frames"] = 5
    if kind.startswith(("Sana", "PixArt")):
        settings |= {"use_resolution_binning": False, "clean_caption": False}
    accepted = inspect.signature(pipe.__call__).parameters
    settings = {key: value for key, value in settings.items() if key in accepted}  # image to image takes no size
    torch.manual_seed(0)  # SD3's ControlNet encodes its picture without the generator
    prompts = [*prompts] if isinstance(prompts, list) else prompts  # Z-Image changes the list that it is given
    output = pipe(prompt=prompts, **{**settings, **arguments})
    return output.frames if hasattr(output, "frames") else output.images


class _Enough(BaseException):
    """The scheduler has been given what was to be seen."""


def received(pipe, name, prompts, steps=1):
    """What the scheduler receives at its step number `steps`: the answer, the backbone's input and the timestep."""
    seen = []
    step = pipe.scheduler.step
    scale = getattr(pipe.scheduler, "scale_model_input", lambda latents, timestep: latents)

    def stop(answer, timestep, latents, *arguments, **options):
        seen.append((answer, scale(latents, timestep), timestep))
        if len(seen) == steps:
            raise _Enough
        return step(answer, timestep, latents, *arguments, **options)

    pipe.scheduler.step = stop
    try:
        draw(pipe, prompts, **unguided(name))
    except _Enough:
        return seen[-1]
    raise AssertionError(f"{name} took {len(seen)} steps")


def randomise(backbone):
    """Every block changes the output; some layers begin at zero."""
    for name, value in backbone.named_parameters():
        if value.dim() > 1:
            value.normal_(0, max(value.shape[1:].numel(), 1) ** -0.5)
        else:
            value.normal_(1.0 if name.endswith("weight") else 0.0, 0.1)


def _clip(cls, width):
    """`cls`: CLIPTextModel or CLIPTextModelWithProjection, of text states and pooled text of one width."""
    config = transformers.CLIPTextConfig.from_pretrained(_CLIP)
    config.hidden_size, config.intermediate_size, config.num_attention_heads = width, 2 * width, 2
    config.projection_dim = width
    return getattr(transformers, cls)(config)


def _word_tokenizer():
    """A token for each word, with a chat template."""
    parts = (*shapes.KINDS, *shapes.RADII, *shapes.RELATIONS, _TEMPLATE, "a")
    words = {word for part in parts for word in part.split()}
    special = ["<pad>", "</s>", "<unk>", "<|im_start|>", "<|im_end|>"]
    vocabulary = [*special, "\n", *string.punctuation, *sorted(words)]
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(vocabulary)}, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"\n|\w+|[^\w\s]"), "removed", invert=True)
    tokenizer.post_processor = processors.TemplateProcessing("$A </s>", special_tokens=[("</s>", 1)])
    tokenizer.add_special_tokens([AddedToken(token) for token in special])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=512,
        chat_template=_CHAT)


def _t5(cls="T5", width=_WIDTH):
    config = getattr(transformers, f"{cls}Config")(
        vocab_size=100, d_model=width, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    return getattr(transformers, f"{cls}EncoderModel")(config)


def _decoder(cls, layers=2):
    """A language model whose states are the text: Gemma2Model, Qwen3Model or Qwen3ForCausalLM."""
    kind = {"Gemma2Model": "Gemma2Config"}.get(cls, "Qwen3Config")
    return getattr(transformers, cls)(getattr(transformers, kind)(
        vocab_size=100, hidden_size=_WIDTH, intermediate_size=16, num_hidden_layers=layers, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, pad_token_id=0, bos_token_id=1, eos_token_id=1))


def _qwen_vl():
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
    text = {"vocab_size": 100, "hidden_size": _WIDTH, "intermediate_size": 16, "num_hidden_layers": 2,
            "num_attention_heads": 2, "num_key_value_heads": 1, "rope_parameters": rope,
            "bos_token_id": 1, "eos_token_id": 1}
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": _WIDTH}
    return transformers.Qwen2_5_VLForConditionalGeneration(transformers.Qwen2_5_VLConfig(
        text_config=text, vision_config=vision, pad_token_id=0, bos_token_id=1, eos_token_id=1))


def _kl(cls=AutoencoderKL, channels=4, **options):
    """Halves the sides of an image."""
    return cls(block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2, norm_num_groups=4,
               up_block_types=("UpDecoderBlock2D",) * 2, latent_channels=channels, layers_per_block=1, **options)


def _shifted_kl():
    return _kl(scaling_factor=1.5, shift_factor=0.06, use_quant_conv=False, use_post_quant_conv=False)


def _statistics(channels):
    """Of latents, as Wan's and Qwen-Image's autoencoders list them."""
    return {"latents_mean": [0.1 * i for i in range(channels)], "latents_std": [1 + 0.1 * i for i in range(channels)]}


def _flow(**options):
    return FlowMatchEulerDiscreteScheduler(**options)


def _sd3(with_t5=False):
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=16, patch_size=2, in_channels=4, out_channels=4, num_layers=3, attention_head_dim=8,
        num_attention_heads=2, joint_attention_dim=2 * _WIDTH, caption_projection_dim=16,
        pooled_projection_dim=2 * _WIDTH, pos_embed_max_size=32, dual_attention_layers=(0,), qk_norm="rms_norm")
    t5 = {"text_encoder_3": _t5(width=2 * _WIDTH), "tokenizer_3": _word_tokenizer()} if with_t5 else {
        "text_encoder_3": None, "tokenizer_3": None}
    return diffusers.StableDiffusion3Pipeline(
        transformer=transformer, scheduler=_flow(shift=3.0), vae=_shifted_kl(),
        text_encoder=_clip("CLIPTextModelWithProjection", _WIDTH), tokenizer=make_tokenizer(_CLIP),
        text_encoder_2=_clip("CLIPTextModelWithProjection", _WIDTH), tokenizer_2=make_tokenizer(_CLIP), **t5)


def _flux():
    transformer = diffusers.FluxTransformer2DModel(
        in_channels=16, num_layers=2, num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=_WIDTH, pooled_projection_dim=_WIDTH, axes_dims_rope=(4, 4, 8), guidance_embeds=True)
    return diffusers.FluxPipeline(
        transformer=transformer, scheduler=_flow(shift=3.0, use_dynamic_shifting=True), vae=_shifted_kl(),
        text_encoder=_clip("CLIPTextModel", _WIDTH), tokenizer=make_tokenizer(_CLIP), text_encoder_2=_t5(),
        tokenizer_2=_word_tokenizer())


def _flux2():
    transformer = diffusers.Flux2Transformer2DModel(
        in_channels=16, num_layers=2, num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=3 * _WIDTH, timestep_guidance_channels=16, axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=False)
    vae = _kl(AutoencoderKLFlux2)
    vae.bn.running_mean.copy_(torch.linspace(-1, 1, 16))
    vae.bn.running_var.copy_(torch.linspace(0.5, 2, 16))
    return diffusers.Flux2KleinPipeline(
        transformer=transformer, scheduler=_flow(shift=3.0, use_dynamic_shifting=True), vae=vae,
        text_encoder=_decoder("Qwen3ForCausalLM", 28), tokenizer=_word_tokenizer())


def _qwen():
    transformer = diffusers.QwenImageTransformer2DModel(
        in_channels=16, out_channels=4, num_layers=3, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=_WIDTH, axes_dims_rope=(4, 4, 8))
    vae = AutoencoderKLQwenImage(base_dim=4, z_dim=4, dim_mult=[1, 1, 1], num_res_blocks=1,
                                 temperal_downsample=[False, True], **_statistics(4))
    return diffusers.QwenImagePipeline(
        transformer=transformer, vae=vae, text_encoder=_qwen_vl(), tokenizer=_word_tokenizer(),
        scheduler=_flow(use_dynamic_shifting=True, time_shift_type="exponential", shift_terminal=0.02))


def _wan(second=False):
    def transformer():
        return diffusers.WanTransformer3DModel(
            num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=_WIDTH, freq_dim=16,
            ffn_dim=32, num_layers=3, rope_max_seq_len=32)

    vae = AutoencoderKLWan(base_dim=4, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1,
                           temperal_downsample=[False, True, True], **_statistics(4))
    stages = {"transformer_2": transformer(), "boundary_ratio": 0.875} if second else {}
    scheduler = UniPCMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0)
    return diffusers.WanPipeline(transformer=transformer(), vae=vae, scheduler=scheduler, text_encoder=_t5("UMT5"),
                                 tokenizer=_word_tokenizer(), **stages)


def _ltx():
    transformer = diffusers.LTXVideoTransformer3DModel(
        in_channels=8, out_channels=8, num_attention_heads=2, attention_head_dim=8, cross_attention_dim=16,
        num_layers=3, caption_channels=_WIDTH)
    vae = AutoencoderKLLTXVideo(
        latent_channels=8, block_out_channels=(8, 8, 8, 8), decoder_block_out_channels=(8, 8, 8, 8),
        layers_per_block=(1,) * 5, decoder_layers_per_block=(1,) * 5, decoder_inject_noise=(False,) * 5,
        spatio_temporal_scaling=(True, True, False, False), decoder_spatio_temporal_scaling=(True, True, False, False),
        patch_size=1, encoder_causal=True, decoder_causal=False)
    vae.latents_mean.copy_(torch.linspace(-1, 1, 8))
    vae.latents_std.copy_(torch.linspace(0.5, 2, 8))
    return diffusers.LTXPipeline(transformer=transformer, vae=vae, scheduler=_flow(use_dynamic_shifting=True),
                                 text_encoder=_t5(), tokenizer=_word_tokenizer())


def _pixart():
    transformer = diffusers.PixArtTransformer2DModel(
        sample_size=16, num_layers=3, patch_size=2, attention_head_dim=8, num_attention_heads=2,
        caption_channels=_WIDTH, in_channels=4, cross_attention_dim=16, out_channels=8)
    return diffusers.PixArtAlphaPipeline(
        transformer=transformer, vae=_kl(scaling_factor=0.5), scheduler=DPMSolverMultistepScheduler(),
        text_encoder=_t5(), tokenizer=_word_tokenizer())


def _sana():
    transformer = diffusers.SanaTransformer2DModel(
        patch_size=1, in_channels=4, out_channels=4, num_layers=3, num_attention_heads=2, attention_head_dim=8,
        num_cross_attention_heads=2, cross_attention_head_dim=8, cross_attention_dim=16, caption_channels=_WIDTH,
        sample_size=32)
    stages = {f"{part}_{key}": value for part in ("encoder", "decoder") for key, value in {
        "block_types": ("ResBlock", "EfficientViTBlock"), "block_out_channels": (8, 8), "qkv_multiscales": ((), (5,)),
        "layers_per_block": (1, 1)}.items()}
    vae = AutoencoderDC(latent_channels=4, attention_head_dim=4, downsample_block_type="conv",
                        upsample_block_type="interpolate", scaling_factor=0.4, **stages)
    return diffusers.SanaPipeline(
        transformer=transformer, vae=vae, text_encoder=_decoder("Gemma2Model"), tokenizer=_word_tokenizer(),
        scheduler=DPMSolverMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0))


def _z_image():
    transformer = diffusers.ZImageTransformer2DModel(
        in_channels=4, dim=32, n_layers=3, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=_WIDTH,
        axes_dims=[8, 4, 4], axes_lens=[1024, 32, 32])
    return diffusers.ZImagePipeline(transformer=transformer, scheduler=_flow(shift=3.0), vae=_shifted_kl(),
                                    text_encoder=_decoder("Qwen3Model"), tokenizer=_word_tokenizer())


def _unet(width, **options):
    return diffusers.UNet2DConditionModel(
        sample_size=16, in_channels=4, out_channels=4, layers_per_block=2, block_out_channels=(8, 16),
        norm_num_groups=4, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), attention_head_dim=4,
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), cross_attention_dim=width, **options)


def _sdxl():
    unet = _unet(2 * _WIDTH, use_linear_projection=True, addition_embed_type="text_time", addition_time_embed_dim=8,
                 transformer_layers_per_block=(1, 2), projection_class_embeddings_input_dim=6 * 8 + _WIDTH)
    return diffusers.StableDiffusionXLPipeline(
        unet=unet, vae=_kl(scaling_factor=0.13), scheduler=EulerDiscreteScheduler(beta_schedule="scaled_linear"),
        text_encoder=_clip("CLIPTextModel", _WIDTH), tokenizer=make_tokenizer(_CLIP),
        text_encoder_2=_clip("CLIPTextModelWithProjection", _WIDTH), tokenizer_2=make_tokenizer(_CLIP))


def _sd():
    return diffusers.StableDiffusionPipeline(
        unet=_unet(_WIDTH), vae=_kl(scaling_factor=0.18), scheduler=DDIMScheduler(), tokenizer=make_tokenizer(_CLIP),
        text_encoder=_clip("CLIPTextModel", _WIDTH), safety_checker=None, feature_extractor=None,
        requires_safety_checker=False)


PIPELINES = {
    "sd3": _sd3, "sd3_t5": lambda: _sd3(True), "flux": _flux, "flux2": _flux2, "qwen": _qwen, "wan": _wan,
    "wan22": lambda: _wan(True), "ltx": _ltx, "pixart": _pixart, "sana": _sana, "z_image": _z_image, "sdxl": _sdxl,
    "sd": _sd,
}
