"""Labels from the text of a flag: words, lists and files."""

import codecs
import math

import numpy as np
import pytest

from guided_diffusion.flags.labels import label_source


@pytest.mark.parametrize("labels", ["random", "balanced", "1,2,5-9"])
@pytest.mark.parametrize("size", [1, 3, 16])
def test_same_label_per_index_whatever_the_batch(labels, size):
    labels_of = label_source(labels, 3, 10)
    whole = labels_of(range(48))
    parts = np.concatenate([labels_of(range(start, start + size)) for start in range(0, 48, size)])
    assert whole.dtype == np.int64 and np.array_equal(parts, whole)
    assert np.array_equal(labels_of(range(47, -1, -1)), whole[::-1])
    assert not np.array_equal(label_source(labels, 4, 10)(range(48)), whole)


@pytest.mark.parametrize("num_samples", [1, 9, 10, 11, 25, 333])
def test_balanced_labels_are_balanced_within_one_for_any_number(num_samples):
    counts = np.bincount(label_source("balanced", 0, 10)(range(num_samples)), minlength=10)
    assert len(counts) == 10 and counts.max() - counts.min() <= 1


EVERY = ",".join(map(str, range(1000)))


@pytest.mark.parametrize(
    ("labels", "pool"),
    [
        ("7", [7]),
        ("1,2,5-9", [1, 2, 5, 6, 7, 8, 9]),
        ("3, 4", [3, 4]),
        ("0-0", [0]),
        ("2,2,3", [2, 2, 3]),
        (EVERY, list(range(1000))),
    ],
)
def test_lists_and_ranges_are_used_again_and_again(labels, pool):
    got = label_source(labels, 0, 1000)(range(3 * len(pool)))
    assert all(sorted(r) == pool for r in got.reshape(3, -1))


@pytest.mark.parametrize("name", ["labels.txt", "labels.csv", "labels", "7.txt", "labels.npy"])
@pytest.mark.parametrize(
    "content",
    [
        "4 4\n9\n0\n",
        "4,4,9,0",
        "4, 4,\r\n9,\r\n0,\r\n",
        "4;4;9;0\n",
        "4\t4 , 9\n\n0\n",
        codecs.BOM_UTF8 + b"4 4 9 0",
        codecs.BOM_UTF8 + b"4,4\r\n9,0\r\n",
        "4,4\n9,0\n".encode("utf-16"),
        "npy",
    ],
)
def test_files_by_content_whatever_their_name(tmp_path, monkeypatch, name, content):
    monkeypatch.chdir(tmp_path)
    if content == "npy":
        with open(name, "wb") as file:
            np.save(file, np.array([[4, 4], [9, 0]]))
    else:
        (tmp_path / name).write_bytes(content.encode() if isinstance(content, str) else content)
    for path in (name, str(tmp_path / name)):
        assert sorted(label_source(path, 0, 10)(range(4))) == [0, 4, 4, 9]


@pytest.mark.parametrize(
    ("labels", "culprit"), [("12", "12"), ("1,10", "10"), ("0-11", "10"), ("file", "-1")]
)
def test_class_out_of_range(tmp_path, monkeypatch, labels, culprit):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("3 -1")
    with pytest.raises(ValueError, match=rf"class {culprit} is out of range, the classes are 0 to 9"):
        label_source(labels, 0, 10)


@pytest.mark.parametrize("labels", ["5-3", "1,,2", "1-2-3"])
def test_list_that_is_not_understood(labels):
    with pytest.raises(ValueError, match=f"labels '{labels}'"):
        label_source(labels, 0, 10)


@pytest.mark.parametrize(
    "labels", ["nowhere.txt", "folder/labels.npy", "2024/labels.npy", "10classes.txt", "1;2", "1,x", ""]
)
def test_missing_file(tmp_path, monkeypatch, labels):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=f"labels '{labels}'.*balanced"):
        label_source(labels, 0, 10)


@pytest.mark.parametrize(
    "content",
    [
        *(b"one two", b"1.5 2", b"\x00\x01", b"1,,2", b",1", b"class\n1\n", b"\xff\xfe\x00", b"\x93NUMPY"),
        *(np.array([1.5, 2.0]), np.array([math.nan]), np.array(["a"])),
    ],
)
def test_file_without_whole_numbers(tmp_path, content):
    path = tmp_path / "labels.npy"
    path.write_bytes(content) if isinstance(content, bytes) else np.save(path, content)
    with pytest.raises(ValueError, match=r"labels\.npy.*whole numbers"):
        label_source(str(path), 0, 10)


@pytest.mark.parametrize("content", [b"", b" \n", codecs.BOM_UTF8])
def test_empty_file(tmp_path, content):
    (tmp_path / "labels.txt").write_bytes(content)
    with pytest.raises(ValueError, match=r"labels\.txt' names no class"):
        label_source(str(tmp_path / "labels.txt"), 0, 10)
