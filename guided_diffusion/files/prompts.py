"""Prompts, the words that a classifier such as CLIP compares an image with."""

from pathlib import Path

ENDINGS = (".txt", ".csv", ".json")  # of what is meant as a file, there or not


def prompts_file(prompts: str) -> Path | None:
    """The file that `prompts` names, None where it is the text of a prompt itself. Raises FileNotFoundError
    where it ends as a file does and there is none.
    """
    path = Path(prompts)
    if "\n" not in prompts and len(prompts) < 256 and path.is_file():  # a longer one no system can ask for
        return path
    if path.suffix in ENDINGS:
        raise FileNotFoundError(f"no file {prompts}: give a file with a prompt for each class, or a text")
    return None


def read_prompts(prompts: str) -> list[str]:
    """The prompts: of a file its lines, a class each; of a text, that text and the empty one, against which
    it is weighed. Raises FileNotFoundError, and ValueError for a file of other content.
    """
    file = prompts_file(prompts)
    if file is None:
        return [prompts, ""]
    try:
        lines = [line.strip() for line in file.read_text(encoding="utf-8-sig").rstrip().splitlines()]
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not text in UTF-8 ({error.reason})") from error
    if not all(lines) or not lines:
        number = lines.index("") + 1 if lines else 1
        raise ValueError(f"{file} has no prompt in line {number}: write one for each class")
    return lines
