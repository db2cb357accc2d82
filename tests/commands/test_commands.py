"""The console command: its list, its help, what it says of bad input, and the launcher's part of the contract."""

import os
import signal
import subprocess
import sys
import types

import pytest

import alter.commands
from alter.commands import COMMANDS, HEAVY, main
from alter.common.errors import InputError
from alter.common.load import CONFIGS

SLOW_IMPORTS = {"torch", "diffusers", "transformers", "accelerate"}


def imported_by_help(*words):
    """What `alter ... --help` prints, and the heavy packages that it imports."""
    process = subprocess.run([sys.executable, "-X", "importtime", "-m", "alter", *words, "--help"], capture_output=True,
                             text=True, cwd=CONFIGS.parent, env={**os.environ, "COLUMNS": "80"})
    assert process.returncode == 0, process.stderr
    return process.stdout, SLOW_IMPORTS & {line.rpartition("|")[2].strip() for line in process.stderr.splitlines()}


def test_the_list_fits_a_screen_and_imports_nothing():
    text, heavy = imported_by_help()
    assert not heavy and len(text.splitlines()) <= 40 and all(len(line) <= 80 for line in text.splitlines())
    assert all(f"    {name}" in text for name in COMMANDS)


@pytest.mark.parametrize("name", sorted(COMMANDS.keys() - HEAVY))
def test_help_of_a_command_imports_nothing_heavy(name):
    text, heavy = imported_by_help(name)
    assert not heavy and text.startswith(f"usage: alter {name} ")
    assert name == "train" or len(text.splitlines()) <= 40  # train's lists every key


def test_every_module_of_commands_is_one():
    for name, (module, extra, text) in COMMANDS.items():
        assert (CONFIGS.parent / "alter/commands" / f"{module}.py").is_file(), name
        assert extra in ("train", "eval", "report") and text


@pytest.mark.parametrize("words, wanted", [
    (["--train.steps=10"], "write train.steps=10"), (["--train.steps", "10"], "write train.steps=VALUE"),
    (["--seed=3"], "write seed=3"), (["--name=two words"], "write name=two words"),
])
def test_keys_have_no_dashes(capsys, words, wanted):
    assert main(["train", "--config", "demo_dit", *words]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {words[0]}: ") and line.endswith(wanted)


@pytest.mark.parametrize("words, message", [
    (["trian"], "invalid choice: 'trian'"), (["train", "--config", "demo_dit", "--dryrun"], "--dryrun"),
    (["report"], "--run"), (["convert", "to-paper", "x", "--out", "y"], "to-paper"),
])
def test_wrong_arguments(capsys, words, message):
    with pytest.raises(SystemExit) as stop:
        main(words)
    assert stop.value.code == 2 and message in capsys.readouterr().err


def stand_in(monkeypatch, action):
    """`alter train` does `action` instead."""
    command = types.SimpleNamespace(
        __doc__="", add_arguments=lambda parser: parser.add_argument("--debug", action="store_true"),
        run=lambda arguments: action())
    monkeypatch.setattr(alter.commands, "import_module", lambda *_: command)


def raising(error):
    def action():
        raise error
    return action


class Interrupted(RuntimeError):
    signum = 15


class NonFiniteLoss(RuntimeError):
    pass


FROM_A_LOADER = InputError("Caught InputError in a loader.\nTraceback (most recent call last):\n  File\n"
                           "alter.common.errors.InputError: file: broken")


@pytest.mark.parametrize("error, code, line", [
    (InputError("a: b"), 2, "error: a: b"), (FROM_A_LOADER, 2, "error: file: broken"),
    (Interrupted("stopped by SIGTERM"), 143, "error: stopped by SIGTERM"),
    (NonFiniteLoss("at step 1"), 1, "error: at step 1"),
    (KeyboardInterrupt(), 130, "error: stopped at once; the last checkpoint, if there is one, stays"),
    (ModuleNotFoundError("No module", name="sklearn.datasets"), 2,
     'error: alter train needs sklearn: pip install "alter[train]"'),
])
def test_errors_are_one_line_and_a_code(monkeypatch, capsys, error, code, line):
    stand_in(monkeypatch, raising(error))
    assert main(["train"]) == code
    assert capsys.readouterr().err.splitlines() == [line]


def test_each_fault_is_a_line_of_its_own(monkeypatch, capsys):
    stand_in(monkeypatch, raising(InputError("a: b\nc: d")))
    assert main(["train"]) == 2
    assert capsys.readouterr().err.splitlines() == ["error: a: b", "error: c: d"]


@pytest.mark.parametrize("error", [ValueError("ours"), ModuleNotFoundError("No module", name="alter.gone")])
def test_defects_of_ours_keep_their_traceback(monkeypatch, error):
    stand_in(monkeypatch, raising(error))
    with pytest.raises(type(error)):
        main(["train"])


def test_debug_keeps_every_traceback(monkeypatch):
    stand_in(monkeypatch, raising(InputError("a: b")))
    with pytest.raises(InputError):
        main(["train", "--debug"])


@pytest.mark.parametrize("action, code", [(lambda: None, 0), (raising(InputError("a")), 2), (lambda: sys.exit(3), 3)])
def test_the_launcher_reads_the_exit_code_from_a_file(monkeypatch, tmp_path, action, code):
    stand_in(monkeypatch, action)
    monkeypatch.setenv("ALTER_STATUS_DIR", str(tmp_path))
    assert main(["train"]) == code
    assert (tmp_path / str(os.getpid())).read_text() == str(code)


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGUSR1], ids=lambda s: s.name)
def test_a_signal_while_models_load_leaves_its_code(monkeypatch, capsys, tmp_path, signum):
    stand_in(monkeypatch, lambda: signal.raise_signal(signum))
    monkeypatch.setenv("ALTER_STATUS_DIR", str(tmp_path))
    before = signal.getsignal(signum)
    assert main(["train"]) == 128 + signum
    assert (tmp_path / str(os.getpid())).read_text() == str(128 + signum)
    (line,) = capsys.readouterr().err.splitlines()
    assert line == "error: stopped at once; the last checkpoint, if there is one, stays"
    assert signal.getsignal(signum) is before


def test_the_launcher_learns_of_a_crash(monkeypatch, tmp_path):
    stand_in(monkeypatch, raising(ValueError("ours")))
    monkeypatch.setenv("ALTER_STATUS_DIR", str(tmp_path))
    with pytest.raises(ValueError):
        main(["train"])
    assert (tmp_path / str(os.getpid())).read_text() == "1"
