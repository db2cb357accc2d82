"""UNets, VAEs, folders and DiTs that are not what a run expects: supported, or refused in one clear line."""

import json
import shutil

import pytest
import torch
from conftest import make_dit, make_unet, make_vae, save_pipeline, save_stable_diffusion
from diffusers import DiTTransformer2DModel, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file

from alter import InputError, TemporalExperts
from alter.backbones import pretrained
from alter.backbones.cost import count_cost
from alter.backbones.dit import tie_embedders
from alter.backbones.gates import HardRows, Simulator
from alter.backbones.pretrained import load_backbone, local_folder, meta_backbone
from alter.backbones.sites import feature_points, find_sites
from alter.training.run import train
from alter.training.setup.describe import describe_run
from alter.training.setup.parts import build
from alter.training.setup.plan import check

BASE = dict(sample_size=16, in_channels=4, out_channels=4, layers_per_block=1, block_out_channels=(8, 16),
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            cross_attention_dim=12, attention_head_dim=4, norm_num_groups=4)


def refused(function, *arguments):
    with pytest.raises(InputError) as caught:
        function(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("changes, message", [
    (dict(in_channels=9),
     "with in_channels=9 and out_channels=4 (inpainting, editing, upscaling) is not trained yet"),
    (dict(in_channels=8), "a UNet2DConditionModel with in_channels=8 and out_channels=4"),
    (dict(num_class_embeds=10), "num_class_embeds=10 (class labels) is not trained yet"),
    (dict(class_embed_type="timestep"), "class_embed_type='timestep' (class labels)"),
    (dict(time_cond_proj_dim=8), "time_cond_proj_dim=8 (a guidance embedding"),
    (dict(encoder_hid_dim=6, encoder_hid_dim_type="text_proj"), "encoder_hid_dim_type='text_proj'"),
    (dict(cross_attention_dim=(12, 16)), "cross_attention_dim=[12, 16] is not supported yet"),
], ids=str)
def test_a_unet_that_needs_more_than_text_is_refused(small_config, tmp_path, changes, message):
    config = small_config("sd")
    shutil.rmtree(tmp_path / "sd-pretrained/unet")
    UNet2DConditionModel(**{**BASE, **changes}).save_pretrained(tmp_path / "sd-pretrained/unet")
    assert message in refused(check, config, 1)
    for function in (describe_run, build, train):
        assert message in refused(function, config)
    assert not (tmp_path / "run").exists()


def test_a_vae_must_fit_the_backbone(small_config, tmp_path):
    config = small_config("sd")
    message = "latent_channels=8 do not fit the backbone's in_channels=4"
    shutil.rmtree(tmp_path / "sd-pretrained/vae")
    make_vae(8).save_pretrained(tmp_path / "sd-pretrained/vae")
    assert message in refused(check, config, 1) and message in refused(build, config)


def test_a_unet_without_a_mid_block(small_config, tmp_path):
    torch.manual_seed(0)
    unet = UNet2DConditionModel(**{**BASE, "mid_block_type": None}).eval()
    sites = find_sites(unet)
    assert feature_points(unet) == ("down_blocks.0", "down_blocks.1", "up_blocks.0", "up_blocks.1")
    assert "up_blocks.0.resnets.0" in {site.name for site in sites}  # its hidden input comes from the last down block
    assert count_cost(unet, 16).macs_total == count_cost(unet.to("meta"), 16).macs_total

    torch.manual_seed(0)
    unet = UNet2DConditionModel(**{**BASE, "mid_block_type": None}).eval()
    inputs = torch.randn(1, 4, 16, 16), torch.tensor([7]), torch.randn(1, 7, 12)
    with torch.no_grad():
        dense, simulator = unet(*inputs).sample, Simulator(unet)
        for index in range(len(sites)):
            mask = torch.ones(1, len(sites), dtype=torch.bool)
            with simulator.use(HardRows(mask)):
                assert torch.equal(unet(*inputs).sample, dense)
            mask[0, index] = False
            with simulator.use(HardRows(mask)):
                assert not torch.equal(unet(*inputs).sample, dense)
    simulator.remove()

    config = small_config("sd")
    shutil.rmtree(tmp_path / "sd-pretrained/unet")
    unet.save_pretrained(tmp_path / "sd-pretrained/unet")
    run = train(config).run_dir
    pipe = StableDiffusionPipeline.from_pretrained(run / "final")
    assert pipe.unet.mid_block is None
    TemporalExperts.from_pretrained(run / "final").apply(pipe)


def test_unequal_embedders_are_not_tied_silently(small_config, tmp_path):
    model = make_dit()
    with torch.no_grad():
        model.transformer_blocks[2].norm1.emb.timestep_embedder.linear_1.weight[0, 0] += 1e-3
    message = refused(tie_embedders, model)
    assert message.startswith("backbone.pretrained: its blocks 0 and 2 have unequal timestep or label embedders")
    save_pipeline(tmp_path / "unequal", model)
    assert "backbone.pretrained: its blocks" in refused(
        build, small_config("dit", backbone={"pretrained": str(tmp_path / "unequal")}))
    assert "teacher.pretrained: its blocks" in refused(
        build, small_config("dit", teacher={"pretrained": str(tmp_path / "unequal")}))
    tie_embedders(make_dit())
    tie_embedders(model, new=True)
    assert len({id(block.norm1.emb) for block in model.transformer_blocks}) == 1


def test_a_dit_keeps_to_its_resolution(small_config, tmp_path):
    save_pipeline(tmp_path / "dit-pretrained", make_dit(size=16))
    with pytest.raises(InputError, match="data.resolution=8: gives latents of 8x8, and this DiT was made for 16x16: "
                                         "use data.resolution=16"):
        check(small_config("dit"), 1)


def test_a_dit_under_its_former_class_name(tmp_path):
    folder = save_pipeline(tmp_path / "dit", make_dit())
    file = folder / "transformer/config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "_class_name": "Transformer2DModel"}))
    assert isinstance(meta_backbone(folder), DiTTransformer2DModel)
    loaded, expected = load_backbone(folder).state_dict(), make_dit().state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in loaded.items())


