"""Two runs do not write into one folder: a claim holds until its process ends, however it ends."""

import errno
import fcntl
import os
import signal
import subprocess
import sys

import pytest
from helpers import HANGING

from alter import InputError, train
from alter.common.files import claim, one_at_a_time, release

_CLAIM = ("import sys, time; from pathlib import Path; from alter.common.files import claim; "
          "claim(Path(sys.argv[1]), 'output_dir'); print('held', flush=True); time.sleep(10_000)")


@pytest.fixture
def another(tmp_path):
    """A process that has claimed tmp_path/run."""
    (tmp_path / "run").mkdir()
    with subprocess.Popen([sys.executable, "-c", _CLAIM, str(tmp_path / "run")], stdout=subprocess.PIPE) as process:
        assert process.stdout.readline().strip() == b"held"
        yield process
        process.kill()
        process.wait(HANGING)


def test_it_ends_with_its_process(another, tmp_path):
    for _ in range(2):
        with pytest.raises(InputError, match=f"output_dir: .*run: process {another.pid} on .* is writing there: wait"):
            claim(tmp_path / "run", "output_dir")
    os.kill(another.pid, signal.SIGKILL)
    another.wait(HANGING)
    claim(tmp_path / "run", "output_dir")
    claim(tmp_path / "run", "output_dir")  # its own
    release()


def test_children_do_not_keep_it(tmp_path):
    claim(tmp_path, "output_dir")
    child = os.fork()
    if child == 0:
        signal.pause()
    release()
    code = _CLAIM.replace("time.sleep(10_000)", "pass")
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, timeout=HANGING)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert done.stdout.strip() == b"held"


def test_a_second_run_is_refused_and_writes_nothing(small_config, another, tmp_path):
    with pytest.raises(InputError, match=f"output_dir: .*: process {another.pid} on ") as caught:
        train(small_config("dit"))
    assert "\n" not in str(caught.value)
    assert [path.name for path in (tmp_path / "run").iterdir()] == [".lock"]
    another.kill()
    another.wait(HANGING)
    run = train(small_config("dit")).run_dir
    assert (run / "final").is_dir()
    code = _CLAIM.replace("time.sleep(10_000)", "pass")
    done = subprocess.run([sys.executable, "-c", code, str(run)], capture_output=True, timeout=HANGING)
    assert done.returncode == 0  # given up at the end of the run, though this process lives on


def test_a_file_system_without_locks(tmp_path, monkeypatch, capsys):
    def none(*arguments):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "lockf", none)
    claim(tmp_path, "output_dir")
    (said,) = capsys.readouterr().err.splitlines()
    assert "keeps no locks (No locks available): nothing hinders a second run" in said


_ALONE = ("import sys; from pathlib import Path; from alter.common.files import one_at_a_time\n"
          "with one_at_a_time(Path(sys.argv[1])): print('held', flush=True); sys.stdin.read()")


def test_one_at_a_time(tmp_path):
    place = tmp_path / "new/.making"
    with subprocess.Popen([sys.executable, "-c", _ALONE, str(place)], stdin=subprocess.PIPE,
                          stdout=subprocess.PIPE) as other:
        assert other.stdout.readline().strip() == b"held"
        with open(place, "a") as file, pytest.raises(OSError):
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        other.stdin.close()
        with one_at_a_time(place):  # once the other has left
            assert other.wait(HANGING) == 0
