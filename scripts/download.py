"""Fetch the pretrained files that a preset needs: resumable, hashed, with the licence told.

    python scripts/download.py imagenet128-resnet101
    python scripts/download.py resnet50-0676ba61.pth --dir /data/weights

What can be fetched is data: pretrained_models/files.json. A file gets its final name only when it is complete
and verified; until then it is FILE.part, and the same command resumes it. Results go to stdout, the rest to
stderr. Exit codes: 0 all files are there, 1 some are not, 2 the command line is wrong, 130 stopped by Ctrl-C.
"""

import contextlib
import fcntl
import http.client
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

from guided_diffusion.files import pretrained
from guided_diffusion.flags.parser import Parser, run_main

TIMEOUT_S = 60
RETRY_WAITS_S = 1, 4, 15  # before the second, third and fourth try; counted anew whenever bytes arrive
CHUNK_BYTES = 1 << 16  # what a reset connection costs at most
# None that a disk raises.
NETWORK_ERRORS = ConnectionError, TimeoutError, ssl.SSLError, http.client.HTTPException


class Failure(Exception):
    """The file could not be had; the text is one line for the user."""


class Transient(Failure):
    """Another try may succeed."""


class Job:
    """One file to provide: its row of the table, the folder for it, and the sha256 that the user gave, or
    None.
    """

    def __init__(self, row, folder, given=None):
        self.row, self.name, self.folder, self.given = row, row.name, folder, given
        self.paths = [folder / name for name in row.names]
        self.part = folder / f"{self.name}.part"
        # Which version the .part began with, as the server calls it: two must not be glued together.
        self.etag = folder / f"{self.name}.part.etag"

    def discard(self):
        self.part.unlink(missing_ok=True)
        self.etag.unlink(missing_ok=True)

    def kept(self):
        """Bytes in the .part, 0 where there is none."""
        return self.part.stat().st_size if self.part.exists() else 0

    def known(self, path):
        """[(sha256 or its beginning, who says so)]: all must hold. What the user gives outranks what was
        recorded.
        """
        recorded = pretrained.recorded_hashes(path.parent).get(path.name, {}).get("sha256")
        own = (recorded, f"recorded in {path.parent / 'hashes.json'}")
        if self.given:
            own = (self.given, "--sha256")
        return [(digest, who) for digest, who in ((self.row.sha256, "published"), own) if digest]

    def verify(self, path, name=None):
        """(sha256, what it was held against) of the file to be called `name`; ValueError if it differs."""
        known = self.known(self.folder / (name or path.name))
        digest = pretrained.verify(path, known, self.row.bytes)
        return digest, " and ".join(f"sha256 {who}" for _, who in known) or "no hash known to check it by"


def connect(job, offset):
    """Response to a GET from byte `offset` on, an HTTP error too. Failure where nothing answers."""
    headers = {"User-Agent": "download.py", "Accept-Encoding": "identity"}
    if offset:
        headers["Range"] = f"bytes={offset}-"
        if job.etag.exists() and (version := job.etag.read_text()):
            headers["If-Range"] = version  # a file that has changed is then sent whole, with status 200
    try:
        return urllib.request.urlopen(urllib.request.Request(job.row.url, headers=headers), timeout=TIMEOUT_S)
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
    if total is None and job.row.bytes is None and not job.known(job.paths[0]):
        raise Failure("neither length nor hash is known, so a cut could not be noticed (give --sha256)")
    if total is not None and total - start > free:
        raise OSError(f"needs {total - start:,} more bytes, only {free:,} are free in {job.folder}")


def save(job, response, start, total):
    """Append the body to the .part, or begin it anew. Transient if it ends early; what has arrived stays."""
    if start == 0:
        job.discard()
        etag = response.headers.get("ETag", "W/")  # weak ones are not for If-Range
        job.etag.write_text(response.headers.get("Last-Modified", "") if etag.startswith("W/") else etag)
    scale = {"unit": "B", "unit_scale": True, "unit_divisor": 1024}
    # disable=None: quiet where stderr is no terminal.
    bar = tqdm(desc=job.name, total=total, initial=start, disable=None, **scale)
    with bar, open(job.part, "ab") as out:
        while chunk := response.read(CHUNK_BYTES):
            out.write(chunk)
            bar.update(len(chunk))
    if total not in (None, job.kept()):
        raise Transient(f"connection closed at {job.kept():,} of {total:,} bytes")