def test_faults_of_a_teacher_name_the_teacher(small_config, tmp_path):
    def check_with(folder):
        return refused(check, small_config("dit", teacher={"pretrained": str(folder)}), 1)

    save_pipeline(tmp_path / "wide", make_dit(layers=5))
    assert "teacher.pretrained" in (said := check_with(tmp_path / "wide")) and "another architecture" in said
    (tmp_path / "empty").mkdir()
    assert check_with(tmp_path / "empty").startswith("teacher.pretrained=")
    (tmp_path / "weights.safetensors").write_bytes(b"")
    assert check_with(tmp_path / "weights.safetensors").startswith("teacher.pretrained=")
    save_pipeline(tmp_path / "same", make_dit())
    check(small_config("dit", teacher={"pretrained": str(tmp_path / "same")}), 1)
    (tmp_path / "same/transformer/diffusion_pytorch_model.safetensors").unlink()
    message = refused(build, small_config("dit", teacher={"pretrained": str(tmp_path / "same")}))
    assert message.startswith("teacher.pretrained")


def test_folders_that_are_almost_a_pipeline(small_config, tmp_path):
    small_config("sd")
    said = {"sd-pretrained/unet": "is the backbone alone: give the pipeline's folder",
            "model.safetensors": "is a file: convert a single-file checkpoint", "empty": "has neither unet/ nor"}
    (tmp_path / "model.safetensors").write_bytes(bytes(100))
    (tmp_path / "empty").mkdir()
    for name, message in said.items():
        config = small_config("sd", backbone={"pretrained": str(tmp_path / name)})
        for function, arguments in ((check, (config, 1)), (describe_run, (config,)), (build, (config,))):
            assert message in refused(function, *arguments)
    (tmp_path / "sd-pretrained/unet/config.json").write_text("{")
    assert "cannot be read" in refused(check, small_config("sd"), 1)
    (tmp_path / "sd-pretrained/unet/config.json").write_text(
        json.dumps({"_class_name": "UNet2DConditionModel", "block_out_channels": [8], "in_channels": 4}))
    assert "diffusers cannot make this UNet2DConditionModel" in refused(check, small_config("sd"), 1)


def halve(folder):
    """Leave fp16 files alone in every component of a pipeline folder."""
    for file in [*folder.rglob("*.safetensors")]:
        save_file({name: value.half() for name, value in load_file(file).items()},
                  file.with_name(f"{file.stem}.fp16.safetensors"), metadata={"format": "pt"})
        file.unlink()


def test_a_pipeline_of_fp16_files_alone(small_config, tmp_path):
    config = small_config("sd")
    halve(tmp_path / "sd-pretrained")
    parts = build(config)
    assert parts.backbone.dtype == torch.float32
    expected = make_unet().half().float().state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in parts.backbone.state_dict().items())
    run = train(config).run_dir
    assert not [*(run / "final").rglob("*.fp16*")]
    pipe = StableDiffusionPipeline.from_pretrained(run / "final")
    assert pipe.vae.dtype == pipe.text_encoder.dtype == pipe.unet.dtype == torch.float32
    assert pipe("a red circle", num_inference_steps=2, output_type="np").images.shape == (1, 32, 32, 3)


def test_fp16_files_alone_are_asked_of_the_hub(tmp_path, monkeypatch):
    asked, folder = [], save_stable_diffusion(tmp_path / "pipe")
    empty = tmp_path / "empty"
    empty.mkdir()

    def download(name, revision, variant=None):
        asked.append(variant)
        return str(folder if variant else empty)

    monkeypatch.setattr(pretrained.DiffusionPipeline, "download", download)
    assert local_folder("somebody/pipe") == folder and asked == [None, "fp16"]
