"""Draws plots as SVG elements.

ElementTree escapes all text. Colours are classes, so the page's style sheet sets them for light and
dark.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from xml.etree import ElementTree as ET

WIDTH, HEIGHT = 460, 300
LEFT, RIGHT, TOP, BOTTOM = 54, 14, 12, 44


@dataclass(frozen=True)
class Axis:
    """An axis from `low` to `high`. log: logarithmic; then both must be above 0."""

    label: str
    low: float
    high: float
    log: bool = False

    def place(self, value: float) -> float:
        """The place of a value: 0 at `low`, 1 at `high`. Values outside go to the nearer end."""
        at, low, high = (self._scaled(v) for v in (value, self.low, self.high))
        return min(max((at - low) / (high - low), 0.0), 1.0)

    def _scaled(self, value: float) -> float:
        return math.log(max(value, 1e-300)) if self.log else value

    def ticks(self) -> list[float]:
        if not self.log or self.high < 4 * self.low:
            return _linear_ticks(self.low, self.high)
        powers = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        for steps in ((1, 2, 5), (1,)):
            found = [s * 10.0**p for p in powers for s in steps]
            found = [t for t in found if self.low <= t <= self.high]
            if len(found) <= 7:
                break
        return found if len(found) > 1 else [self.low, self.high]


def _linear_ticks(low: float, high: float) -> list[float]:
    raw = (high - low) / 5
    unit = 10.0 ** math.floor(math.log10(raw))
    step = next(m * unit for m in (1, 2, 5, 10) if m * unit >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [k * step for k in range(first, math.floor(high / step + 1e-9) + 1)]


def axis(label: str, values: Sequence[float], *, log: bool = False, zero: bool = False) -> Axis:
    """An axis that holds the values, with some margin. zero: start at 0."""
    low, high = min(values, default=0.0), max(values, default=1.0)
    if high - low < 1e-9 * abs(high):
        high = low  # closer values would leave nothing between the ends, because of rounding
    if log and low > 0:
        spread = max(high / low, 1.2) ** 0.04
        return Axis(label, low / spread, high * spread, log=True)
    low = min(low, 0.0) if zero else low
    air = 0.06 * (high - low) or 0.05 * abs(high) or 1.0
    return Axis(label, low if zero else low - air, high + air)


def tick_text(value: float) -> str:
    if abs(value) >= 1000:
        return f"{value / 1000:,.6g}k"
    return f"{value:.4g}"


@dataclass
class Plot:
    """A plot. A `y` axis without a label is not drawn.

    name, text: title and description, for screen readers.
    key: the legend, as (class, shape, label).
    note: text below the plot.
    """

    name: str
    text: str
    x: Axis
    y: Axis
    height: float = HEIGHT
    key: list[tuple[str, str, str]] = field(default_factory=list)
    note: str = ""

    def __post_init__(self) -> None:
        self.left = LEFT if self.y.label else RIGHT
        box = f"0 0 {WIDTH} {self.height:g}"
        self.root = ET.Element("svg", {"viewBox": box, "role": "img", "aria-label": self.name})
        ET.SubElement(self.root, "title").text = self.name
        ET.SubElement(self.root, "desc").text = self.text
        self._frame()

    def _frame(self) -> None:
        for value in self.x.ticks():
            x = self.at_x(value)
            self.element("line", "grid", x1=x, x2=x, y1=TOP, y2=self.height - BOTTOM)
            self.write(x, self.height - BOTTOM + 16, tick_text(value), "middle")
        self.write((self.left + WIDTH - RIGHT) / 2, self.height - 8, self.x.label, "middle")
        if not self.y.label:
            return
        for value in self.y.ticks():
            y = self.at_y(value)
            self.element("line", "grid", x1=self.left, x2=WIDTH - RIGHT, y1=y, y2=y)
            self.write(self.left - 6, y + 4, tick_text(value), "end")
        label = self.write(0, 0, self.y.label, "middle")
        middle = (TOP + self.height - BOTTOM) / 2
        label.set("transform", f"translate(13 {middle:.1f}) rotate(-90)")

    def at_x(self, value: float) -> float:
        return self.left + self.x.place(value) * (WIDTH - self.left - RIGHT)

    def at_y(self, value: float) -> float:
        return self.height - BOTTOM - self.y.place(value) * (self.height - TOP - BOTTOM)

    def element(self, tag: str, style: str, **numbers: float) -> ET.Element:
        places = {name: f"{value:.1f}" for name, value in numbers.items()}
        return ET.SubElement(self.root, tag, {"class": style, **places})

    def write(self, x: float, y: float, text: str, anchor: str = "start") -> ET.Element:
        found = self.element("text", "", x=x, y=y)
        found.set("text-anchor", anchor)
        found.text = text
        return found

    def legend(self, style: str, shape: str, label: str) -> None:
        if (style, shape, label) not in self.key:
            self.key.append((style, shape, label))

    def point(self, x: float, y: float, shape: str, style: str, text: str) -> None:
        """Draw a mark. `text` appears when the pointer is over it."""
        found = mark(shape, self.at_x(x), self.at_y(y))
        found.set("class", f"{found.get('class', '')} {style}".strip())
        ET.SubElement(found, "title").text = text
        self.root.append(found)

    def line(self, points: Sequence[tuple[float, float]], style: str) -> None:
        if len(points) > 1:
            self.element("polyline", f"line {style}").set("points", self._points(points))

    def band(self, low: Sequence[tuple[float, float]], high: Sequence[tuple[float, float]]) -> None:
        if len(low) > 1:
            outline = [*low, *reversed(high)]
            self.element("polygon", "band").set("points", self._points(outline))

    def _points(self, points: Sequence[tuple[float, float]]) -> str:
        return " ".join(f"{self.at_x(x):.1f},{self.at_y(y):.1f}" for x, y in points)

    def curve(self, of: Callable[[float], float | None]) -> list[tuple[float, float]]:
        """Points of a function along the x axis, without those where it is None."""
        steps = 40
        found = []
        for i in range(steps + 1):
            part = i / steps
            if self.x.log:
                x = self.x.low * (self.x.high / self.x.low) ** part
            else:
                x = self.x.low + (self.x.high - self.x.low) * part
            y = of(x)
            if y is not None:
                found.append((x, y))
        return found


def mark(shape: str, x: float, y: float) -> ET.Element:
    """A mark around a point. shape: dot, ring, cross, diamond (an outlier) or line."""
    if shape in ("dot", "ring"):
        place = {"cx": f"{x:.1f}", "cy": f"{y:.1f}", "r": "4"}
        return ET.Element("circle", {"class": shape, **place})
    paths = {
        "cross": f"M{x - 4:.1f} {y - 4:.1f}l8 8m0 -8l-8 8",
        "diamond": f"M{x:.1f} {y - 6:.1f}l6 6l-6 6l-6 -6z",
        "line": f"M{x - 9:.1f} {y:.1f}h18",
    }
    return ET.Element("path", {"class": shape, "d": paths[shape]})


def sample_mark(shape: str, style: str) -> str:
    """The small drawing of an entry in the legend."""
    root = ET.Element("svg", {"viewBox": "0 0 20 16", "aria-hidden": "true", "class": "key"})
    found = mark(shape, 10, 8)
    found.set("class", f"{shape} {style}".strip())
    root.append(found)
    return ET.tostring(root, encoding="unicode")
