"""The table of pretrained files: finding, hashing, recording; and that the shipped one is whole."""

import hashlib
import json
import re

import pytest

from guided_diffusion.files.pretrained import (
    PRETRAINED_DIR,
    find_pretrained,
    known_hashes,
    read_table,
    record_hash,
    recorded_hashes,
    sha256,
    verify,
)

V2 = "resnet50-11ad3fa6.pth"


@pytest.mark.parametrize("asked", [V2, "resnet50_weight_V2.pth"])
def test_file_is_found_under_any_of_its_names(tmp_path, asked):
    (tmp_path / "resnet50_weight_V2.pth").touch()
    assert find_pretrained(asked, folder=tmp_path) == tmp_path / "resnet50_weight_V2.pth"
    (tmp_path / V2).touch()
    assert find_pretrained(asked, folder=tmp_path) == tmp_path / asked


@pytest.mark.parametrize(
    ("name", "words"),
    [
        (
            "128x128_diffusion.pt",
            "scripts/download.py 128x128_diffusion.pt`, or put https://openaipublic.blob",
        ),
        ("resnet50_weight_V2.pth", "or put https://download.pytorch.org/models/resnet50-11ad3fa6.pth there"),
        ("mine.pt", "give its path, or put https://mine there by hand"),
    ],
)
def test_file_that_is_not_there_is_named_with_its_place(tmp_path, name, words):
    with pytest.raises(FileNotFoundError) as caught:
        find_pretrained(name, url="https://mine", folder=tmp_path)
    assert str(caught.value).startswith(f"no weights at {tmp_path / name}; ") and words in str(caught.value)


@pytest.mark.parametrize("size", [0, 1, (1 << 20) + 7])
def test_sha256(tmp_path, size):
    content = bytes(i % 251 for i in range(size))
    (tmp_path / "file").write_bytes(content)
    assert sha256(tmp_path / "file") == hashlib.sha256(content).hexdigest()


def test_what_is_known_of_a_file_and_held_against_it(tmp_path):
    path, digest = tmp_path / "resnet50_weight_V2.pth", hashlib.sha256(b"x").hexdigest()
    path.write_bytes(b"x")
    record_hash(tmp_path, path.name, digest.upper(), 1)
    record_hash(tmp_path, "another", "0" * 64, 2)
    assert list(recorded_hashes(tmp_path)) == ["another", path.name]
    assert known_hashes(path) == [("11ad3fa6", "published"), (digest, "recorded")]
    assert verify(path, known_hashes(path)[1:], size=1) == digest
    with pytest.raises(ValueError, match=f"sha256 expected 11ad3fa6 .published., got {digest}"):
        verify(path, known_hashes(path))
    with pytest.raises(ValueError, match="expected 5 bytes, got 1"):
        verify(path, [], size=5)


def test_table_is_well_formed():
    content = json.loads((PRETRAINED_DIR / "files.json").read_text())
    table = read_table()
    names = [name for row in table.files.values() for name in row.names]
    assert len(set(names)) == len(names) and not set(names) & set(table.presets)
    for name, row in table.files.items():
        assert content["files"][name].keys() - {"sha256_prefix"} == {
            "url", "sha256", "bytes", "licence", "also_named", "what"
        }  # fmt: skip
        assert row.url.startswith("https://") and row.url.endswith(f"/{name}") and "/" not in name
        assert re.fullmatch("([0-9a-f]{8}|[0-9a-f]{64})?", row.sha256)
        assert row.bytes is None or row.bytes > 0
        assert row.licence and row.what and "\n" not in row.licence + row.what
        if digits := re.search(r"resnet\d+-([0-9a-f]{8})\.", name):  # the hash begins as the name says
            assert row.sha256.startswith(digits[1])


def test_presets_are_complete():
    table = read_table()
    imagenet = {f"imagenet128-{variant}" for variant in ("resnet101", "resnet50", "unguided", "finetuned")}
    assert table.presets.keys() >= {"digits", "cifar10-edm-unguided", "cifar10-edm-resnet56", *imagenet}
    assert table.presets["digits"] == []
    assert {name for names in table.presets.values() for name in names} <= table.files.keys()


def test_readme_names_every_file():
    readme = (PRETRAINED_DIR / "README.md").read_text()
    assert [name for name in read_table().files if f"`{name}`" not in readme] == []
