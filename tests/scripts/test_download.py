"""scripts/download.py against a small server on the loopback: what is fetched, what is kept, what is said."""

import hashlib
import http.server
import importlib.util
import json
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "scripts" / "download.py"
NAME = "weights.pth"
CONTENT = bytes(range(256)) * 1200  # 307,200 bytes
SHA256 = hashlib.sha256(CONTENT).hexdigest()


def load_script():
    spec = importlib.util.spec_from_file_location("download_script", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


download = load_script()


@pytest.fixture(autouse=True)
def no_waiting_and_no_proxy(monkeypatch):
    monkeypatch.setattr(download, "RETRY_WAITS_S", (0, 0, 0))
    monkeypatch.setenv("no_proxy", "127.0.0.1")


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves server.content under any path; the fields of Server say how badly."""

    def do_GET(self):
        server, text = self.server, self.headers.get("Range")
        server.ranges.append(text)
        fresh = self.headers.get("If-Range") in (None, server.etag)
        start = int(re.fullmatch(r"bytes=(\d+)-", text)[1]) if text and server.with_ranges and fresh else 0
        if server.statuses:
            return self.answer(server.statuses.pop(0), b"", {})
        if start >= len(server.content):
            return self.answer(416, b"", {"Content-Range": f"bytes */{len(server.content)}"})
        last = len(server.content) - 1
        headers = {"Content-Range": f"bytes {start + server.shift}-{last}/{last + 1}"} if start else {}
        return self.answer(206 if start else 200, server.content[start:], headers)

    def answer(self, status, body, headers):
        server = self.server
        self.send_response(status)
        for key, value in {"ETag": server.etag, "Content-Type": server.kind, **headers}.items():
            if value:
                self.send_header(key, value)
        if server.with_length:
            self.send_header("Content-Length", str(server.claimed or len(body)))
        self.end_headers()
        if server.cuts and len(body) > server.cuts[0]:
            body = body[: server.cuts.pop(0)]
        half = len(body) // 2
        self.wfile.write(body[:half])
        server.halfway()
        self.wfile.write(body[half:])
        server.served += len(body)

    def log_message(self, *args):
        pass


class Server(http.server.ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.content, self.etag, self.kind = CONTENT, '"one"', "application/octet-stream"
        self.with_ranges, self.with_length, self.claimed, self.shift = True, True, None, 0
        self.cuts, self.statuses = (
            [],
            [],
        )  # bytes after which to close, statuses to answer with: used up one by one
        self.ranges, self.served = [], 0
        self.halfway = lambda: None

    def handle_error(self, request, client_address):
        """Say nothing when a client hangs up, as it does where it refuses a file: stderr is what the tests
        look at.
        """

    def table(self, name=NAME, **fields):
        url = f"http://127.0.0.1:{self.server_port}/{name}"
        row = {
            "url": url,
            "sha256": None,
            "bytes": None,
            "licence": "MIT",
            "also_named": [],
            "what": "a test",
        }
        return {"files": {name: row | fields}, "presets": {"small": [name], "none": []}}


@pytest.fixture
def server():
    with Server() as running:
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield running
        running.shutdown()
        thread.join()


def fetch(folder, table, *more, name=NAME):
    return download.main([name, "--dir", str(folder), *more], table=table)


def names_in(folder):
    return sorted(path.name for path in folder.iterdir())


def records(folder):
    return json.loads((folder / "hashes.json").read_text())


def refused(argv, table, capsys):
    """The one line with which a command line is refused."""
    with pytest.raises(SystemExit) as stop:
        download.main(argv, table=table)
    out, err = capsys.readouterr()
    assert stop.value.code == 2 and out == "" and err.count("\n") == 1
    return err


# What is fetched
# -----------------------------------------------------------------------------------------------------


def test_fresh_download_is_recorded_and_tells_the_licence(server, tmp_path, capsys):
    folder = tmp_path / "new" / "folder"
    assert fetch(folder, server.table(), name="small") == 0
    assert (folder / NAME).read_bytes() == CONTENT
    assert records(folder) == {NAME: {"sha256": SHA256, "bytes": len(CONTENT)}}
    assert names_in(folder) == ["hashes.json", NAME]
    out, err = capsys.readouterr()
    assert SHA256 in out and err == f"{NAME}: licence: MIT\n"  # no progress bar where stderr is no terminal


def test_second_run_fetches_nothing(server, tmp_path, capsys):
    fetch(tmp_path, server.table())
    assert fetch(tmp_path, server.table()) == 0
    assert len(server.ranges) == 1
    assert f"{NAME}: ok, already here (sha256 recorded in" in capsys.readouterr().out


def test_final_name_appears_only_when_complete(server, tmp_path):
    seen = []
    server.halfway = lambda: seen.append((tmp_path / NAME).exists())
    server.cuts = [100_000, 50_000]
    assert fetch(tmp_path, server.table()) == 0
    assert seen == [False, False, False]


def test_cut_connection_transfers_only_the_rest(server, tmp_path, capsys):
    server.cuts = [100_000]
    assert fetch(tmp_path, server.table()) == 0
    assert (tmp_path / NAME).read_bytes() == CONTENT
    assert server.ranges == [None, "bytes=100000-"] and server.served == len(CONTENT)
    assert "connection closed at 100,000 of 307,200 bytes; trying again" in capsys.readouterr().err


def test_next_command_goes_on_where_the_last_one_gave_up(server, tmp_path, capsys):
    server.cuts, server.statuses = [100_000], []
    server.halfway = lambda: server.statuses.extend([503] * 3)
    assert fetch(tmp_path, server.table()) == 1
    assert (
        f"HTTP 503 Service Unavailable; fetch {server.table()['files'][NAME]['url']}"
        in capsys.readouterr().err
    )
    assert (tmp_path / f"{NAME}.part").read_bytes() == CONTENT[:100_000] and not (tmp_path / NAME).exists()
    server.statuses, server.halfway = [], lambda: None
    assert fetch(tmp_path, server.table()) == 0
    assert server.served == len(CONTENT) and (tmp_path / NAME).read_bytes() == CONTENT


def test_server_without_ranges_starts_again(server, tmp_path):
    server.with_ranges, server.cuts = False, [100_000]
    assert fetch(tmp_path, server.table()) == 0
    assert (tmp_path / NAME).read_bytes() == CONTENT and server.served == len(CONTENT) + 100_000


def test_file_that_changed_meanwhile_is_not_glued_together(server, tmp_path):
    server.cuts, server.statuses = [100_000], []
    server.halfway = lambda: server.statuses.append(404)
    assert fetch(tmp_path, server.table()) == 1
    server.statuses, server.halfway = [], lambda: None
    server.content, server.etag = CONTENT[::-1], '"two"'
    assert fetch(tmp_path, server.table()) == 0
    assert (tmp_path / NAME).read_bytes() == CONTENT[::-1]


def test_complete_part_needs_only_its_check(server, tmp_path):
    (tmp_path / f"{NAME}.part").write_bytes(CONTENT)
    assert fetch(tmp_path, server.table()) == 0
    assert server.served == 0 and (tmp_path / NAME).read_bytes() == CONTENT


def test_complete_part_of_known_size_needs_no_network(tmp_path, closed_port):
    (tmp_path / f"{NAME}.part").write_bytes(CONTENT)
    table = Server.table(closed_port, bytes=len(CONTENT), sha256=SHA256)
    assert fetch(tmp_path, table) == 0


@pytest.mark.parametrize(
    "shift, kept", [(0, CONTENT + b"more"), (7, CONTENT[:1000])], ids=["too long", "wrong range"]
)
def test_part_that_does_not_fit_is_fetched_anew(server, tmp_path, shift, kept):
    server.shift = shift
    (tmp_path / f"{NAME}.part").write_bytes(kept)
    assert fetch(tmp_path, server.table()) == 0
    assert (tmp_path / NAME).read_bytes() == CONTENT and server.ranges[-1] is None


def test_transient_errors_are_tried_again(server, tmp_path):
    server.statuses = [503, 429, 500]
    assert fetch(tmp_path, server.table()) == 0


def test_slow_server_times_out_and_is_asked_again(server, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(download, "TIMEOUT_S", 0.2)
    pauses = [0.5]
    server.halfway = lambda: time.sleep(pauses.pop() if pauses else 0)
    assert fetch(tmp_path, server.table()) == 0
    assert "connection lost (timed out); trying again" in capsys.readouterr().err
    assert (tmp_path / NAME).read_bytes() == CONTENT


def test_interrupt_keeps_the_part(server, tmp_path):
    go_on = threading.Event()
    server.halfway = go_on.wait
    program = (
        "import importlib.util, json, signal, sys\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a shell's background job starts without
        f"spec = importlib.util.spec_from_file_location('download_script', {str(SCRIPT)!r})\n"
        "module = importlib.util.module_from_spec(spec)\n"
        "spec.loader.exec_module(module)\n"
        "sys.exit(module.main(sys.argv[2:], table=json.loads(sys.argv[1])))\n"
    )
    argv = [sys.executable, "-c", program, json.dumps(server.table()), NAME, "--dir", str(tmp_path)]
    process = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    part, limit = tmp_path / f"{NAME}.part", time.monotonic() + 20
    while not (part.exists() and part.stat().st_size) and time.monotonic() < limit:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=20)
    go_on.set()
    assert (
        process.returncode == 130 and "the same command goes on from there" in err and "Traceback" not in err
    )
    kept = part.stat().st_size
    assert 0 < kept < len(CONTENT)
    assert fetch(tmp_path, server.table()) == 0
    assert server.ranges[1] == f"bytes={kept}-" and (tmp_path / NAME).read_bytes() == CONTENT


# What is verified
# ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fields, more, expected",
    [
        ({"sha256": "a" * 64}, [], f"sha256 expected {'a' * 64} (published), got {SHA256}"),
        ({"sha256_prefix": "12345678"}, [], f"sha256 expected 12345678 (published), got {SHA256}"),
        ({}, ["--sha256", "b" * 64], f"sha256 expected {'b' * 64} (--sha256), got {SHA256}"),
        ({"bytes": 5}, [], "expected 5 bytes, got 307,200"),
    ],
    ids=["hash", "prefix", "user", "size"],
)
def test_mismatch_keeps_nothing(server, tmp_path, capsys, fields, more, expected):
    for _ in range(2):  # the second time is not stuck on what the first left
        assert fetch(tmp_path, server.table(**fields), *more) == 1
        _, err = capsys.readouterr()
        assert expected in err and err.count("\n") == 2 and names_in(tmp_path) == []
    assert server.ranges == [None, None]


@pytest.mark.parametrize("fields", [{"sha256": SHA256, "bytes": len(CONTENT)}, {"sha256_prefix": SHA256[:8]}])
def test_published_hash_that_holds(server, tmp_path, capsys, fields):
    assert fetch(tmp_path, server.table(**fields)) == 0
    assert "(sha256 published)" in capsys.readouterr().out


def test_users_hash_that_holds_in_either_case(server, tmp_path, capsys):
    assert fetch(tmp_path, server.table(), "--sha256", SHA256.upper()) == 0
    assert "(sha256 --sha256)" in capsys.readouterr().out


def test_file_that_changed_on_disk_is_reported_and_left(server, tmp_path, capsys):
    fetch(tmp_path, server.table())
    (tmp_path / NAME).write_bytes(b"changed")
    capsys.readouterr()
    assert fetch(tmp_path, server.table()) == 1
    _, err = capsys.readouterr()
    assert f"sha256 expected {SHA256} (recorded in {tmp_path / 'hashes.json'}), got " in err
    assert f"move {tmp_path / NAME} away" in err and (tmp_path / NAME).read_bytes() == b"changed"


def test_file_that_changed_on_the_server_is_refused_unless_its_hash_is_given(server, tmp_path, capsys):
    fetch(tmp_path, server.table())
    (tmp_path / NAME).unlink()
    server.content = b"another release"
    assert fetch(tmp_path, server.table()) == 1
    assert "(recorded in" in capsys.readouterr().err and names_in(tmp_path) == ["hashes.json"]
    new = hashlib.sha256(server.content).hexdigest()
    assert fetch(tmp_path, server.table(), "--sha256", new) == 0
    assert records(tmp_path)[NAME]["sha256"] == new


def test_also_named_counts_and_is_verified(server, tmp_path, capsys):
    table = server.table(sha256_prefix=SHA256[:8], also_named=["renamed.pth"])
    (tmp_path / "renamed.pth").write_bytes(CONTENT)
    for name in (NAME, "renamed.pth", "small"):
        assert fetch(tmp_path, table, name=name) == 0
        assert "renamed.pth: ok, already here" in capsys.readouterr().out
    (tmp_path / "renamed.pth").write_bytes(b"something else")
    assert fetch(tmp_path, table) == 1
    assert server.ranges == [] and not (tmp_path / NAME).exists()


def test_file_put_there_by_hand_is_recorded(server, tmp_path, capsys):
    (tmp_path / NAME).write_bytes(CONTENT)
    assert fetch(tmp_path, server.table()) == 0
    assert "already here (no hash known to check it by)" in capsys.readouterr().out
    assert records(tmp_path)[NAME]["sha256"] == SHA256 and server.ranges == []


@pytest.mark.parametrize("text", ["{", "[]", '{"weights.pth": 1}', '{"weights.pth": {}}'])
def test_broken_records_stop_before_the_download(server, tmp_path, capsys, text):
    (tmp_path / "hashes.json").write_text(text)
    assert fetch(tmp_path, server.table()) == 1
    _, err = capsys.readouterr()
    assert "hashes.json is not a table" in err and err.count("\n") == 1 and server.ranges == []


# What goes wrong
# -----------------------------------------------------------------------------------------------------


@pytest.fixture
def closed_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    return type("Nobody", (), {"server_port": port})


@pytest.mark.parametrize(
    "fields, known",
    [
        ({}, "no hash is known"),
        ({"sha256": SHA256}, f"sha256 {SHA256}"),
        ({"sha256_prefix": "12345678"}, "sha256 begins"),
    ],
)
def test_offline_says_what_to_put_where(closed_port, tmp_path, capsys, fields, known):
    table = Server.table(closed_port, **fields)
    assert fetch(tmp_path, table) == 1
    _, err = capsys.readouterr()
    _licence, line = err.splitlines()
    url = table["files"][NAME]["url"]
    assert line.startswith(f"{NAME}: cannot be reached (")
    assert f"fetch {url} and put it at {tmp_path / NAME} ({known}" in line
    assert names_in(tmp_path) == []


def test_one_missing_file_does_not_keep_the_others_back(server, closed_port, tmp_path, capsys):
    table = server.table()
    table["files"] |= Server.table(closed_port, name="far.pt")["files"]
    table["presets"]["both"] = ["far.pt", NAME]
    assert fetch(tmp_path, table, name="both") == 1
    assert (
        tmp_path / NAME
    ).read_bytes() == CONTENT and "far.pt: cannot be reached" in capsys.readouterr().err


def test_not_found_is_one_line(server, tmp_path, capsys):
    server.statuses = [404]
    assert fetch(tmp_path, server.table()) == 1
    _, err = capsys.readouterr()
    assert "HTTP 404 Not Found; fetch http" in err and err.count("\n") == 2 and names_in(tmp_path) == []


def test_web_page_is_not_taken_for_weights(server, tmp_path, capsys):
    server.kind = "text/html; charset=utf-8"
    assert fetch(tmp_path, server.table()) == 1
    assert "the answer is a web page" in capsys.readouterr().err and names_in(tmp_path) == []


def test_unknown_length_needs_a_hash(server, tmp_path, capsys):
    server.with_length = False
    assert fetch(tmp_path, server.table()) == 1
    assert "neither length nor hash is known" in capsys.readouterr().err
    assert fetch(tmp_path, server.table(), "--sha256", SHA256) == 0


def test_full_disk_is_noticed_before_the_first_byte(server, tmp_path, capsys):
    server.claimed = 10**18
    assert fetch(tmp_path, server.table()) == 1
    _, err = capsys.readouterr()
    assert "needs 1,000,000,000,000,000,000 more bytes, only" in err and err.count("\n") == 2
    assert names_in(tmp_path) == []


def test_folder_that_is_a_file(server, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert fetch(tmp_path / "file", server.table()) == 1
    _, err = capsys.readouterr()
    assert err.startswith(f"--dir {tmp_path / 'file'}: ") and err.count("\n") == 1


def test_second_download_into_the_folder_is_refused(server, tmp_path, capsys):
    with download.locked(tmp_path):
        assert fetch(tmp_path, server.table()) == 1
    assert "another download into it is running" in capsys.readouterr().err
    assert fetch(tmp_path, server.table()) == 0


# Command line
# --------------------------------------------------------------------------------------------------------


def test_unknown_name_lists_the_choices(server, tmp_path, capsys):
    err = refused(["imagenet"], server.table(), capsys)
    assert err == f"download.py: unknown 'imagenet': choose from small, none, {NAME}\n"


@pytest.mark.parametrize(
    "argv, expected",
    [
        ([], "give names of presets or files, or --list"),
        ([NAME, "--list"], "give names of presets or files, or --list"),
        ([NAME, "--sha", "a" * 64], "unrecognized arguments: --sha"),
        ([NAME, "--base_url", "x"], "unrecognized arguments: --base_url"),
        ([NAME, "--sha256", "xyz"], "--sha256 'xyz' is not 64 hex digits"),
        ([NAME, "--sha256", ""], "--sha256 '' is not 64 hex digits"),
        (["none", "--sha256", "a" * 64], "--sha256 goes with exactly one file, not 0"),
        ([NAME, "--sha256", "a" * 64], f"contradicts the published 12345678 of {NAME}"),
    ],
)
def test_command_line_is_refused_in_one_line(server, capsys, argv, expected):
    assert expected in refused(argv, server.table(sha256_prefix="12345678"), capsys)
    assert server.ranges == []


def run_script(*argv, cwd):
    command = [sys.executable, str(SCRIPT), *argv]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=30, check=False)


def test_digits_needs_no_download_from_any_folder(tmp_path):
    done = run_script("digits", cwd=tmp_path)
    assert (
        (done.returncode, done.stderr) == (0, "")
        and "nothing to fetch" in done.stdout
        and names_in(tmp_path) == []
    )


def test_list_names_all_presets_and_files_with_licences(tmp_path):
    table = json.loads((ROOT / "pretrained_models" / "files.json").read_text())
    done = run_script("--list", cwd=tmp_path)
    assert done.returncode == 0 and all(name in done.stdout for name in [*table["presets"], *table["files"]])
    assert all(row["licence"] in done.stdout for row in table["files"].values())


def test_script_needs_no_torch():
    assert not re.search(r"^\s*(import|from) (torch|requests)", SCRIPT.read_text(), re.MULTILINE)


# The table
# -----------------------------------------------------------------------------------------------------------


def test_table_is_well_formed():
    table = json.loads((ROOT / "pretrained_models" / "files.json").read_text())
    fields = {"url", "sha256", "sha256_prefix", "bytes", "licence", "also_named", "what"}
    names = [other for name, row in table["files"].items() for other in (name, *row["also_named"])]
    assert len(set(names)) == len(names) and not set(names) & set(table["presets"])
    for name, row in table["files"].items():
        assert fields - {"sha256_prefix"} <= set(row) <= fields
        assert row["url"].startswith("https://") and row["url"].endswith(f"/{name}") and "/" not in name
        assert row["sha256"] is None or re.fullmatch("[0-9a-f]{64}", row["sha256"])
        assert "sha256_prefix" not in row or re.fullmatch("[0-9a-f]{8}", row["sha256_prefix"])
        assert row["bytes"] is None or (isinstance(row["bytes"], int) and row["bytes"] > 0)
        assert row["licence"] and row["what"] and "\n" not in row["licence"] + row["what"]
        if row["url"].startswith(
            "https://download.pytorch.org/"
        ):  # its file names carry the beginning of the hash
            assert name.endswith(f"-{row['sha256_prefix']}.pth")


def test_presets_are_complete():
    table = json.loads((ROOT / "pretrained_models" / "files.json").read_text())
    variants = ("resnet101", "resnet50", "unguided", "finetuned")
    assert set(table["presets"]) >= {"digits", *(f"imagenet128-{variant}" for variant in variants)}
    assert table["presets"]["digits"] == []
    assert all(name in table["files"] for names in table["presets"].values() for name in names)


def test_readme_names_every_file():
    readme = (ROOT / "pretrained_models" / "README.md").read_text()
    table = json.loads((ROOT / "pretrained_models" / "files.json").read_text())
    assert [name for name in table["files"] if f"`{name}`" not in readme] == []
