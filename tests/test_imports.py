"""Who may import whom: the rule of the rooms, read from the source."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("guided_diffusion", "classifiers", "evaluation")
OURS = {*ROOMS, "scripts", "tests"}
# Besides the standard library and themselves. What is imported only where it is used may be missing.
ALLOWED = {
    "guided_diffusion": {
        "torch",
        "numpy",
        "tqdm",
        "safetensors",
        "PIL",
        "filelock",
        "matplotlib",
        "diffusers",
        "transformers",
    },
    "classifiers": {"torch", "torchvision", "diffusers", "timm", "transformers"},
    "evaluation": {
        "torch",
        "torchvision",
        "numpy",
        "scipy",
        "pytorch_fid",
        "tqdm",
        "matplotlib",
        "transformers",
    },
}
COMMON = "guided_diffusion.files"  # every room may import it
# Inside guided_diffusion, from the ground up: a module imports those of its own line and of earlier ones.
ORDER = [
    "files checkpoints",
    "layers unet edm_unet song_unet dit schedules losses nn resample image_datasets fp16_util",
    "process denoisers mixed_denoisers preconditioning solvers guidance gaussian_diffusion edm respace",
    "adapters",
    "flags",
    "script_util",
    "runs training train_util dist_util logger",
]
# What a module imports from above it, as labels are drawn by index, like noise.
EXCEPTIONS = {("guided_diffusion/flags/labels.py", "guided_diffusion.runs.noise")}


def source_files(*rooms):
    return sorted(path.relative_to(ROOT) for room in rooms for path in (ROOT / room).rglob("*.py"))


def imported(path):
    """The full names that a file imports, at the top or inside a function: "import a.b" and "from a import b"
    are a.b.
    """
    package, names = list(path.parent.parts), set()
    for node in ast.walk(ast.parse((ROOT / path).read_text())):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            start = ".".join([*base, *([node.module] if node.module else [])])
            names.update(f"{start}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func
            function = called.attr if isinstance(called, ast.Attribute) else getattr(called, "id", "")
            if function in ("import_module", "__import__"):
                names.add(str(node.args[0].value))
    return names


def top(name):
    return name.partition(".")[0]


def is_within(name, *modules):
    return any(name == module or name.startswith(f"{module}.") for module in modules)


def level(name):
    """The line of ORDER that a module of guided_diffusion stands on; -1 for a name that is no module."""
    return next((i for i, modules in enumerate(ORDER) if name.split(".")[1] in modules.split()), -1)


every_room = pytest.mark.parametrize("path", source_files(*ROOMS), ids=str)


@pytest.mark.parametrize("room", [*ROOMS, "scripts"])
def test_there_is_something_to_look_at(room):
    assert set().union(*(imported(path) for path in source_files(room)))


@every_room
def test_rooms_import_only_what_they_may(path):
    allowed = ALLOWED[path.parts[0]] | set(sys.stdlib_module_names) | {path.parts[0]}
    assert {
        name for name in imported(path) if top(name) not in allowed and not is_within(name, COMMON)
    } == set()


@pytest.mark.parametrize("path", source_files("guided_diffusion")[1:], ids=str)
def test_guided_diffusion_is_built_from_the_ground_up(path):
    own = level(".".join(path.with_suffix("").parts))
    assert own >= 0, f"{path} has no place in ORDER"
    above = {name for name in imported(path) if name.startswith("guided_diffusion.") and level(name) > own}
    excepted = [module for file, module in EXCEPTIONS if file == path.as_posix()]
    assert {name for name in above if not is_within(name, *excepted)} == set()


@pytest.mark.parametrize("path", source_files(*ROOMS, "scripts"), ids=str)
def test_nothing_imports_scripts_or_tests(path):
    foreign = {"scripts", "tests"}
    if path.parts[0] != "scripts":  # a script may call a function of its sibling
        foreign |= {file.stem for file in source_files("scripts")}
    assert {name for name in imported(path) if top(name) in foreign} == set()


@every_room
def test_argparse_is_where_flags_are(path):
    # Training checkpoints hold their flags, which are read as data.
    read_as_data = path == Path("guided_diffusion/files/checkpoints.py")
    assert "argparse" not in imported(path) or path.parts[:2] == ("guided_diffusion", "flags") or read_as_data


def test_exceptions_are_still_needed():
    for file, module in EXCEPTIONS:
        assert any(is_within(name, module) for name in imported(Path(file)))


@pytest.mark.parametrize("path", source_files("evaluation"), ids=str)
def test_files_that_run_as_scripts_are_not_named_like_the_standard_library(path):
    assert path.stem not in sys.stdlib_module_names


def test_guided_diffusion_loads_without_the_other_rooms_and_classifiers_without_their_extras():
    files = [path for path in source_files("guided_diffusion") if path.stem != "__init__"]
    modules = [".".join(path.with_suffix("").parts) for path in files]
    forbidden = ["scipy", "matplotlib", "mpi4py", "classifiers", "evaluation", "scripts"]
    extras = ["torchvision", "timm", "transformers", "diffusers"]  # of which each takes a second or more
    code = (
        "import importlib, sys\n"
        "sys.path.insert(0, '.')\n"
        f"for name in {modules!r}: importlib.import_module(name)\n"
        f"found = [name for name in {forbidden!r} if name in sys.modules]\n"
        "import classifiers\n"
        f"print(*found, *[name for name in {extras!r} if name in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == []
