"""Scripts run with the packages beside them, from anywhere, whatever else is on the path, and with streams
that the caller closed.
"""

import ast
import os
import shutil
import subprocess
import sys

import pytest
from helpers import ROOT

OURS = ("guided_diffusion", "classifiers", "evaluation")


@pytest.fixture
def clone(tmp_path):
    """A second clone, its packages and scripts alone."""
    for name in ("guided_diffusion", "scripts"):
        shutil.copytree(ROOT / name, tmp_path / "clone" / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("classifiers", "evaluation"):
        (tmp_path / "clone" / name).symlink_to(ROOT / name)
    return tmp_path / "clone"


@pytest.fixture
def other(tmp_path):
    """A folder with a package of the same name that needs what is not there, as openai's does."""
    package = tmp_path / "other" / "guided_diffusion"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("import blobfile_is_not_installed\n")
    return tmp_path / "other"


def run(script, *words, cwd="/", redirect="", before="", **variables):
    """Call a script by a shell, without any help from the environment."""
    plain = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    command = ["sh", "-c", f'exec {before} "$0" "$@" {redirect}', sys.executable, script, *words]
    return subprocess.run(
        command, cwd=cwd, env={**plain, **variables}, capture_output=True, text=True, timeout=120
    )


@pytest.mark.parametrize(
    "how", ["from another folder", "PYTHONPATH", "from the other's folder", "from a link"]
)
def test_a_script_finds_the_packages_beside_it(tmp_path, clone, other, how):
    script = clone / "scripts/presets.py"
    # What runs must be this clone's: it has a preset more.
    with open(clone / "guided_diffusion/flags/presets.py", "a") as file:
        file.write('\nPRESETS["only-here"] = {}\n')
    if how == "from a link":
        (tmp_path / "link.py").symlink_to(script)
        script = tmp_path / "link.py"
    cwd = other if how == "from the other's folder" else tmp_path
    variables = {"PYTHONPATH": f"{other}:{ROOT}"} if how == "PYTHONPATH" else {}
    done = run(script, "only-here", cwd=cwd, **variables)
    assert (done.returncode, done.stdout, done.stderr) == (0, "classifier_sample.py\n", "")


def test_a_package_that_was_loaded_before_is_named(tmp_path, clone, other):
    """As by a .pth file or a sitecustomize.py."""
    (other / "guided_diffusion/__init__.py").write_text("")
    (tmp_path / "sitecustomize.py").write_text("import guided_diffusion\n")
    done = run(clone / "scripts/presets.py", "digits", PYTHONPATH=f"{tmp_path}:{other}")
    needed, found = clone / "guided_diffusion", other / "guided_diffusion"
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"error: this script needs {needed}, and Python finds {found} instead\n"


@pytest.mark.parametrize("redirect", ["2>&-", ">&-", "<&- >&- 2>&-"])
def test_a_closed_stream_is_no_error_and_no_file_takes_its_place(tmp_path, redirect):
    out = tmp_path / "run"
    size = ["--num_samples", "2", "--batch_size", "2", "--timestep_respacing", "1"]
    done = run(
        ROOT / "scripts/classifier_sample.py", "--preset", "digits", *size, "--out", out, redirect=redirect
    )
    assert done.returncode == 0, done.stderr
    assert ("samples_2x16x16x3.npz" in done.stdout) == (">&- " not in f" {redirect} ".replace("2>&-", ""))
    assert sorted(path.name for path in out.iterdir()) == [
        "grid.png",
        "log.txt",
        "run.json",
        "samples_2x16x16x3.npz",
    ]


def test_what_a_script_starts_has_the_streams_too(tmp_path):
    code = (
        "import _beside, os, subprocess, sys\n"
        "child = 'import os; [os.fstat(i) for i in range(3)]; os.write(2, b\"gone\")'\n"
        "sys.exit(subprocess.call([sys.executable, '-c', child]))\n"
    )
    (tmp_path / "start.py").write_text(code)
    done = run(tmp_path / "start.py", redirect="<&- >&- 2>&-", PYTHONPATH=str(ROOT / "scripts"))
    assert done.returncode == 0


@pytest.mark.parametrize(
    "name", sorted(path.stem for path in (ROOT / "scripts").glob("*.py") if "__main__" in path.read_text())
)
def test_a_script_looks_beside_itself_before_it_imports_the_packages(name):
    nodes = ast.parse((ROOT / f"scripts/{name}.py").read_text()).body
    names = [
        (node.names[0].name if isinstance(node, ast.Import) else node.module).partition(".")[0]
        for node in nodes
        if isinstance(node, ast.Import | ast.ImportFrom)
    ]
    assert next(name for name in names if name == "_beside" or name in OURS) == "_beside"
