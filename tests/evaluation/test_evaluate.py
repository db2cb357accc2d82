"""Images on disk to metrics: sets, networks with their real architectures, caching, and the scripts."""

import json
import os
import subprocess
import sys
import types

import numpy as np
import pytest
import torch
from accelerate import PartialState
from helpers import HANGING, ROOT, Harmless, run_script
from helpers import save_noise as save_images
from PIL import Image
from safetensors.torch import load_file

from alter import InputError
from alter.evaluation import distances, features, image_sets, preferences, suite
from alter.training.demo_images import demo_network


def run(name, *arguments):
    """Calls a script; returns its exit code, and what it wrote to both streams."""
    done = run_script(name, *arguments)
    return done.returncode, done.stdout, done.stderr


class Mean:
    """A network that is its own ground truth: the mean colour."""

    name, digest = "mean colour", "0"

    def __init__(self, dimensions=3):
        self.seen, self.dimensions = 0, dimensions

    def to(self, device):
        return self

    def prepare(self, image):
        return torch.from_numpy(np.array(image)).float().mean((0, 1))[: self.dimensions]

    def features(self, images):
        self.seen += len(images)
        return {"pool": images}


def extract(images, network, cache):
    return features.extract(images, network, cache, batch_size=4, workers=0, state=PartialState())


def test_features_are_extracted_once_and_go_on_after_an_interruption(tmp_path, monkeypatch):
    images = image_sets.ImageSet(save_images(tmp_path / "images"))
    network = Mean()
    expected = np.stack([np.asarray(images.load(i)[0], dtype=np.float32).mean((0, 1)) for i in range(12)])
    done = Mean.features

    def interrupted(self, batch):
        if self.seen >= 8:
            raise KeyboardInterrupt
        return done(self, batch)

    monkeypatch.setattr(Mean, "features", interrupted)
    assert len(images) == 12  # parts of 8 and 4
    with pytest.raises(KeyboardInterrupt):
        extract(images, network, tmp_path / "cache")
    monkeypatch.setattr(Mean, "features", done)
    rest = Mean()
    found, _ = extract(images, rest, tmp_path / "cache")
    np.testing.assert_allclose(found["pool"], expected, rtol=1e-5)
    assert rest.seen == 12 - 8  # the first part was there
    again = Mean()
    extract(image_sets.ImageSet(images.source), again, tmp_path / "cache")
    assert again.seen == 0
    Image.new("RGB", (24, 24)).save(images.source / "003.png")
    extract(image_sets.ImageSet(images.source), again, tmp_path / "cache")
    assert again.seen == 12  # other content, other features


def test_odd_images_are_converted_and_counted_or_refused(tmp_path):
    folder = save_images(tmp_path / "images", count=3)
    Image.new("L", (30, 24), 200).save(folder / "grey.png")
    Image.new("CMYK", (24, 24)).save(folder / "print.jpg")
    Image.new("RGBA", (24, 24)).save(folder / "glass.png")
    found, odd = extract(image_sets.ImageSet(folder), Mean(), tmp_path / "cache")
    assert found["pool"][3].tolist() == [255, 255, 255]  # transparent is white: names are sorted
    text = "\n".join(odd)
    assert "1 images of mode L" in text and "1 images of mode CMYK" in text and "2 different sizes" in text
    (folder / "cut.png").write_bytes((folder / "000.png").read_bytes()[:90])
    (folder / "empty.png").touch()
    with pytest.raises(InputError, match="2 images cannot be read .*cut.png: .*empty.png: "):
        extract(image_sets.ImageSet(folder), Mean(), tmp_path / "cache")
    (tmp_path / "nothing").mkdir()
    with pytest.raises(InputError, match="holds no images"):
        image_sets.ImageSet(tmp_path / "nothing")
    with pytest.raises(InputError, match="no such folder"):
        image_sets.ImageSet(tmp_path / "missing")
    twice = save_images(tmp_path / "twice", count=2)
    (twice / "copy.png").write_bytes((twice / "000.png").read_bytes())
    assert "1 of 3 images repeat another one" in image_sets.ImageSet(twice).warnings()[0]


def test_features_that_are_not_finite_name_the_image(tmp_path):
    class Broken(Mean):
        def features(self, images):
            images[0, 0] = torch.inf
            return {"pool": images}

    with pytest.raises(InputError, match=r"3 images features that are not finite, first 000.png"):
        extract(image_sets.ImageSet(save_images(tmp_path / "images")), Broken(), tmp_path / "cache")


