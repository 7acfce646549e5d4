"""One pass from images to features: equal for every input, resumed and cached exactly, errors from the
reading thread.
"""

import threading
import time

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from test_images import png, write_zip

from evaluation import features as module
from evaluation.features import extract
from evaluation.moments import moments_of
from evaluation.networks.digits import DigitsFeatures, DigitsNetwork
from guided_diffusion.files.image_sets import open_images

N = 37
IMAGES = np.random.RandomState(3).randint(0, 256, (N, 16, 16, 3), dtype=np.uint8)


class Counting:
    """A feature network that counts its calls and images, and may fail at one of them."""

    def __init__(self, network, fail_at=None):
        self.network, self.fail_at, self.calls, self.seen = network, fail_at, 0, 0
        self.name, self.protocol, self.sha256, self.batch_size = (
            network.name,
            network.protocol,
            network.sha256,
            4,
        )

    def __call__(self, images):
        if self.calls == self.fail_at:
            raise RuntimeError("killed")
        self.calls, self.seen = self.calls + 1, self.seen + len(images)
        return self.network(images)


@pytest.fixture(scope="module")
def weights():
    torch.manual_seed(0)
    return DigitsNetwork().state_dict()


@pytest.fixture(scope="module")
def network(weights):
    return DigitsFeatures(weights)


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    monkeypatch.setattr(module, "PART_SIZE", 8)


def write_npz(path, images=IMAGES):
    np.savez(path, arr_0=images)
    return open_images(path)


def write_folder(folder, images=IMAGES):
    folder.mkdir()
    for index, image in enumerate(images):
        (folder / f"{index:03d}.png").write_bytes(png(image))
    return folder


def write_shards(folder):
    (folder / "shards").mkdir(parents=True)
    (folder / "run.json").write_text('{"settings": {"num_samples": 50}}')
    for start in range(0, N, 10):
        np.savez(
            folder / "shards" / f"{start:06d}-{min(start + 10, N):06d}.npz", arr_0=IMAGES[start : start + 10]
        )
    return folder


def check_equal(a, b):
    for x, y in (
        (a.pool3, b.pool3),
        (a.logits, b.logits),
        (a.spatial.mean, b.spatial.mean),
        (a.spatial.covariance(), b.spatial.covariance()),
    ):
        assert np.array_equal(x, y)
    assert (a.resolution, a.provenance) == (b.resolution, b.provenance)


def test_features_of_all_images_in_order(tmp_path, network):
    result = extract(write_npz(tmp_path / "a.npz"), network, batch_size=5, progress=False)
    expected = network(IMAGES)
    assert result.count == N
    for actual, wanted in ((result.pool3, expected["pool3"]), (result.logits, expected["logits"])):
        assert actual.dtype == np.float32
        assert np.abs(actual - wanted).max() <= 1e-6
    spatial = moments_of(expected["spatial"])
    assert result.spatial.count == N
    assert np.abs(result.spatial.mean - spatial.mean).max() <= 1e-6
    assert np.abs(result.spatial.covariance() - spatial.covariance()).max() <= 1e-6
    assert result.resolution == (16, 16)
    kept = {
        key: result.provenance[key]
        for key in ("images", "features", "protocol", "weights_sha256", "count", "resolution", "dtype")
    }
    assert list(kept.values()) == ["a.npz", "digits", "digits", network.sha256, N, [16, 16], "float32"]
    assert set(result.provenance["versions"]) == {"torch", "numpy", "pytorch_fid"}


def test_every_input_gives_the_same_features(tmp_path, network):
    folder = write_folder(tmp_path / "folder")
    paths = [folder, write_zip(tmp_path / "a.zip", folder), write_shards(tmp_path / "run")]
    wanted = extract(write_npz(tmp_path / "a.npz"), network, batch_size=4, progress=False)
    for path in paths:
        result = extract(open_images(path), network, batch_size=4, progress=False)
        assert np.abs(result.pool3 - wanted.pool3).max() <= 1e-6, path
        assert np.abs(result.logits - wanted.logits).max() <= 1e-6, path
        assert np.abs(result.spatial.covariance() - wanted.spatial.covariance()).max() <= 1e-6, path


def test_a_second_run_never_calls_the_network(tmp_path, network):
    images = write_npz(tmp_path / "a.npz")
    first = extract(images, network, batch_size=4, cache=tmp_path / "cache", progress=False)
    never = Counting(network, fail_at=0)
    check_equal(extract(images, never, batch_size=3, cache=tmp_path / "cache", progress=False), first)
    assert never.calls == 0
    assert (
        len(list(tmp_path.glob("cache/*/spatial-*.npz"))) == 1
    )  # the moments are as large as 4,000 images' features


@pytest.mark.parametrize("kind", ["npz", "folder"])
def test_a_killed_run_resumes_after_its_last_part(tmp_path, network, kind):
    images = write_npz(tmp_path / "a.npz") if kind == "npz" else open_images(write_folder(tmp_path / "a"))
    wanted = extract(images, network, batch_size=4, progress=False)
    killed = Counting(network, fail_at=7)  # 28 images are seen, 24 of them are in complete parts
    with pytest.raises(RuntimeError, match="killed"):
        extract(images, killed, cache=tmp_path / "cache", progress=False)
    rest = Counting(network)
    check_equal(extract(images, rest, cache=tmp_path / "cache", progress=False), wanted)
    assert rest.seen == N - 24


