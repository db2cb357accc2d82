"""The bash launchers, around a stand-in for scripts/train.py that records what reaches it."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
TRAINER = '''
import json, os, signal, sys, time
from pathlib import Path

record, status = Path(os.environ["RECORD"]), os.environ.get("ALTER_STATUS_DIR")
with open(record, "a") as file:
    file.write(json.dumps(sys.argv[1:]) + "\\n")
if "fail" in sys.argv and "--check" in sys.argv:
    print("error: refused", file=sys.stderr); sys.exit(2)
code = 0
if "--check" not in sys.argv:
    own = Path(status) / str(os.getpid()) if status else None
    if own:
        own.touch()
    if "wait" in sys.argv:
        seen = []
        for signum in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            signal.signal(signum, lambda number, frame: seen.append(number))
        (record.parent / f"ready-{os.getpid()}").touch()
        while not seen:
            time.sleep(0.02)
        time.sleep(0.5)
        (record.parent / f"seen-{os.getpid()}").write_text(str(seen))
        code = 128 + seen[0]
    for argument in sys.argv:
        if argument.startswith("exit="):
            code = int(argument[5:])
    if own:
        own.write_text(str(code))
sys.exit(code)
'''


@pytest.fixture
def clone(tmp_path):
    root = tmp_path / "a clone of alter"
    (root / "scripts").mkdir(parents=True)
    for name in ("train_dit.sh", "train_sd21.sh", "scripts/launch.sh", "scripts/setup_env.sh",
                 "scripts/requirements_met.py"):
        shutil.copy(ROOT / name, root / name)
    (root / "scripts/train.py").write_text(TRAINER)
    (root / "requirements.txt").write_text("pyyaml\ntorch>=2.0  # enough\n")
    return root


def environment(clone, **extra):
    venv = Path(sys.executable).parent.parent
    return {**os.environ, "VIRTUAL_ENV": str(venv), "PATH": f"{venv}/bin:{os.environ['PATH']}",
            "RECORD": str(clone / "record"), "CUDA_VISIBLE_DEVICES": "", **extra}


def launch(clone, *arguments, name="train_dit.sh", cwd=None, **extra):
    return subprocess.run(["bash", str(clone / name), *arguments], cwd=cwd, env=environment(clone, **extra),
                          capture_output=True, text=True, timeout=120)


def recorded(clone):
    import json

    return [json.loads(line) for line in (clone / "record").read_text().splitlines()]


@pytest.mark.parametrize("name, config", [("train_dit.sh", "dit_xl2.yaml"), ("train_sd21.sh", "sd21.yaml")])
def test_the_default_configuration_from_any_directory(clone, tmp_path, name, config):
    assert launch(clone, "train.steps=3", name=name, cwd=tmp_path).returncode == 0
    assert recorded(clone) == [["--config", str(clone / "configs" / config), "train.steps=3"]]
    assert not (clone / ".venv").exists()


def test_arguments_keep_their_spaces(clone):
    arguments = ["--config", "my configs/a.yaml", "output_dir=a red circle", "name=--config"]
    assert launch(clone, *arguments).returncode == 0
    assert recorded(clone) == [arguments]


@pytest.mark.parametrize("code", [0, 2, 7])
@pytest.mark.parametrize("processes", ["1", "2"])
def test_the_exit_code_is_the_trainers(clone, code, processes):
    assert launch(clone, "--config", "x", f"exit={code}", ALTER_PROCESSES=processes).returncode == code


def test_several_processes_are_checked_first(clone):
    result = launch(clone, "--config", "x", "fail", ALTER_PROCESSES="2")
    assert result.returncode == 2 and result.stderr.strip() == "error: refused"
    assert recorded(clone) == [["--check", "--config", "x", "fail"]]


def test_a_dry_run_is_one_process(clone):
    assert launch(clone, "--dry-run", ALTER_PROCESSES="2").returncode == 0
    assert len(recorded(clone)) == 1


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGUSR1"])
def test_signals_reach_every_trainer_once(clone, processes, name):
    number = getattr(signal, name)
    process = subprocess.Popen(["bash", str(clone / "train_dit.sh"), "wait"], start_new_session=True,
                               env=environment(clone, ALTER_PROCESSES=str(processes)))
    deadline = time.time() + 90
    while len(list(clone.glob("ready-*"))) < processes and time.time() < deadline:
        time.sleep(0.1)
    if name == "SIGINT":  # a terminal sends Ctrl-C to the whole foreground group
        os.killpg(process.pid, number)
    else:
        process.send_signal(number)
    assert process.wait(timeout=60) == 128 + number
    assert [file.read_text() for file in clone.glob("seen-*")] == [f"[{int(number)}]"] * processes


@pytest.mark.parametrize("text, code", [
    ("pyyaml\n# a comment\n\ntorch>=2.0,<99\n", 0), ("no-such-package-at-all\n", 1), ("torch<2.0\n", 1),
])
def test_requirements_met(tmp_path, text, code):
    file = tmp_path / "requirements.txt"
    file.write_text(text)
    result = subprocess.run([sys.executable, str(ROOT / "scripts/requirements_met.py"), str(file)],
                            capture_output=True, text=True)
    assert result.returncode == code and bool(result.stderr) == bool(code)
