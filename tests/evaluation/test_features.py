"""One pass from images to features: whatever the network gives, resumed and cached exactly, errors from the
reading thread.
"""

import threading
import time

import numpy as np
import pytest
from pictures_util import TestNetwork, digits_weights, write_pictures

from evaluation import features as module
from evaluation.features import extract
from evaluation.moments import moments_of
from guided_diffusion.files.image_sets import open_images

N = 37
IMAGES = np.random.RandomState(3).randint(0, 256, (N, 16, 16, 3), dtype=np.uint8)
OUTPUTS = [("pool3", "logits", "spatial"), ("pool3", "logits"), ("pool3",), ("spatial", "pool3")]


@pytest.fixture(params=OUTPUTS, ids=lambda outputs: "+".join(outputs))
def outputs(request):
    return request.param


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    monkeypatch.setattr(module, "PART_SIZE", 8)


@pytest.fixture
def images(tmp_path):
    return write_npz(tmp_path / "a.npz")


def write_npz(path, images=IMAGES):
    np.savez(path, arr_0=images)
    return open_images(path)


@pytest.fixture
def run(tmp_path):
    """Extract with a cache."""
    return lambda images, network, **more: extract(
        images, network, cache=tmp_path / "cache", progress=False, **more
    )


def check_equal(a, b):
    assert np.array_equal(a.pool3, b.pool3)
    assert np.array_equal(a.logits, b.logits)  # None is equal to None
    assert (a.spatial is None) == (b.spatial is None)
    if a.spatial:
        assert np.array_equal(a.spatial.mean, b.spatial.mean)
        assert np.array_equal(a.spatial.covariance(), b.spatial.covariance())
    assert (a.resolution, a.provenance) == (b.resolution, b.provenance)


def test_features_of_all_images_in_order_and_none_for_what_the_network_lacks(images, outputs):
    network = TestNetwork(outputs=outputs)
    result = extract(images, network, batch_size=5, progress=False)
    expected = TestNetwork()(IMAGES)
    assert (result.count, result.resolution) == (N, (16, 16))
    assert result.pool3.dtype == np.float32 and np.abs(result.pool3 - expected["pool3"]).max() <= 1e-6
    assert (result.logits is None) == ("logits" not in outputs)
    if "logits" in outputs:
        assert np.abs(result.logits - expected["logits"]).max() <= 1e-6
    assert (result.spatial is None) == ("spatial" not in outputs)
    if "spatial" in outputs:
        assert np.allclose(result.spatial.covariance(), moments_of(expected["spatial"]).covariance())
    about = result.provenance
    wanted = {"images": "a.npz", "features": "test", "protocol": "test", "weights_sha256": network.sha256}
    assert about.items() >= {**wanted, "count": N, "resolution": [16, 16], "dtype": "float32"}.items()
    assert sorted(about["outputs"]) == sorted(outputs)
    assert set(about["versions"]) == {"torch", "numpy", "pytorch_fid"}


def test_a_network_without_pool3_is_refused(images):
    with pytest.raises(ValueError, match="the feature network test gives logits; pool3 must be there"):
        extract(images, TestNetwork(outputs=("logits",)), progress=False)


def test_a_folder_gives_the_features_of_an_npz(tmp_path, images):
    folder = open_images(write_pictures(tmp_path / "folder", IMAGES))
    assert np.array_equal(
        extract(folder, TestNetwork(), progress=False).pool3,
        extract(images, TestNetwork(), progress=False).pool3,
    )


def test_a_second_run_never_calls_the_network(tmp_path, images, run, outputs):
    first = run(images, TestNetwork(outputs=outputs))
    check_equal(run(images, TestNetwork(outputs=outputs, fail_at=0), batch_size=3), first)
    # Of the moments, which are as large as the features of 4,000 images, one file is kept.
    assert len(list(tmp_path.glob("cache/*/spatial-*.npz"))) == ("spatial" in outputs)


@pytest.mark.parametrize("kind", ["npz", "folder"])
def test_a_killed_run_resumes_after_its_last_part(tmp_path, images, run, outputs, kind):
    if kind == "folder":
        images = open_images(write_pictures(tmp_path / "a", IMAGES))
    wanted = extract(images, TestNetwork(outputs=outputs), progress=False)
    with pytest.raises(RuntimeError, match="killed"):  # 28 images are seen, 24 of them are in complete parts
        run(images, TestNetwork(outputs=outputs, fail_at=7))
    rest = TestNetwork(outputs=outputs)
    check_equal(run(images, rest), wanted)
    assert rest.seen == N - 24


