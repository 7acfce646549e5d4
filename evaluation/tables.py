"""What was measured, as a text table and in Markdown.

Results of different protocols or references are not comparable. Where they meet, a warning stands above them,
and each row says its own.
"""

from collections.abc import Sequence

from evaluation.evaluator import Result
from evaluation.metrics import METRICS, is_possible, metric_label, rounded

WARNING = (
    "WARNING: DIFFERENT PROTOCOLS OR REFERENCES: NUMBERS OF TWO ROWS MUST NOT BE COMPARED "
    "UNLESS THEIR LAST COLUMNS AGREE"
)


def table(results: Sequence[Result]) -> str:
    """One row per set, with the number of images; the protocol, the feature network and the reference above
    it, the notes below it.
    """
    rows = _cells(results)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip() for row in rows
    ]
    return "\n".join([*_heading(results), "", *lines, *_footnotes(results)])


def markdown_table(results: Sequence[Result]) -> str:
    """The same in Markdown."""
    head, *rows = _cells(results)
    align = ["---"] + ["---:"] * (len(head) - 1)
    lines = [
        "| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in (head, align, *rows)
    ]
    return "\n\n".join(
        [*_heading(results), "\n".join(lines), "\n".join(f"- {note}" for note in _notes(results))]
    )


def _heading(results):
    if differ(results):
        return [WARNING]
    reference = results[0].reference
    statistics = f"statistics {reference['statistics']} ({reference['statistics_count'] or 'unknown number'})"
    digest = f"fingerprint {str(reference['fingerprint'])[:8]}"
    if reference["file_sha256"]:
        digest = f"sha256 {reference['file_sha256'][:8]}"
    return [
        f"protocol {results[0].protocol}",
        f"reference {reference['images']}: {reference['count'] or 'no'} images, {statistics}, {digest}",
    ]


def differ(results: Sequence[Result]) -> bool:
    """Whether some of the results must not be compared with each other."""
    return len({_comparable(result) for result in results}) > 1


def by_network(results: Sequence[Result]) -> list[list[Result]]:
    """The results of each feature network, in the order in which they come."""
    groups: dict[str, list[Result]] = {}
    for result in results:
        groups.setdefault(result.samples["features"], []).append(result)
    return list(groups.values())


def side_by_side(groups: Sequence[Sequence[Result]]) -> str:
    """A Markdown table of the same sets under several networks, a column for each, a row for every number."""
    networks = [group[0].samples["features"] for group in groups]
    lines = [f"| set | number | {' | '.join(networks)} |", "| --- | --- |" + " ---: |" * len(groups)]
    for results in zip(*groups, strict=True):
        for metric in METRICS:
            labels = dict.fromkeys(_label(result, metric.key) for result in results)
            numbers = [_number(result, metric.key) for result in results]
            if set(numbers) != {"n/a"}:
                name = results[0].name.replace("|", "\\|")
                lines.append(f"| {name} | {' / '.join(labels)} | {' | '.join(numbers)} |")
    return "\n".join(lines)


def _comparable(result):
    """What two rows must share."""
    return result.protocol, result.reference["fingerprint"], result.reference["file_sha256"]


def _cells(results):
    """Rows of strings, the titles first; a column for every number that some row has or might have had."""
    labels = list(
        dict.fromkeys(
            _label(result, metric.key)
            for metric in METRICS
            for result in results
            if is_possible(metric, result.samples, result.reference)
        )
    )
    labels += dict.fromkeys(f"{_label(result, 'fid')}-inf" for result in results if result.fid_infinity)
    told = differ(results)
    rows = [["set", "images", *labels, *(["protocol", "reference"] if told else [])]]
    for result in results:
        values = {_label(result, metric.key): _number(result, metric.key) for metric in METRICS}
        if line := result.fid_infinity:
            values[f"{_label(result, 'fid')}-inf"] = f"{line.value:.3f} ± {line.standard_error:.3f}"
        about = [result.protocol, result.reference["images"]] if told else []
        numbers = [values.get(label, "n/a") for label in labels]
        rows.append([result.name, str(result.count or "n/a"), *numbers, *about])
    return rows


def _label(result, key):
    return metric_label(key, result.samples["features"])


def _number(result, key):
    value = result.metrics[key]
    if value is None:
        return "n/a"
    text = rounded(key, value)
    return f"{text} ± {result.fid_error.std:.3f}" if key == "fid" and result.fid_error else text


def _footnotes(results):
    notes = _notes(results)
    return ["", *(f"note: {note}" for note in notes)] if notes else []


def _notes(results):
    """Each note once, with the sets that it is about unless it names one itself; then what the ± are."""
    sets: dict[str, list[str]] = {}
    for result in results:
        for note in result.notes:
            sets.setdefault(note, []).append(result.name)
    notes = []
    for note, names in sets.items():
        about = "all sets" if len(names) == len(results) > 1 else ", ".join(names)
        notes.append(note if note.startswith((f"{names[0]} ", f"{names[0]}:")) else f"{about}: {note}")
    if len({result.count for result in results}) > 1:
        notes.append(
            "the sets differ in their number of images, by which Inception Scores and all distances but KID "
            "are biased: compare equal ones"
        )
    if any(result.fid_error for result in results):
        notes.append(
            "± is the standard deviation over bootstrap resamples; of a distance that is mostly bias it is "
            "too large"
        )
    if any(result.fid_infinity for result in results):
        notes.append(
            "-inf is extrapolated to infinitely many images; its ± is that of the line alone, too small to "
            "compare two sets by"
        )
    return notes
