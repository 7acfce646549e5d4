"""Statistics files: what they should hold, what they hold instead, and what is said of other containers."""

import pickle

import numpy as np
import pytest
import torch
from pictures_util import TestNetwork

from evaluation.moments import moments_of
from evaluation.sets import open_set
from evaluation.statistics_files import load_statistics

EYE, ZEROS = np.eye(3), np.zeros(3)


def draws(count, dimension=5):
    return np.random.RandomState(0).standard_normal((count, dimension))


def write_statistics(path, **arrays):
    np.savez(path, **arrays)
    return path


def test_statistics_of_pooled_and_spatial_features(tmp_path):
    pool, spatial = moments_of(draws(50)).gaussian(), moments_of(draws(50, 4)).gaussian()
    path = write_statistics(
        tmp_path / "s.npz",
        mu=pool.mu,
        sigma=pool.sigma,
        mu_s=spatial.mu,
        sigma_s=spatial.sigma,
        arr_0=np.zeros(1),
    )
    for read, written in zip(load_statistics(path), (pool, spatial), strict=True):
        np.testing.assert_array_equal(read.mu, written.mu)
        np.testing.assert_array_equal(read.sigma, written.sigma)
    path = write_statistics(
        tmp_path / "p.npz", mu=pool.mu.astype(np.float32), sigma=pool.sigma.astype(np.float32)
    )
    read, nothing = load_statistics(path)
    assert nothing is None
    assert read.sigma.dtype == np.float64


@pytest.mark.parametrize(
    ("mu", "sigma", "message"),
    [
        (ZEROS, np.eye(4), r"mu has shape \(3,\) and sigma \(4, 4\)"),
        (EYE, EYE, r"mu has shape \(3, 3\) and sigma \(3, 3\)"),
        (ZEROS, np.full((3, 3), np.nan), "sigma holds 9 NaN or infinite entries"),
        (np.array([0, np.inf, 0]), EYE, "mu holds 1 NaN or infinite"),
        (ZEROS, EYE + np.eye(3, k=1), r"sigma is not symmetric \(entries differ by up to 1\)"),
        (ZEROS, -EYE, "sigma has the variance -1 on its diagonal"),
        (np.array(["a", "b", "c"]), EYE, "mu is made of <U1; needed are real numbers"),
    ],
)
def test_statistics_that_are_none(tmp_path, mu, sigma, message):
    path = write_statistics(tmp_path / "bad.npz", mu=mu, sigma=sigma)
    with pytest.raises(ValueError, match=rf"bad\.npz \(mu, sigma\): {message}") as caught:
        load_statistics(path)
    assert "\n" not in str(caught.value)


def pickled(protocol, content):
    return pickle.dumps(content, protocol=protocol)


NEEDED = "statistics are an npz with mu and sigma"
IN_OTHER_CONTAINERS = {
    "matrix.npy": (EYE, r"is a single array, float64 \(3, 3\)"),
    "dict.npy": ({"mu": ZEROS, "sigma": EYE}, "is a single array of Python objects, which are refused"),
    "stats.pkl": (pickled(4, {"mean": ZEROS, "cov": EYE}), r"is a pickle, .*: it holds mean, cov"),
    "old.pickle": (pickled(0, {"mu": ZEROS, "sigma": EYE}), r"is a pickle, .*: it holds mu, sigma"),
    "nested.dat": (
        pickled(5, {"fid": {"mu": 0, "sigma": 1}}),
        r"is a pickle, .*: it holds fid \(mu, sigma\)",
    ),
    "tuple.pkl": (pickled(4, (ZEROS, EYE)), "is a pickle, which is not read as statistics; "),
    "hostile.pkl": (b"cos\nsystem\n(S'touch hacked'\ntR.", "is a pickle, .*: it holds a os.system; "),
    "torn.pkl": (pickled(4, {"mean": ZEROS})[:40], "is a pickle, which is not read as statistics; "),
    "torch.pt": ({"mu": torch.zeros(3)}, "is a file of PyTorch's"),
}


@pytest.mark.parametrize("name", IN_OTHER_CONTAINERS)
def test_other_containers_are_named_with_what_they_hold_and_never_unpickled(tmp_path, monkeypatch, name):
    content, message = IN_OTHER_CONTAINERS[name]
    path = tmp_path / name
    monkeypatch.chdir(tmp_path)
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif name.endswith(".npy"):
        np.save(path, content)
    else:
        torch.save(content, path)
    for read in (load_statistics, lambda path: open_set(path, None)):
        with pytest.raises(ValueError, match=rf"{name} {message}") as caught:
            read(path)
        assert NEEDED in str(caught.value) and "\n" not in str(caught.value)
    assert [file.name for file in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize(
    ("arrays", "held"),
    [
        ({"mean": ZEROS, "cov": EYE}, "it holds mean, cov"),
        ({"m": ZEROS, "s": EYE}, "it holds m, s"),
        ({"mu": ZEROS, "cov": EYE}, "has no sigma"),
        ({"arr_0": ZEROS, "arr_1": EYE}, r"arr_0 is float64 \(3,\)"),
    ],
)
def test_other_names_are_said_with_those_that_are_needed(tmp_path, arrays, held):
    path = write_statistics(tmp_path / "named.npz", **arrays)
    with pytest.raises(ValueError, match=held) as caught:
        open_set(path, TestNetwork())
    assert NEEDED in str(caught.value)


def test_files_that_are_no_statistics(tmp_path):
    objects = np.array([{}], dtype=object)
    (tmp_path / "text.npz").write_text("nothing of the kind")
    damaged = write_statistics(tmp_path / "damaged.npz", mu=ZEROS, sigma=EYE)
    damaged.write_bytes(damaged.read_bytes().replace(np.float64(1).tobytes(), b"\0" * 8))
    for path, message in [
        (
            write_statistics(tmp_path / "images.npz", arr_0=EYE),
            "has no mu; statistics are an npz with mu and sigma, this one holds arr_0",
        ),
        (write_statistics(tmp_path / "half.npz", mu=ZEROS, sigma=EYE, mu_s=ZEROS), "has no sigma_s"),
        (
            write_statistics(tmp_path / "objects.npz", mu=objects, sigma=EYE),
            "damaged, or holds Python objects, which are refused",
        ),
        (damaged, "damaged, or holds Python objects"),
        (tmp_path / "text.npz", "is no npz file, or a damaged one"),
    ]:
        with pytest.raises(ValueError, match=message) as caught:
            load_statistics(path)
        assert path.name in str(caught.value)
        assert "\n" not in str(caught.value)
    with pytest.raises(FileNotFoundError):
        load_statistics(tmp_path / "absent.npz")
