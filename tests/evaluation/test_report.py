"""The table, the JSON and the page: every number under its name, the protocol above it, and a loud mark where
two protocols meet.
"""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from PIL import Image

from evaluation import pictures
from evaluation.accuracy import Judgement
from evaluation.evaluator import Result
from evaluation.frechet import ErrorBar, Extrapolation
from evaluation.metrics import METRICS
from evaluation.report import to_json, write_report
from evaluation.tables import WARNING, markdown_table, table

ROOT = Path(__file__).resolve().parents[2]
KEYS = [metric.key for metric in METRICS]
NUMBERS = (2.19, 5.09, 141.4767, 0.79, 0.58, 0.9, 0.8, -0.00012, 31.2, None, 0.91, 0.82, None, None)
VALUES = dict(zip(KEYS, NUMBERS, strict=True))
MEASURED = [value for value in NUMBERS if value is not None]
REFERENCE_NOTES = ["fewer than 10,000 images"]
COMPARISON = {"a": "first", "b": "second", "verdict": "first is better than second"}


def provenance(name, protocol="adm", features="inception-2015-12-05", digest="ab" * 32):
    about = {
        "images": name,
        "features": features,
        "protocol": protocol,
        "weights_sha256": "6726825d" * 8,
        "count": 50000,
    }
    return about | {
        "fingerprint": digest,
        "file_sha256": digest,
        "statistics": "in the file",
        "statistics_count": 60000,
    }


def result(name, **changes):
    made = Result(name, 50000, VALUES, [], provenance(name), provenance("ref.npz"), "float32")
    return dataclasses.replace(made, **changes)


def rows_of(text):
    """{set: {title: cell}} of a text table, whose columns are two blanks apart."""
    lines = [[cell.strip() for cell in line.split("  ") if cell.strip()] for line in text.splitlines()]
    head = next(i for i, line in enumerate(lines) if line and line[0] == "set")
    return {
        line[0]: dict(zip(lines[head], line, strict=True))
        for line in lines[head + 1 :]
        if len(line) == len(lines[head])
    }


def test_a_row_per_set_with_the_number_of_images_and_what_they_share_above():
    text = table(
        [
            result("first"),
            result("second", count=100, metrics={**VALUES, "sfid": None}, notes=["no sFID: why"]),
        ]
    )
    rows = rows_of(text)
    expected = {
        "FID": "2.190",
        "sFID": "5.090",
        "IS": "141.477",
        "precision": "0.7900",
        "recall": "0.5800",
        "KID": "-0.00012",
    }
    assert rows["first"].items() >= {"images": "50000", **expected}.items()
    assert (rows["second"]["images"], rows["second"]["sFID"]) == ("100", "n/a")
    above = text[: text.index("\nset")]
    for said in (
        "protocol adm",
        "inception-2015-12-05",
        "6726825d",
        "float32",
        "ref.npz: 50000 images, statistics in the file (60000)",
        "abababab",
    ):
        assert said in above
    assert "note: second: no sFID: why" in text
    assert WARNING not in text and "protocol" not in rows["first"]


def test_error_bars_and_extrapolations_where_there_are_some():
    measured = result(
        "first", fid_error=ErrorBar(2.19, 0.05, 2.3, 2.1, 2.3), fid_infinity=Extrapolation(2.01, 0.02, 9.0)
    )
    text = table([measured, result("second")])
    rows = rows_of(text)
    assert (rows["first"]["FID"], rows["first"]["FID-inf"]) == ("2.190 ± 0.050", "2.010 ± 0.020")
    assert (rows["second"]["FID"], rows["second"]["FID-inf"]) == ("2.190", "n/a")
    assert "± is the standard deviation over bootstrap resamples" in text
    assert "±" not in table([result("second")])


def digits(name):
    return result(
        name,
        samples=provenance(name, "digits", "digits"),
        reference=provenance("ref.npz", "digits", "digits"),
    )


