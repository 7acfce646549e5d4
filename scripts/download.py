"""Fetch the pretrained files that a preset needs: resumable, hashed, with the licence told.

    python scripts/download.py imagenet128-resnet101
    python scripts/download.py resnet50-0676ba61.pth --dir /data/weights

What can be fetched is data: pretrained_models/files.json. A file gets its final name only when it is complete
and verified; until then it is FILE.part, and the same command goes on from there. Results go to stdout, the
rest to stderr.
Exit codes: 0 all files are there, 1 some are not, 2 the command line is wrong, 130 stopped by Ctrl-C.
"""

import argparse
import contextlib
import fcntl
import hashlib
import http.client
import json
import os
import re
import shutil
import ssl
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import _beside  # noqa: F401
from tqdm import tqdm

from guided_diffusion.files.checkpoints import recorded_hashes

PRETRAINED = Path(__file__).resolve().parent.parent / "pretrained_models"
TIMEOUT_S = 60
RETRY_WAITS_S = (
    1,
    4,
    15,
)  # seconds before the second, third and fourth try; counted anew whenever bytes arrive
CHUNK_BYTES = 1 << 16  # what a reset connection costs at most
NETWORK_ERRORS = (
    ConnectionError,
    TimeoutError,
    ssl.SSLError,
    http.client.HTTPException,
)  # none that a disk raises


class Failure(Exception):
    """The file could not be had; the text is one line for the user."""


class Transient(Failure):
    """Another try may succeed."""


class Job:
    """One file to provide: its row of the table, the folder it goes to, and the sha256 that the user gave, or
    None.
    """

    def __init__(self, name, entry, folder, given=None):
        self.name, self.folder, self.given = name, folder, given
        self.url, self.bytes, self.licence = entry["url"], entry["bytes"], entry["licence"]
        self.published = entry["sha256"] or entry.get(
            "sha256_prefix", ""
        )  # 64 hex digits, the first few, or none
        self.paths = [folder / other for other in (name, *entry["also_named"])]
        self.part = folder / f"{name}.part"
        self.etag = (
            folder / f"{name}.part.etag"
        )  # of the version that .part began with: two must not be glued together

    def discard(self):
        self.part.unlink(missing_ok=True)
        self.etag.unlink(missing_ok=True)

    def kept(self):
        """Bytes in the .part, 0 where there is none."""
        return self.part.stat().st_size if self.part.exists() else 0


def write_record(folder, name, digest, size):
    records = {**recorded_hashes(folder), name: {"sha256": digest, "bytes": size}}
    (folder / "hashes.json.part").write_text(json.dumps(records, indent=2, sort_keys=True) + "\n")
    os.replace(folder / "hashes.json.part", folder / "hashes.json")


def known_hashes(job, name):
    """[(sha256 or its beginning, who says so)]: all must hold. What the user gives outranks what was
    recorded.
    """
    recorded = recorded_hashes(job.folder).get(name, {}).get("sha256")
    own = (job.given, "--sha256") if job.given else (recorded, f"recorded in {job.folder / 'hashes.json'}")
    return [(text, who) for text, who in ((job.published, "published"), own) if text]


def verify(job, path):
    """(sha256, bytes, what they were held against) of `path`; Failure if they are not those known of the
    file.
    """
    size, digest = path.stat().st_size, hashlib.sha256()
    if job.bytes not in (None, size):
        raise Failure(f"expected {job.bytes:,} bytes, got {size:,}")
    with open(path, "rb") as source:
        while chunk := source.read(CHUNK_BYTES):
            digest.update(chunk)
    known = known_hashes(job, path.name.removesuffix(".part"))
    for expected, who in known:
        if not digest.hexdigest().startswith(expected):
            raise Failure(f"sha256 expected {expected} ({who}), got {digest.hexdigest()}")
    return (
        digest.hexdigest(),
        size,
        " and ".join(f"sha256 {who}" for _, who in known) or "no hash known to check it by",
    )


def connect(job, offset):
    """Response to a GET from byte `offset` on; an HTTP error is a response too. Failure where nothing
    answers.
    """
    request = urllib.request.Request(
        job.url, headers={"User-Agent": "download.py", "Accept-Encoding": "identity"}
    )
    if offset:
        request.add_header("Range", f"bytes={offset}-")
        if job.etag.exists() and (version := job.etag.read_text()):
            request.add_header(
                "If-Range", version
            )  # a file that has changed is then sent whole, with status 200
    try:
        return urllib.request.urlopen(request, timeout=TIMEOUT_S)
    except urllib.error.HTTPError as error:
        return error
    except urllib.error.URLError as error:  # who is offline from the start need not wait for retries
        again = offset or isinstance(error.reason, ConnectionResetError)
        raise (Transient if again else Failure)(f"cannot be reached ({error.reason})") from None


