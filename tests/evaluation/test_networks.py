"""Feature networks with their real architectures and random weights."""

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import Harmless
from helpers import save_noise as save_images
from PIL import Image
from safetensors.torch import load_file, save_file
from torch_fidelity import feature_extractor_inceptionv3 as fidelity
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from alter import InputError
from alter.evaluation import image_sets, networks, suite


@pytest.fixture(scope="module")
def inception_weights(tmp_path_factory):
    file = tmp_path_factory.mktemp("inception") / "random.pth"
    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fidelity.FeatureExtractorInceptionV3, "load_state_dict", lambda self, state: None)
        patch.setattr(fidelity.torch, "load", lambda *_, **__: {})
        net = fidelity.FeatureExtractorInceptionV3("random", ["2048"], feature_extractor_weights_path="none")
    torch.save(net.state_dict(), file)
    return file


def test_inception_is_torch_fidelitys(inception_weights, tmp_path):
    theirs = fidelity.FeatureExtractorInceptionV3("own", ["2048", "logits_unbiased"],
                                                  feature_extractor_weights_path=str(inception_weights))
    seen = []
    theirs.Mixed_6d.branch1x1.register_forward_hook(lambda module, inputs, output: seen.append(output))
    images = image_sets.ImageSet(save_images(tmp_path / "images", count=2, size=40))
    loaded = [images.load(i)[0] for i in range(2)]
    pool, logits = theirs(torch.stack([torch.from_numpy(np.array(image)).permute(2, 0, 1) for image in loaded]))
    legacy = networks.Inception(inception_weights, "legacy")
    ours = legacy.features(torch.stack([legacy.prepare(image) for image in loaded]))
    torch.testing.assert_close(ours["pool"], pool, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours["logits"], logits, rtol=1e-4, atol=1e-4)
    assert ours["spatial"].shape == (2, 2023)
    torch.testing.assert_close(ours["spatial"].view(2, 17, 17, 7).permute(0, 3, 1, 2), seen[0][:, :7], rtol=1e-4,
                               atol=1e-5)
    clean = networks.Inception(inception_weights, "clean")
    picture = loaded[0].resize((299, 299))
    torch.testing.assert_close(clean.prepare(picture), legacy.prepare(picture))
    assert (clean.prepare(loaded[0]) - legacy.prepare(loaded[0])).abs().max() > 1  # another filter
    assert clean.name != legacy.name and clean.digest == legacy.digest


def test_dinov2_clip_and_cmmd_load_their_real_architectures(tmp_path):
    import open_clip
    import timm

    torch.manual_seed(0)
    picture = image_sets.ImageSet(save_images(tmp_path / "images", count=1, size=50)).load(0)[0]

    net = timm.create_model("vit_small_patch14_dinov2", img_size=518, num_classes=0).eval()
    save_file(net.state_dict(), tmp_path / "dino.safetensors")
    dino = networks.Dino(tmp_path / "dino.safetensors", "vit_small_patch14_dinov2")
    with torch.no_grad():
        token = dino.features(dino.prepare(picture)[None])["token"]
        assert token.shape == (1, 384)
        resized = timm.layers.resample_abs_pos_embed(net.pos_embed, [16, 16])
        same = timm.create_model("vit_small_patch14_dinov2", img_size=224, num_classes=0).eval()
        same.load_state_dict({**net.state_dict(), "pos_embed": resized})
        torch.testing.assert_close(token, same.forward_features(dino.prepare(picture)[None])[:, 0])

    clip, _, prepare = open_clip.create_model_and_transforms("ViT-S-32-alt")
    save_file(clip.state_dict(), tmp_path / "clip.safetensors")
    ours = networks.OpenClip("ViT-S-32-alt", tmp_path / "clip.safetensors")
    with torch.no_grad():
        image = clip.eval().encode_image(prepare(picture)[None])
        text = clip.encode_text(open_clip.get_tokenizer("ViT-S-32-alt")(["a red circle"]))
        torch.testing.assert_close(ours.features(ours.prepare(picture)[None])["embedding"], image)
    embedded = ours.embed(["a red circle"])
    np.testing.assert_allclose(embedded, text.numpy(), rtol=1e-4, atol=1e-5)
    expected = 100 * max(0.0, float(torch.nn.functional.cosine_similarity(image, text)))
    assert suite.METRICS["clip"].measure(image.numpy(), embedded)["value"] == pytest.approx(expected, abs=1e-4)

    config = CLIPVisionConfig(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
                              image_size=28, patch_size=14, projection_dim=8)
    CLIPVisionModelWithProjection(config).save_pretrained(tmp_path / "cmmd")
    vision = networks.ClipVision(tmp_path / "cmmd")
    wide = Image.new("RGB", (100, 28))
    wide.paste((255, 255, 255), (36, 0, 64, 28))
    assert vision.prepare(wide).min() > 1  # the centre square, which is white, not the whole squeezed
    state = load_file(tmp_path / "cmmd" / "model.safetensors")
    save_file({name: value for name, value in state.items() if "projection" not in name},
              tmp_path / "cmmd" / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match="its weights lack visual_projection"):
        networks.ClipVision(tmp_path / "cmmd")
    assert vision.prepare(picture).shape == (3, 28, 28)
    features = vision.features(vision.prepare(picture)[None])["embedding"]
    assert features.shape == (1, 8)
    values = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None] / 127.5 - 1
    assert torch.equal(networks.embedded(vision, values), features)
    grey = torch.linspace(-1.5, 1.5, 50 * 50).reshape(1, 1, 50, 50)
    assert torch.equal(networks.embedded(vision, grey),
                       networks.embedded(vision, grey.clamp(-1, 1).expand(1, 3, 50, 50)))


def test_missing_damaged_and_hostile_weights(tmp_path, inception_weights, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="--inception-weights .*none.pth: no such file: put weights-inception"):
        networks.Inception(Path("none.pth"), "clean")
    Path("hostile.pth").write_bytes(pickle.dumps(Harmless()))
    with pytest.raises(InputError, match="not readable as plain weights"):
        networks.Inception(Path("hostile.pth"), "clean")
    assert not Path("unpickled").exists()
    torch.save({"a": torch.zeros(1)}, "other.pth")
    with pytest.raises(InputError, match="other weights than"):
        networks.Inception(Path("other.pth"), "clean")
    with pytest.raises(InputError, match="--dinov2-weights"):
        networks.Dino(Path("none.safetensors"), "vit_small_patch14_dinov2")
    with pytest.raises(InputError, match="--clip-model-path"):
        networks.OpenClip("ViT-S-32-alt", Path("none.safetensors"))
    with pytest.raises(InputError, match="openai/clip-vit-large-patch14-336"):
        networks.ClipVision(Path("none"))
