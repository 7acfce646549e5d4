"""Images with labels from folders, zips, npz files and CIFAR-10's batches."""

import pickle

import numpy as np
import pytest
from pictures_util import write_zip
from PIL import Image

from guided_diffusion.files.cifar_batches import read_batch
from guided_diffusion.files.labelled import LabelledImages, centre_crop, classes_of, read_labelled
from guided_diffusion.image_datasets import load_data

PIXELS = np.random.RandomState(0).randint(0, 256, (4, 8, 8, 3), dtype=np.uint8)


def write(folder, *names, pixels=PIXELS):
    for name, image in zip(names, pixels, strict=False):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / name)
    return folder


@pytest.mark.parametrize(
    ("names", "classes"),
    [
        (["b/0.png", "a/x_1.png", "b/2.png", "c/d/3.png"], ["a", "b", "c/d"]),
        (["dog_1.png", "cat_7.png", "dog_0.png", "eel.png"], ["cat", "dog", "eel.png"]),
        (["all/dog_1.png", "all/cat_7.png"], ["cat", "dog"]),
    ],
)
def test_classes_of_folders_and_of_names(names, classes):
    found, labels = classes_of(names)
    assert found == classes
    assert [found[label] in name for label, name in zip(labels, names, strict=True)] == [True] * len(names)


def test_a_folder_and_a_zip_of_it(tmp_path):
    folder = write(tmp_path / "set", "b/0.png", "a/1.png", "b/2.png")
    (folder / "notes.txt").write_text("no picture")
    for source in (folder, write_zip(tmp_path / "set.zip", folder)):
        found = read_labelled(source, 8)
        np.testing.assert_array_equal(found.images, PIXELS[[1, 0, 2]])
        assert (found.labels.tolist(), list(found.classes)) == ([0, 1, 1], ["a", "b"])


def test_a_zip_with_edms_labels(tmp_path):
    folder = write(tmp_path / "set", "0.png", "1.png")
    (folder / "dataset.json").write_text('{"labels": [["0.png", 7], ["1.png", 3]]}')
    assert read_labelled(write_zip(tmp_path / "a.zip", folder), 8).labels.tolist() == [7, 3]
    (folder / "dataset.json").write_text('{"labels": null}')
    assert read_labelled(write_zip(tmp_path / "b.zip", folder), 8).labels is None
    (folder / "dataset.json").write_text('{"labels": [["0.png", 7]]}')
    with pytest.raises(ValueError, match=r"dataset.json has no class number for 1.png \(1 such\)"):
        read_labelled(write_zip(tmp_path / "c.zip", folder), 8)


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("inside", ["", "cifar-10-batches-py"])
def test_cifars_folder(tmp_path, protocol, inside):
    folder = tmp_path / "cifar" / inside
    folder.mkdir(parents=True)
    planes = np.random.RandomState(0).randint(0, 256, (3, 3072), dtype=np.uint8)
    for i in (1, 2):
        content = {"data": planes, "labels": [i, 5, 9], "filenames": ["x.png"] * 3}
        (folder / f"data_batch_{i}").write_bytes(pickle.dumps(content, protocol=protocol))
    found = read_labelled(tmp_path / "cifar", 32)
    assert found.labels.tolist() == [1, 5, 9, 2, 5, 9]
    np.testing.assert_array_equal(found.images[1], planes[1].reshape(3, 32, 32).transpose(1, 2, 0))


class Attack:
    def __reduce__(self):
        return print, ("ran",)


def test_a_batch_by_its_path(tmp_path):
    planes = np.random.RandomState(0).randint(0, 256, (3, 3072), dtype=np.uint8)
    (tmp_path / "test_batch").write_bytes(pickle.dumps({"data": planes, "labels": [4, 0, 9]}))
    found = read_labelled(tmp_path / "test_batch", 32)
    np.testing.assert_array_equal(found.images, planes.reshape(3, 3, 32, 32).transpose(0, 2, 3, 1))
    assert found.labels.tolist() == [4, 0, 9]


def test_a_batch_that_asks_for_more_is_refused(tmp_path, capsys):
    (tmp_path / "data_batch_1").write_bytes(pickle.dumps({"data": Attack(), "labels": []}))
    with pytest.raises(ValueError, match="data_batch_1 is damaged, or no batch of CIFAR-10"):
        read_batch(tmp_path / "data_batch_1")
    assert capsys.readouterr().out == ""


def test_pictures_are_cut_to_their_centre():
    wide = np.zeros((8, 24, 3), np.uint8)
    wide[:, 8:16] = 255
    assert (centre_crop(Image.fromarray(wide), 8) == 255).all()
    halved = centre_crop(Image.fromarray(np.kron(PIXELS[0], np.ones((2, 2, 1), np.uint8))), 8)
    np.testing.assert_array_equal(halved, PIXELS[0])
    assert centre_crop(Image.fromarray(PIXELS[0]), 5).shape == (5, 5, 3)
    assert centre_crop(Image.fromarray(PIXELS[0]), 12).shape == (12, 12, 3)


