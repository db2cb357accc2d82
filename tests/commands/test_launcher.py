"""The shell launchers, on a stand-in for scripts/train.py, from a clone whose path has spaces."""

import json
import os
import pty
import shutil
import signal
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
from helpers import ROOT
from stand_in import Clone


@pytest.fixture
def clone(tmp_path):
    return Clone(tmp_path)


@pytest.mark.parametrize("script, config", [("train_dit.sh", "dit_xl2.yaml"), ("train_sd21.sh", "sd21.yaml")])
def test_default_config(clone, script, config):
    assert clone.run("a.b=1", script=script).returncode == 0
    assert clone.noted("train")[0]["arguments"] == ["--config", f"{clone.root}/configs/{config}", "a.b=1"]
    assert clone.noted("check") == []


def test_any_config(clone):
    assert clone.run("--config", "configs/flux.yaml", "a.b=1", script="train.sh").returncode == 0
    assert clone.noted("train")[0]["arguments"] == ["--config", "configs/flux.yaml", "a.b=1"]


def test_arguments_arrive_unchanged_and_a_config_of_the_users_is_the_last(clone):
    given = ["--config", "my own.yaml", "data.path=a  b", "name=it's \"x\" $HOME *", "text=a --config b", "empty="]
    assert clone.run(*given).returncode == 0
    arguments = clone.noted("train")[0]["arguments"]
    assert arguments[-len(given):] == given
    assert [argument for argument in arguments[:-len(given)] if argument == "--config"] == ["--config"]


def test_works_from_another_directory_and_again(clone, tmp_path):
    elsewhere = tmp_path / "another place"
    (elsewhere / "a clone of alter").mkdir(parents=True)  # a CDPATH must not lead here
    for _ in range(2):
        process = subprocess.run(["bash", "a clone of alter/train_dit.sh"], cwd=clone.root.parent,
                                 env=clone.environment | {"CDPATH": str(elsewhere), "PYTHONPATH": "/of the user"})
        assert process.returncode == 0
    for noted in clone.noted("train"):
        assert noted["cwd"] == str(clone.root.parent)
        assert noted["script"] == f"{clone.root}/scripts/train.py"
        assert noted["path"] == f"{clone.root}:/of the user"
    assert len(clone.noted("train")) == 2


@pytest.mark.parametrize("code", [0, 1, 2, 143])
def test_exit_code_of_one_process(clone, code):
    assert clone.run(CODE=str(code)).returncode == code


@pytest.mark.parametrize("flag", ["--check", "--dry-run", "--help"])
def test_flags_that_need_one_process(clone, flag):
    assert clone.run(flag, ALTER_PROCESSES="2").returncode == 0
    (noted,) = clone.noted("check" if flag == "--check" else "train")
    assert noted["world"] == 1 and flag in noted["arguments"]


@pytest.mark.parametrize("visible, listed, processes", [
    (None, 1, 1), (None, 3, 3), (None, 0, 1), ("", 4, 1), ("-1", 4, 1), ("2", 4, 1), ("0,3", 4, 2), ("0,-1,2", 4, 1),
])
def test_processes_are_the_visible_gpus(clone, visible, listed, processes):
    clone.command(clone.commands, "nvidia-smi", f"for i in $(seq {listed}); do echo \"GPU $i: x\"; done")
    # With a python that records what it is asked to run, accelerate is not started.
    clone.command(clone.commands, "python3", f'''case "$*" in
*accelerate.commands.launch*) printf '%s\\n' "$*" >"$RECORDS/launch-1" ;;
*) exec "{sys.executable}" "$@" ;;
esac''')
    environment = {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    assert clone.run(**environment).returncode == 0
    launched = clone.records / "launch-1"
    if processes == 1:
        assert not launched.exists() and len(clone.noted("train")) == 1
    else:
        assert f"--num_processes {processes} " in launched.read_text()
        assert "--multi_gpu" in launched.read_text()
        assert len(clone.noted("check")) == 1


def test_bad_number_of_processes(clone):
    process = clone.run(ALTER_PROCESSES="two")
    assert process.returncode == 2
    assert process.stderr.splitlines() == ["error: ALTER_PROCESSES must be a whole number, not 'two'"]
    assert clone.noted("train") == []


@pytest.mark.parametrize("script", ["train_dit.sh", "train_sd21.sh"])
def test_bad_input_is_refused_before_several_processes_start(clone, script):
    process = clone.run("a=b", script=script, ALTER_PROCESSES="2", CHECK_CODE="2")
    assert process.returncode == 2
    assert process.stderr.splitlines() == ["error: bad input"]
    assert clone.noted("check")[0]["arguments"][0] == "--check"
    assert clone.noted("check")[0]["arguments"][-1] == "a=b"
    assert clone.noted("train") == []


@pytest.mark.parametrize("code", [0, 7])
def test_two_processes(clone, code, tmp_path):
    process = clone.run("data.path=a  b", ALTER_PROCESSES="2", CUDA_VISIBLE_DEVICES="", CODE=str(code), cwd=tmp_path)
    assert process.returncode == code, process.stderr
    assert len(clone.noted("check")) == 1
    noted = clone.noted("train")
    assert sorted(n["rank"] for n in noted) == [0, 1]
    for one in noted:
        assert one["world"] == 2 and one["use_cpu"] == "true" and one["cwd"] == str(tmp_path)
        assert one["arguments"] == ["--config", f"{clone.root}/configs/dit_xl2.yaml", "data.path=a  b"]
        assert one["status"].startswith(f"{clone.temporary}/alter.")
    assert list(clone.temporary.glob("alter.*")) == []


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT], ids=lambda s: s.name)
def test_signals_reach_every_trainer_once(clone, signum, processes):
    process = clone.start(ALTER_PROCESSES=str(processes), CUDA_VISIBLE_DEVICES="", WAIT="1")
    clone.until("ready", processes)
    process.send_signal(signum)
    assert clone.finish(process) == 128 + signum
    assert clone.noted("signal") == [signum] * processes
    assert clone.stopped == processes  # when the launcher ended, all of them had


@pytest.mark.parametrize("processes", [1, 2])
def test_ctrl_c_reaches_every_trainer_once(clone, processes):
    keyboard, terminal = pty.openpty()
    try:
        process = clone.start(ALTER_PROCESSES=str(processes), CUDA_VISIBLE_DEVICES="", WAIT="1", terminal=terminal)
        clone.until("ready", processes)
        os.write(keyboard, b"\x03")
        assert clone.finish(process) == 130
    finally:
        os.close(keyboard)
        os.close(terminal)
    assert clone.noted("signal") == [signal.SIGINT] * processes


@pytest.mark.parametrize("signum", [signal.SIGUSR1, signal.SIGINT], ids=lambda s: s.name)
def test_signal_before_the_trainers_have_registered_ends_the_launch(clone, signum):
    process = clone.start(ALTER_PROCESSES="2", CUDA_VISIBLE_DEVICES="", UNREGISTERED="1")
    clone.until("ready", 2)
    process.send_signal(signum)
    assert clone.finish(process) == 128 + signum
    for trainer in clone.noted("ready"):
        with pytest.raises(ProcessLookupError):
            os.kill(trainer, 0)


def test_the_death_of_one_process_ends_the_launch_with_a_line(clone):
    process = clone.run(ALTER_PROCESSES="2", CUDA_VISIBLE_DEVICES="", KILLED="1")
    assert process.returncode == 1
    (trainer,) = (int(file.name.rpartition("-")[2]) for file in clone.records.glob("train-*")
                  if json.loads(file.read_text())["rank"] == 1)
    assert process.stderr.strip().splitlines()[-1] == (
        f"error: training process {trainer} died without an exit code (killed, or out of memory): go on from the "
        "last checkpoint with resume=latest")


def test_the_console_command_in_the_launchers_environment(clone, tmp_path):
    shutil.copy(ROOT / "scripts" / "alter.sh", clone.root / "scripts")
    (clone.root / "alter").mkdir()
    (clone.root / "alter" / "__main__.py").write_text(
        "import os, sys\nprint(sys.argv[1:], os.environ['PYTHONPATH'], os.getcwd())\nsys.exit(7)\n")
    process = clone.run("report", "--run", "a  b", script="scripts/alter.sh", cwd=tmp_path)
    assert process.returncode == 7
    assert process.stdout == f"{['report', '--run', 'a  b']} {clone.root} {tmp_path}\n"


def requirements_met(folder: Path, text: str):
    file = folder / "some requirements.txt"
    file.write_text(text)
    return subprocess.run([sys.executable, str(ROOT / "scripts" / "requirements_met.py"), str(file)],
                          capture_output=True, text=True)


def test_requirements_satisfied(tmp_path):
    process = requirements_met(tmp_path, f"# a comment\n\npytest>=1,<={version('pytest')}  # why\nruff\n"
                                         "not-of-this-python; python_version < '3'\n")
    assert (process.returncode, process.stderr) == (0, "")


@pytest.mark.parametrize("line, named", [
    ("no-such-package-of-alter>=1", "no-such-package-of-alter>=1"),
    ("pytest<1", f"pytest<1 (found {version('pytest')})"),
])
def test_requirements_not_satisfied(tmp_path, line, named):
    process = requirements_met(tmp_path, f"ruff\n{line}\n")
    assert process.returncode == 1
    assert process.stderr == f"missing: {named}\n"


def test_requirements_met_imports_nothing_heavy():
    process = subprocess.run([sys.executable, "-X", "importtime", str(ROOT / "scripts" / "requirements_met.py"),
                              str(ROOT / "requirements.txt")], capture_output=True, text=True)
    assert "torch" not in {line.rpartition("|")[2].strip() for line in process.stderr.splitlines()}


def test_no_python_is_said_in_one_line(clone):
    (clone.root / "requirements.txt").write_text("no-such-package-of-alter\n")
    clone.command(clone.commands, "python3", "exit 1")  # older than 3.10, as far as its answers go
    process = clone.run()
    assert process.returncode == 2
    assert process.stderr.splitlines() == ["error: no Python 3.10 or newer on PATH: install one and run again"]
    assert not (clone.root / ".venv").exists()


def test_unsatisfied_environment_gets_a_venv_of_its_own_once(clone):
    """pip and venv are stand-ins: the made python reports itself satisfied after its installation."""
    made = 'mkdir -p "$4/bin" && cp "$0" "$4/bin/python"'
    clone.command(clone.commands, "python3", f'''echo "$*" >>"$RECORDS/asked"
case "$*" in
*requirements_met.py*) [ -e "$(dirname "$0")/installed" ] ;;
"-m venv --clear"*) {made} ;;
*"pip install"*) [ -z "${{BREAK-}}" ] && touch "$(dirname "$0")/installed" ;;
*train.py*) exec "{sys.executable}" "$@" ;;
esac''')
    assert clone.run(BREAK="1").returncode != 0
    assert clone.noted("train") == []
    process = clone.run()  # repairs what was interrupted
    assert process.returncode == 0
    assert process.stderr.splitlines() == ["installing requirements.txt into .venv (once; several GB)"]
    assert clone.run().stderr == ""
    assert len(clone.noted("train")) == 2
    asked = (clone.records / "asked").read_text().splitlines()
    assert sum("pip install" in line for line in asked) == 2
    assert sum("-m venv" in line for line in asked) == 1
