"""Renders a report as one HTML file that loads nothing from the network."""

from __future__ import annotations

from xml.etree import ElementTree as ET

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from deskside.bench.report import answers, environment, plots, representative, tables
from deskside.bench.report.svg import Plot, sample_mark
from deskside.bench.report.view import View


def render(view: View) -> str:
    templates = Environment(
        loader=PackageLoader("deskside.bench.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    template = templates.get_template("report.html.jinja")
    return template.render(
        view=view,
        tables=tables,
        answers=answers,
        environment=environment,
        representative=representative,
        plots=plots.draw(view.record, view.summary),
        svg=_svg,
        sample_mark=lambda shape, style: Markup(sample_mark(shape, style)),
    )


def _svg(plot: Plot) -> Markup:
    # ElementTree escapes all text.
    return Markup(ET.tostring(plot.root, encoding="unicode"))