def span(job, response, offset):
    """(first byte of the body, whole size or None); None where the .part is complete already."""
    status, content_range = response.status, response.headers.get("Content-Range", "")
    if status == 200:  # also from a server that ignores ranges: start again
        length = response.headers.get("Content-Length", "")
        return 0, int(length) if length.isdigit() else None
    total = int(content_range.rpartition("/")[2]) if re.fullmatch(r"bytes .+/\d+", content_range) else None
    if status == 206 and content_range.startswith(f"bytes {offset}-"):
        return offset, total
    if status == 416 and offset and total == offset:
        return None
    if status in (206, 416) and offset:
        job.discard()
        raise Transient("what was kept does not fit the file on the server")
    kind = Transient if status in (408, 425, 429) or status >= 500 else Failure
    raise kind(f"HTTP {status} {response.reason}")


def refuse_early(job, response, start, total):
    """Raise before the first byte is written where the result could not be used."""
    free = shutil.disk_usage(job.folder).free
    if response.headers.get_content_type() == "text/html":  # a network's login page, say
        raise Failure("the answer is a web page")
    if total is None and job.bytes is None and not known_hashes(job, job.name):
        raise Failure("neither length nor hash is known, so a cut could not be noticed (give --sha256)")
    if total is not None and total - start > free:
        raise OSError(f"needs {total - start:,} more bytes, only {free:,} are free in {job.folder}")


def save(job, response, start, total):
    """Append the body to the .part (from byte 0: anew). Transient if it ends early; what has arrived
    stays.
    """
    if start == 0:
        job.discard()
        etag = response.headers.get("ETag", "W/")  # weak ones are not for If-Range
        job.etag.write_text(response.headers.get("Last-Modified", "") if etag.startswith("W/") else etag)
    bar = tqdm(
        desc=job.name, total=total, initial=start, unit="B", unit_scale=True, unit_divisor=1024, disable=None
    )
    with bar, open(job.part, "ab") as out:  # disable=None: quiet where stderr is no terminal
        while chunk := response.read(CHUNK_BYTES):
            out.write(chunk)
            bar.update(len(chunk))
    if total not in (None, job.kept()):
        raise Transient(f"connection closed at {job.kept():,} of {total:,} bytes")


def attempt(job):
    """One connection; afterwards the .part is complete, or an exception tells why not."""
    offset = job.kept()
    if offset and offset == job.bytes:
        return  # an earlier run stopped just before the check
    try:
        with connect(job, offset) as response:
            if place := span(job, response, offset):
                refuse_early(job, response, *place)
                save(job, response, *place)
    except NETWORK_ERRORS as error:
        raise Transient(f"connection lost ({str(error) or type(error).__name__})") from None


def by_hand(job):
    """The way out without the network: what to fetch, where to put it, what its hash is."""
    known = [f"sha256 {'begins with ' * (len(text) < 64)}{text}" for text, _ in known_hashes(job, job.name)]
    return f"fetch {job.url} and put it at {job.paths[0]} ({', '.join(known) or 'no hash is known'})"


def fetch(job):
    """Complete the .part, over as many connections as it takes. Raises Failure."""
    failures = 0
    while True:
        before = job.kept()
        try:
            return attempt(job)
        except Failure as error:
            failures = 1 if job.kept() > before else failures + 1
            if not isinstance(error, Transient) or failures > len(RETRY_WAITS_S):
                raise Failure(f"{error}; {by_hand(job)}") from None
            print(f"{job.name}: {error}; trying again in {RETRY_WAITS_S[failures - 1]} s", file=sys.stderr)
            time.sleep(RETRY_WAITS_S[failures - 1])


def finish(job):
    """Verify the complete .part and give it its name. A bad one is removed, so that the next try is not
    stuck.
    """
    try:
        digest, size, trust = verify(job, job.part)
    except Failure as error:
        job.discard()
        raise Failure(f"{error}; from {job.url}; nothing was kept") from None
    with open(job.part, "rb+") as handle:
        os.fsync(handle.fileno())
    write_record(job.folder, job.name, digest, size)
    os.replace(job.part, job.paths[0])
    job.discard()
    print(f"{job.name}: ok, {size:,} bytes, sha256 {digest} ({trust})", flush=True)