def test_the_distance_of_another_network_is_never_called_fid():
    measured = dataclasses.replace(
        digits("first"),
        fid_error=ErrorBar(2.19, 0.05, 2.3, 2.1, 2.3),
        fid_infinity=Extrapolation(2.01, 0.02, 9.0),
    )
    everything = table([measured]) + markdown_table([measured]) + json.dumps(to_json([measured]))
    assert "fid" not in everything.lower() and "FD(digits)" in everything
    row = to_json([measured])["results"][0]
    assert (row["fd_digits"], row["fd_digits_bootstrap"]["std"], row["fd_digits_infinity"]["value"]) == (
        2.19,
        0.05,
        2.01,
    )


@pytest.mark.parametrize(
    "other",
    [
        result("second", samples=provenance("second", "pytorch-fid")),
        digits("second"),
        result("second", precision_recall_dtype="float16"),
        result("second", reference=provenance("other.npz", digest="cd" * 32)),
    ],
    ids=["protocol", "features", "dtype", "reference"],
)
def test_protocols_that_meet_are_marked_loudly(tmp_path, other):
    first = result("first")
    for text in (table([first, other]), markdown_table([first, other])):
        assert text.splitlines()[0] == WARNING
        for measured in (first, other):
            (line,) = [line for line in text.splitlines() if measured.name in line]
            assert measured.protocol in line and measured.reference["images"] in line
    # Two networks have a table each, with a heading of its own.
    apart = other.samples["features"] != first.samples["features"]
    assert to_json([first, other]).get("warning") == (None if apart else WARNING)
    assert "warning" not in to_json([first, first])
    assert (WARNING in write_report(tmp_path, [first, other], {}).read_text()) != apart


def test_two_networks_have_no_column_in_common():
    rows = rows_of(table([result("first"), digits("second")]))
    assert (rows["first"]["FID"], rows["first"]["FD(digits)"]) == ("2.190", "n/a")
    assert (rows["second"]["FID"], rows["second"]["FD(digits)"]) == ("n/a", "2.190")


def test_json_holds_everything_and_is_json():
    content = to_json([result("first", notes=["note"])], REFERENCE_NOTES, COMPARISON)
    assert json.loads(json.dumps(content, allow_nan=False)) == content
    row = content["results"][0]
    assert {metric: row[metric] for metric in KEYS} == VALUES
    assert (row["name"], row["num_images"], row["notes"]) == ("first", 50000, ["note"])
    sides = {"samples": provenance("first"), "reference": provenance("ref.npz")}
    assert row["provenance"] == {**sides, "options": {}, "precision_recall_dtype": "float32"}
    assert (content["reference_notes"], content["comparison"]) == (REFERENCE_NOTES, COMPARISON)


def test_the_page_links_pictures_that_are_there(tmp_path):
    grids = {
        name: np.full((n, 16, 16, 3), 99, np.uint8) for name, n in (("run a/first", 64), ("run b/first", 5))
    }
    without_images = result("statistics", metrics={**dict.fromkeys(KEYS), "fid": 3.0})
    page = write_report(
        tmp_path / "new" / "report",
        [result("run a/first"), without_images],
        grids,
        REFERENCE_NOTES,
        COMPARISON,
    )
    text = page.read_text()
    links = [part.split(")")[0] for part in text.split("](")[1:]]
    assert len(links) == len(set(links)) == 4
    for link in links:
        with Image.open(page.parent / link) as picture:
            assert min(picture.size) >= 64 and len(picture.convert("RGB").getcolors(1 << 20)) > 1
    assert all(
        said in text
        for said in ("| statistics | 50000 | 3.000 | n/a |", *REFERENCE_NOTES, COMPARISON["verdict"])
    )
    assert json.loads((page.parent / "report.json").read_text()) == to_json(
        [result("run a/first"), without_images], REFERENCE_NOTES, COMPARISON
    )


