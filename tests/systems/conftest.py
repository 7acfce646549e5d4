import os

import pytest
from bad_files import write_bad_files
from filelock import FileLock
from helpers import call, contents
from samplers import DIGITS, SAMPLERS, SCRIPTS
from table import ADM, BASES


@pytest.fixture(params=SAMPLERS, ids=lambda sampler: sampler.name)
def sampler(request):
    """Each row of the table."""
    return request.param


@pytest.fixture(scope="session")
def once(tmp_path_factory):
    """once(name, run): the folder of that name, after the first of pytest-xdist's processes that asks for it
    has called run(folder).
    """
    place = tmp_path_factory.getbasetemp()
    place = (place.parent if "PYTEST_XDIST_WORKER" in os.environ else place) / "once"
    place.mkdir(exist_ok=True)

    def folder_of(name, run):
        with FileLock(place / f"{name}.lock"):
            if not (done := place / f"{name}.done").exists():
                run(place / name)
                done.touch()
        return place / name

    return folder_of


@pytest.fixture(scope="session")
def finished(once):
    """finished(row): the folder of a run of its flags with --log_guidance; it must stay as it is."""
    return lambda sampler: once(
        f"finished-{sampler.name}", lambda folder: sampler.run(folder, "--log_guidance", True)
    )


@pytest.fixture(scope="session")
def unguided(once):
    """unguided(row): the same without any classifier."""
    return lambda sampler: once(
        f"unguided-{sampler.name}", lambda folder: sampler.run(folder, base=sampler.unguided)
    )


# Bad input


@pytest.fixture(scope="session")
def files(tmp_path_factory):
    return write_bad_files(tmp_path_factory.mktemp("bad"))


@pytest.fixture(scope="session")
def done(tmp_path_factory):
    """Folders of finished runs by script: bad input must leave them as they are."""
    folders = {}
    for script, base in BASES.items():
        folders[script] = tmp_path_factory.mktemp(script)
        assert call(SCRIPTS[script].main, [*base, "--out", folders[script]]).code == 0
    return folders


@pytest.fixture
def refused(done, files):
    """refused(flags, fragments, script, base, code): the script must end with one line that holds the
    fragments, and change nothing in a finished folder; returns the line.
    """

    def check(flags, fragments, script="classifier_sample", base=ADM, code=1):
        folder, places = done[script], {"files": files, "digits": DIGITS}
        before = contents(folder, but="log.txt")
        words = [word.format(**places).replace("~", " ") for word in flags.split()]
        result = call(SCRIPTS[script].main, [*base, "--out", folder, *words])
        assert (result.code, result.out) == (code, ""), result.err
        last = result.err.strip().splitlines()[-1]
        assert last.startswith("error: " if code == 1 else "script.py: error: ")
        assert code == 2 or result.err.strip() == last
        wanted = [fragment.strip() for fragment in fragments.format(**places).split("|")]
        assert [fragment for fragment in wanted if fragment not in last] == [], last
        assert ("another run's output" in last) == ("another run's output" in fragments), last
        assert contents(folder, but="log.txt") == before and not (files / "was_run").exists()
        return last

    return check
