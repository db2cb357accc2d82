"""Reading a user's text, and writing so that a kill, a full disk or a power cut leaves what was there, or all."""

import codecs
import contextlib
import errno
import fcntl
import gzip
import os
import re
import socket
import sys
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from .errors import InputError

LOCK = ".lock"  # of POSIX, which children do not inherit and which ends with its process
_held: list[TextIO] = []


def decode_text(content: bytes) -> str:
    """Text in UTF-8, with or without a byte order mark, or in UTF-16 with one; the mark is taken off.

    Raises:
        ValueError: naming the first byte that is no such text, and its line.
    """
    encoding = "utf-16" if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "utf-8"
    try:
        text = content.decode(encoding)
        if "\0" not in text:
            return text.removeprefix("\ufeff")
        place = len(text[: text.index("\0")].encode(encoding))
    except UnicodeDecodeError as error:
        place = error.start
    line = content[:place].count(b"\n") + 1
    raise ValueError(f"line {line}: byte {place} (0x{content[place]:02x}) is no {encoding.upper()} text")


def read_text(file: Path, field: str) -> str:
    """The text of a file that a user wrote; that of a .gz file unpacked.

    Args:
        field: what named the file, for the message: a key or an option.

    Raises:
        InputError: if it cannot be read, or is neither UTF-8 nor UTF-16 with a byte order mark.
    """
    try:
        content = file.read_bytes()
        return decode_text(gzip.decompress(content) if file.suffix == ".gz" else content)
    except FileNotFoundError:
        raise InputError(f"{field}: {file}: no such file") from None
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{field}: {file}: cannot be read ({reason}): write it again, or allow it") from None
    except ValueError as error:
        raise InputError(f"{field}: {file} {error}: save the file as UTF-8") from None


def split_lines(text: str) -> list[str]:
    """The lines, which \\n, \\r and \\r\\n alone end: str.splitlines cuts at U+2028 too, inside of a prompt."""
    return re.split(r"\r\n|[\r\n]", text)


def read_lines(file: Path, field: str) -> list[str]:
    """The lines of `read_text`, stripped, without the blank ones."""
    return [line.strip() for line in split_lines(read_text(file, field)) if line.strip()]


def folder_fault(path: str | Path) -> str | None:
    """Why a path is no folder that can be listed, in a few words; None: it is one."""
    try:
        os.scandir(path).close()
    except (FileNotFoundError, NotADirectoryError):
        if os.path.exists(path):
            return "is a file, not a folder"
        return f"is a link to {os.readlink(path)}, which does not exist" if os.path.islink(path) else "no such folder"
    except (OSError, ValueError) as error:
        return f"cannot be listed ({getattr(error, 'strerror', None) or error})"
    return None


def check_writable(path: Path, field: str, folder: bool = False) -> None:
    """Refuse, before work starts, a place where its result could not be written; leaves nothing there.

    Args:
        field: what named the path, for the message: a key or an option.
        folder: whether it is a folder, made with those above it; else a file, in a folder that exists.

    Raises:
        InputError: saying why.
    """
    if not folder and path.exists() and not path.is_file():
        raise InputError(f"{field}: {path}: is {'a folder' if path.is_dir() else 'no file'}: name a file")
    if not folder and not path.parent.is_dir():
        raise InputError(f"{field}: {path}: its folder does not exist: make it, or choose another")
    try:
        with tempfile.TemporaryFile(dir=_nearest(path if folder else path.parent)):
            pass
    except OSError as error:
        raise InputError(f"{field}: {path}: cannot be written ({error.strerror}): choose another place") from None


def claim(folder: Path, field: str) -> None:
    """Keep other processes from claiming a folder until this one ends or calls `release`, on NFS too.

    Where the file system keeps no locks, a warning says so.

    Args:
        field: what named the folder, for the message.

    Raises:
        InputError: if another process has claimed it.
    """
    release()
    held = open(folder / LOCK, "a+", encoding="utf-8")
    try:
        fcntl.lockf(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        held.seek(0)
        other = held.read().strip() or "another process"
        held.close()
        if error.errno in (errno.EACCES, errno.EAGAIN):
            raise InputError(f"{field}: {folder}: {other} is writing there: wait for it or end it, or choose another "
                             "folder") from None
        print(f"warning: {folder}: its file system keeps no locks ({error.strerror}): nothing hinders a second run "
              "from writing there", file=sys.stderr)
        return
    held.truncate(0)
    held.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    held.flush()
    _held.append(held)


def release() -> None:
    """Give up what this process has claimed."""
    while _held:
        _held.pop().close()


@contextlib.contextmanager
def one_at_a_time(file: Path) -> Iterator[None]:
    """Waits until no other process is in such a block; `file`, whose folder is made, stays."""
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):  # a file system without locks, or that is read alone
            file.parent.mkdir(parents=True, exist_ok=True)
            fcntl.lockf(stack.enter_context(open(file, "a", encoding="utf-8")), fcntl.LOCK_EX)
        yield


def _nearest(path: Path) -> Path:
    """The path itself, or the nearest above it that exists."""
    try:
        path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return _nearest(path.parent)
    return path


def write_text(file: Path, text: str) -> None:
    """Replace `file` by `text`, in UTF-8; after an OSError it is as it was."""
    partial = file.with_name(f".partial-{file.name}")
    try:
        with open(partial, "w", encoding="utf-8") as written:
            written.write(text)
            written.flush()
            os.fsync(written.fileno())
        partial.replace(file)
    except OSError:
        partial.unlink(missing_ok=True)
        raise
    sync(file.parent)


def append_text(file: Path, text: str) -> None:
    """Append to `file`, in UTF-8; after an OSError it is as it was."""
    content = text.encode()
    with open(file, "ab", buffering=0) as appended:
        size = appended.tell()
        try:
            while content:
                content = content[appended.write(content):]
        except OSError:
            with contextlib.suppress(OSError):
                appended.truncate(size)
            raise


def publish(partial: Path, folder: Path) -> None:
    """Rename a folder once all that is in it has reached the disk; `folder` must not exist."""
    for path in [*partial.rglob("*"), partial]:
        sync(path)
    partial.rename(folder)
    sync(folder.parent)


def sync(path: Path) -> None:
    """Wait until a file's content, or a folder's list of names, has reached the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno != errno.EINVAL or not path.is_dir():  # some network file systems sync no folders
            raise
    finally:
        os.close(handle)