def provide(job):
    """Make one file be there; True if it is. What goes wrong with it is said in one line."""
    here = next(filter(Path.is_file, job.paths), None)
    try:
        if here:
            digest, size, trust = verify(job, here)
            with contextlib.suppress(OSError):  # a shared folder may be read-only
                write_record(job.folder, here.name, digest, size)
            print(f"{here.name}: ok, already here ({trust})", flush=True)
        else:
            print(f"{job.name}: licence: {job.licence}", file=sys.stderr)
            fetch(job)
            finish(job)
        return True
    except (Failure, OSError) as error:  # a bad file that was there is the user's, so it is not removed
        print(
            f"{job.name}: {error}{f'; move {here} away to fetch it again' if here else ''}", file=sys.stderr
        )
        return False


@contextlib.contextmanager
def locked(folder):
    """Makes the folder and keeps others out: a second download would write into the same .part. OSError
    there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:  # others than this one: a network file system without such locks
        if isinstance(error, BlockingIOError):
            raise OSError("another download into it is running: wait for its end") from None
    try:
        yield
    finally:
        os.close(handle)


def parse(argv, table):
    """(args, jobs). Where the command line cannot be meant: one line and SystemExit(2)."""
    parser = argparse.ArgumentParser(
        prog="download.py", description="Fetch pretrained files.", allow_abbrev=False
    )
    parser.error = lambda message: parser.exit(2, f"download.py: {message}\n")
    parser.add_argument("names", nargs="*", metavar="PRESET|FILENAME", help="see --list")
    parser.add_argument(
        "--dir", type=Path, default=PRETRAINED, help="where the files go (default: %(default)s)"
    )
    parser.add_argument(
        "--sha256", metavar="HEX", type=str.lower, help="64 hex digits that the one file must have"
    )
    parser.add_argument(
        "--list", action="store_true", help="print the presets and the files, with their licences"
    )
    args = parser.parse_args(argv)
    known = {
        other: [name] for name, entry in table["files"].items() for other in (name, *entry["also_named"])
    }
    known.update(table["presets"])
    if unknown := [name for name in args.names if name not in known]:
        parser.error(f"unknown {unknown[0]!r}: choose from {', '.join([*table['presets'], *table['files']])}")
    names = dict.fromkeys(file for name in args.names for file in known[name])
    jobs = [Job(name, table["files"][name], args.dir.absolute(), args.sha256) for name in names]
    if args.list == bool(args.names):
        parser.error("give names of presets or files, or --list")
    if args.sha256 is not None and not re.fullmatch("[0-9a-f]{64}", args.sha256):
        parser.error(f"--sha256 {args.sha256!r} is not 64 hex digits")
    if args.sha256 and len(jobs) != 1:
        parser.error(f"--sha256 goes with exactly one file, not {len(jobs)}")
    if args.sha256 and not args.sha256.startswith(jobs[0].published):
        parser.error(
            f"--sha256 {args.sha256} contradicts the published {jobs[0].published} of {jobs[0].name}"
        )
    return args, jobs


def main(argv=None, table=None):
    """Exit code. `table` replaces the content of files.json."""
    table = table or json.loads((PRETRAINED / "files.json").read_text())
    args, jobs = parse(argv, table)
    if args.list:
        lines = [
            f"{preset}: {', '.join(names) or 'nothing to fetch'}"
            for preset, names in table["presets"].items()
        ]
        print(
            "\n".join(
                lines + [f"{n}: {e['what']}; {e['licence']}; {e['url']}" for n, e in table["files"].items()]
            )
        )
        return 0
    if not jobs:
        print(f"{', '.join(args.names)}: ok, nothing to fetch, the files come with the repository")
        return 0
    try:
        with locked(args.dir):
            recorded_hashes(args.dir)  # a broken one shows before the download, not after
            missing = [job for job in jobs if not provide(job)]
            return 1 if missing else 0
    except OSError as error:
        print(f"--dir {args.dir}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(
            "stopped: what has arrived is kept in FILE.part, the same command goes on from there",
            file=sys.stderr,
        )
        return 130


if __name__ == "__main__":
    sys.exit(main())
