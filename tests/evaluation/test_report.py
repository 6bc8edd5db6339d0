import base64
import io
import math
import re
import subprocess
import sys
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from icd_lightning.evaluation.report import (
    MISSING,
    Bars,
    Curve,
    Panel,
    Report,
    Style,
    Table,
    draw_section,
    markdown_table,
    print_tables,
    write_report,
)
from icd_lightning.evaluation.report.canvas import (
    INNER,
    MIN_LABEL,
    PART_COLORS,
    Canvas,
    Font,
    draw_body,
    draw_report,
    wrap,
)
from icd_lightning.evaluation.report.figures import COLORS, curve_figure, text_width
from icd_lightning.evaluation.statistics import Estimate
from icd_lightning.tiny.rendering import render
from icd_lightning.tiny.scenes import random_scene

HOSTILE = """<script>alert("1")</script> & 'quotes' [bold] $x$"""


class Reader(HTMLParser):
    """Collects elements, and fails where they are not closed in the order in which they were opened."""

    VOID = ("meta", "link", "img")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict]] = []
        self.texts: list[str] = []
        self._open: list[str] = []
        self.feed(text)
        assert self._open == []

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        self._open += [] if tag in self.VOID else [tag]

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.texts.append(data)

    def all(self, tag: str) -> list[dict]:
        return [attributes for name, attributes in self.elements if name == tag]


def solid(color, height=64, width=64):
    return np.broadcast_to(np.array(color, np.uint8), (height, width, 3)).copy()


def scenes(count):
    rng = np.random.default_rng(0)
    return [(scene.caption(), render(scene)) for scene in (random_scene(rng) for _ in range(count))]


def panel(columns=3, rows=2, **options):
    labelled = tuple((caption, (picture,) * columns) for caption, picture in scenes(rows))
    return Panel("Pictures", "What they show.", tuple(f"column {i}" for i in range(columns)), labelled, **options)


def table(**options):
    rows = (("DDIM", 100, 43.2101, None), ("ours", 8, 27.8, 0.5), ("untrained", 8, 20.31, math.nan))
    return Table("Numbers", "", ("Method", "Evaluations", "PSNR", "Share"), rows, **options)


def curve(**options):
    return Curve("Loss", "", "step", "loss", {"a": ([1, 2, 3], [1.0, 0.5, 0.2]), "b": ([1, 3], [0.4, 0.3])}, **options)


def bars(*shares) -> Bars:
    return Bars("Votes", "", ("ours", "neither", "theirs"), tuple((f"row {i}\nquiet", s) for i, s in enumerate(shares)))


def report(*sections, **options):
    return Report("A title", "A subtitle", (("8", "evaluations"),), sections, **options)


def html_of(folder, *sections, **options):
    path, _ = write_report(report(*sections, **options), folder, png_sections=())
    return path.read_text()


# Files


def test_writes_both_files_and_leaves_nothing_else(tmp_path):
    everything = report(panel(), table(), curve(), facts={"seed": "0"})
    paths = write_report(everything, tmp_path / "new" / "folder")
    assert sorted(paths) == sorted((tmp_path / "new" / "folder").iterdir())
    contents = [path.read_bytes() for path in paths]
    assert [path.read_bytes() for path in write_report(everything, tmp_path)] == contents


def test_a_failed_drawing_leaves_the_old_file(tmp_path, monkeypatch):
    paths = write_report(report(), tmp_path)
    before = paths[1].read_bytes()
    monkeypatch.setattr(Canvas, "png", lambda _: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        write_report(report(table()), tmp_path)
    assert paths[1].read_bytes() == before
    assert set(tmp_path.iterdir()) == set(paths)


def test_importing_the_data_loads_no_drawing_library():
    libraries = {"PIL", "matplotlib", "jinja2", "rich", "torch"}
    code = f"import sys, icd_lightning.evaluation.report; print({libraries} & set(sys.modules))"
    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "set()\n"


def test_sections_may_be_chosen_for_the_picture(tmp_path):
    html, png = write_report(report(panel(rows=4), table()), tmp_path, png_sections=(panel(rows=1),))
    assert len(Reader(html.read_text()).all("img")) == 12
    assert png.read_bytes() == draw_report(report(panel(rows=1))).png()


# The page


def test_page_loads_nothing_from_elsewhere(tmp_path):
    text = html_of(tmp_path, panel(), table(), curve(marks=True), facts={"home": "https://example.org/"})
    page = Reader(text)
    for _, attributes in page.elements:
        for name in ("src", "href", "xlink:href", "srcset", "action", "data", "poster"):
            assert attributes.get(name, "data:").startswith(("data:", "#"))
    assert page.all("script") == []
    assert set(re.findall(r"url\((.)", text)) <= {"#"}
    assert "@import" not in text
    assert "default-src 'none'" in page.all("meta")[3]["content"]


def test_curves_are_drawn_in_the_colors_of_the_page_light_and_dark(tmp_path):
    text = html_of(tmp_path, curve())
    (svg,) = re.findall("<svg.*</svg>", text, re.DOTALL)
    assert svg.count("var(--series-0)") == svg.count("var(--series-1)") == 1
    assert re.findall(r"#[0-9a-f]{6}", svg) == []
    dark = text[text.index("prefers-color-scheme: dark") :]
    assert set(re.findall(r"var\((--[\w-]+)\)", text)) - {"--key", "--per-line"} <= set(
        re.findall(r"(--[\w-]+):", dark)
    )


def test_page_holds_every_picture_bit_for_bit_with_a_description(tmp_path):
    (one, first), (two, second) = scenes(2)
    large = solid((9, 9, 9), 512, 1024)
    rows = ((one, (first, None)), (two, (second, large)))
    images = Reader(html_of(tmp_path, Panel("Pictures", "", ("original", "rebuilt\n8 steps"), rows))).all("img")
    assert [image["alt"] for image in images] == [f"original: {one}", f"original: {two}", f"rebuilt 8 steps: {two}"]
    for image, picture in zip(images, (first, second), strict=False):
        data = base64.b64decode(image["src"].removeprefix("data:image/png;base64,"))
        np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(data))), picture)
    assert [(image["width"], image["height"]) for image in images] == [("64", "64"), ("64", "64"), ("384", "192")]


def test_page_shows_text_as_it_is(tmp_path):
    sections = (
        Panel(HOSTILE, HOSTILE, (HOSTILE,), ((HOSTILE, (solid((1, 2, 3)),)),)),
        Table(HOSTILE, HOSTILE, (HOSTILE,), ((HOSTILE,),)),
        Curve(HOSTILE, HOSTILE, HOSTILE, HOSTILE, {HOSTILE: ([0, 1], [0, 1])}),
        Bars(HOSTILE, HOSTILE, (HOSTILE,) * 3, ((HOSTILE, (1.0, 0.0, 0.0)),)),
    )
    path, _ = write_report(Report(HOSTILE, HOSTILE, ((HOSTILE, HOSTILE),), sections, {HOSTILE: HOSTILE}), tmp_path)
    page = Reader(path.read_text())
    assert page.all("script") == []
    assert page.all("img")[0]["alt"] == f"{HOSTILE}: {HOSTILE}"
    assert page.texts.count(HOSTILE) == 26


def test_tables_of_the_page_are_whole_and_numbers_stand_right(tmp_path):
    page = Reader(html_of(tmp_path, table(highlight_rows=(1,))))
    assert [head.get("class") for head in page.all("th") if head["scope"] == "col"] == [None] + ["number"] * 3
    assert len([head for head in page.all("th") if head["scope"] == "row"]) == 3
    assert [cell.get("class") for cell in page.all("td")] == ["number"] * 9
    assert [row.get("class") for row in page.all("tr")] == [None, None, "ours", None]


def test_bars_of_the_page_are_as_wide_as_their_shares(tmp_path):
    page = Reader(html_of(tmp_path, bars((0.5, 0.05, 0.45), (0.0, 0.0, 1.0))))
    assert [part["style"] for part in page.all("span")] == [f"width: {x}%" for x in (50.0, 5.0, 45.0, 0.0, 0.0, 100.0)]
    assert page.all("span")[1]["title"] == "neither: 5.0 %"
    assert [text for text in page.texts if "%" in text and ":" not in text] == ["50\xa0%", "45\xa0%", "100\xa0%"]


# The picture


def drawn(*sections, **options):
    return np.asarray(Image.open(io.BytesIO(draw_report(report(*sections, **options)).png())))


def where(picture, color):
    """Rows and columns of a colour, as (top, bottom, left, right), ends included."""
    y, x = np.nonzero((picture[..., :3] == np.array(color)).all(-1))
    return y.min(), y.max(), x.min(), x.max()


def test_picture_is_a_sheet_with_clear_corners():
    sheet = drawn(panel(), table(), curve())
    assert sheet.shape[1:] == (1600, 4)
    assert sheet[0, 0, 3] == 0
    assert sheet[sheet.shape[0] // 2, 800, 3] == 255
    margins = np.concatenate([sheet[:, :40, :3], sheet[:, -40:, :3]], axis=1)
    assert (margins == 255).all()


def test_pictures_stand_under_one_another_and_never_overlap():
    colors = [(200, 30 * i, 7) for i in range(6)]
    rows = tuple(
        (" ".join(["a very long caption"] * n), tuple(map(solid, colors[i : i + 3]))) for i, n in ((0, 1), (3, 30))
    )
    sheet = drawn(Panel("Pictures", "", ("a", "b", "c"), rows))
    boxes = np.array([where(sheet, color) for color in colors])
    assert len(set((boxes[:, 1] - boxes[:, 0]).tolist() + (boxes[:, 3] - boxes[:, 2]).tolist())) == 1  # equal squares
    np.testing.assert_array_equal(boxes[:3, 2:], boxes[3:, 2:])
    np.testing.assert_array_equal(boxes[:, :2].reshape(2, 3, 2), boxes[[0, 3], None, :2].repeat(3, axis=1))
    assert (boxes[1:3, 2] > boxes[0:2, 3]).all()
    assert boxes[3, 0] > boxes[0, 1]
    ink = (sheet[..., :3].astype(int).sum(-1) < 120) & (np.arange(1600) < boxes[0, 2])[None]
    assert np.nonzero(ink)[1].max() < boxes[0, 2] - 10  # the long caption keeps to its column


def test_bars_of_the_picture_are_as_wide_as_their_shares():
    colors = [tuple(bytes.fromhex(COLORS.get(color, color)[1:])) for color, _ in PART_COLORS]
    picture = draw_body(bars((0.25, 0.15, 0.6))).pixels()
    line = picture[where(picture, colors[2])[1] - 2]  # at the bar's lower edge, below the letters
    assert [int((line == color).all(-1).sum()) for color in colors] == [
        pytest.approx(share * (INNER - MIN_LABEL), abs=2) for share in (0.25, 0.15, 0.6)
    ]


def test_a_hole_stays_empty_and_ours_is_tinted():
    rows = (("", (solid((10, 200, 10)), None)), ("", (solid((10, 10, 200)), solid((200, 10, 10)))))
    sheet = drawn(Panel("Pictures", "", ("theirs", "ours"), rows, highlight=(1,)))
    row, column = where(sheet, (10, 200, 10)), where(sheet, (200, 10, 10))
    hole = sheet[row[0] : row[1], column[2] : column[3], :3]
    assert (hole == hole[0, 0]).all()
    assert (hole[0, 0] != 255).any()
    assert (sheet[row[0] : row[1], 100 : row[2] - 20, :3] == 255).all()


@pytest.mark.parametrize("count", [1, 14, 40])
def test_wide_tables_stay_on_the_sheet(count):
    header = ("Method", *(f"quantity number {i}" for i in range(count)))
    rows = tuple((f"method {n} with a long description of itself", *range(1000, 1000 + count)) for n in range(3))
    sheet = drawn(Table("Numbers", "", header, rows, highlight_rows=(1,)))
    assert (sheet[:, -40:, :3] == 255).all()


def test_numbers_of_a_wide_table_keep_to_one_line():
    rows = tuple(("method", *(Estimate(1000.0 * n, 0, 2) for _ in range(9))) for n in range(1, 4))
    header = ("", *(f"column number {i}" for i in range(9)))
    table = Table("", "", header, rows, styles=dict.fromkeys(header, Style(3)))
    canvas = draw_body(table, width=INNER)
    shown = [text.get_text() for text in canvas.axes.texts]
    assert [text for text in shown if "±" in text] == [cell.text for row in table.cells() for cell in row[1:]]


@pytest.mark.parametrize(
    "sections",
    [
        (),
        (Panel("Pictures", "", ("a",), ()),),
        (Panel("Pictures", "", ("a",), (("", (None,)),)),),
        (Panel("Pictures", "", ("a", "b"), (("x", (solid((1, 1, 1), 8, 40), solid((1, 1, 1), 40, 8))),)),),
        (Table("Numbers", "", ("a", "b"), ()),),
        (Curve("Loss", "", "x", "y", {"a": ([], [])}),),
        (Curve("Loss", "", "x", "y", {"a": ([1], [0.0])}, log_y=True),),
        (Curve("Loss", "", "x", "y", {"a": ([1], [2.0])}), curve(), curve()),
        (bars(),),
        (bars((0.0, 1.0, 0.0)),),
    ],
)
def test_little_data_makes_a_report_too(tmp_path, sections):
    html, png = write_report(Report("A title", "", (), sections), tmp_path)
    Reader(html.read_text())
    assert Image.open(png).width == 1600


def test_no_letter_that_reports_use_is_missing(recwarn):
    drawn(Table("α β τ ε σ λ", "→ ← ↑ ↓ ≤ ≥ ± × · – ∞ ² ü é", ("ö",), (("Ł",),)))  # noqa: RUF001
    assert [str(warning.message) for warning in recwarn if "lyph" in str(warning.message)] == []


@pytest.mark.parametrize("width", [40, 150, 600])
def test_wrapped_lines_fit_and_lose_no_letter(width):
    text = "a small red striped circle left of a large blue ring → w ≤ 5\nhttps://example.org/a-word-wider-than-a-line"
    wrapped = [line for line, _ in wrap(text, Font(22), width)]
    assert all(text_width(line, Font(22)) <= width for line in wrapped)
    assert "".join(wrapped).replace(" ", "") == "".join(text.split())
    assert wrap("", Font(22), width) == []


# Curves


def lines_of(shown: Curve):
    (axes,) = curve_figure(shown, 600, 400, 20).axes
    return axes, [line.get_xydata() for line in axes.get_lines()]


def test_what_is_not_finite_or_not_above_0_on_a_log_axis_is_a_gap():
    gapped = Curve("", "", "x", "y", {"a": ([0, 1, 2, 3, 4], [1.0, 10.0, math.nan, 0.0, 100.0])}, log_y=True)
    axes, (alone, line) = lines_of(gapped)
    assert alone.tolist() == [[4, 100]]  # no line goes there: a dot
    assert np.isnan(line).all(1).tolist() == [False, False, True, True, False]
    assert axes.get_yscale() == "log"


@pytest.mark.parametrize("log_y", [False, True])
@pytest.mark.parametrize("values", [(1e-7, 3e-7), (0.003, 0.09), (7.0, 9.0), (999.0, 1001.0), (5.0, 5.0), (1.0, 1e9)])
def test_axes_hold_the_data_and_ticks_that_differ(values, log_y):
    axes, _ = lines_of(Curve("", "", "x", "y", {"a": ([0, 1], values)}, log_y=log_y))
    low, high = axes.get_ylim()
    assert low <= values[0] <= values[1] <= high
    axes.figure.draw_without_rendering()
    ticks = [label.get_text() for label in axes.get_yticklabels() if low <= label.get_position()[1] <= high]
    assert 2 <= len(ticks) == len(set(ticks)) <= 9


def test_marks_tell_as_many_series_apart_as_there_are_methods(tmp_path):
    many = Curve("", "", "x", "y", {f"m{i}": ([i], [i * i]) for i in range(14)}, marks=True)
    axes, _ = lines_of(many)
    looks = {(x.get_color(), x.get_marker(), x.get_markerfacecolor()) for x in axes.get_lines()}
    assert len(looks) == len({many.look(i) for i in range(14)}) == 14
    keys = Reader(html_of(tmp_path, many)).all("li")
    assert [key["class"] for key in keys] == ["disc"] * 6 + ["ring"] * 6 + ["square"] * 2
    assert draw_section(many, tmp_path / "many.png").stat().st_size > 0


# Numbers


def texts(shown):
    return [[cell.text for cell in cells] for cells in shown.cells()]


def test_numbers_are_rounded_by_column():
    assert texts(table()) == [
        ["DDIM", "100", "43.2", MISSING],
        ["ours", "8", "27.8", "0.500"],
        ["untrained", "8", "20.3", "nan"],
    ]
    assert texts(table(styles={"PSNR": Style(2), "other": Style(7)}))[0] == ["DDIM", "100", "43.21", MISSING]
    values = ((math.inf, np.float32(0.25), np.int64(1234567)), (-math.inf, -1234.5, 3))
    assert texts(Table("", "", ("a", "b", "c"), values)) == [["∞", "0", "1,234,567"], ["-∞", "-1,234", "3"]]


def test_the_best_of_a_column_are_marked_by_their_means():
    styles = {"Evaluations": Style(best="min"), "PSNR": Style(best="max"), "Share": Style(1, "max", 100)}
    shown = table(styles=styles)
    assert [cells[3].text for cells in shown.cells()] == [MISSING, "50.0", "nan"]
    assert [[cell.best for cell in cells] for cells in shown.cells()] == [
        [False, False, True, False],
        [False, True, False, True],
        [False, True, False, False],
    ]
    assert shown.heads() == ["Method", "Evaluations\u00a0↓", "PSNR\u00a0↑", "Share (%)\u00a0↑"]
    assert shown.legend == "↑ higher is better, ↓ lower is better, best in bold"
    assert table().legend == ""
    means = (Estimate(1.001, 0.9, 1.1), Estimate(1.002, 0.5, 1.5), Estimate(0.5, 0.1, 3.0), 1.0)
    close = Table("", "", ("a",), tuple((mean,) for mean in means), styles={"a": Style(2, "max")})
    assert texts(close) == [["1.00 ± 0.10"], ["1.00 ± 0.50"], ["0.50 ± 1.45"], ["1.00"]]
    assert [cells[0].best for cells in close.cells()] == [True, True, False, True]  # they read the same


def test_terminal_table_shows_values_as_they_are():
    console = Console(file=io.StringIO(), width=120)
    rows = ((HOSTILE, 1.25), ("b", None))
    print_tables([Table("Title [red]", HOSTILE, ("Method [b]", "x"), rows, styles={"x": Style(best="max")})], console)
    out = console.file.getvalue()
    for text in ("Title [red]", "Method [b]", HOSTILE, "1.25", "higher is better"):
        assert text in out


# Mistakes


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Panel("P", "", ("a", "b"), (("x", (None,)),)), "row 'x' has 1 pictures for 2 columns"),
        (lambda: Table("T", "", ("a", "b"), ((1,),)), r"1 values for 2 columns: \(1,\)"),
        (lambda: Curve("C", "", "x", "y", {}), "0 series"),
        (lambda: bars((0.5, 0.1, 0.1)), r"'row 0.*has \(0.5, 0.1, 0.1\), which are not shares of a whole"),
        (lambda: bars((1.5, -0.5, 0.0)), "not shares of a whole"),
        (lambda: bars((math.nan, 0.5, 0.5)), "not shares of a whole"),
        (lambda: Curve("C", "", "x", "y", {str(i): ([], []) for i in range(7)}), "7 series; show 1 to 6"),
    ],
)
def test_mistakes_are_named(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_a_table_in_markdown_has_a_line_for_each_row_and_its_note():
    table = Table("Title", "What it means.", ("method", "dB"), (("a", 1.25), ("b|\nc", None)), styles={"dB": Style(1)})
    lines = markdown_table(table).splitlines()
    assert lines[0] == "**Title**"
    assert lines[2:6] == ["| method | dB |", "| --- | --: |", "| a | 1.2 |", f"| b\\| c | {MISSING} |"]
    assert lines[-1] == "What it means."
