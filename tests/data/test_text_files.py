"""Text that users write: one reader, whatever the encoding, and one clear line where there is none."""

import gzip
import os

import pytest
from helpers import folder_config, grey, run_config, save_greys
from test_data import save_metadata

from alter import InputError
from alter.common.files import decode_text, folder_fault, read_lines, read_text
from alter.data.images import Unreadable
from alter.data.open import CaptionedFolder, ImageFolder, TextsBeside, open_source


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_text_in_every_encoding_that_names_itself(tmp_path, encoding):
    file = tmp_path / "prompts.txt"
    file.write_bytes("un café\r\n\r\n a\u2028red\x0b\x85circle \rb\n".encode(encoding))
    assert read_lines(file, "--prompts") == ["un café", "a\u2028red\x0b\x85circle", "b"]
    assert read_text(file, "--prompts").startswith("un café\r\n")
    big_endian = b"\xfe\xff" + "é".encode("utf-16-be")
    assert decode_text(big_endian) == "é" and decode_text(b"") == ""


@pytest.mark.parametrize("content, reason", [
    ("a\nun café\n".encode("cp1252"), r"line 2: byte 8 \(0xe9\) is no UTF-8 text"),
    ("ab".encode("utf-16-le"), r"line 1: byte 1 \(0x00\) is no UTF-8 text"),
    ("ab".encode("utf-32"), r"byte 2 \(0x00\) is no UTF-16 text"),
    ("ab".encode("utf-16")[:-1], r"byte 4 \(0x62\) is no UTF-16 text"),
    (b"a\0b", r"line 1: byte 1 \(0x00\)"),
])
def test_other_encodings_are_named_with_the_byte(tmp_path, content, reason):
    (tmp_path / "p.txt").write_bytes(content)
    with pytest.raises(InputError, match=rf"^--prompts: {tmp_path}/p.txt .*{reason}.*: save the file as UTF-8$"):
        read_text(tmp_path / "p.txt", "--prompts")


def test_files_that_are_none(tmp_path):
    (tmp_path / "cut.gz").write_bytes(gzip.compress(b"abc" * 50)[:-9])
    (tmp_path / "no.gz").write_bytes(b"abc")
    for name, reason in (("gone", "no such file"), (".", "Is a directory"), ("cut.gz", "cannot be read"),
                         ("no.gz", "Not a gzipped file")):
        with pytest.raises(InputError, match=f"data.path: {tmp_path}.*: .*{reason}") as error:
            read_text(tmp_path / name, "data.path")
        assert "\n" not in str(error.value)