def test_a_kill_between_the_files_of_a_part_loses_that_part_alone(tmp_path, network, monkeypatch):
    images = write_npz(tmp_path / "a.npz")
    wanted = extract(images, network, batch_size=4, progress=False)
    complete = module.renamed_when_complete

    def killed_at_a_part(path):
        if path.name == "00000016-00000024.npz":
            raise RuntimeError("killed")
        return complete(path)

    monkeypatch.setattr(module, "renamed_when_complete", killed_at_a_part)
    with pytest.raises(RuntimeError, match="killed"):
        extract(images, network, batch_size=4, cache=tmp_path / "cache", progress=False)
    monkeypatch.setattr(module, "renamed_when_complete", complete)
    rest = Counting(network)
    check_equal(extract(images, rest, cache=tmp_path / "cache", progress=False), wanted)
    assert rest.seen == N - 16


def test_changed_images_or_weights_miss_the_cache(tmp_path, network, weights):
    def seen(images, network):
        counting = Counting(network)
        extract(images, counting, cache=tmp_path / "cache", progress=False)
        return counting.seen

    changed = IMAGES.copy()
    changed[-1, 0, 0, 0] ^= 1
    other = DigitsFeatures({**weights, "fc.bias": weights["fc.bias"] + 1})
    assert seen(write_npz(tmp_path / "a.npz"), network) == N
    assert seen(write_npz(tmp_path / "b.npz"), network) == 0  # the same images under another name
    assert seen(write_npz(tmp_path / "a.npz", changed), network) == N
    assert seen(write_npz(tmp_path / "b.npz"), other) == N


def test_a_damaged_cache_is_named(tmp_path, network):
    images = write_npz(tmp_path / "a.npz")
    extract(images, network, cache=tmp_path / "cache", progress=False, batch_size=4)
    (part,) = tmp_path.glob("cache/*/00000008-*.npz")
    part.write_bytes(part.read_bytes()[:-50])
    with pytest.raises(ValueError, match=r"00000008-00000016\.npz is damaged"):
        extract(images, network, cache=tmp_path / "cache", progress=False)


def test_unreadable_pictures_are_counted_across_a_resume(tmp_path, network):
    folder = write_folder(tmp_path / "a")
    for index in (0, 1, 2, 3, 4, 5, 6, 7, 8, 20, 36):  # the whole first part, and the last image
        (folder / f"{index:03d}.png").write_bytes(b"")
    with pytest.raises(ValueError, match=r"000\.png is damaged"):
        extract(open_images(folder), network, progress=False)
    kept = np.delete(IMAGES, [0, 1, 2, 3, 4, 5, 6, 7, 8, 20, 36], axis=0)
    with pytest.raises(RuntimeError, match="killed"):
        extract(
            open_images(folder, skip_unreadable=True),
            Counting(network, fail_at=5),
            cache=tmp_path / "cache",
            progress=False,
        )
    result = extract(
        open_images(folder, skip_unreadable=True), Counting(network), cache=tmp_path / "cache", progress=False
    )
    assert np.abs(result.pool3 - network(kept)["pool3"]).max() <= 1e-6
    assert (result.count, result.spatial.count) == (26, 26)
    assert result.provenance["notes"] == ["11 of 37 images: unreadable, skipped"]
    again = extract(
        open_images(folder, skip_unreadable=True),
        Counting(network, fail_at=0),
        cache=tmp_path / "cache",
        progress=False,
    )
    check_equal(again, result)


def test_reading_is_ahead_but_bounded_and_ends_with_the_caller(tmp_path, network):
    images = write_npz(tmp_path / "a.npz", np.concatenate([IMAGES] * 4))
    read, waited = [], []
    batches = images.batches
    images.batches = lambda *args: (read.append(len(batch)) or batch for batch in batches(*args))

    class Slow(Counting):
        def __call__(self, batch):
            deadline = time.monotonic() + 5
            while len(read) < self.calls + 2 and time.monotonic() < deadline:
                time.sleep(0.001)
            waited.append(len(read) - self.calls)
            return super().__call__(batch)

    before = threading.active_count()
    with pytest.raises(RuntimeError, match="killed"):
        extract(images, Slow(network, fail_at=10), progress=False)
    assert min(waited) >= 2  # the batch in hand, and at least one that was read meanwhile
    assert max(waited) <= module.BATCHES_AHEAD + 2
    assert threading.active_count() == before


def test_progress_goes_to_stderr_and_bad_batch_sizes_are_refused(tmp_path, network, capsys):
    images = write_npz(tmp_path / "a.npz")
    extract(images, network, batch_size=4)
    out, err = capsys.readouterr()
    assert out == ""
    assert f"{N}/{N}" in err
    with pytest.raises(ValueError, match="the batch size is 0; give 1 or more"):
        extract(images, network, batch_size=0)


def test_digits_features(weights, network, tmp_path):
    result = network(torch.from_numpy(IMAGES))
    assert {key: (value.shape, value.dtype) for key, value in result.items()} == {
        "pool3": ((N, 64), np.float32),
        "spatial": ((N, 112), np.float32),
        "logits": ((N, 10), np.float32),
    }
    trained = DigitsNetwork().eval()
    trained.load_state_dict(weights)
    with torch.no_grad():
        logits = trained(torch.from_numpy(IMAGES).permute(0, 3, 1, 2) / 127.5 - 1)
    assert np.abs(result["logits"] - logits.numpy()).max() <= 1e-6
    assert (
        np.abs(
            result["pool3"] @ weights["fc.weight"].numpy().T + weights["fc.bias"].numpy() - result["logits"]
        ).max()
        <= 1e-5
    )

    save_file(weights, tmp_path / "features.safetensors")
    assert np.array_equal(DigitsFeatures(tmp_path / "features.safetensors")(IMAGES)["pool3"], result["pool3"])
    for wrong in (IMAGES[:, :8], IMAGES.astype(np.float32)):
        with pytest.raises(ValueError, match=r"need uint8 images \(N, 16, 16, 3\), not"):
            network(wrong)