@pytest.mark.parametrize("name", ["spatial-00000024.npz", "00000016-00000024.npz"])
def test_a_kill_between_the_files_of_a_part_loses_that_part_alone(images, run, monkeypatch, name):
    wanted = extract(images, TestNetwork(), progress=False)
    from evaluation import parts

    complete = parts.renamed_when_complete

    def killed(path):
        if path.name == name:
            raise RuntimeError("killed")
        return complete(path)

    with monkeypatch.context() as patched, pytest.raises(RuntimeError, match="killed"):
        patched.setattr(parts, "renamed_when_complete", killed)
        run(images, TestNetwork())
    rest = TestNetwork()
    check_equal(run(images, rest), wanted)
    assert rest.seen == N - 16


def test_a_cache_of_a_network_that_gave_more_is_continued_without_it(images, run):
    with pytest.raises(RuntimeError, match="killed"):
        run(images, TestNetwork(fail_at=7))
    fewer = run(images, TestNetwork(outputs=("pool3", "logits")))
    assert fewer.spatial is None and fewer.provenance["outputs"] == ["pool3", "logits"]
    assert np.array_equal(fewer.pool3, extract(images, TestNetwork(), progress=False).pool3)


def test_changed_images_or_weights_miss_the_cache(tmp_path, run):
    def seen(images, weights=None):
        network = TestNetwork(weights)
        run(images, network)
        return network.seen

    changed = IMAGES.copy()
    changed[-1, 0, 0, 0] ^= 1
    other = {**digits_weights(), "fc.bias": digits_weights()["fc.bias"] + 1}
    assert seen(write_npz(tmp_path / "a.npz")) == N
    assert seen(write_npz(tmp_path / "b.npz")) == 0  # the same images under another name
    assert seen(write_npz(tmp_path / "a.npz", changed)) == N
    assert seen(write_npz(tmp_path / "b.npz"), other) == N


def test_a_damaged_cache_is_named(tmp_path, images, run):
    run(images, TestNetwork())
    (part,) = tmp_path.glob("cache/*/00000008-*.npz")
    part.write_bytes(part.read_bytes()[:-50])
    with pytest.raises(ValueError, match=r"00000008-00000016\.npz is damaged"):
        run(images, TestNetwork())


def test_unreadable_pictures_are_counted_across_a_resume(tmp_path, run, outputs):
    folder = write_pictures(tmp_path / "a", IMAGES)
    missing = [0, 1, 2, 3, 4, 5, 6, 7, 8, 20, 36]  # the whole first part, and the last image
    for index in missing:
        (folder / f"{index:04d}.png").write_bytes(b"")
    with pytest.raises(ValueError, match=r"0000\.png is damaged"):
        extract(open_images(folder), TestNetwork(), progress=False)

    def resumed(fail_at=None):
        network = TestNetwork(outputs=outputs, fail_at=fail_at)
        return run(open_images(folder, skip_unreadable=True), network)

    with pytest.raises(RuntimeError, match="killed"):
        resumed(fail_at=5)
    result = resumed()
    assert np.abs(result.pool3 - TestNetwork()(np.delete(IMAGES, missing, axis=0))["pool3"]).max() <= 1e-6
    assert result.count == 26 and (result.spatial is None or result.spatial.count == 26)
    assert result.provenance["notes"] == ["11 of 37 images: unreadable, skipped"]
    check_equal(resumed(fail_at=0), result)


def test_reading_is_ahead_but_bounded_and_ends_with_the_caller(tmp_path):
    images = write_npz(tmp_path / "a.npz", np.concatenate([IMAGES] * 4))
    read, waited = [], []
    batches = images.batches
    images.batches = lambda *args: (read.append(len(batch)) or batch for batch in batches(*args))

    class Slow(TestNetwork):
        def __call__(self, batch):
            deadline = time.monotonic() + 5
            while len(read) < self.calls + 2 and time.monotonic() < deadline:
                time.sleep(0.001)
            waited.append(len(read) - self.calls)
            return super().__call__(batch)

    before = threading.active_count()
    with pytest.raises(RuntimeError, match="killed"):
        extract(images, Slow(fail_at=10), progress=False)
    assert min(waited) >= 2  # the batch in hand, and at least one that was read meanwhile
    assert max(waited) <= module.BATCHES_AHEAD + 2
    assert threading.active_count() == before


def test_progress_goes_to_stderr_and_bad_batch_sizes_are_refused(images, capsys):
    extract(images, TestNetwork())
    out, err = capsys.readouterr()
    assert out == "" and f"{N}/{N}" in err
    with pytest.raises(ValueError, match="the batch size is 0; give 1 or more"):
        extract(images, TestNetwork(), batch_size=0)
