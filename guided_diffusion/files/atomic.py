"""Files that are complete or absent, whatever happens while they are written. Imports no other module of the
project.
"""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

PART = r"\..+\.\d+\.part"  # the name of a file that is being written, or was when its process was killed


@contextmanager
def renamed_when_complete(path: str | Path) -> Iterator[BinaryIO]:
    """Open a file for writing that takes the name `path` once the block ends without an error, and vanishes
    otherwise.
    """
    path = Path(path)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with open(part, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def write_json(path: str | Path, content: object) -> None:
    """Write a JSON file that is complete or absent."""
    with renamed_when_complete(path) as file:
        file.write((json.dumps(content, indent=2) + "\n").encode())