def test_resizing_is_part_of_the_protocol_and_of_the_key(tmp_path):
    folder = save_images(tmp_path / "images", count=2, size=32)
    plain, small = image_sets.ImageSet(folder), image_sets.ImageSet(folder, resize=8)
    assert small.load(0)[0].size == (8, 8) and plain.digest != small.digest and "resized to 8" in small.protocol
    average = np.asarray(plain.load(0)[0], dtype=float).mean()  # antialiasing keeps the mean; picking pixels does not
    assert np.asarray(small.load(0)[0], dtype=float).mean() == pytest.approx(average, abs=3)


def make_features(tmp_path, network=None):
    return suite.Features(lambda key: network or Mean(), tmp_path / "cache", 4, 0, PartialState())


def test_references_of_every_kind_give_the_same_distance(tmp_path):
    images = image_sets.ImageSet(save_images(tmp_path / "images", count=20))
    real = save_images(tmp_path / "real", count=18, seed=1, shift=100)
    found = make_features(tmp_path)
    folder = suite.Reference(real, found, None)
    expected = suite.evaluate(images, ["fid", "kid", "prc"], found, folder, None, 0)
    x, y = (found(part, "clean", "pool") for part in (images, image_sets.ImageSet(real)))
    assert expected["fid"]["value"] == pytest.approx(distances.frechet_distance(x, y))
    assert expected["fid"]["reference"]["images"] == 18 and expected["fid"]["images"] == 20

    pixels = np.stack([np.asarray(image_sets.ImageSet(real).load(i)[0]) for i in range(18)])
    np.savez(tmp_path / "batch.npz", pixels)
    batch = suite.Reference(tmp_path / "batch.npz", found, None)
    assert suite.evaluate(images, ["kid", "fid"], found, batch, None, 0)["fid"]["value"] == pytest.approx(
        expected["fid"]["value"])

    folder.save(tmp_path / "stats.npz", [suite.METRICS["fid"]])
    saved = suite.Reference(tmp_path / "stats.npz", make_features(tmp_path), None)
    assert saved.count(suite.METRICS["fid"]) == 18
    assert suite.evaluate(images, ["fid"], make_features(tmp_path), saved, None, 0)["fid"]["value"] == pytest.approx(
        expected["fid"]["value"])
    with pytest.raises(InputError, match="needs: name a folder of images"):
        suite.evaluate(images, ["kid"], make_features(tmp_path), saved, None, 0)

    mean, covariance = distances.moments(y)
    np.savez(tmp_path / "adm.npz", pixels[:5], mu=mean, sigma=covariance)  # some images beside statistics of all
    adm = suite.Reference(tmp_path / "adm.npz", found, None)
    assert suite.evaluate(images, ["fid_legacy"], found, adm, None, 0)["fid_legacy"]["value"] == pytest.approx(
        expected["fid"]["value"])  # the network of this test is the same for both

    class Other(Mean):
        digest = "1"

    other = make_features(tmp_path, Other())
    with pytest.raises(InputError, match="other weights: make them again"):
        suite.evaluate(images, ["fid"], other, suite.Reference(tmp_path / "stats.npz", other, None), None, 0)
    np.savez(tmp_path / "hostile.npz", arr_0=np.array([Harmless()], dtype=object))
    with pytest.raises(InputError, match="hostile.npz: not a readable"):
        suite.Reference(tmp_path / "hostile.npz", found, None)


def test_order_and_names(tmp_path):
    folder = tmp_path / "images"
    for name in ("10.png", "9.png", "a/9.png"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (len(name), 0, 0)).save(folder / name)
    images = image_sets.ImageSet(folder)
    assert images.names[:2] == ["9.png", "10.png"] and images.repeated_names == ["9"]
    with pytest.raises(InputError, match="3 images is too small"):
        suite.evaluate(images, ["is"], make_features(tmp_path), None, None, 0)
    Image.new("RGB", (8, 8)).save(folder / "11.png")
    with pytest.raises(InputError, match="several images are named 9"):
        suite.evaluate(image_sets.ImageSet(folder), ["clip"], make_features(tmp_path), None, ["a"] * 4, 0)
    code, _, err = run("evaluate", "--images", folder, "--out", tmp_path / "nowhere" / "m.json")
    assert code == 2 and "its folder does not exist" in err


