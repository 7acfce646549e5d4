"""The Python of README and docs runs as it stands."""

import ast
import re
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from guided_diffusion.flags import adm, edm, fields
from guided_diffusion.flags import guidance as guidance_flags
from guided_diffusion.flags.presets import EDM_PRESETS, PRESETS
from guided_diffusion.guidance import GuidanceStep

ROOT = Path(__file__).parent.parent
RULES = "docs/guidance-rules.md"
PAGES = [path.relative_to(ROOT).as_posix() for path in (ROOT / "README.md", *(ROOT / "docs").glob("*.md"))]


def blocks(page, language="python"):
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / page).read_text(), flags=re.DOTALL)


def run(page):
    """Run the blocks of a page, one after another; returns their names."""
    names = {"__name__": "page"}
    for code in blocks(page):
        exec(compile(code, page, "exec"), names)
    return names


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page) and page != RULES])
def test_the_code_of_a_page_runs(page):
    run(page)


def test_the_rules_of_the_page_guide_every_sampler(capsys):
    run(RULES)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 6  # DDPM, DDIM, Euler, Heun, EDM, and DDIM with another direction and strength
    for line in lines:
        hits = sum(a == b for a, b in zip(ast.literal_eval(line), range(10), strict=True))
        assert hits >= 5, line  # chance is 1


@pytest.mark.parametrize(
    ("config", "presets", "preset", "more"),
    [
        (adm.ADMFlags, PRESETS, "digits", []),
        (edm.EDMFlags, EDM_PRESETS, "digits-edm", []),
        (edm.EDMFlags, EDM_PRESETS, "digits-edm", ["--guidance_form", "score"]),
    ],
)
def test_the_field_of_the_page_is_all_that_the_flag_takes(config, presets, preset, more):
    rule, body = {}, {}
    exec(blocks(RULES)[0], rule)
    [field] = blocks(RULES, "py")
    exec(field, {**vars(guidance_flags), "at_least": fields.at_least, **rule}, body)
    body["__annotations__"] = {"fixed_length": float}
    extended = dataclass(frozen=True, kw_only=True)(type("Extended", (config,), body))

    flags = fields.parse(extended, None, presets, ["--preset", preset, "--fixed_length", "0.25", *more])
    guidance = flags.build_guidance(lambda x: x.mean(dim=(2, 3)), None)
    x, step = torch.linspace(-1, 1, 24).view(2, 3, 2, 2), GuidanceStep(3, 5, 0.1, 0.1, 2.0, 0.4)
    shift = guidance(x, torch.tensor([0, 2]), step)
    torch.testing.assert_close(shift.square().mean(dim=(1, 2, 3)).sqrt(), torch.full((2,), 0.25))
    with pytest.raises(ValueError, match="--fixed_length must be at least 0, got -1"):
        fields.parse(extended, None, presets, ["--preset", preset, "--fixed_length", "-1", *more])


@pytest.mark.parametrize("page", [*PAGES, "CONTRIBUTING.md", "CHANGELOG.md"])
def test_pages_are_short_and_their_links_lead_somewhere(page):
    text = (ROOT / page).read_text()
    assert len(text.splitlines()) <= 160 or page.endswith("guidance-rules.md")
    assert all(len(line) <= 110 for line in text.splitlines())
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", text):
        assert target.startswith("https://") or (ROOT / page).parent.joinpath(target).exists(), target
