"""Reading sets of images: the same pixels from every kind of input, what is converted, what is said, and what is
refused.
"""

import json
import os
import struct
import zipfile
import zlib

import numpy as np
import pytest
import torch
from pictures_util import picture, write_pictures, write_zip
from PIL import Image
from pytorch_fid.fid_score import IMAGE_EXTENSIONS

from guided_diffusion.files.image_sets import open_images, pick_images
from guided_diffusion.files.images import ENDINGS
from guided_diffusion.runs.store import SampleStore

N, H, W = 11, 5, 6
IMAGES = np.random.RandomState(0).randint(0, 256, (N, H, W, 3), dtype=np.uint8)
IN_FOLDER_ORDER = np.concatenate([IMAGES[0::2], IMAGES[1::2]])


def write_folder(folder, images=IMAGES):
    for index in (0, 1):
        write_pictures(folder / f"class{index}", images[index::2])
    return folder


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


def read(path, **options):
    """(pixels of one pass, notes after it)."""
    images = open_images(path, **options)
    return np.concatenate(list(images.batches(4))), images.notes


MAKERS = {
    "npz": lambda tmp: (write_npz(tmp / "a.npz"), IMAGES),
    "compressed npz": lambda tmp: (write_npz(tmp / "a.NPZ", np.savez_compressed), IMAGES),
    "npz by its content": lambda tmp: (write_npz(tmp / "a.bak"), IMAGES),
    "folder": lambda tmp: (write_folder(tmp / "a"), IN_FOLDER_ORDER),
    "zip": lambda tmp: (write_zip(tmp / "b.Zip", write_folder(tmp / "a")), IN_FOLDER_ORDER),
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


def test_pictures_are_picked_from_a_zip_that_is_opened_once(tmp_path, monkeypatch):
    images = open_images(write_zip(tmp_path / "a.zip", write_folder(tmp_path / "a")))
    opened, open_zip = [], zipfile.ZipFile.__init__
    monkeypatch.setattr(
        zipfile.ZipFile, "__init__", lambda *args, **kw: opened.append(1) or open_zip(*args, **kw)
    )
    assert np.array_equal(pick_images(images, N), IN_FOLDER_ORDER) and len(opened) == 1


def test_picking_leaves_unreadable_pictures_out_and_the_notes_of_the_pass_alone(tmp_path):
    (write_pictures(tmp_path / "a", IMAGES) / "0002.png").write_bytes(b"")
    images = open_images(tmp_path / "a", skip_unreadable=True)
    list(images.batches(4))
    before = images.notes
    assert np.array_equal(pick_images(images, N), np.delete(IMAGES, 2, axis=0))
    assert images.notes == before == [f"1 of {N} images: unreadable, skipped"]


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


def test_hidden_files_are_ignored_and_others_that_are_no_pictures_are_counted(tmp_path):
    folder = write_folder(tmp_path / "a")
    (folder / "dataset.json").write_text("{}")
    (folder / ".hidden.png").write_bytes(b"no image")
    (folder / ".cache").mkdir()
    (folder / ".cache" / "x.png").write_bytes(b"no image")
    for path in (folder, write_zip(tmp_path / "b.zip", folder)):
        pixels, notes = read(path)
        assert np.array_equal(pixels, IN_FOLDER_ORDER) and notes == []
    (folder / "animated.GIF").write_bytes(picture(IMAGES[0], "GIF"))
    (folder / "class0" / "notes.gif").write_text("no image")
    (folder / "class0" / "n01440764_1.JPEG.1").write_bytes(picture(IMAGES[0], "JPEG"))
    for path in (folder, write_zip(tmp_path / "c.zip", folder)):
        pixels, notes = read(path)
        assert np.array_equal(pixels, IN_FOLDER_ORDER)
        assert notes == ["3 files left out, not read as pictures: 1 .1, 2 .gif"]


# What pytorch-fid reads


LOSSLESS = {
    "bmp": "BMP",
    "pgm": "PPM",
    "png": "PNG",
    "ppm": "PPM",
    "tif": "TIFF",
    "tiff": "TIFF",
    "webp": "WEBP",
}


def test_the_endings_are_those_of_pytorch_fid_and_every_format_gives_its_pixels(tmp_path):
    assert {ending[1:] for ending in ENDINGS} == IMAGE_EXTENSIONS
    grey = np.repeat(IMAGES[0, :, :, :1], 3, axis=2)
    for ending, form in LOSSLESS.items():
        options = {"lossless": True} if form == "WEBP" else {}
        array = grey[:, :, 0] if ending == "pgm" else IMAGES[1]
        (tmp_path / f"{ending}.{ending.upper()}").write_bytes(picture(array, form, **options))
    (tmp_path / "z.jpeg").write_bytes(picture(np.full((H, W, 3), 99, np.uint8), "JPEG", quality=100))
    pixels, notes = read(tmp_path)
    assert len(pixels) == len(LOSSLESS) + 1
    for image, ending in zip(pixels[:-1], sorted(LOSSLESS), strict=True):
        assert np.array_equal(image, grey if ending == "pgm" else IMAGES[1]), ending
    assert [note.split(",")[0] for note in notes] == ["1 of 8 images: JPEG", "1 of 8 images: grey"]


def test_what_is_converted_or_lost_is_noted(tmp_path):
    palette = Image.fromarray(IMAGES[1]).quantize(64)  # 30 pixels: every colour is kept
    palette.save(tmp_path / "0.png")
    (tmp_path / "1.JPG").write_bytes(picture(IMAGES[2], "JPEG"))
    (tmp_path / "2.webp").write_bytes(picture(IMAGES[2], "WEBP"))
    (tmp_path / "3.tif").write_bytes(picture(IMAGES[2], "TIFF", compression="jpeg"))
    frames = [Image.fromarray(image) for image in IMAGES[:2]]
    frames[0].save(tmp_path / "4.tiff", save_all=True, append_images=frames[1:])
    pixels, notes = read(tmp_path)
    assert np.array_equal(pixels[0], np.asarray(palette.convert("RGB")))
    assert np.array_equal(pixels[4], IMAGES[0])
    expected = {"JPEG": 2, "WebP": 1, "palette": 1, "several frames": 1}
    assert [note.split(",")[0] for note in notes] == [
        f"{n} of 5 images: {kind}" for kind, n in expected.items()
    ]


# Links


def test_linked_class_folders_are_read_as_if_they_were_there(tmp_path):
    folder = write_folder(tmp_path / "a")
    (tmp_path / "b").mkdir()
    for name in ("class0", "class1"):
        (tmp_path / "b" / name).symlink_to(folder / name)
    assert np.array_equal(read(tmp_path / "b")[0], IN_FOLDER_ORDER)
    assert open_images(tmp_path / "b").fingerprint() == open_images(folder).fingerprint()


def test_a_file_that_is_reached_twice_counts_as_imagefolder_counts_it(tmp_path):
    torchvision = pytest.importorskip("torchvision")
    folder = write_folder(tmp_path / "a")
    (folder / "class2").symlink_to("class1")
    (folder / "class0" / "again.png").symlink_to("0000.png")
    (folder / "class1" / "inner").symlink_to("../class0")
    listed = [path for path, _ in torchvision.datasets.ImageFolder(folder).samples]
    assert len(listed) == 7 + 2 * (5 + 7)  # of 11 files
    expected = sorted(os.path.relpath(path, folder) for path in listed)
    pixels, _ = read(folder)
    assert np.array_equal(pixels, [np.asarray(Image.open(folder / name)) for name in expected])


def test_a_link_back_up_is_not_entered(tmp_path):
    folder = write_folder(tmp_path / "a")
    for name in ("class0/up", "here"):
        (folder / name).symlink_to(folder)
    (folder / "class1" / "other").symlink_to(folder / "class0")
    (folder / "class0" / "other").symlink_to(folder / "class1")
    pixels, _ = read(folder)
    assert len(pixels) == N + N  # each class once more, below the other


@pytest.mark.parametrize("name", ["class2", "0007.png", "loop"])
def test_a_link_that_leads_nowhere_is_named_or_left_out_and_said(tmp_path, name):
    folder = write_folder(tmp_path / "a")
    (folder / name).symlink_to("loop" if name == "loop" else tmp_path / "gone" / name)
    with pytest.raises(ValueError, match=rf"{name} is a link that leads nowhere: mend or remove it"):
        open_images(folder)
    pixels, notes = read(folder, skip_unreadable=True)
    assert np.array_equal(pixels, IN_FOLDER_ORDER)
    assert notes == [f"1 links that lead nowhere left out, such as {name}"]


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_the_same_name_twice_in_a_zip_is_said(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        for index, name in enumerate(["a.png", "b.png", "a.png"]):
            archive.writestr(name, picture(IMAGES[index]))
    pixels, notes = read(tmp_path / "a.zip")
    assert np.array_equal(pixels, IMAGES[[2, 2, 1]])
    (note,) = notes
    assert note.startswith("1 names are in the zip more than once, such as a.png: ")


# What is refused


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("ending", [".png", ".jpg", ".tif", ".webp"])
def test_a_truncated_picture_is_named_or_skipped_and_counted(tmp_path, ending, zipped):
    folder = write_folder(tmp_path / "a")
    form = {".png": "PNG", ".jpg": "JPEG", ".tif": "TIFF", ".webp": "WEBP"}[ending]
    whole = picture(IMAGES[0], form)
    (folder / f"broken{ending}").write_bytes(whole[: len(whole) * 3 // 4])
    (folder / "empty.png").write_bytes(b"")
    path = write_zip(tmp_path / "b.zip", folder) if zipped else folder
    with pytest.raises(ValueError, match=rf"broken\{ending} is damaged") as error:
        read(path)
    assert "\n" not in str(error.value)
    images = open_images(path, skip_unreadable=True)
    assert images.count == N + 2
    assert np.array_equal(np.concatenate(list(images.batches(4))), IN_FOLDER_ORDER)
    assert (images.count, images.notes) == (N, [f"2 of {N + 2} images: unreadable, skipped"])


def random_array(shape, dtype=np.uint8):
    return np.random.RandomState(2).randint(0, 256, shape).astype(dtype)


def built_png(bits, pixels):
    """Built by hand: with 16 bits Pillow cannot write it, and its bytes are those of no library's version."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", W, H, bits, 2, 0, 0, 0)
    rows = b"".join(b"\0" + row for row in pixels)
    chunks = chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(rows, 0)), chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def tiff_16_bit_rgb():
    """An 8-bit one with its BitsPerSample rewritten, in its place behind the directory, and pixels enough."""
    whole = picture(np.zeros((H, 2 * W, 3), np.uint8), "TIFF")
    return whole.replace(struct.pack("<HHH", 8, 8, 8), struct.pack("<HHH", 16, 16, 16)).replace(
        struct.pack("<HHIHH", 256, 4, 1, 2 * W, 0), struct.pack("<HHIHH", 256, 4, 1, W, 0)
    )


REFUSED_PICTURES = {
    "RGBA": (picture(random_array((H, W, 4))), "bad.png has an alpha channel"),
    "WebP with alpha": (picture(random_array((H, W, 4)), "WEBP"), "bad.png has an alpha channel"),
    "grey with alpha": (picture(random_array((H, W, 2))), "bad.png has an alpha channel"),
    "a transparent colour": (picture(IMAGES[0], transparency=(1, 2, 3)), "bad.png has an alpha channel"),
    "16-bit grey": (picture(random_array((H, W), np.uint16)), "bad.png has 16 bits per channel"),
    "16-bit RGB": (built_png(16, [bytes(6 * W)] * H), "bad.png has 16 bits per channel"),
    "16-bit grey TIFF": (picture(random_array((H, W), np.uint16), "TIFF"), "bad.png has 16 bits per"),
    "16-bit RGB TIFF": (tiff_16_bit_rgb(), "bad.png has 16 bits per channel"),
    "16-bit PPM": (b"P6 # c\n6 5\n# 255\n65535\n" + bytes(H * W * 6), "bad.png has 16 bits per channel"),
    "CMYK": (picture(IMAGES[0], "JPEG", "CMYK"), "bad.png is of mode CMYK"),
    "another size": (picture(IMAGES[0, :4]), r"different sizes: class0/0000.png is 5x6, zz/bad.png is 4x6"),
}


@pytest.mark.parametrize("kind", REFUSED_PICTURES)
@pytest.mark.parametrize("skip_unreadable", [False, True])
def test_refused_pictures(tmp_path, kind, skip_unreadable):
    content, message = REFUSED_PICTURES[kind]
    folder = write_folder(tmp_path / "a")
    (folder / "zz").mkdir()
    (folder / "zz" / "bad.png").write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        read(folder, skip_unreadable=skip_unreadable)
    assert "\n" not in str(error.value)


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


def test_fingerprints_are_those_of_earlier_versions(tmp_path):
    """So that caches of features stay good."""
    for index, image in enumerate(IMAGES):
        (tmp_path / f"{index}.png").write_bytes(built_png(8, [row.tobytes() for row in image]))
    assert open_images(write_npz(tmp_path / "a.npz")).fingerprint()[:16] == "53c47398b6554246"
    (tmp_path / "a.npz").unlink()
    assert open_images(tmp_path).fingerprint()[:16] == "4c0392b759204dd5"


def test_a_picture_that_would_fill_the_memory_is_damaged_like_others(tmp_path):
    Image.new("1", (20000, 20000)).save(tmp_path / "bomb.png")
    Image.new("RGB", (4, 4)).save(tmp_path / "small.png")
    bomb = r"bomb.png is damaged \(.*decompression bomb.*\); --skip_unreadable leaves it out"
    with pytest.raises(ValueError, match=bomb):
        open_images(tmp_path)
    opened = open_images(tmp_path, skip_unreadable=True)
    assert [len(batch) for batch in opened.batches(2)] == [1] and opened.count == 1
