"""How large things may be, read from the source."""

import ast
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("guided_diffusion", "classifiers", "evaluation", "scripts", "tests")
FILE_LINES, FUNCTION_LINES, COLUMNS, PARAMETERS, TESTS_TO_SOURCE = 300, 60, 110, 8, 1.1
LONGER_FILES = {"guided_diffusion/unet.py": 450}
# Public names that are known with these arguments: guided-diffusion's, EDM's, and guidance's two rules.
MORE_PARAMETERS = {
    "guided_diffusion/gaussian_diffusion.py": {
        "GaussianDiffusion.p_sample",
        "GaussianDiffusion.ddim_sample",
        "GaussianDiffusion.p_sample_loop_progressive",
        "GaussianDiffusion.ddim_sample_loop_progressive",
    },
    "guided_diffusion/script_util.py": {
        "create_model_and_diffusion",
        "create_model",
        "create_classifier",
        "create_gaussian_diffusion",
        "create_classifier_and_diffusion",
    },
    "guided_diffusion/unet.py": {"UNetModel.__init__", "EncoderUNetModel.__init__"},
    "guided_diffusion/edm.py": {"edm_sampler"},
    "guided_diffusion/edm_unet.py": {"DhariwalUNet.__init__"},
    "guided_diffusion/song_unet.py": {"SongUNet.__init__"},
    "guided_diffusion/preconditioning.py": {"VPPrecond.__init__", "iDDPMPrecond.__init__"},
    "guided_diffusion/dit.py": {"DiT.__init__"},
    "guided_diffusion/train_util.py": {"TrainLoop.__init__"},
    "guided_diffusion/guidance/classifier.py": {"ClassifierGuidance.__init__", "released_edm_guidance"},
}


@cache
def sources():
    """{path from the root: text} of every file of ours."""
    paths = [*ROOT.glob("*.py"), *(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))]
    return {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in sorted(paths)}


def functions(node, prefix=""):
    """(qualified name, node) of every function, those inside of others too."""
    for child in ast.iter_child_nodes(node):
        name = f"{prefix}{getattr(child, 'name', '')}"
        if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield name, child
        named = isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef))
        yield from functions(child, f"{name}." if named else prefix)


def parameters(function):
    args = function.args
    names = [each.arg for each in (*args.posonlyargs, *args.args, *args.kwonlyargs)]
    return len([name for name in names if name not in ("self", "cls")])


def test_there_is_something_to_look_at():
    assert len(sources()) > 100
    assert all(any(path.startswith(f"{folder}/") for path in sources()) for folder in FOLDERS)


@pytest.mark.parametrize("path", sources())
def test_size(path):
    lines = sources()[path].splitlines()
    assert len(lines) <= LONGER_FILES.get(path, FILE_LINES), f"{path} has {len(lines)} lines"
    wide = {i: len(line) for i, line in enumerate(lines, 1) if len(line) > COLUMNS}
    assert wide == {}, f"{path}: {{line: columns}}"
    all_functions = dict(functions(ast.parse(sources()[path])))
    lengths = {name: each.end_lineno - each.lineno + 1 for name, each in all_functions.items()}
    assert {name: n for name, n in lengths.items() if n > FUNCTION_LINES} == {}, (
        f"{path}: {{function: lines}}"
    )
    counts = {name: parameters(each) for name, each in all_functions.items()}
    many = {name: n for name, n in counts.items() if n > PARAMETERS}
    assert set(many) <= MORE_PARAMETERS.get(path, set()), f"{path}: {{function: parameters}} is {many}"


def test_tests_are_about_as_long_as_the_source():
    lengths = {path: len(text.splitlines()) for path, text in sources().items()}
    tests = sum(n for path, n in lengths.items() if path.startswith("tests/"))
    source = sum(lengths.values()) - tests
    assert tests <= TESTS_TO_SOURCE * source, f"{tests} lines of tests, {source} of source"
