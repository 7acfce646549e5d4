"""scripts/download.py against a small server on the loopback: what is fetched, what is kept, what is said."""

import hashlib
import json
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest
from download_server import CONTENT, NAME, running, table
from helpers import ROOT, call, environment, load_script

from guided_diffusion.files import pretrained

SHA256 = hashlib.sha256(CONTENT).hexdigest()
download = load_script("download")


@pytest.fixture(autouse=True)
def no_waiting_and_no_proxy(monkeypatch):
    monkeypatch.setattr(download, "RETRY_WAITS_S", (0, 0, 0))
    monkeypatch.setenv("no_proxy", "127.0.0.1")


@pytest.fixture
def server():
    with running() as server:
        yield server


@pytest.fixture
def closed_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "to").mkdir()
    return tmp_path / "to"


@pytest.fixture
def run(tmp_path, monkeypatch):
    """run(argv, table) -> what the shell would see, with that table in the place of the shipped one."""
    monkeypatch.setattr(pretrained, "PRETRAINED_DIR", tmp_path / "table")

    def run(argv, content):
        (tmp_path / "table").mkdir(exist_ok=True)
        (tmp_path / "table/files.json").write_text(json.dumps(content))
        return call(download.main, argv)

    return run


@pytest.fixture
def fetch(run, folder):
    return lambda content, *more, name=NAME: run([name, "--dir", folder, *more], content)


def names_in(folder):
    return sorted(path.name for path in folder.iterdir())


def records(folder):
    return json.loads((folder / "hashes.json").read_text())


def test_fresh_download_is_recorded_and_tells_the_licence(server, run, tmp_path):
    folder, seen = tmp_path / "new" / "folder", []
    server.halfway = lambda: seen.append((folder / NAME).exists())
    done = run(["small", "--dir", folder], server.table())
    assert done.code == 0 and SHA256 in done.out
    assert done.err == f"{NAME}: licence: MIT\n"  # no progress bar where stderr is no terminal
    assert (folder / NAME).read_bytes() == CONTENT and seen == [False]
    assert records(folder) == {NAME: {"sha256": SHA256, "bytes": len(CONTENT)}}
    assert names_in(folder) == ["hashes.json", NAME]
    again = run(["small", "--dir", folder], server.table())
    assert again.code == 0 and f"{NAME}: ok, already here (sha256 recorded in" in again.out
    assert len(server.ranges) == 1


@pytest.mark.parametrize("with_ranges", [True, False])
def test_cut_connection_transfers_only_the_rest_where_the_server_can(server, fetch, folder, with_ranges):
    server.cuts, server.with_ranges = [100_000], with_ranges
    done = fetch(server.table())
    assert done.code == 0 and "connection closed at 100,000 of 307,200 bytes; trying again" in done.err
    assert (folder / NAME).read_bytes() == CONTENT and server.ranges == [None, "bytes=100000-"]
    assert server.served == len(CONTENT) + (0 if with_ranges else 100_000)


@pytest.mark.parametrize("changed", [False, True])
def test_next_command_resumes_unless_the_file_has_changed(server, fetch, folder, changed):
    server.cuts = [100_000]
    server.halfway = lambda: server.statuses.extend([503] * 3)
    done = fetch(server.table())
    assert done.code == 1
    assert f"HTTP 503 Service Unavailable; fetch {server.table()['files'][NAME]['url']}" in done.err
    assert (folder / f"{NAME}.part").read_bytes() == CONTENT[:100_000] and not (folder / NAME).exists()
    server.statuses, server.halfway = [], lambda: None
    if changed:
        server.content, server.etag = CONTENT[::-1], '"two"'
    assert fetch(server.table()).code == 0
    assert (folder / NAME).read_bytes() == server.content
    assert server.served == len(CONTENT) + (100_000 if changed else 0)


def test_complete_part_needs_only_its_check(server, closed_port, fetch, folder):
    for content in (server.table(), table(closed_port, bytes=len(CONTENT), sha256=SHA256)):
        (folder / NAME).unlink(missing_ok=True)
        (folder / f"{NAME}.part").write_bytes(CONTENT)
        assert fetch(content).code == 0
        assert server.served == 0 and (folder / NAME).read_bytes() == CONTENT


@pytest.mark.parametrize(("shift", "kept"), [(0, CONTENT + b"too long"), (7, CONTENT[:1000])])
def test_part_that_does_not_fit_is_fetched_anew(server, fetch, folder, shift, kept):
    server.shift = shift
    (folder / f"{NAME}.part").write_bytes(kept)
    assert fetch(server.table()).code == 0
    assert (folder / NAME).read_bytes() == CONTENT and server.ranges[-1] is None


def test_errors_that_pass_are_tried_again(server, fetch, folder, monkeypatch):
    monkeypatch.setattr(download, "TIMEOUT_S", 0.2)
    server.statuses, pauses = [503, 429], [0.5, 0, 0]
    server.halfway = lambda: time.sleep(pauses.pop() if pauses else 0)
    done = fetch(server.table())
    assert done.code == 0 and "HTTP 429" in done.err
    assert "connection lost (timed out); trying again" in done.err
    assert (folder / NAME).read_bytes() == CONTENT


def test_interrupt_keeps_the_part(server, fetch, folder, tmp_path):
    released = threading.Event()
    server.halfway = released.wait
    fetch({"files": {}, "presets": {"none": []}}, name="none")  # makes the folder for the table
    (tmp_path / "table/files.json").write_text(json.dumps(server.table()))
    program = (
        "import runpy, signal, sys\n"
        f"sys.path.insert(0, {str(ROOT / 'scripts')!r})\n"
        "from pathlib import Path\n"
        "from guided_diffusion.files import pretrained\n"
        # A background job of a shell starts with Ctrl-C ignored.
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        f"pretrained.PRETRAINED_DIR = Path({str(tmp_path / 'table')!r})\n"
        f"runpy.run_path({str(ROOT / 'scripts/download.py')!r}, run_name='__main__')\n"
    )
    argv = [sys.executable, "-c", program, NAME, "--dir", str(folder)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(argv, env={**environment(), "no_proxy": "127.0.0.1"}, **pipes)
    part, limit = folder / f"{NAME}.part", time.monotonic() + 60
    while not (part.exists() and part.stat().st_size) and time.monotonic() < limit:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    released.set()
    assert process.returncode == 130 and "interrupted" in err and "Traceback" not in err
    kept = part.stat().st_size
    assert 0 < kept < len(CONTENT)
    assert fetch(server.table()).code == 0
    assert server.ranges[1] == f"bytes={kept}-" and (folder / NAME).read_bytes() == CONTENT


@pytest.mark.parametrize(
    ("fields", "more", "expected"),
    [
        ({"sha256": "a" * 64}, [], f"sha256 expected {'a' * 64} (published), got {SHA256}"),
        ({"sha256_prefix": "12345678"}, [], f"sha256 expected 12345678 (published), got {SHA256}"),
        ({}, ["--sha256", "b" * 64], f"sha256 expected {'b' * 64} (--sha256), got {SHA256}"),
        ({"bytes": 5}, [], "expected 5 bytes, got 307,200"),
    ],
    ids=["hash", "prefix", "user", "size"],
)
def test_mismatch_keeps_nothing(server, fetch, folder, fields, more, expected):
    for _ in range(2):  # the second time is not stuck on what the first left
        done = fetch(server.table(**fields), *more)
        assert done.code == 1 and expected in done.err and done.err.count("\n") == 2
        assert names_in(folder) == []
    assert server.ranges == [None, None]


def test_hash_that_holds(server, fetch, folder):
    assert "(sha256 published)" in fetch(server.table(sha256=SHA256, bytes=len(CONTENT))).out
    (folder / "hashes.json").unlink()
    assert "(sha256 published)" in fetch(server.table(sha256_prefix=SHA256[:8])).out
    assert "(sha256 --sha256)" in fetch(server.table(), "--sha256", SHA256.upper()).out


def test_file_that_changed_is_refused_unless_its_hash_is_given(server, fetch, folder):
    fetch(server.table())
    (folder / NAME).write_bytes(b"changed")
    done = fetch(server.table())  # on disk: it is the user's, so it is left
    assert done.code == 1 and (folder / NAME).read_bytes() == b"changed"
    assert f"sha256 expected {SHA256} (recorded in {folder / 'hashes.json'}), got " in done.err
    assert f"move {folder / NAME} away" in done.err
    (folder / NAME).unlink()
    server.content = b"another release"
    done = fetch(server.table())  # on the server
    assert done.code == 1 and "(recorded in" in done.err and names_in(folder) == ["hashes.json"]
    new = hashlib.sha256(server.content).hexdigest()
    assert fetch(server.table(), "--sha256", new).code == 0 and records(folder)[NAME]["sha256"] == new


def test_file_put_there_by_hand_counts_under_any_name_and_is_verified_and_recorded(server, fetch, folder):
    content = server.table(sha256_prefix=SHA256[:8], also_named=["renamed.pth"])
    (folder / "renamed.pth").write_bytes(CONTENT)
    for name in (NAME, "renamed.pth", "small"):
        done = fetch(content, name=name)
        assert done.code == 0 and "renamed.pth: ok, already here (sha256 published" in done.out
    assert records(folder)["renamed.pth"]["sha256"] == SHA256
    (folder / "renamed.pth").write_bytes(b"something else")
    assert fetch(content).code == 1
    assert server.ranges == [] and not (folder / NAME).exists()


@pytest.mark.parametrize("text", ["{", "[]", '{"weights.pth": 1}', '{"weights.pth": {}}'])
def test_broken_records_stop_before_the_download(server, fetch, folder, text):
    (folder / "hashes.json").write_text(text)
    done = fetch(server.table())
    assert done.code == 1 and "hashes.json is not a table" in done.err and done.err.count("\n") == 1
    assert server.ranges == []


KNOWN = [({}, "no hash is known"), ({"sha256": SHA256}, f"sha256 {SHA256}")]


@pytest.mark.parametrize(("fields", "known"), [*KNOWN, ({"sha256_prefix": "12345678"}, "sha256 begins")])
def test_offline_says_what_to_put_where(server, closed_port, fetch, folder, fields, known):
    content = server.table()
    far = table(closed_port, name="far.pt", **fields)["files"]
    content["files"] |= far
    content["presets"]["both"] = ["far.pt", NAME]
    done = fetch(content, name="both")
    (line,) = [line for line in done.err.splitlines() if line.startswith("far.pt: cannot be reached (")]
    assert f"fetch {far['far.pt']['url']} and put it at {folder / 'far.pt'} ({known}" in line
    assert done.code == 1 and names_in(folder) == ["hashes.json", NAME]  # the other file is fetched


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"statuses": [404]}, "HTTP 404 Not Found; fetch http"),
        ({"kind": "text/html; charset=utf-8"}, "the answer is a web page"),
        ({"with_length": False}, "neither length nor hash is known"),
        ({"claimed": 10**18}, "needs 1,000,000,000,000,000,000 more bytes, only"),
    ],
)
def test_what_could_not_be_used_is_refused_before_the_first_byte(server, fetch, folder, change, words):
    vars(server).update(change)
    done = fetch(server.table())
    assert done.code == 1 and words in done.err and done.err.count("\n") == 2 and names_in(folder) == []
    if change.get("with_length") is False:
        assert fetch(server.table(), "--sha256", SHA256).code == 0


def test_folder_that_cannot_be_used(server, run, fetch, folder, tmp_path):
    (tmp_path / "file").write_text("")
    done = run([NAME, "--dir", tmp_path / "file"], server.table())
    assert done.code == 1 and f"--dir {tmp_path / 'file'}: " in done.err and done.err.count("\n") == 1
    with download.locked(folder):
        assert "another download into it is running" in fetch(server.table()).err
    assert fetch(server.table()).code == 0


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["imagenet"], f"unknown 'imagenet': choose from small, none, {NAME}"),
        ([], "give names of presets or files, or --list"),
        ([NAME, "--list"], "give names of presets or files, or --list"),
        ([NAME, "--sha", "a" * 64], "unrecognized arguments: --sha"),
        ([NAME, "--sha256", "xyz"], "--sha256 'xyz' is not 64 hex digits"),
        ([NAME, "--sha256", ""], "--sha256 '' is not 64 hex digits"),
        (["none", "--sha256", "a" * 64], "--sha256 goes with exactly one file, not 0"),
        ([NAME, "--sha256", "a" * 64], f"contradicts the published 12345678 of {NAME}"),
    ],
)
def test_command_line_is_refused_in_one_line(server, run, argv, expected):
    done = run(argv, server.table(sha256_prefix="12345678"))
    assert done.code == 2 and expected in done.err and done.err.count("\n") == 1 and server.ranges == []


def test_digits_needs_no_download(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = call(download.main, ["digits"])
    assert done.code == 0 and "nothing to fetch" in done.out and names_in(tmp_path) == []


def test_list_names_all_presets_and_files_with_licences():
    done, content = call(download.main, ["--list"]), pretrained.read_table()
    lines = done.out.splitlines()
    assert done.code == 0 and len(lines) == len(content.presets) + len(content.files)
    for line, row in zip(lines[len(content.presets) :], content.files.values(), strict=True):
        assert line.startswith(row.name) and row.licence in line and row.url in line
