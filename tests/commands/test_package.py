"""The wheel: what is in it, what it asks for, and a run from an empty folder where nothing but it is there."""

import email
import os
import re
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

from alter.common.version import __version__

ROOT = Path(__file__).parents[2]
CORE = {"torch", "diffusers", "safetensors", "huggingface_hub", "numpy"}
# Packages of extras and tests; those that diffusers and huggingface_hub bring (yaml, tqdm, PIL) are left to them.
BEYOND = ["accelerate", "transformers", "scipy", "sklearn", "matplotlib", "datasets", "timm", "torchvision",
          "open_clip", "cleanfid", "torch_fidelity", "pyarrow", "peft", "tensorboard", "tokenizers"]
SHORT = ["search.samples=4", "search.bins=4", "demo.steps=4", "train.steps=4", "train.search_steps=2",
         "train.batch_size=8", "data.holdout=16", "experts.start=dense", "experts.offset=4", "evaluate.samples=100",
         "evaluate.sampling_steps=2", "evaluate.dense=false", "log.tracker=none"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built from a copy, so that no build/ is made in the checkout."""
    pytest.importorskip("setuptools", "77")
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    files = subprocess.run(["git", "ls-files", "-co", "--exclude-standard", "alter", "configs", "pyproject.toml",
                            "README.md", "LICENSE"], cwd=ROOT, capture_output=True, text=True)
    if files.returncode:
        pytest.skip("no git checkout")
    for name in files.stdout.splitlines():
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    subprocess.run([sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index",
                    "--wheel-dir", str(out), str(source)], check=True)
    (file,) = out.glob("*.whl")
    return file


@pytest.fixture(scope="module")
def commands(wheel, tmp_path_factory):
    """The bin/ of an environment that has the wheel, and sees the packages of this one."""
    root = tmp_path_factory.mktemp("environment")
    venv.create(root, with_pip=False)
    subprocess.run([sys.executable, "-m", "pip", "--python", str(root / "bin/python"), "install", "--quiet",
                    "--no-deps", "--no-index", str(wheel)], check=True)
    (site,) = root.glob("lib/python*/site-packages")
    assert (site / "alter").is_dir()
    (site / "packages-of-the-tests.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return root / "bin"


def call(folder, *command, **environment):
    clean = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    clean |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(list(map(str, command)), cwd=folder, capture_output=True, text=True, env=clean | environment)


def test_what_is_in_it(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        (metadata,) = (name for name in names if name.endswith("/METADATA"))
        about = email.message_from_string(archive.read(metadata).decode())
    for folder in ("alter", "configs"):
        for file in (ROOT / folder).rglob("*"):
            if file.suffix in (".py", ".yaml", ".json"):
                inside = file.relative_to(ROOT if folder == "alter" else ROOT / "configs").as_posix()
                assert (inside if folder == "alter" else f"alter/configs/{inside}") in names
    assert {name.partition("/")[0] for name in names} == {"alter", f"alter-{__version__}.dist-info"}
    assert about["Version"] == __version__ and about["License-Expression"] == "Apache-2.0"
    assert about["Description-Content-Type"] == "text/markdown" and about.get_payload().startswith("# alter")
    required = about.get_all("Requires-Dist")
    assert {re.match(r"[\w-]+", line)[0] for line in required if "extra ==" not in line} == CORE
    assert set(about.get_all("Provides-Extra")) == {"train", "eval", "report", "all", "dev"}


def test_requirements_txt_is_the_package_with_its_extras():
    tomllib = pytest.importorskip("tomllib")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    named = {*project["dependencies"], *sum(project["optional-dependencies"].values(), [])}
    lines = (line.partition("#")[0].strip() for line in (ROOT / "requirements.txt").read_text().splitlines())
    assert {line for line in lines if line} == {name for name in named if not name.startswith("alter[")}


# As tests/conftest.py has it for runs in the process of the tests.
BRIEF = """
import functools, sys
import alter.training.demo_images as demo_images
import alter.training.summary as summary

demo_images.train_classifier = functools.partial(demo_images.train_classifier, steps=2)
summary.errors_by_timestep = functools.partial(summary.errors_by_timestep, bins=4)
from alter.commands import main
sys.exit(main(["train", "--config", "demo_dit", *sys.argv[1:]]))
"""


def test_a_run_from_an_empty_folder(commands, tmp_path):
    process = call(tmp_path, commands / "python", "-c", BRIEF, *SHORT)
    assert process.returncode == 0, process.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"outputs"}
    run = tmp_path / "outputs/demo_dit/latest"
    assert (run / "final/experts.json").is_file() and (run / "summary.json").is_file()
    assert f"run directory: outputs/demo_dit/{run.resolve().name}" in process.stdout


def test_commands_from_an_empty_folder(commands, tmp_path):
    process = call(tmp_path, commands / "alter", "--help")
    assert process.returncode == 0 and "train temporal experts" in process.stdout
    process = call(tmp_path, commands / "python", "-m", "alter", "latency", "--help")
    assert process.returncode == 0 and process.stdout.startswith("usage: alter latency ")
    process = call(tmp_path, commands / "alter", "train", "--config", "demo_dti")
    assert process.returncode == 2 and process.stderr.startswith("error: --config demo_dti: no such file")
    assert not list(tmp_path.iterdir())


HIDE = f"""
import sys

class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {BEYOND}:
            return None
        return next((spec for finder in others if (spec := finder.find_spec(name, path, target))), None)

    def find_distributions(self, *arguments):
        return others[-1].find_distributions(*arguments)

others = sys.meta_path[:]
sys.meta_path[:] = [Hidden()]
"""


def test_loading_experts_needs_the_core_dependencies_alone(tmp_path):
    """And of these, alter itself imports nothing that only they bring."""
    code = HIDE + """
import builtins
original = builtins.__import__

def imported(name, given=None, *rest, **named):
    given = named.get("globals", given)
    if str((given or {}).get("__name__")).startswith("alter") and name.partition(".")[0] in ("yaml", "tqdm", "PIL"):
        raise AssertionError(f"{given['__name__']} imports {name}")
    return original(name, given, *rest, **{n: v for n, v in named.items() if n != "globals"})

builtins.__import__ = imported
import alter
print(alter.TemporalExperts.__name__, alter.load_pipeline.__name__, *dir(alter))
"""
    process = call(tmp_path, sys.executable, "-c", code, PYTHONPATH=str(ROOT))
    assert process.stdout.split() == [
        "TemporalExperts", "load_pipeline", "ClassConditionalPipeline", "InputError", "TemporalExperts", "__version__",
        "load_config", "load_pipeline", "train"], process.stderr


@pytest.mark.parametrize("words, line", [
    ("'train', '--config', 'demo_dit', '--check'", 'error: alter train needs accelerate: pip install "alter[train]"'),
    ("'report', '--run', 'x'", 'error: alter report needs matplotlib: pip install "alter[report]"'),
])
def test_a_missing_extra_is_named_in_one_line(tmp_path, words, line):
    code = f"{HIDE}\nfrom alter.commands import main\nsys.exit(main([{words}]))"
    process = call(tmp_path, sys.executable, "-c", code, PYTHONPATH=str(ROOT))
    assert process.returncode == 2 and process.stderr.splitlines() == [line]
