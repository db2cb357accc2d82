"""Writing so that a kill, a full disk or a power cut leaves a file or folder as it was, or complete."""

import contextlib
import errno
import os
from pathlib import Path


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
