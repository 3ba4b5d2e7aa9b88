"""Files that appear whole or not at all."""

from __future__ import annotations

import json
import os
import stat

import pytest

from ikem_fast.atomic import atomic_open, write_json


@pytest.mark.parametrize("durable", [True, False])
def test_the_file_appears_at_the_end(tmp_path, durable):
    path = tmp_path / "file.txt"
    with atomic_open(path, durable=durable) as file:
        file.write("äb\r\nc\n")
        assert not path.exists()
    assert path.read_bytes() == "äb\r\nc\n".encode()
    with atomic_open(path, "wb", durable=durable) as file:
        file.write(b"\x00\xff")
    assert path.read_bytes() == b"\x00\xff"
    assert os.listdir(tmp_path) == ["file.txt"]


def test_an_exception_leaves_the_earlier_file_and_nothing_else(tmp_path):
    path = tmp_path / "file.txt"
    path.write_text("before")

    def write_in_vain():
        with atomic_open(path) as file:
            file.write("after")
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        write_in_vain()
    assert path.read_text() == "before"
    assert os.listdir(tmp_path) == ["file.txt"]


def test_others_may_read_the_file_as_the_umask_says(tmp_path):
    with atomic_open(tmp_path / "atomic") as file:
        file.write("x")
    (tmp_path / "plain").write_text("x")
    modes = [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("atomic", "plain")]
    assert modes[0] == modes[1]


def test_json(tmp_path):
    write_json(tmp_path / "value.json", {"name": "é", "list": [1, 2.5, None]})
    text = (tmp_path / "value.json").read_text(encoding="utf-8")
    assert "é" in text
    assert text.endswith("}\n")
    assert json.loads(text) == {"name": "é", "list": [1, 2.5, None]}
    with pytest.raises(ValueError, match="Out of range float"):
        write_json(tmp_path / "value.json", float("nan"))
    assert json.loads((tmp_path / "value.json").read_text(encoding="utf-8"))["name"] == "é"


def test_errors(tmp_path):
    with pytest.raises(ValueError, match="mode must be 'w' or 'wb', got 'a'"), atomic_open(tmp_path / "x", "a"):
        pass
    with pytest.raises(FileNotFoundError), atomic_open(tmp_path / "none" / "x"):
        pass
