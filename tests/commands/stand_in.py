"""A clone of this repository whose scripts/train.py is a stand-in, and the launchers at work in it."""

import json
import os
import shutil
import signal
import subprocess
import sys
import termios
import time
from fcntl import ioctl
from importlib.metadata import version
from pathlib import Path

from helpers import HANGING, ROOT

# Keeps the trainer's side of the contract and leaves a file of JSON for everything that happens to it.
STAND_IN = '''
import json, os, signal, sys, time
from pathlib import Path

records = Path(os.environ["RECORDS"])
kind = "check" if "--check" in sys.argv else "train"
world = int(os.environ.get("WORLD_SIZE", "1"))

def note(name, value):
    (records / f"{name}-{time.time_ns()}-{os.getpid()}").write_text(json.dumps(value))

def received(signum, frame):
    note("signal", signum)
    got.append(signum)

def meet(name):
    note(name, os.getpid())
    while len(list(records.glob(name + "-*"))) < world:
        time.sleep(0.02)

note(kind, {"arguments": sys.argv[1:], "cwd": os.getcwd(), "script": sys.argv[0], "world": world,
            "rank": int(os.environ.get("RANK", "0")), "path": os.environ["PYTHONPATH"],
            "use_cpu": os.environ.get("ACCELERATE_USE_CPU"), "status": os.environ.get("ALTER_STATUS_DIR")})
if kind == "check":
    if "CHECK_CODE" in os.environ:
        print("error: bad input", file=sys.stderr)
    sys.exit(int(os.environ.get("CHECK_CODE", "0")))

got = []
if "UNREGISTERED" in os.environ:
    note("ready", os.getpid())
    time.sleep(600)
status = Path(os.environ["ALTER_STATUS_DIR"], str(os.getpid())) if "ALTER_STATUS_DIR" in os.environ else None
code = int(os.environ.get("CODE", "0"))
if code:
    meet("failing")  # for accelerate ends the rest when the first has failed
if "KILLED" in os.environ:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # which accelerate sends when the first is gone
    status.touch()
    meet("ready")
    if os.environ["RANK"] == os.environ["KILLED"]:
        os.kill(os.getpid(), signal.SIGKILL)
    code = 1  # as one that misses the other
if "WAIT" in os.environ:
    for name in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(name, received)
    if status:
        status.touch()
    note("ready", os.getpid())
    deadline = time.monotonic() + 600
    while not got and time.monotonic() < deadline:
        time.sleep(0.02)
    time.sleep(0.5)  # long enough for a signal that comes twice
    meet("stopped")
    for name in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(name, signal.SIG_IGN)
    meet("deaf")  # for accelerate sends SIGTERM to the rest when the first is gone
    code = 128 + got[0] if got else 99
if status:
    status.write_text(str(code))
sys.exit(code)
'''


class Clone:
    def __init__(self, folder: Path):
        self.root = folder / "a clone of alter"
        self.records = folder / "the records"
        self.temporary = folder / "temporary files"
        commands = folder / "commands of mine"
        for path in (self.root / "scripts", self.records, self.temporary, commands):
            path.mkdir(parents=True)
        for name in ("launch.sh", "setup_env.sh", "requirements_met.py"):
            shutil.copy(ROOT / "scripts" / name, self.root / "scripts")
        for name in ("train.sh", "train_dit.sh", "train_sd21.sh"):
            shutil.copy(ROOT / name, self.root)
        (self.root / "scripts" / "train.py").write_text(STAND_IN)
        (self.root / "requirements.txt").write_text(f"pytest=={version('pytest')}  # the one that runs this\n")
        # The python on PATH is the one that runs the tests, and there is one GPU.
        self.command(commands, "python3", f'exec "{sys.executable}" "$@"')
        self.command(commands, "nvidia-smi", "echo 'GPU 0: of the test (UUID: GPU-0)'")
        self.commands = commands
        self.environment = {k: v for k, v in os.environ.items() if not k.startswith(("ALTER_", "ACCELERATE_"))}
        for name in ("VIRTUAL_ENV", "PYTHONPATH", "CUDA_VISIBLE_DEVICES", "RANK", "WORLD_SIZE"):
            self.environment.pop(name, None)
        self.environment |= {"RECORDS": str(self.records), "TMPDIR": str(self.temporary),
                             "PATH": f"{commands}{os.pathsep}{os.environ['PATH']}"}

    @staticmethod
    def command(folder: Path, name: str, body: str) -> None:
        (folder / name).write_text(f"#!/bin/sh\n{body}\n")
        (folder / name).chmod(0o755)

    def start(self, *arguments: str, script="train_dit.sh", cwd=None, terminal=None, **environment: str):
        def prepare():  # a shell cannot trap what it was started to ignore
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            if terminal is not None:
                ioctl(terminal, termios.TIOCSCTTY, 0)

        return subprocess.Popen(
            ["bash", str(self.root / script), *arguments], cwd=cwd or self.root, env=self.environment | environment,
            stdin=subprocess.DEVNULL if terminal is None else terminal, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, text=True, start_new_session=True, preexec_fn=prepare,
        )

    def run(self, *arguments: str, **options):
        process = self.start(*arguments, **options)
        try:
            output, errors = process.communicate(timeout=HANGING)
        finally:
            process.kill()
        return subprocess.CompletedProcess(arguments, process.returncode, output, errors)

    def noted(self, name: str) -> list:
        return [json.loads(file.read_text()) for file in sorted(self.records.glob(f"{name}-*"))]

    def until(self, name: str, count: int) -> None:
        deadline = time.monotonic() + HANGING
        while len(list(self.records.glob(f"{name}-*"))) < count:
            assert time.monotonic() < deadline, f"{name} was not reached"
            time.sleep(0.05)

    def finish(self, process) -> int:
        """Its exit code, once it has ended by itself: not its children's end, as communicate() would have it."""
        try:
            process.wait(timeout=HANGING)
            self.stopped = len(self.noted("stopped"))
        finally:
            process.kill()
            process.communicate()
        assert list(self.temporary.glob("alter.*")) == []  # accelerate leaves one of its own
        return process.returncode