def test_the_pictures_name_the_sets_and_put_the_points_where_they_belong(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(pictures, "save_figure", lambda figure, path, **_: figures.append(figure))
    write_report(tmp_path, [result("first"), result("a" * 60)], {})
    bars, plane = figures
    panels = [axes for axes in bars.axes if axes.get_visible()]
    assert [axes.get_title() for axes in panels] == [
        "FID",
        "sFID",
        "IS",
        "precision",
        "recall",
        "density",
        "coverage",
        "KID",
        "MIND",
        "clipped density",
        "clipped coverage",
    ]
    assert [bar.get_width() for axes in panels for bar in axes.patches[:1]] == MEASURED
    names = [label.get_text() for label in panels[0].get_yticklabels()]
    assert names[0] == "first" and len(names[1]) <= pictures.LONGEST_NAME and "…" in names[1]
    (axes,) = plane.axes
    assert (axes.get_xlim(), axes.get_ylim(), axes.get_xlabel(), axes.get_ylabel()) == (
        (0, 1),
        (0, 1),
        "recall",
        "precision",
    )
    assert [(line.get_xdata()[0], line.get_ydata()[0]) for line in axes.lines] == [(0.58, 0.79)] * 2


def test_two_networks_stand_side_by_side(tmp_path):
    judged = Judgement("digits_judge", 0.75, {0: (1.0, 2), 3: (0.5, 2)})
    results = [result("a|b", judgement=judged), result("c", nearest_pairs=[(4, 2, 0.5)])]
    results += [digits("a|b"), digits("c")]
    pair = [np.full((3, 16, 16, 3), shade, np.uint8) for shade in (9, 200)]
    page = write_report(tmp_path, results, {}, nearest={"c (digits)": pair})
    text = page.read_text()
    assert "| set | number | inception-2015-12-05 | digits |" in text
    assert (
        "| a\\|b | FID / FD(digits) | 2.190 | 2.190 |" in text and "| c | recall | 0.5800 | 0.5800 |" in text
    )
    for stem in ("bars", "precision_recall"):
        files = [f"{stem}-{network}.png" for network in ("inception-2015-12-05", "digits")]
        assert [(tmp_path / file).is_file() and f"]({file})" in text for file in files] == [True, True]
    assert "digits_judge on a|b: accuracy 75.0%; lowest by class: 3 50.0%, 0 100.0%" in text
    assert "| 3 | 2 | 50.0% |" in text
    with Image.open(tmp_path / "nearest1-c-digits-.png") as picture:
        assert picture.getpixel((160, 20)) == (9,) * 3 and picture.getpixel((160, 100)) == (200,) * 3
    rows = json.loads((tmp_path / "report.json").read_text())["results"]
    assert rows[0]["judgement"]["by_class"]["3"] == [0.5, 2] and rows[1]["nearest_pairs"] == [[4, 2, 0.5]]


NAMES = ["$a_{", "$x$", "_hidden", "caf\u00e9 | b", "\udcff"]


def test_any_name_of_a_set_and_any_settings_of_matplotlib_leave_the_report_whole(tmp_path, monkeypatch):
    for key, value in {"text.usetex": True, "svg.fonttype": "none", "font.size": 1000}.items():
        monkeypatch.setitem(matplotlib.rcParams, key, value)
    results = [result(name, reference=provenance("$ref.npz")) for name in NAMES]
    results.append(result("other $", samples=provenance("other $", "pytorch-fid")))
    page = write_report(tmp_path, results, {name: np.zeros((2, 4, 4, 3), np.uint8) for name in NAMES})
    assert len(list(tmp_path.glob("*.png"))) == 2 + len(NAMES)
    text = page.read_text()
    assert all(name in text for name in NAMES[:3]) and "\\udcff" in text
    assert [row["name"] for row in json.loads((tmp_path / "report.json").read_text())["results"]][
        :-1
    ] == NAMES


def test_a_picture_that_cannot_be_drawn_leaves_the_numbers(tmp_path, monkeypatch):
    monkeypatch.setattr("evaluation.report.draw_bars", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write_report(tmp_path, [result("first")], {})
    assert json.loads((tmp_path / "report.json").read_text()) == to_json([result("first")])


def test_what_only_some_need_is_not_loaded_by_all():
    code = "import sys, evaluation.report; print({'matplotlib', 'transformers'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "set()", done.stderr