def test_an_npz_of_another_size_is_cut_too(tmp_path):
    np.savez(tmp_path / "a.npz", arr_0=PIXELS, arr_1=np.arange(4))
    found = read_labelled(tmp_path / "a.npz", 4)
    assert found.images.shape == (4, 4, 4, 3) and found.labels.tolist() == [0, 1, 2, 3]


def test_bad_sets_are_one_line_each(tmp_path):
    (tmp_path / "empty").mkdir()
    folder = write(tmp_path / "damaged", "0.png", "1.png")
    (folder / "1.png").write_bytes(b"no picture")
    (tmp_path / "text.npz").write_text("no archive")
    (tmp_path / "text.zip").write_text("no archive")
    arrays = {
        "none": {"images": PIXELS},
        "floats": {"arr_0": PIXELS / 255},
        "short": {"arr_0": PIXELS, "arr_1": np.arange(3)},
        "objects": {"arr_0": PIXELS, "arr_1": np.array([Attack()] * 4)},
    }
    for name, content in arrays.items():
        np.savez(tmp_path / f"{name}.npz", **content)
    for name, message in {
        "nothing": "there is nothing at",
        "empty": "holds no pictures: no file in it ends in .bmp",
        "damaged": "damaged/1.png cannot be read as a picture",
        "text.npz": "is truncated or not an npz",
        "text.zip": "is truncated or not a zip file",
        "none.npz": "has no arr_0, which holds the images",
        "floats.npz": r"arr_0 is float64 \(4, 8, 8, 3\) in C order; needed are uint8 images",
        "short.npz": r"arr_1 is int64 \(3,\); needed are 4 whole numbers",
        "objects.npz": "arr_1 holds Python objects, which are refused",
    }.items():
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            read_labelled(tmp_path / name, 8)


def test_labels_are_checked(tmp_path):
    np.savez(tmp_path / "a.npz", arr_0=PIXELS, arr_1=np.array([0, 1, 10, 2]))
    with pytest.raises(ValueError, match="image 2 has label 10, and --num_classes 10 allows 0 to 9"):
        read_labelled(tmp_path / "a.npz", 8).require_labels("a.npz", 10)
    np.savez(tmp_path / "b.npz", arr_0=PIXELS)
    with pytest.raises(
        ValueError, match=r"b.npz has no labels: sort the pictures into a folder for each class"
    ):
        read_labelled(tmp_path / "b.npz", 8).require_labels("b.npz", 10)


# guided-diffusion's form


def test_load_data_in_order_and_for_ever(tmp_path):
    folder = write(tmp_path, "dog_0.png", "cat_1.png", "cat_2.png", "dog_3.png")
    data = load_data(
        data_dir=str(folder),
        batch_size=2,
        image_size=8,
        class_cond=True,
        deterministic=True,
        random_flip=False,
    )
    batches = [next(data) for _ in range(3)]
    assert [condition["y"].tolist() for _, condition in batches] == [[0, 0], [1, 1], [0, 0]]
    expected = PIXELS[[1, 2]].transpose(0, 3, 1, 2) / 127.5 - 1
    np.testing.assert_allclose(batches[0][0].numpy(), expected, atol=1e-6)


def test_load_data_crops_and_flips(tmp_path):
    folder = write(tmp_path, *(f"{i}.png" for i in range(4)))
    data = load_data(data_dir=str(folder), batch_size=4, image_size=6, random_crop=True)
    images, condition = next(data)
    assert images.shape == (4, 3, 6, 6) and condition == {} and images.abs().max() <= 1


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"batch_size": 9}, "has 4 pictures for this process, less than a batch of 9"),
        ({"data_dir": ""}, "data_dir is missing"),
    ],
)
def test_load_data_refuses_at_once(tmp_path, more, message):
    folder = write(tmp_path, *(f"{i}.png" for i in range(4)))
    with pytest.raises(ValueError, match=message):
        load_data(**{"data_dir": str(folder), "batch_size": 2, "image_size": 8, **more})


def test_a_held_out_set_is_numbered_by_the_names_of_the_other(tmp_path):
    held_out = read_labelled(write(tmp_path / "held", "dog/0.png", "eel/1.png", "dog/2.png"), 8)
    classes = ["cat", "dog", "eel"]
    renumbered = held_out.numbered_as(classes, "held", "photos")
    assert renumbered.labels.tolist() == [1, 1, 2] and renumbered.images is held_out.images
    assert held_out.numbered_as([], "held", "numbers.npz") is held_out
    with pytest.raises(ValueError, match=r"^held has the class 'eel', which photos has not \(1 such\)"):
        held_out.numbered_as(["cat", "dog"], "held", "photos")


def test_what_to_do_without_labels():
    for otherwise in ("", ", or train without --class_cond"):
        with pytest.raises(ValueError, match=f"a folder for each class{otherwise}$"):
            LabelledImages(PIXELS, None).require_labels("a.npz", 2, otherwise)
