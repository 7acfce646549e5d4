"""The table of pretrained files: what each is, where it comes from, where it lies, and what its hash must be.

`pretrained_models/files.json` says what is published; `hashes.json`, beside the files, says what was seen
when a file was fetched or first found. Downloads, checkpoints, classifiers and the evaluation all ask here.
Needs no torch.
"""

import hashlib
import json
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from guided_diffusion.files.atomic import write_json

# In a checkout and in an installed wheel alike, it lies beside the packages.
PRETRAINED_DIR = Path(__file__).resolve().parents[2] / "pretrained_models"


@dataclass(frozen=True)
class PretrainedFile:
    """One row. name, also_named: file names. sha256: 64 hex digits, the first few of them, or empty."""

    name: str
    url: str
    licence: str
    what: str
    sha256: str
    bytes: int | None
    also_named: tuple[str, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """Every name under which the file may lie, its own first."""
        return self.name, *self.also_named


@dataclass(frozen=True)
class Table:
    """files: rows by name. presets: name of a preset -> names of the files that it needs and that do not
    ship.
    """

    files: Mapping[str, PretrainedFile]
    presets: Mapping[str, list[str]]

    @classmethod
    def of(cls, content: Mapping[str, Any]) -> "Table":
        """From the content of a files.json."""
        rows = {
            name: PretrainedFile(
                name,
                row["url"],
                row["licence"],
                row["what"],
                row["sha256"] or row.get("sha256_prefix", ""),
                row["bytes"],
                tuple(row["also_named"]),
            )
            for name, row in content["files"].items()
        }
        return cls(rows, content.get("presets", {}))

    def find(self, name: str) -> PretrainedFile | None:
        """The row of a file by any of its names."""
        return next((row for row in self.files.values() if name in row.names), None)


def read_table() -> Table:
    """The table of `pretrained_models/files.json`. Raises FileNotFoundError where the install lacks it."""
    path = PRETRAINED_DIR / "files.json"
    if not path.is_file():
        raise FileNotFoundError(f"no table of pretrained files at {path}; install the package again")
    return Table.of(json.loads(path.read_text()))


def find_pretrained(name: str, *, url: str | None = None, folder: Path | None = None) -> Path:
    """Return where the file `name` lies in pretrained_models/ (or `folder`), under any name that the table
    has.

    url: where it comes from if the table does not know it. Raises FileNotFoundError that says which file to
    put where.
    """
    folder = PRETRAINED_DIR if folder is None else folder
    row = read_table().find(name)
    for alias in (name, *(row.names if row else ())):
        if (folder / alias).is_file():
            return folder / alias
    hint = f"run `python scripts/download.py {name}`" if row else "give its path"
    source = row.url if row else url
    by_hand = f", or put {source} there by hand" if source else ""
    raise FileNotFoundError(f"no weights at {folder / name}; {hint}{by_hand}")


def existing_file(path: str | Path) -> Path:
    """The path itself. Raises FileNotFoundError that says how to get the file where it is missing, or is an
    address.
    """
    if Path(path).is_file():
        return Path(path)
    if address := re.match(r"(\w{2,}):/+(.+)", str(path)):  # Path has made one slash of two
        raise FileNotFoundError(_fetch_first(f"{address[1]}://{address[2]}"))
    path, hint = Path(path), "see `python scripts/download.py --list`"
    if path.is_dir():
        raise FileNotFoundError(f"no checkpoint at {path}: it is a folder; give the path of a file in it")
    if read_table().find(path.name):
        hint = f"fetch it with `python scripts/download.py {path.name}`"
    raise FileNotFoundError(f"no checkpoint at {path}; {hint}")


def _fetch_first(url):
    name = re.split(r"[?#]", url)[0].rstrip("/").rpartition("/")[2]
    place = PRETRAINED_DIR / name
    how = (
        f" with `curl -L -o {place} {shlex.quote(url)}`" if url.startswith("http") else f", put it at {place}"
    )
    if read_table().find(name):
        how = f" with `python scripts/download.py {name}`"
    return f"{url} is an address, not a file: fetch it{how}, then give the path {place}"


def sha256(path: str | Path) -> str:
    """Hexadecimal SHA-256 of a file, read in pieces."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def known_hashes(path: str | Path) -> list[tuple[str, str]]:
    """[(SHA-256 or its beginning, who says so)] of a file by its name; who is "published" or "recorded"."""
    path = Path(path)
    row = read_table().find(path.name)
    recorded = recorded_hashes(path.parent).get(path.name, {}).get("sha256", "")
    known = [(row.sha256 if row else "", "published"), (recorded, "recorded")]
    return [(digest, who) for digest, who in known if digest]


def verify(path: str | Path, known: list[tuple[str, str]], size: int | None = None) -> str:
    """The SHA-256 of a file. Raises ValueError where it is none of `known` (as `known_hashes` gives them), or
    where the file has not `size` bytes.
    """
    if size not in (None, found := Path(path).stat().st_size):
        raise ValueError(f"expected {size:,} bytes, got {found:,}")
    digest = sha256(path)
    for expected, who in known:
        if not digest.startswith(expected):
            raise ValueError(f"sha256 expected {expected} ({who}), got {digest}")
    return digest


def recorded_hashes(folder: Path) -> dict[str, dict]:
    """`hashes.json` of a folder: file name -> {"sha256", "bytes"}. Raises OSError if it is broken."""
    path = folder / "hashes.json"
    try:
        records = json.loads(path.read_text()) if path.exists() else {}
        return {
            name: {"sha256": row["sha256"].lower(), "bytes": row["bytes"]} for name, row in records.items()
        }
    except (ValueError, TypeError, KeyError, AttributeError):
        raise OSError(f"{path} is not a table of sha256 and bytes: repair or remove it") from None


def record_hash(folder: Path, name: str, digest: str, size: int) -> None:
    """Put a file into the `hashes.json` of its folder, in the place of what stood there."""
    records = {**recorded_hashes(folder), name: {"sha256": digest, "bytes": size}}
    write_json(folder / "hashes.json", dict(sorted(records.items())))
