"""Sets of images by their paths: the same pixels from every kind of input, and what is no set of images."""

import json
import zipfile

import numpy as np
import pytest
import torch
from pictures_util import IMAGES, IN_CLASSES, H, N, W, built_png, picture, read, write_classes, write_zip

from guided_diffusion.files.image_sets import open_images, pick_images
from guided_diffusion.runs.store import SampleStore


def write_shards(folder, bounds=(0, 4, 8, N)):
    (folder / "shards").mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps({"settings": {"num_samples": 20}}))
    (folder / "grid.png").write_bytes(picture(IMAGES[0]))
    for start, stop in zip(bounds, bounds[1:], strict=False):
        shard = {"arr_0": IMAGES[start:stop], "arr_1": np.arange(stop - start)}
        np.savez(folder / "shards" / f"{start:06d}-{stop:06d}.npz", **shard)
    return folder


def write_npz(path, save=np.savez, **arrays):
    with open(path, "wb") as file:
        save(file, **(arrays or {"arr_0": IMAGES, "arr_1": np.arange(N)}))
    return path


def write_finished(folder):
    write_shards(folder, bounds=(0, 4))  # a leftover
    write_npz(folder / f"samples_{N}x{H}x{W}x3.npz")
    return folder


MAKERS = {
    "npz": lambda tmp: (write_npz(tmp / "a.npz"), IMAGES),
    "compressed npz": lambda tmp: (write_npz(tmp / "a.NPZ", np.savez_compressed), IMAGES),
    "npz by its content": lambda tmp: (write_npz(tmp / "a.bak"), IMAGES),
    "folder": lambda tmp: (write_classes(tmp / "a"), IN_CLASSES),
    "zip": lambda tmp: (write_zip(tmp / "b.Zip", write_classes(tmp / "a")), IN_CLASSES),
    "shards": lambda tmp: (write_shards(tmp / "a"), IMAGES),
    "finished run": lambda tmp: (write_finished(tmp / "a"), IMAGES),
}


@pytest.mark.parametrize("maker", MAKERS)
def test_every_input_gives_the_same_images_from_any_start_and_picked_ones(tmp_path, maker):
    path, expected = MAKERS[maker](tmp_path)
    images = open_images(path)
    assert (images.count, images.resolution, images.name) == (N, (H, W), path.name)
    for start in (0, 1, 5, 8, N - 1):
        batches = list(images.batches(3, start))
        assert [len(batch) for batch in batches] == [len(range(N)[i : i + 3]) for i in range(start, N, 3)]
        assert all(batch.flags.writeable and batch.dtype == np.uint8 for batch in batches)
        assert np.array_equal(np.concatenate(batches), expected[start:])
    chosen = np.sort(np.random.RandomState(3).permutation(N)[:5])
    assert np.array_equal(pick_images(images, 5, seed=3), expected[chosen])
    assert np.array_equal(pick_images(images, 1000), expected)


def run_of_pngs(folder, png_name):
    """The store of a run of N samples in batches of 4 that ends in PNGs, with its first batch."""
    store = SampleStore(folder, {}, N, 4, png_name=png_name)
    write_batches(store, store.missing()[:1])
    return store


def write_batches(store, ranges):
    for r in ranges:
        store.write(r, torch.from_numpy(IMAGES[r.start : r.stop]), torch.zeros(len(r)), {})


@pytest.mark.parametrize("name", ["{:06d}.png", "000000/{:06d}.png"])
def test_a_run_of_pngs_before_and_after_its_end(tmp_path, name):
    store = run_of_pngs(tmp_path / "a", name.format)
    pixels, notes = read(tmp_path / "a")
    assert np.array_equal(pixels, IMAGES[:4]) and notes == [f"unfinished run: 4 of {N} images"]
    write_batches(store, store.missing())
    # Interrupted between its PNGs, a run is read from its shards.
    if "/" not in name:
        (tmp_path / "a" / "000000.png").write_bytes(picture(IMAGES[5]))
        assert np.array_equal(read(tmp_path / "a")[0], IMAGES)
    store.finish()
    pixels, notes = read(tmp_path / "a")
    assert np.array_equal(pixels, IMAGES) and notes == []  # the records of the run are no pictures


def test_npz_is_streamed(tmp_path, monkeypatch):
    path = write_npz(tmp_path / "a.npz", np.savez_compressed, arr_0=np.zeros((4000, 16, 16, 3), np.uint8))
    largest = []
    whole = zipfile.ZipExtFile.read
    monkeypatch.setattr(zipfile.ZipExtFile, "read", lambda self, n=-1: largest.append(n) or whole(self, n))
    assert sum(len(batch) for batch in open_images(path).batches(10)) == 4000
    assert min(largest) >= 0  # a negative size would read it whole
    assert max(largest) <= max(10 * 16 * 16 * 3, 256)


