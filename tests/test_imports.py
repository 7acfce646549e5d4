"""Who may import whom: the rule of the rooms, read from the source."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("guided_diffusion", "classifiers", "evaluation")
OURS = {*ROOMS, "scripts", "tests"}
ALLOWED = {
    "guided_diffusion": {"torch", "numpy", "tqdm", "safetensors", "PIL", "matplotlib"},
    "classifiers": {"torch", "torchvision"},
    "evaluation": {"torch", "numpy", "scipy", "torchvision", "pytorch_fid", "tqdm", "matplotlib"},
}
# What every room may import, and what imports no other module of the project.
COMMON = "guided_diffusion.files"


def source_files(*rooms):
    return sorted(path.relative_to(ROOT) for room in rooms for path in (ROOT / room).rglob("*.py"))


def imported(path):
    """The full names that a file imports, at the top or inside a function: "import a.b" and "from a import b"
    are a.b.
    """
    package = list(path.parent.parts)
    names = set()
    for node in ast.walk(ast.parse((ROOT / path).read_text())):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            start = ".".join([*base, *([node.module] if node.module else [])])
            names.update(f"{start}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            function = (
                node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            )
            if function in ("import_module", "__import__"):
                names.add(str(node.args[0].value))
    return names


def top(name):
    return name.partition(".")[0]


def is_within(name, module):
    return name == module or name.startswith(f"{module}.")


@pytest.mark.parametrize("room", ["guided_diffusion", "classifiers", "scripts"])
def test_there_is_something_to_look_at(room):
    files = source_files(room)
    assert files
    assert set().union(*(imported(path) for path in files))


@pytest.mark.parametrize("path", source_files(*ROOMS), ids=str)
def test_rooms_import_only_what_they_may(path):
    room = path.parts[0]
    allowed = ALLOWED[room] | set(sys.stdlib_module_names) | {room}
    foreign = {name for name in imported(path) if top(name) not in allowed and not is_within(name, COMMON)}
    assert foreign == set()


@pytest.mark.parametrize("path", source_files("guided_diffusion/files"), ids=str)
def test_files_import_no_other_room(path):
    assert {name for name in imported(path) if top(name) in OURS and not is_within(name, COMMON)} == set()


@pytest.mark.parametrize("path", source_files(*ROOMS, "scripts"), ids=str)
def test_nothing_imports_scripts_or_tests(path):
    assert {name for name in imported(path) if top(name) in ("scripts", "tests")} == set()


@pytest.mark.parametrize("path", source_files("evaluation"), ids=str)
def test_files_that_run_as_scripts_are_not_named_like_the_standard_library(path):
    assert path.stem not in sys.stdlib_module_names


def test_guided_diffusion_loads_without_torchvision_and_without_the_other_rooms():
    modules = [
        ".".join(path.with_suffix("").parts)
        for path in source_files("guided_diffusion")
        if path.stem != "__init__"
    ]
    forbidden = ["torchvision", "scipy", "mpi4py", "classifiers", "evaluation", "scripts"]
    code = (
        "import importlib, sys\n"
        "sys.path.insert(0, '.')\n"
        f"for name in {modules!r}: importlib.import_module(name)\n"
        f"print(*[name for name in {forbidden!r} if name in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == []
