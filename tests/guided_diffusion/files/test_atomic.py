"""Files that are complete or absent."""

import json
import os

import pytest

from guided_diffusion.files.atomic import renamed_when_complete, write_json


class Killed(BaseException):
    """What a kill looks like from inside."""


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("old", [None, b"old"])
def test_the_name_is_taken_at_the_end_of_the_block(tmp_path, old):
    path = tmp_path / "file.bin"
    if old:
        path.write_bytes(old)
    with renamed_when_complete(str(path)) as file:
        file.write(b"new")
        file.flush()
        assert (path.read_bytes() if path.exists() else None) == old
        # Hidden, and without the ending that readers look for.
        (part,) = (name for name in names(tmp_path) if name != "file.bin")
        assert part.startswith(".") and part.endswith(".part")
    assert path.read_bytes() == b"new" and names(tmp_path) == ["file.bin"]


@pytest.mark.parametrize("error", [OSError, Killed])
def test_a_block_that_fails_leaves_the_old_content_and_nothing_else(tmp_path, error):
    path = tmp_path / "file.bin"
    path.write_bytes(b"old")
    with pytest.raises(error), renamed_when_complete(path) as file:
        file.write(b"half")
        raise error
    assert path.read_bytes() == b"old" and names(tmp_path) == ["file.bin"]


def test_the_content_is_on_the_disk_before_it_has_the_name(tmp_path, monkeypatch):
    synced, replace = [], os.replace
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.append(os.fstat(descriptor).st_size))
    monkeypatch.setattr(os, "replace", lambda old, new: synced.append(new) or replace(old, new))
    with renamed_when_complete(tmp_path / "file.bin") as file:
        file.write(b"12345")
    assert synced == [5, tmp_path / "file.bin"]


def test_a_folder_that_is_not_there_is_the_error_that_is_raised(tmp_path):
    with pytest.raises(FileNotFoundError), renamed_when_complete(tmp_path / "absent" / "file.bin"):
        raise AssertionError("the block must not begin")


def test_json_is_read_back_and_replaced_as_a_whole(tmp_path):
    path, content = tmp_path / "run.json", {"a": [1, None, 0.5], "b": {"ü": "ß"}}
    write_json(path, content)
    assert json.loads(path.read_text()) == content and path.read_bytes().endswith(b"}\n")
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert json.loads(path.read_text()) == content and names(tmp_path) == ["run.json"]