def test_what_a_folder_is_instead(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to("nowhere")
    for name, reason in (("gone", "no such folder"), ("file", "is a file, not a folder"), (".", None),
                         ("link", "is a link to nowhere, which does not exist"), ("file/below", "no such folder"),
                         ("x" * 300, r"cannot be listed \(File name too long\)"), ("a\0b", "cannot be listed")):
        fault = folder_fault(f"{tmp_path}/{name}")
        if reason is None:
            assert fault is None
            continue
        assert reason.replace("\\", "") in fault
        with pytest.raises(InputError, match=rf"data.path='.*': {reason}"):
            open_source(run_config(f"{tmp_path}/{name}"))

    def refuse(path):
        raise PermissionError(13, "Permission denied", os.fspath(path))

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(InputError, match=r"data.path='.*': cannot be listed \(Permission denied\): set it"):
        open_source(run_config(tmp_path))


def test_metadata_as_windows_writes_it(tmp_path):
    save_greys(tmp_path, 2)
    lines = ['{"file_name": "0.png", "text": "café"}', '{"file_name": "1.png", "text": "b\u2028c"}']
    (tmp_path / "metadata.jsonl").write_bytes("\r\n".join(lines).encode("utf-16"))
    source = open_source(run_config(tmp_path))
    assert [source[0, i]["captions"] for i in (0, 1)] == ["café", "b\u2028c"]


def test_packed_metadata(tmp_path):
    save_greys(tmp_path, 1)
    (tmp_path / "metadata.jsonl.gz").write_bytes(gzip.compress(b'{"file_name": "0.png", "text": "a"}\n'))
    assert open_source(run_config(tmp_path))[0, 0]["captions"] == "a"
    save_metadata(tmp_path, {"file_name": "0.png", "text": "a"})
    with pytest.raises(InputError, match="has metadata.jsonl and metadata.jsonl.gz: keep one"):
        open_source(run_config(tmp_path))


def test_metadata_as_a_table(tmp_path):
    save_greys(tmp_path, 3)
    (tmp_path / "metadata.csv").write_text('\ufefffile_name,text\r\n0.png,"a ""red"", \nround circle"\r\n\r\n1.png,\r\n'
                                           './2.png,b\r\n', encoding="utf-8", newline="")
    source = open_source(run_config(tmp_path))
    assert isinstance(source, CaptionedFolder)
    assert [source[0, i]["captions"] for i in range(3)] == ['a "red", \nround circle', "", "b"]
    assert source.describe(2) == str(tmp_path / "2.png")
    with pytest.raises(InputError, match=r"data.caption_column='caption': no such column .*file_name, text"):
        open_source(run_config(tmp_path, caption_column="caption"))


@pytest.mark.parametrize("content, reason", [
    ("file_name,text\n0.png,a, b\n", "line 2: 3 cells for 2 columns: put text with commas"),
    ("file_name,text\n0.png\n", "line 2: 1 cells for 2 columns"),
    ("file_name;text\n0.png;a\n", "its first line is 'file_name;text'"),
    ("file_name,text,text\n0.png,a,b\n", "its first line is .*each once"),
    ('file_name,text\n0.png,"a\n', "line 2: not CSV"),
    ("file_name,text\n0.png,a\n9.png,b\n", "line 3: file_name='9.png': no such file"),
    ("file_name,text\n../0.png,a\n", "line 2: file_name='../0.png' leaves the folder"),
    ("", "no images"),
])
def test_faults_of_a_table(tmp_path, content, reason):
    save_greys(tmp_path, 1)
    (tmp_path / "metadata.csv").write_text(content)
    with pytest.raises(InputError, match=f"data.path.*{reason}") as error:
        open_source(run_config(tmp_path))
    assert "\n" not in str(error.value)


def test_captions_beside_images(tmp_path):
    for i, (name, text) in enumerate({"a": b"\xef\xbb\xbfa dog\n", "sub/b": b"", "c": b"\xff\xfea\0"}.items()):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        grey(i).save(tmp_path / f"{name}.png")
        (tmp_path / f"{name}.{'TXT' if name == 'c' else 'txt'}").write_bytes(text)
    grey(3).save(tmp_path / "d.png")
    (tmp_path / "notes.txt").write_text("x")
    source = open_source(run_config(tmp_path))
    assert isinstance(source, TextsBeside) and source.num_classes == 0 and len(source) == 4
    assert [source[0, i]["captions"] for i in (0, 1, 3)] == ["a dog", "a", ""]
    with pytest.raises(Unreadable, match="no d.txt beside it"):
        source[0, 2]
    (tmp_path / "a.txt").write_bytes("é".encode("cp1252"))
    with pytest.raises(Unreadable, match="a.txt: no caption .*byte 0"):
        source[0, 0]
    (tmp_path / "a.txt").unlink()
    with pytest.raises(Unreadable, match="a.txt: no caption .*No such file"):
        source[0, 0]
    assert isinstance(open_source(run_config(tmp_path), "class"), ImageFolder)
    assert isinstance(open_source(run_config(tmp_path), "text"), TextsBeside)


@pytest.mark.parametrize("value", ["", " \n", ["", "a"]])
def test_a_blank_caption_is_the_empty_prompt(tmp_path, value):
    save_greys(tmp_path, 1)
    save_metadata(tmp_path, {"file_name": "0.png", "text": value})
    source = CaptionedFolder(folder_config(tmp_path), 0)
    drawn = {source[epoch, 0]["captions"] for epoch in range(20)}
    assert drawn == ({"", "a"} if isinstance(value, list) else {""})