def test_foreign_statistics_are_checked(tmp_path):
    images, found = image_sets.ImageSet(save_images(tmp_path / "images", count=5)), make_features(tmp_path)
    np.savez(tmp_path / "adm.npz", mu=np.zeros(7), sigma=np.eye(7))
    with pytest.raises(InputError, match="statistics of 7 features, mean colour has 3"):
        suite.evaluate(images, ["fid_legacy"], found, suite.Reference(tmp_path / "adm.npz", found, None), None, 0)
    small = image_sets.ImageSet(images.source, 8)
    with pytest.raises(InputError, match="made with --resize None, not 8"):
        suite.evaluate(small, ["fid_legacy"], found, suite.Reference(tmp_path / "adm.npz", found, 8), None, 0)
    (tmp_path / "cut.npz").write_bytes((tmp_path / "adm.npz").read_bytes()[:200])
    with pytest.raises(InputError, match="cut.npz: not a readable"):
        suite.Reference(tmp_path / "cut.npz", found, None)


def test_intervals_warnings_and_refusals(tmp_path):
    class Wide(Mean):
        def features(self, images):
            wide = torch.cat([images, images**2], dim=1)
            return {"pool": wide, "logits": wide / wide.max()}

    images = image_sets.ImageSet(save_images(tmp_path / "images", count=20))
    found = make_features(tmp_path, Wide())
    reference = suite.Reference(save_images(tmp_path / "real", count=4, seed=1), found, None)
    result = suite.evaluate(images, ["fid"], found, reference, None, 10)["fid"]
    low, high = result["ci95"]
    assert low < result["value"] < high
    others = suite.evaluate(images, ["kid", "prc", "is"], found, reference, None, 5)
    assert all(other["ci95"][0] <= other["value"] <= other["ci95"][1] for other in others.values())
    assert any("4 images for 6 features" in line for line in found.warnings)
    with pytest.raises(InputError, match="fid: needs --reference"):
        suite.evaluate(images, ["fid"], found, None, None, 0)
    with pytest.raises(InputError, match="a prompt for each of the 20 images, .*found 1"):
        suite.evaluate(images, ["clip"], found, None, ["one"], 0)
    text = suite.table({"a": {"fid": result}, "b": {}})
    assert "±" in text and text.splitlines()[1].endswith("-")


def test_preferences_of_installed_packages(tmp_path, monkeypatch):
    images = image_sets.ImageSet(save_images(tmp_path / "images", count=4))
    found = make_features(tmp_path)

    def measure(name):
        return suite.evaluate(images, [name], found, None, ["a", "bb", "ccc", "dd"], 0, lambda name, prompts: (
            preferences.preference_scores(name, images, prompts, torch.device("cpu"), tmp_path / "pick")))[name]

    for name in ("image_reward", "hpsv2"):
        with pytest.raises(InputError, match=f"--metrics {name}: the package .* cannot be imported"):
            measure(name)
    hpsv2 = types.SimpleNamespace(score=lambda images, prompt, hps_version: [len(prompt)])
    reward = types.SimpleNamespace(load=lambda name, device: types.SimpleNamespace(
        score=lambda prompt, images: -len(prompt)))
    monkeypatch.setitem(sys.modules, "hpsv2", hpsv2)
    monkeypatch.setitem(sys.modules, "ImageReward", reward)
    assert (measure("hpsv2")["value"], measure("image_reward")["value"]) == (2, -2)
    with pytest.raises(InputError, match="put a copy of yuvalkirstain/PickScore_v1"):
        measure("pickscore")


def test_the_demo_network_takes_any_image_and_is_trained_once(tmp_path):
    network = demo_network(tmp_path, PartialState())
    assert demo_network(tmp_path, PartialState()).digest == network.digest
    shapes = {network.prepare(Image.new("RGB", size)).shape for size in ((8, 8), (100, 30))}
    assert shapes == {torch.Size([1, 8, 8])}
    (file,) = tmp_path.glob("*.safetensors")
    assert "body.0.weight" in load_file(file)