def attempt(job):
    """One connection; afterwards the .part is complete, or an exception tells why not."""
    offset = job.kept()
    if offset and offset == job.row.bytes:
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
    known = [f"sha256 {'begins with ' * (len(text) < 64)}{text}" for text, _ in job.known(job.paths[0])]
    return f"fetch {job.row.url} and put it at {job.paths[0]} ({', '.join(known) or 'no hash is known'})"


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
        digest, trust = job.verify(job.part, job.name)
    except ValueError as error:
        job.discard()
        raise Failure(f"{error}; from {job.row.url}; nothing was kept") from None
    size = job.kept()
    with open(job.part, "rb+") as handle:
        os.fsync(handle.fileno())
    pretrained.record_hash(job.folder, job.name, digest, size)
    os.replace(job.part, job.paths[0])
    job.discard()
    print(f"{job.name}: ok, {size:,} bytes, sha256 {digest} ({trust})", flush=True)


def provide(job):
    """Make one file be there; True if it is. What goes wrong with it is said in one line."""
    here = next(filter(Path.is_file, job.paths), None)
    try:
        if here:
            digest, trust = job.verify(here)
            with contextlib.suppress(OSError):  # a shared folder may be read-only
                pretrained.record_hash(job.folder, here.name, digest, here.stat().st_size)
            print(f"{here.name}: ok, already here ({trust})", flush=True)
        else:
            print(f"{job.name}: licence: {job.row.licence}", file=sys.stderr)
            fetch(job)
            finish(job)
        return True
    except (
        Failure,
        ValueError,
        OSError,
    ) as error:  # a bad file that was there is the user's, so it is not removed
        advice = f"; move {here} away to fetch it again" if here else ""
        print(f"{job.name}: {error}{advice}", file=sys.stderr)
        return False


@contextlib.contextmanager
def locked(folder):
    """Make the folder and keep others out, who would write into the same .part. OSError where another is in
    it.
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
    """(args, jobs). Where the command line cannot be meant: one line and exit code 2."""
    parser = Parser(prog="download.py", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="PRESET|FILENAME", help="see --list")
    folder = pretrained.PRETRAINED_DIR
    parser.add_argument("--dir", type=Path, default=folder, help="where the files go")
    parser.add_argument("--sha256", metavar="HEX", type=str.lower, help="64 hex digits: the one file's hash")
    parser.add_switch("--list", help="print presets and files, with their licences")
    args = parser.parse_args(argv)
    files = {alias: [row] for row in table.files.values() for alias in row.names}
    files |= {preset: [table.files[name] for name in names] for preset, names in table.presets.items()}
    if unknown := [name for name in args.names if name not in files]:
        parser.error(f"unknown {unknown[0]!r}: choose from {', '.join([*table.presets, *table.files])}")
    rows = dict.fromkeys(row for name in args.names for row in files[name])
    jobs = [Job(row, args.dir.absolute(), args.sha256) for row in rows]
    if args.list == bool(args.names):
        parser.error("give names of presets or files, or --list")
    if args.sha256 is not None and not re.fullmatch("[0-9a-f]{64}", args.sha256):
        parser.error(f"--sha256 {args.sha256!r} is not 64 hex digits")
    if args.sha256 and len(jobs) != 1:
        parser.error(f"--sha256 goes with exactly one file, not {len(jobs)}")
    if args.sha256 and not args.sha256.startswith(jobs[0].row.sha256):
        row = jobs[0].row
        parser.error(f"--sha256 {args.sha256} contradicts the published {row.sha256} of {row.name}")
    return args, jobs


def print_table(table):
    for preset, names in table.presets.items():
        print(f"{preset}: {', '.join(names) or 'nothing to fetch'}")
    for row in table.files.values():
        print(f"{row.name}: {row.what}; {row.licence}; {row.url}")


def main(argv=None):
    table = pretrained.read_table()
    args, jobs = parse(argv, table)
    if args.list:
        return print_table(table)
    if not jobs:
        return print(f"{', '.join(args.names)}: ok, nothing to fetch, the files come with the repository")
    try:
        with locked(args.dir):
            pretrained.recorded_hashes(args.dir)  # a broken one shows before the download, not after
            missing = [job for job in jobs if not provide(job)]
    except OSError as error:
        raise OSError(f"--dir {args.dir}: {error}") from None
    if missing:
        sys.exit(1)  # each has said why


if __name__ == "__main__":
    run_main(main, resumable=True)
