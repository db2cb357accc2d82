"""Images against the dense model's: two folders, the command, a demo's run and its page."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from conftest import make_dit, save_pipeline, save_stable_diffusion
from diffusers import StableDiffusionPipeline
from helpers import save_noise
from PIL import Image

from alter import TemporalExperts, train
from alter.backbones.cost import count_cost
from alter.commands import main
from alter.commands.benchmarking.cases import draw_experts
from alter.evaluation.pairs import drift, psnr, ssim
from alter.evaluation.pictures import Pair, read_pairs, save_pairs
from alter.evaluation.report.page import build_page, read_run
from alter.experts.ladder import Rung


def write_manifest(folder, **changes):
    images = [{"file": file.name, "condition": f"prompt {i}", "seed": 7 + i}
              for i, file in enumerate(sorted(folder.glob("*.png")))]
    images[1] |= changes.pop("second", {})
    (folder / "manifest.json").write_text(json.dumps({"settings": {"steps": 20, **changes}, "images": images}))
    return folder


@pytest.fixture
def folders(tmp_path):
    """The dense model's images, and the same a little darker: the second most of all."""
    dense = save_noise(tmp_path / "dense", count=8)
    experts = tmp_path / "experts"
    experts.mkdir()
    for i, file in enumerate(sorted(dense.glob("*.png"))):
        pixels = np.asarray(Image.open(file)).astype(int)
        Image.fromarray((pixels - (40 if i == 1 else 4)).clip(0).astype(np.uint8)).save(experts / file.name)
    write_manifest(dense, steps=50)
    return write_manifest(experts), dense


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """Features and the demo's classifier, which is trained once."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def evaluate(cache, capsys):
    """The command; returns its exit code and its errors."""
    def call(*arguments):
        code = main(["evaluate", "--cache", str(cache), "--feature-network", "demo", "--workers", "0",
                     *map(str, arguments)])
        return code, capsys.readouterr().err
    return call


def tensors(folder):
    return torch.stack([torch.from_numpy(np.array(Image.open(file))).permute(2, 0, 1).float() / 127.5 - 1
                        for file in sorted(folder.glob("*.png"))])


def test_two_folders(folders, evaluate, tmp_path):
    experts, dense = folders
    assert evaluate("--images", experts, "--against", dense)[0] == 0
    results = json.loads((tmp_path / "experts-against.json").read_text())
    assert list(results) == ["psnr", "ssim", "drift"]
    a, b = tensors(experts), tensors(dense)
    assert results["psnr"]["value"] == pytest.approx(float(psnr(a, b).mean())) and results["psnr"]["identical"] == 0
    assert results["ssim"]["value"] == pytest.approx(float(ssim(a, b).mean()))
    assert 0 < results["drift"]["value"] < 1 and "demo classifier" in results["drift"]["protocol"]
    assert all(result["ci95"][0] < result["value"] < result["ci95"][1] for result in results.values())
    assert results["ssim"]["reference"] == {"source": str(dense), "images": 8, "differs": {"steps": [20, 50]}}
    about, top, bottom = read_pairs(tmp_path / "experts-against.png")[0]
    assert about["file"] == "001.png" and about["title"] == "prompt 1"
    assert np.array_equal(top, Image.open(dense / "001.png"))
    assert np.array_equal(bottom, Image.open(experts / "001.png"))

    reverse = tmp_path / "reverse.json"
    assert evaluate("--images", dense, "--against", experts, "--metrics", "psnr", "ssim", "--out", reverse)[0] == 0
    swapped = json.loads(reverse.read_text())
    assert all(swapped[name]["value"] == pytest.approx(results[name]["value"]) for name in ("psnr", "ssim"))
    assert evaluate("--compare", tmp_path / "experts-against.json", reverse)[0] == 0


def test_equal_folders(folders, evaluate, tmp_path, capsys):
    _, dense = folders
    out = tmp_path / "equal.json"
    assert evaluate("--images", dense, "--against", dense, "--out", out)[0] == 0
    results = json.loads(out.read_text())
    assert results["psnr"]["value"] == "inf" and results["psnr"]["identical"] == 8 and "ci95" not in results["psnr"]
    assert results["ssim"]["value"] == pytest.approx(1) and results["drift"]["value"] == 0
    assert main(["evaluate", "--compare", str(out)]) == 0
    assert "inf" in capsys.readouterr().out


def test_latents(folders, evaluate, tmp_path):
    experts, dense = folders
    source, rows = np.random.default_rng(0), {}
    for folder in folders:
        rows[folder] = source.standard_normal((8, 4, 3, 3), dtype=np.float32)
        for i in range(8):
            np.save(folder / f"{i:03d}.npy", rows[folder][i])
    assert evaluate("--images", experts, "--against", dense)[0] == 0
    found = json.loads((tmp_path / "experts-against.json").read_text())["drift_latents"]
    assert found["value"] == pytest.approx(drift(*(torch.from_numpy(rows[folder]) for folder in folders)).value)
    (experts / "003.npy").unlink()
    code, error = evaluate("--images", experts, "--against", dense)
    assert code == 2 and "003.npy: no latents" in error and "sample --latents" in error


@pytest.mark.parametrize("change, message", [
    ({"second": {"seed": 1}}, "001.png has seed 1 here and 8 there"),
    ({"second": {"condition": "b"}}, "001.png has condition 'b' here and 'prompt 1' there"),
    ("size", "003.png has 30x30 pixels here and 24x24 there"),
    ("absent", "007.png and 0 more are in one of them alone"),
    ("manifest", "no manifest.json tells the seeds"),
    ("damaged", "manifest.json: not as `alter sample` writes it"),
    ("weights", "none.pth: no such file: put torchvision's alexnet"),
], ids=str)
def test_folders_that_do_not_belong_together(folders, evaluate, tmp_path, change, message):
    experts, dense = folders
    arguments = ["--metrics", "psnr"]
    if isinstance(change, dict):
        write_manifest(experts, **change)
    elif change == "size":
        Image.open(experts / "003.png").resize((30, 30)).save(experts / "003.png")
    elif change == "absent":
        (experts / "007.png").unlink()
    elif change == "manifest":
        (experts / "manifest.json").unlink()
    elif change == "damaged":
        (experts / "manifest.json").write_text('{"images": [3]}')
    else:
        arguments = ["--metrics", "lpips", "--lpips-weights", tmp_path / "none.pth"]
    code, error = evaluate("--images", experts, "--against", dense, *arguments)
    assert code == 2 and message in error
    assert not (tmp_path / "experts-against.json").exists()


@pytest.mark.parametrize("arguments, message", [
    (["--metrics", "psnr"], "--metrics psnr: needs --against"),
    (["--against", "{dense}", "--metrics", "fid"], "--metrics fid: --against measures pairs"),
    (["--against", "{dense}", "--reference", "{dense}"], "leave --reference"),
    (["--against", "nowhere"], "nowhere: no such folder"),
    (["--against", "{dense}", "--metrics", "drift_dinov2"], "stands in for Inception alone"),
])
def test_bad_arguments(folders, evaluate, arguments, message):
    experts, dense = folders
    code, error = evaluate("--images", experts, *(word.format(dense=dense) for word in arguments))
    assert code == 2 and message in error


def test_a_demo_against_its_dense_model_on_the_page(small_config, evaluate, tmp_path):
    config = small_config("dit", evaluate={"guidance_scale": 1.0})
    run = train(config).run_dir
    assert evaluate("--run", run, "--against", "dense")[0] == 0
    results = json.loads((run / "against.json").read_text())
    assert list(results) == ["psnr", "ssim", "drift", "drift_latents"] and results["drift"]["images"] == 100
    dense, experts = ([np.load(file) for file in sorted((run / "evaluation" / name).glob("*.npy"))]
                      for name in ("dense", "images"))
    assert results["drift_latents"]["value"] == pytest.approx(
        drift(*(torch.from_numpy(np.stack(rows)) for rows in (experts, dense))).value)
    page = build_page([read_run(run)])
    assert "Against the dense model</h3>" in page and "100 pairs, each of one seed" in page
    assert page.count('alt="dense: ') == page.count('alt="experts: ') == 6
    drawn = {file: file.stat().st_mtime_ns for file in (run / "evaluation").glob("*/*.png")}
    assert evaluate("--run", run, "--against", "dense")[0] == 0
    assert drawn == {file: file.stat().st_mtime_ns for file in drawn}  # known from before

    # Without experts the weights that nothing has tuned are the dense model: nothing differs.
    experts = TemporalExperts.from_pretrained(run / "final")
    save_pipeline(run / "final", make_dit())
    cost = count_cost(make_dit(), 8)
    every = np.ones((1, len(experts.sites)), dtype=bool)
    TemporalExperts.build(every, np.zeros(1000, dtype=int), cost, 1.0, "total").save_pretrained(run / "final")
    assert evaluate("--run", run, "--against", "dense")[0] == 0
    results = json.loads((run / "against.json").read_text())
    assert results["psnr"]["value"] == "inf" and results["drift"]["value"] == results["drift_latents"]["value"] == 0
    code, error = evaluate("--run", run, "--against", tmp_path)
    assert code == 2 and "use dense, or --images" in error


def test_a_rung_of_a_runs_ladder(small_config, evaluate, tmp_path):
    """Its images are those of a run whose experts are that rung alone, beside those of the chosen one."""
    run = train(small_config("dit", evaluate={"guidance_scale": 1.0})).run_dir
    experts = TemporalExperts.from_pretrained(run / "final")
    every, few = np.ones(len(experts.sites), dtype=bool), np.arange(len(experts.sites)) < 1
    rungs = [Rung(0.4, np.zeros(1000, dtype=int)), Rung(1.0, np.ones(1000, dtype=int))]
    whole = dataclasses.replace(experts, mask_EL=np.stack([few, every]), ladder=tuple(rungs), chosen=1, measured=None)
    whole.save_pretrained(run / "final")

    def drawn(folder):
        return [file.read_bytes() for file in sorted((run / folder / "images").glob("*.png"))]

    assert evaluate("--run", run, "--keep", 0.5)[0] == evaluate("--run", run)[0] == 0
    few, every = drawn("evaluation-keep-0.5"), drawn("evaluation")
    assert len(few) == 100 and few != every
    files = [json.loads((run / name).read_text()) for name in ("metrics-keep-0.5.json", "metrics.json")]
    assert files[0]["fid"]["value"] != files[1]["fid"]["value"]
    whole.only(0.4).save_pretrained(run / "final")
    assert evaluate("--run", run)[0] == 0 and drawn("evaluation") == few
    whole.save_pretrained(run / "final")
    assert evaluate("--run", run, "--keep", 0.5, "--against", "dense")[0] == 0
    assert (run / "against-keep-0.5.json").is_file() and not (run / "against.json").exists()
    for arguments, message in ((["--run", run, "--keep", 0.3], "keep_ratio=0.3: is below the lowest rung"),
                               (["--run", run, "--keep", 2], "--keep 2.0: choose a share"),
                               (["--images", run, "--keep", 0.5], "use --run")):
        code, error = evaluate(*arguments)
        assert code == 2 and message in error and len(error.strip().splitlines()) == 1


def test_pictures_of_several_sizes_come_back(tmp_path):
    pairs = [Pair(f"{i}.png", "a 'title'", {"psnr": float("inf")}, Image.new("RGB", size, (i, 0, 0)),
                  Image.new("RGB", size, (0, i, 0))) for i, size in enumerate(((4, 6), (8, 2)))]
    save_pairs(pairs, tmp_path / "pairs.png")
    for pair, (about, dense, image) in zip(pairs, read_pairs(tmp_path / "pairs.png"), strict=True):
        assert about == {"file": pair.name, "title": "a 'title'", "size": list(pair.image.size),
                         "values": {"psnr": "inf"}}
        assert np.array_equal(dense, pair.dense) and np.array_equal(image, pair.image)


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    """A finished run on a Stable Diffusion whose weights were changed since, and the original."""
    root = tmp_path_factory.mktemp("tuned")
    original = save_stable_diffusion(root / "original")
    final = save_stable_diffusion(root / "run/final")
    unet = StableDiffusionPipeline.from_pretrained(final).unet
    draw_experts(count_cost(unet, 16), 0.6, seed=0, count=3).save_pretrained(final)
    with torch.no_grad():
        for value in unet.parameters():
            value.add_(0.02 * torch.randn_like(value))
    unet.save_pretrained(final / "unet")
    (root / "prompts.txt").write_text("a red circle\na blue square\n")
    (root / "run/config.yaml").write_text(json.dumps({
        "backbone": {"pretrained": str(original)}, "data": {"path": str(root), "resolution": 32}}))
    return root


def test_samples_of_the_original(tuned, evaluate, tmp_path, capsys):
    def draw(out, *arguments):
        code = main(["sample", "--run", str(tuned / "run"), "--prompts", str(tuned / "prompts.txt"), "--num", "4",
                     "--steps", "2", "--out", str(tmp_path / out), *map(str, arguments)])
        return code, capsys.readouterr().err

    original = tuned / "original"
    assert draw("experts", "--latents")[0] == draw("dense", "--original", "--latents")[0] == 0
    assert draw("named", "--dense-pipeline", original)[0] == 0
    pipe = StableDiffusionPipeline.from_pretrained(original)
    generators = [torch.Generator().manual_seed(i) for i in range(4)]
    arguments = {"num_inference_steps": 2, "output_type": "latent", "generator": generators}
    latents = pipe(["a red circle", "a blue square"] * 2, **arguments).images / pipe.vae.config.scaling_factor
    for i in range(4):
        np.testing.assert_allclose(np.load(tmp_path / f"dense/{i:06d}.npy"), latents[i], atol=1e-4)
        dense, named = (np.asarray(Image.open(tmp_path / name / f"{i:06d}.png")) for name in ("dense", "named"))
        assert np.array_equal(dense, named)
    assert evaluate("--images", tmp_path / "experts", "--against", tmp_path / "dense")[0] == 0
    results = json.loads((tmp_path / "experts-against.json").read_text())
    assert "drift_latents" in results and results["psnr"]["value"] < 60

    other = save_pipeline(tmp_path / "other", make_dit())
    for arguments, message in (
            (["--dense-pipeline", tuned / "run/final"], "tuned under experts"),
            (["--dense-pipeline", other], "of another architecture"),
            (["--dense-pipeline", tmp_path / "nowhere"], "no such folder")):
        code, error = draw("bad", *arguments)
        assert code == 2 and message in error and not (tmp_path / "bad").exists()
