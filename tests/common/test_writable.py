"""Places are checked before work starts, and stay as they were."""

from pathlib import Path

import pytest

import alter.training.run
from alter import InputError, train
from alter.common.files import check_writable


def test_what_can_be_written_passes_and_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("before")
    for place in (Path("new"), Path("file"), tmp_path / "file"):
        check_writable(place, "--out")
    for place in (Path("a/b/c"), Path("."), tmp_path, tmp_path / "a/b"):
        check_writable(place, "--out", folder=True)
    assert [path.name for path in tmp_path.iterdir()] == ["file"] and (tmp_path / "file").read_text() == "before"


@pytest.mark.parametrize("place, folder, reason", [
    ("file", True, "cannot be written (Not a directory)"), ("file/a/b", True, "cannot be written (Not a directory)"),
    ("/proc/none", True, "cannot be written"), ("n" * 300, True, "cannot be written (File name too long)"),
    ("gone", True, "cannot be written (No such file or directory)"), ("a/file", False, "its folder does not exist"),
    ("folder", False, "is a folder: name a file"), ("/dev/null", False, "is no file"), ("/proc/x", False, "cannot be"),
])
def test_what_cannot_is_refused(tmp_path, monkeypatch, place, folder, reason):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    (tmp_path / "gone").symlink_to("nowhere")
    with pytest.raises(InputError) as caught:
        check_writable(Path(place), "--out", folder)
    assert str(caught.value).startswith(f"--out: {place}: {reason}")


@pytest.mark.parametrize("place", ["/proc/none/run", "file/run"])
def test_output_dir_is_checked_before_anything_is_loaded(small_config, tmp_path, monkeypatch, place):
    (tmp_path / "file").touch()
    monkeypatch.setattr(alter.training.run, "build", None)
    monkeypatch.setattr(alter.training.run, "check", None)
    with pytest.raises(InputError, match="^output_dir: .*cannot be written"):
        train(small_config(output_dir=str(tmp_path / place)))
