"""Pictures in folders and zips: which are read, what is converted, what is said, and what is refused."""

import os
import struct
import zipfile

import numpy as np
import pytest
from pictures_util import (
    IMAGES,
    IN_CLASSES,
    H,
    N,
    W,
    built_png,
    picture,
    read,
    write_classes,
    write_pictures,
    write_zip,
)
from PIL import Image
from pytorch_fid.fid_score import IMAGE_EXTENSIONS

from guided_diffusion.files.image_sets import open_images, pick_images
from guided_diffusion.files.images import ENDINGS


def test_pictures_are_picked_from_a_zip_that_is_opened_once(tmp_path, monkeypatch):
    images = open_images(write_zip(tmp_path / "a.zip", write_classes(tmp_path / "a")))
    opened, open_zip = [], zipfile.ZipFile.__init__
    monkeypatch.setattr(
        zipfile.ZipFile, "__init__", lambda *args, **kw: opened.append(1) or open_zip(*args, **kw)
    )
    assert np.array_equal(pick_images(images, N), IN_CLASSES) and len(opened) == 1


def test_picking_leaves_unreadable_pictures_out_and_the_notes_of_the_pass_alone(tmp_path):
    (write_pictures(tmp_path / "a", IMAGES) / "0002.png").write_bytes(b"")
    images = open_images(tmp_path / "a", skip_unreadable=True)
    list(images.batches(4))
    before = images.notes
    assert np.array_equal(pick_images(images, N), np.delete(IMAGES, 2, axis=0))
    assert images.notes == before == [f"1 of {N} images: unreadable, skipped"]


def test_hidden_files_are_ignored_and_others_that_are_no_pictures_are_counted(tmp_path):
    folder = write_classes(tmp_path / "a")
    (folder / "dataset.json").write_text("{}")
    (folder / ".hidden.png").write_bytes(b"no image")
    (folder / ".cache").mkdir()
    (folder / ".cache" / "x.png").write_bytes(b"no image")
    for path in (folder, write_zip(tmp_path / "b.zip", folder)):
        pixels, notes = read(path)
        assert np.array_equal(pixels, IN_CLASSES) and notes == []
    (folder / "animated.GIF").write_bytes(picture(IMAGES[0], "GIF"))
    (folder / "class0" / "notes.gif").write_text("no image")
    (folder / "class0" / "n01440764_1.JPEG.1").write_bytes(picture(IMAGES[0], "JPEG"))
    for path in (folder, write_zip(tmp_path / "c.zip", folder)):
        pixels, notes = read(path)
        assert np.array_equal(pixels, IN_CLASSES)
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
    folder = write_classes(tmp_path / "a")
    (tmp_path / "b").mkdir()
    for name in ("class0", "class1"):
        (tmp_path / "b" / name).symlink_to(folder / name)
    assert np.array_equal(read(tmp_path / "b")[0], IN_CLASSES)
    assert open_images(tmp_path / "b").fingerprint() == open_images(folder).fingerprint()


def test_a_file_that_is_reached_twice_counts_as_imagefolder_counts_it(tmp_path):
    torchvision = pytest.importorskip("torchvision")
    folder = write_classes(tmp_path / "a")
    (folder / "class2").symlink_to("class1")
    (folder / "class0" / "again.png").symlink_to("0000.png")
    (folder / "class1" / "inner").symlink_to("../class0")
    listed = [path for path, _ in torchvision.datasets.ImageFolder(folder).samples]
    assert len(listed) == 7 + 2 * (5 + 7)  # of 11 files
    expected = sorted(os.path.relpath(path, folder) for path in listed)
    pixels, _ = read(folder)
    assert np.array_equal(pixels, [np.asarray(Image.open(folder / name)) for name in expected])


def test_a_link_back_up_is_not_entered(tmp_path):
    folder = write_classes(tmp_path / "a")
    for name in ("class0/up", "here"):
        (folder / name).symlink_to(folder)
    (folder / "class1" / "other").symlink_to(folder / "class0")
    (folder / "class0" / "other").symlink_to(folder / "class1")
    pixels, _ = read(folder)
    assert len(pixels) == N + N  # each class once more, below the other


@pytest.mark.parametrize("name", ["class2", "0007.png", "loop"])
def test_a_link_that_leads_nowhere_is_named_or_left_out_and_said(tmp_path, name):
    folder = write_classes(tmp_path / "a")
    (folder / name).symlink_to("loop" if name == "loop" else tmp_path / "gone" / name)
    with pytest.raises(ValueError, match=rf"{name} is a link that leads nowhere: mend or remove it"):
        open_images(folder)
    pixels, notes = read(folder, skip_unreadable=True)
    assert np.array_equal(pixels, IN_CLASSES)
    assert notes == [f"links that lead nowhere, left out: 1, such as {name}"]


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_the_same_name_twice_in_a_zip_is_said(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        for index, name in enumerate(["a.png", "b.png", "a.png"]):
            archive.writestr(name, picture(IMAGES[index]))
    pixels, notes = read(tmp_path / "a.zip")
    assert np.array_equal(pixels, IMAGES[[2, 2, 1]])
    (note,) = notes
    assert note.startswith("names that are more than once in the zip: 1, such as a.png; ")


# What is refused


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("ending", [".png", ".jpg", ".tif", ".webp"])
def test_a_truncated_picture_is_named_or_skipped_and_counted(tmp_path, ending, zipped):
    folder = write_classes(tmp_path / "a")
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
    assert np.array_equal(np.concatenate(list(images.batches(4))), IN_CLASSES)
    assert (images.count, images.notes) == (N, [f"2 of {N + 2} images: unreadable, skipped"])


def random_array(shape, dtype=np.uint8):
    return np.random.RandomState(2).randint(0, 256, shape).astype(dtype)


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
    folder = write_classes(tmp_path / "a")
    (folder / "zz").mkdir()
    (folder / "zz" / "bad.png").write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        read(folder, skip_unreadable=skip_unreadable)
    assert "\n" not in str(error.value)


def test_a_picture_that_would_fill_the_memory_is_damaged_like_others(tmp_path):
    Image.new("1", (20000, 20000)).save(tmp_path / "bomb.png")
    Image.new("RGB", (4, 4)).save(tmp_path / "small.png")
    bomb = r"bomb.png is damaged \(.*decompression bomb.*\); --skip_unreadable leaves it out"
    with pytest.raises(ValueError, match=bomb):
        open_images(tmp_path)
    opened = open_images(tmp_path, skip_unreadable=True)
    assert [len(batch) for batch in opened.batches(2)] == [1] and opened.count == 1
