"""The README's Python runs as it stands."""

import ast
import re
from pathlib import Path

README = (Path(__file__).parent.parent / "README.md").read_text()


def test_the_guidance_rule_of_the_readme_runs(capsys):
    (code,) = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    exec(compile(code, "README.md", "exec"), {"__name__": "readme"})
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3  # ancestral, DDIM and EDM
    for line in lines:
        hits = sum(a == b for a, b in zip(ast.literal_eval(line), range(10), strict=True))
        assert hits >= 5, line  # chance is 1
