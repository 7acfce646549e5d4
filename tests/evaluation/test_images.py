"""Reading sets of images: the same pixels from every kind of input, what is converted, and what is
refused.
"""

import io
import json
import struct
import zipfile
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from evaluation.images import open_images, pick_images
from guided_diffusion.runs.store import SampleStore

N, H, W = 11, 5, 6
IMAGES = np.random.RandomState(0).randint(0, 256, (N, H, W, 3), dtype=np.uint8)


def png(array, mode=None, form="PNG", **options):
    file = io.BytesIO()
    picture = Image.fromarray(array)
    (picture.convert(mode) if mode else picture).save(file, format=form, **options)
    return file.getvalue()


def write_folder(folder, images=IMAGES):
    for index, image in enumerate(images):
        path = folder / f"class{index % 2}" / f"{index // 2:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(image))
    return folder


def in_folder_order(images=IMAGES):
    return np.concatenate([images[0::2], images[1::2]])


def write_zip(path, folder):
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(folder.rglob("*.*"), reverse=True):
            archive.write(file, file.relative_to(folder))
    return path


def write_shards(folder, bounds=(0, 4, 8, N)):
    (folder / "shards").mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps({"settings": {"num_samples": 20}}))
    (folder / "grid.png").write_bytes(png(IMAGES[0]))
    for start, stop in zip(bounds, bounds[1:], strict=False):
        np.savez(
            folder / "shards" / f"{start:06d}-{stop:06d}.npz",
            arr_0=IMAGES[start:stop],
            arr_1=np.arange(stop - start),
        )
    return folder


def write_npz(path, save=np.savez, **arrays):
    save(path, **(arrays or {"arr_0": IMAGES, "arr_1": np.arange(N)}))
    return path


def write_finished(folder):
    write_shards(folder, bounds=(0, 4))  # a leftover
    write_npz(folder / f"samples_{N}x{H}x{W}x3.npz")
    return folder


MAKERS = {
    "npz": lambda tmp: (write_npz(tmp / "a.npz"), IMAGES),
    "compressed npz": lambda tmp: (write_npz(tmp / "a.npz", np.savez_compressed), IMAGES),
    "folder": lambda tmp: (write_folder(tmp / "a"), in_folder_order()),
    "zip": lambda tmp: (write_zip(tmp / "b.zip", write_folder(tmp / "a")), in_folder_order()),
    "shards": lambda tmp: (write_shards(tmp / "a"), IMAGES),
    "finished run": lambda tmp: (write_finished(tmp / "a"), IMAGES),
}


@pytest.mark.parametrize("maker", MAKERS)
@pytest.mark.parametrize("start", [0, 1, 5, 8, N - 1])
def test_every_input_gives_the_same_images_from_any_start(tmp_path, maker, start):
    path, expected = MAKERS[maker](tmp_path)
    images = open_images(path)
    assert (images.count, images.resolution, images.name) == (N, (H, W), path.name)
    batches = list(images.batches(3, start))
    assert [len(batch) for batch in batches] == [len(range(N)[i : i + 3]) for i in range(start, N, 3)]
    assert all(batch.flags.writeable and batch.dtype == np.uint8 for batch in batches)
    assert np.array_equal(np.concatenate(batches), expected[start:])


def test_notes_of_an_unfinished_run(tmp_path):
    assert open_images(write_shards(tmp_path / "a")).notes == ["unfinished run: 11 of 20 images"]


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
    images = open_images(tmp_path / "a")
    assert images.notes == [f"unfinished run: 4 of {N} images"]
    assert np.array_equal(next(images.batches(N)), IMAGES[:4])
    write_batches(store, store.missing())
    store.finish()
    images = open_images(tmp_path / "a")
    assert (images.entries, images.notes) == (N, [])
    assert np.array_equal(np.concatenate(list(images.batches(3))), IMAGES)


def test_of_a_run_that_was_interrupted_between_its_pngs_the_shards_are_read(tmp_path):
    store = run_of_pngs(tmp_path / "a", "{:06d}.png".format)
    (tmp_path / "a" / "000000.png").write_bytes(png(IMAGES[5]))
    write_batches(store, store.missing())
    assert np.array_equal(np.concatenate(list(open_images(tmp_path / "a").batches(3))), IMAGES)


def test_npz_is_streamed(tmp_path, monkeypatch):
    path = write_npz(tmp_path / "a.npz", np.savez_compressed, arr_0=np.zeros((4000, 16, 16, 3), np.uint8))
    largest = []
    read = zipfile.ZipExtFile.read
    monkeypatch.setattr(zipfile.ZipExtFile, "read", lambda self, n=-1: largest.append(n) or read(self, n))
    assert sum(len(batch) for batch in open_images(path).batches(10)) == 4000
    assert min(largest) >= 0  # a negative size would read it whole
    assert max(largest) <= max(10 * 16 * 16 * 3, 256)


def test_other_and_hidden_files_are_ignored(tmp_path):
    folder = write_folder(tmp_path / "a")
    (folder / "notes.txt").write_text("no image")
    (folder / ".hidden.png").write_bytes(b"no image")
    (folder / ".cache").mkdir()
    (folder / ".cache" / "x.png").write_bytes(b"no image")
    for path in (folder, write_zip(tmp_path / "b.zip", folder)):
        assert np.array_equal(np.concatenate(list(open_images(path).batches(4))), in_folder_order())


def test_grey_palette_and_jpeg_are_converted_and_noted(tmp_path):
    grey = IMAGES[0, :, :, 0]
    palette = Image.fromarray(IMAGES[1]).quantize(64)  # 30 pixels: every colour is kept
    (tmp_path / "0.png").write_bytes(png(grey))
    palette.save(tmp_path / "1.png")
    (tmp_path / "2.JPG").write_bytes(png(IMAGES[2], form="JPEG"))
    images = open_images(tmp_path)
    (batch,) = images.batches(3)
    assert np.array_equal(batch[0], np.repeat(grey[:, :, None], 3, axis=2))
    assert np.array_equal(batch[1], np.asarray(palette.convert("RGB")))
    assert [note.partition(",")[0] for note in images.notes] == [
        f"1 of 3 images: {kind}" for kind in ("JPEG", "grey", "palette")
    ]


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("ending", [".png", ".jpg"])
def test_a_truncated_picture_is_named_or_skipped_and_counted(tmp_path, ending, zipped):
    folder = write_folder(tmp_path / "a")
    image = np.random.RandomState(1).randint(0, 256, (H, W, 3), dtype=np.uint8)
    whole = png(image, form={".png": "PNG", ".jpg": "JPEG"}[ending])
    (folder / f"broken{ending}").write_bytes(whole[: len(whole) * 3 // 4])
    (folder / "empty.png").write_bytes(b"")
    path = write_zip(tmp_path / "b.zip", folder) if zipped else folder
    with pytest.raises(ValueError, match=rf"broken\{ending} is damaged") as error:
        list(open_images(path).batches(4))
    assert "\n" not in str(error.value)
    images = open_images(path, skip_unreadable=True)
    assert images.count == N + 2
    assert np.array_equal(np.concatenate(list(images.batches(4))), in_folder_order())
    assert (images.count, images.notes) == (N, [f"2 of {N + 2} images: unreadable, skipped"])


def random_array(shape, dtype=np.uint8):
    return np.random.RandomState(2).randint(0, 256, shape).astype(dtype)


def png_16_bit_rgb():
    """Built by hand, because Pillow cannot write it."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", W, H, 16, 2, 0, 0, 0)
    rows = b"".join(b"\0" + bytes(6 * W) for _ in range(H))
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )


REFUSED_PICTURES = {
    "RGBA": (png(random_array((H, W, 4))), "bad.png has an alpha channel"),
    "grey with alpha": (png(random_array((H, W, 2))), "bad.png has an alpha channel"),
    "a transparent colour": (png(IMAGES[0], transparency=(1, 2, 3)), "bad.png has an alpha channel"),
    "16-bit grey": (png(random_array((H, W), np.uint16)), "bad.png has 16 bits per channel"),
    "16-bit RGB": (png_16_bit_rgb(), "bad.png has 16 bits per channel"),
    "CMYK": (png(IMAGES[0], mode="CMYK", form="JPEG"), "bad.png is of mode CMYK"),
    "another size": (png(IMAGES[0, :4]), r"different sizes: class0/000.png is 5x6, zz/bad.png is 4x6"),
}


@pytest.mark.parametrize("kind", REFUSED_PICTURES)
@pytest.mark.parametrize("skip_unreadable", [False, True])
def test_refused_pictures(tmp_path, kind, skip_unreadable):
    content, message = REFUSED_PICTURES[kind]
    folder = write_folder(tmp_path / "a")
    (folder / "zz").mkdir()
    (folder / "zz" / "bad.png").write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        list(open_images(folder, skip_unreadable=skip_unreadable).batches(4))
    assert "\n" not in str(error.value)


REFUSED_ARRAYS = {
    "no arr_0": ({"mu": np.zeros(3), "sigma": np.zeros((3, 3))}, "has no arr_0, .* it holds mu, sigma"),
    "0 images": ({"arr_0": IMAGES[:0]}, "holds 0 images"),
    "float": ({"arr_0": IMAGES.astype(np.float32)}, r"arr_0 is float32 \(11, 5, 6, 3\)"),
    "NCHW": ({"arr_0": IMAGES.transpose(0, 3, 1, 2).copy()}, r"arr_0 is uint8 \(11, 3, 5, 6\)"),
    "one image": ({"arr_0": IMAGES[0]}, r"arr_0 is uint8 \(5, 6, 3\)"),
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
    path.write_bytes(
        content[:-100] if damage == "truncated" else content[:400] + b"\xff" * 200 + content[600:]
    )
    with pytest.raises(ValueError, match=r"a\.npz is truncated or not an npz"):
        list(open_images(path).batches(4))


def test_shards_of_two_sizes(tmp_path):
    folder = write_shards(tmp_path / "a")
    np.savez(folder / "shards" / "000011-000012.npz", arr_0=IMAGES[:1, :4])
    with pytest.raises(
        ValueError, match=r"different sizes: .*000000-000004\.npz is 5x6, .*000011-000012\.npz is 4x6"
    ):
        open_images(folder)


def test_refused_paths(tmp_path):
    def refused(path, message, error=ValueError, **options):
        with pytest.raises(error, match=message) as raised:
            open_images(path, **options)
        assert "\n" not in str(raised.value)

    refused(tmp_path / "none", "there is nothing at", FileNotFoundError)
    refused(tmp_path, "holds 0 images: no PNG or JPEG")
    (tmp_path / "a.txt").write_text("")
    refused(tmp_path / "a.txt", "cannot read images from")
    (tmp_path / "a.zip").write_bytes(b"PK")
    refused(tmp_path / "a.zip", "truncated or not a zip file")
    with zipfile.ZipFile(tmp_path / "a.zip", "w"):
        pass
    refused(tmp_path / "a.zip", "holds 0 images")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text("{}")
    (tmp_path / "run" / "grid.png").write_bytes(png(IMAGES[0]))
    refused(tmp_path / "run", "has not completed a shard yet")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "a.png").write_bytes(b"")
    refused(tmp_path / "broken", "holds 0 readable images", skip_unreadable=True)
    for n in (2, 3):
        write_npz(tmp_path / f"samples_{n}x5x6x3.npz")
    refused(tmp_path, "holds 2 sample files")


def test_fingerprint(tmp_path):
    folder = write_folder(tmp_path / "a")
    first = open_images(folder).fingerprint()
    assert open_images(write_zip(tmp_path / "b.zip", folder)).fingerprint() == first
    plain, packed = write_npz(tmp_path / "a.npz"), write_npz(tmp_path / "b.npz", np.savez_compressed)
    assert open_images(plain).fingerprint() == open_images(packed).fingerprint()

    changed = IMAGES.copy()
    changed[7, 2, 3, 1] ^= 1
    write_folder(folder, changed)
    another = write_npz(tmp_path / "c.npz", arr_0=changed)
    shards = write_shards(tmp_path / "shards")
    fewer = write_shards(tmp_path / "fewer", bounds=(0, 4, 8))
    skipping = open_images(folder, skip_unreadable=True)
    sets = [open_images(path) for path in (plain, folder, another, shards, fewer)]
    assert len({first, skipping.fingerprint(), *(images.fingerprint() for images in sets)}) == 7


def test_a_picture_that_would_fill_the_memory_is_damaged_like_others(tmp_path):
    Image.new("1", (20000, 20000)).save(tmp_path / "bomb.png")
    Image.new("RGB", (4, 4)).save(tmp_path / "small.png")
    with pytest.raises(
        ValueError, match=r"bomb.png is damaged \(.*decompression bomb.*\); --skip_unreadable leaves it out"
    ):
        open_images(tmp_path)
    opened = open_images(tmp_path, skip_unreadable=True)
    assert [len(batch) for batch in opened.batches(2)] == [1] and opened.count == 1


def test_picked_images_are_those_of_one_pass_whatever_holds_them(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (600, 4, 4, 3), np.uint8)
    np.savez_compressed(tmp_path / "set.npz", arr_0=pixels)
    picked = pick_images(open_images(tmp_path / "set.npz"), 50, seed=3)
    chosen = np.sort(np.random.RandomState(3).permutation(600)[:50])
    assert np.array_equal(picked, pixels[chosen])
    assert np.array_equal(pick_images(open_images(tmp_path / "set.npz"), 1000), pixels)