@pytest.mark.slow
def test_the_script_from_one_and_two_processes(tmp_path):
    images, real = save_images(tmp_path / "images", 40), save_images(tmp_path / "real", 30, seed=1)
    common = ["--images", images, "--reference", real, "--feature-network", "demo", "--bootstrap", 3]
    code, out, err = run("evaluate", *common, "--out", tmp_path / "1.json", "--cache", tmp_path / "c1")
    assert code == 0 and "rank-deficient" in err and "fid" in out
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2",
              "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0",
              ROOT / "scripts/evaluate.py"]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true"}

    def run_two(*arguments):
        command = [*map(str, [*launch, *common, *arguments])]
        return subprocess.run(command, capture_output=True, text=True, timeout=HANGING, env=environment)

    double = run_two("--out", tmp_path / "2.json", "--cache", tmp_path / "c2")
    assert double.returncode == 0, double.stderr
    assert "24/24" in double.stderr and "40/40" not in double.stderr  # the first process's three parts of five
    one, two = (json.loads((tmp_path / f"{n}.json").read_text()) for n in (1, 2))
    assert one.keys() == two.keys() == {"fid", "kid", "is", "prc"}
    for name in one:
        assert one[name]["value"] == pytest.approx(two[name]["value"], rel=1e-5)
        assert {"protocol", "images", "network", "libraries", "seconds", "peak_memory_bytes"} <= one[name].keys()
        assert len(one[name]["network"]["sha256"]) == 64
    content = (images / "009.png").read_bytes()
    (images / "009.png").write_bytes(content[:90])  # in the second process's share, which alone reads it
    failed = run_two("--cache", tmp_path / "c3")
    assert failed.returncode != 0 and "1 images cannot be read (009.png: " in failed.stderr
    (images / "009.png").write_bytes(content)
    code, out, _ = run("evaluate", "--compare", tmp_path / "1.json", tmp_path / "2.json")
    assert code == 0 and out.count("±") >= 2
    code, _, err = run("evaluate", "--images", images, "--num", 41)
    assert code == 2 and "holds 40 images, not --num 41" in err
    code, _, err = run("evaluate", "--images", images, "--metrics", "fid", "--reference", real, "--inception-weights",
                       tmp_path / "no.pth", "--cache", tmp_path / "c1")
    assert code == 2 and "no such file: put weights-inception" in err


def coco(tmp_path, count=6):
    folder = save_images(tmp_path / "val", count=count, size=30)
    content = {"images": [{"id": 10 + i, "file_name": f"{i:03d}.png"} for i in range(count)],
               "annotations": [{"id": 100 - k, "image_id": 10 + k % count, "caption": f"caption {k}\n"}
                               for k in range(2 * count)]}
    (tmp_path / "captions.json").write_text(json.dumps(content))
    return ["--captions", tmp_path / "captions.json", "--images", folder]


def test_evaluation_sets_from_official_files(tmp_path):
    source = coco(tmp_path)
    for name in ("a", "b"):
        code, *_ = run("prepare_eval", "coco2014", *source, "--count", 4, "--size", 16, "--out", tmp_path / name)
        assert code == 0
    about = json.loads((tmp_path / "a" / "about.json").read_text())
    assert about == json.loads((tmp_path / "b" / "about.json").read_text()) and len(about["images"]) == 4
    prompts = (tmp_path / "a" / "prompts.txt").read_text().splitlines()
    assert prompts == [f"caption {image['id'] - 10 + 6}" for image in about["images"]]  # the lowest annotation id
    assert image_sets.ImageSet(tmp_path / "a" / "images").load(0)[0].size == (16, 16)

    code, _, err = run("prepare_eval", "coco2017", *source, "--out", tmp_path / "c")
    assert code == 2 and "6 images with captions, 5000 are needed" in err
    (tmp_path / "val" / "002.png").unlink()
    code, _, err = run("prepare_eval", "coco2017", *source, "--count", 6, "--out", tmp_path / "c")
    assert code == 2 and "lacks 1 of 6 images (002.png)" in err
    (tmp_path / "val" / "002.png").write_bytes(b"no image")
    code, _, err = run("prepare_eval", "coco2017", *source, "--count", 6, "--out", tmp_path / "c")
    assert code == 2 and "1 of 6 images cannot be read (002.png: " in err
    assert not (tmp_path / "c").exists() and not list(tmp_path.glob(".partial*"))

    (tmp_path / "cc.tsv").write_text("a dog\thttp://x\na cat\thttp://y\n")
    rows = tmp_path / "rows"
    rows.mkdir()
    Image.new("RGB", (20, 30)).save(rows / "00001.jpg")
    code, *_ = run("prepare_eval", "cc3m", "--captions", tmp_path / "cc.tsv", "--images", rows, "--out", tmp_path / "d")
    assert code == 0 and (tmp_path / "d" / "prompts.txt").read_text() == "a cat\n"
    assert run("prepare_eval", "imagenet", "--out", tmp_path / "e")[0] == 0
    assert (tmp_path / "e" / "labels.txt").read_text().split() == [str(i) for i in range(1000)]