REFUSED_ARRAYS = {
    "no arr_0": (
        {"mean": np.zeros(3)},
        "has no arr_0, .* it holds mean; statistics are an npz with mu and sigma",
    ),
    "0 images": ({"arr_0": IMAGES[:0]}, "holds 0 images"),
    "float": ({"arr_0": IMAGES.astype(np.float32)}, r"arr_0 is float32 \(11, 5, 6, 3\)"),
    "NCHW": ({"arr_0": IMAGES.transpose(0, 3, 1, 2).copy()}, r"arr_0 is uint8 \(11, 3, 5, 6\)"),
    "one image": ({"arr_0": IMAGES[0]}, r"arr_0 is uint8 \(5, 6, 3\)"),
    "unnamed statistics": (
        {"arr_0": np.zeros(3), "arr_1": np.eye(3)},
        "statistics are an npz with mu and sigma",
    ),
    "Fortran order": ({"arr_0": np.asfortranarray(IMAGES)}, "in Fortran order"),
    "objects": ({"arr_0": np.array([{}], dtype=object)}, "holds Python objects, which are refused"),
}


@pytest.mark.parametrize("kind", REFUSED_ARRAYS)
def test_refused_arrays(tmp_path, kind):
    arrays, message = REFUSED_ARRAYS[kind]
    path = write_npz(tmp_path / "a.npz", **arrays)
    with pytest.raises(ValueError, match=message) as error:
        open_images(path)
    assert "\n" not in str(error.value)
    assert str(path) in str(error.value)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("damage", ["truncated", "overwritten"])
def test_damaged_npz(tmp_path, save, damage):
    path = write_npz(tmp_path / "a.npz", save)
    content = path.read_bytes()
    overwritten = content[:400] + b"\xff" * 200 + content[600:]
    path.write_bytes(content[:-100] if damage == "truncated" else overwritten)
    with pytest.raises(ValueError, match=r"a\.npz is truncated or not an npz"):
        read(path)


def test_refused_paths(tmp_path):
    def refused(path, message, error=ValueError, **options):
        with pytest.raises(error, match=message) as raised:
            open_images(path, **options)
        assert "\n" not in str(raised.value)

    folder = write_shards(tmp_path / "sizes")
    np.savez(folder / "shards" / "000011-000012.npz", arr_0=IMAGES[:1, :4])
    refused(folder, r"different sizes: .*000000-000004\.npz is 5x6, .*000011-000012\.npz is 4x6")
    refused(tmp_path / "none", "there is nothing at", FileNotFoundError)
    (tmp_path / "gifs").mkdir()
    (tmp_path / "gifs" / "a.gif").write_text("")
    refused(
        tmp_path / "gifs", r"holds 0 images: no file in it ends in \.bmp .*; 1 file left out, .*: 1 \.gif"
    )
    refused(tmp_path / "gifs" / "a.gif", "cannot read images from")
    (tmp_path / "a.zip").write_bytes(b"PK")
    refused(tmp_path / "a.zip", "truncated or not a zip file")
    with zipfile.ZipFile(tmp_path / "a.zip", "w"):
        pass
    refused(tmp_path / "a.zip", "holds 0 images")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text("{}")
    (tmp_path / "run" / "grid.png").write_bytes(picture(IMAGES[0]))
    refused(tmp_path / "run", "has not completed a shard yet")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "a.png").write_bytes(b"")
    refused(tmp_path / "broken", "holds 0 readable images", skip_unreadable=True)
    for n in (2, 3):
        write_npz(tmp_path / f"samples_{n}x5x6x3.npz")
    refused(tmp_path, "holds 2 sample files")


def test_fingerprint(tmp_path):
    folder = write_classes(tmp_path / "a")
    first = open_images(folder).fingerprint()
    assert open_images(write_zip(tmp_path / "b.zip", folder)).fingerprint() == first
    plain, packed = write_npz(tmp_path / "a.npz"), write_npz(tmp_path / "b.npz", np.savez_compressed)
    assert open_images(plain).fingerprint() == open_images(packed).fingerprint()

    changed = IMAGES.copy()
    changed[7, 2, 3, 1] ^= 1
    write_classes(folder, changed)
    another = write_npz(tmp_path / "c.npz", arr_0=changed)
    shards = write_shards(tmp_path / "shards")
    fewer = write_shards(tmp_path / "fewer", bounds=(0, 4, 8))
    skipping = open_images(folder, skip_unreadable=True)
    sets = [open_images(path) for path in (plain, folder, another, shards, fewer)]
    assert len({first, skipping.fingerprint(), *(images.fingerprint() for images in sets)}) == 7


def test_fingerprints_are_those_of_earlier_versions(tmp_path):
    """So that caches of features stay good."""
    for index, image in enumerate(IMAGES):
        (tmp_path / f"{index}.png").write_bytes(built_png(8, [row.tobytes() for row in image]))
    assert open_images(write_npz(tmp_path / "a.npz")).fingerprint()[:16] == "53c47398b6554246"
    (tmp_path / "a.npz").unlink()
    assert open_images(tmp_path).fingerprint()[:16] == "4c0392b759204dd5"
