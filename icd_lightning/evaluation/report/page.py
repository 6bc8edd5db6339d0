"""A `Report` as one HTML file: pictures inside it, light and dark, for a phone and a screen reader too."""

from __future__ import annotations

import base64
from io import BytesIO
from itertools import groupby
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from PIL import Image

from icd_lightning.evaluation.report import Bars, Curve, Panel, Picture, Report
from icd_lightning.evaluation.report.figures import COLORS, SERIES, curve_svg

MAX_SIDE = 384  # pixels of a picture in the page; larger ones would make it heavy, and are shown smaller anyhow
VARIABLES = {**COLORS, **{f"series-{index}": color for index, color in enumerate(SERIES)}}


def templates(folder: Path) -> Environment:
    """Of HTML; values are escaped, and one that is missing is an error."""
    loader = FileSystemLoader(folder)
    return Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)


def page(report: Report) -> str:
    environment = templates(Path(__file__).parent)
    environment.tests["panel"] = lambda section: isinstance(section, Panel)
    environment.tests["bars"] = lambda section: isinstance(section, Bars)
    variables = {color: f"var(--{name})" for name, color in VARIABLES.items()}  # the page's colours, light or dark
    environment.filters.update(image=_image, svg=lambda curve: Markup(curve_svg(curve, variables)))
    numbered = groupby(enumerate(report.sections), key=lambda pair: isinstance(pair[1], Curve))
    groups = [(are_curves, list(group)) for are_curves, group in numbered]
    return environment.get_template("page.html.j2").render(report=report, groups=groups, colors=VARIABLES)


def _image(picture: Picture) -> dict[str, object]:
    image = Image.fromarray(picture)
    image.thumbnail((MAX_SIDE, MAX_SIDE), Image.Resampling.LANCZOS)
    buffer = BytesIO()
    image.save(buffer, format="PNG", optimize=True)
    data = base64.b64encode(buffer.getvalue()).decode()
    return {"width": image.width, "height": image.height, "src": f"data:image/png;base64,{data}"}
