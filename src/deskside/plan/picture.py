"""Draws a plan: layers across, kinds of tensors down, devices as colours.

The SVG is self-contained and has a light and a dark scheme. A cell with tensors on two devices is
divided by their bytes. Hovering over a cell shows what it holds and why.
"""

from __future__ import annotations

from xml.etree import ElementTree as ET

from deskside.machine.devices import show_size
from deskside.plan.plan import Plan
from deskside.plan.rules import layer_of
from deskside.plan.table import rate_label
from deskside.plan.units import KINDS

LEFT, TOP, ROW, GAP, WIDTH = 150, 64, 24, 4, 1080
STATES = "KV and state"
# Okabe and Ito's colours, for any colour vision. The CPU is grey.
COLOURS = ("#8a8f98", "#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#b8a900")
STYLE = """
svg { font: 12px system-ui, sans-serif; background: #fff; }
text { fill: #1f2328; } .dim { fill: #59636e; } .head { font-size: 16px; font-weight: 600; }
.empty { fill: #eff1f3; } .bar { fill: #e3e6ea; }
@media (prefers-color-scheme: dark) {
  svg { background: #0d1117; } text { fill: #e6edf3; } .dim { fill: #9198a1; }
  .empty { fill: #191f27; } .bar { fill: #262d36; }
}
"""

Cell = dict[str, int]  # bytes by device


def picture(plan: Plan, title: str) -> str:
    """The SVG as text, under the heading `title`."""
    devices = [d.name for d in plan.machine.devices]
    colour = dict(zip(devices, (COLOURS[i % len(COLOURS)] for i in range(99)), strict=False))
    layers = 1 + max(op.layer for op in plan.tape.ops)
    cells, why = _cells(plan, layers)
    rows = [k for k in (*KINDS, STATES) if any(row == k for row, _ in cells)]
    bars = TOP + len(rows) * ROW + 56
    height = bars + len(devices) * 30 + 22 * len(plan.rates) + 44
    root = ET.Element(
        "svg",
        {
            "xmlns": "http://www.w3.org/2000/svg",
            "viewBox": f"0 0 {WIDTH} {height}",
            "width": str(WIDTH),
            "height": str(height),
            "role": "img",
            "aria-label": title,
        },
    )
    ET.SubElement(root, "style").text = STYLE
    _text(root, 16, 28, title, "head")
    _text(root, 16, 46, f"{plan.machine.name}, context {plan.options.ctx:,}", "dim")
    columns = layers + 2  # the embedding before the first layer, the head after the last
    width = (WIDTH - LEFT - 16) / columns
    for r, row in enumerate(rows):
        y = TOP + r * ROW
        _text(root, LEFT - 8, y + ROW / 2 + 2, row, anchor="end")
        for c in range(columns):
            cell = cells.get((row, c - 1))
            _cell(root, LEFT + c * width, y, width, cell, colour, _tip(row, c - 1, cell, why))
    below = TOP + len(rows) * ROW + 12
    for layer in range(0, layers, max(1, layers // 12)):
        x = LEFT + (layer + 1.5) * width
        _text(root, x, below, str(layer), "dim", "middle")
    _text(root, LEFT - 8, below, "layer", "dim", "end")
    _bars(root, plan, bars, colour)
    y = bars + len(devices) * 30 + 20
    for rate in plan.rates:
        _text(root, LEFT - 8, y, rate_label(rate), "dim", "end")
        _text(root, LEFT, y, f"{rate.rate:.1f} tok/s, {100 * rate.share:.0f} % of the roofline")
        _text(root, LEFT + 230, y, f"limit: {rate.limit}", "dim")
        y += 22
    _text(root, 16, y + 6, "Predicted; GPU speed is computed from data sheets.", "dim")
    return ET.tostring(root, encoding="unicode") + "\n"


def _cells(
    plan: Plan, layers: int
) -> tuple[dict[tuple[str, int], Cell], dict[tuple[str, int], str]]:
    """Bytes by device of every (row, layer), and the reasons.

    Layer -1 is the embedding, layer `layers` the head.
    """
    infos = plan.tape.weights()
    cells: dict[tuple[str, int], Cell] = {}
    why: dict[tuple[str, int], str] = {}
    for name, device in plan.placement.items():
        layer, kind = layer_of(name), plan.kinds[name]
        column = layer if layer is not None else -1 if kind == "embedding" else layers
        cell = cells.setdefault((kind, column), {})
        cell[device] = cell.get(device, 0) + infos[name].nbytes
        why[kind, column] = plan.reasons[name]
    for op in plan.tape.ops:
        if op.state is not None:
            device = plan.state_devices[op.state]
            cells.setdefault((STATES, op.layer), {}).setdefault(device, 1)
    return cells, why


def _tip(row: str, layer: int, cell: Cell | None, why: dict[tuple[str, int], str]) -> str:
    if not cell:
        return ""
    held = ", ".join(f"{d} {show_size(n)}" if n > 1 else d for d, n in cell.items())
    reason = why.get((row, layer), "beside its layer")
    return f"layer {layer}, {row}: {held}; {reason}"


def _cell(
    root: ET.Element,
    x: float,
    y: float,
    width: float,
    cell: Cell | None,
    colour: dict[str, str],
    tip: str,
) -> None:
    inner, total = width - min(2.0, width / 4), sum((cell or {}).values())
    if not cell:
        _rect(root, x, y, inner, ROW - GAP, {"class": "empty"})
        return
    for device, n in cell.items():
        part = inner * n / total
        rect = _rect(root, x, y, part, ROW - GAP, {"fill": colour[device]})
        ET.SubElement(rect, "title").text = tip
        x += part


def _bars(root: ET.Element, plan: Plan, y: float, colour: dict[str, str]) -> None:
    """One bar per device: the memory taken, without the margin, of all that it has."""
    full = WIDTH - LEFT - 250
    for u in plan.usage:
        name, memory = u.device.name, u.device.memory
        _text(root, LEFT - 8, y + 15, name, anchor="end")
        _rect(root, LEFT, y, full, 20, {"class": "bar", "rx": "3"})
        taken = full * min((u.total - u.device.margin) / memory, 1)
        if taken > 0:
            _rect(root, LEFT, y, taken, 20, {"fill": colour[name], "rx": "3"})
        text = f"{show_size(u.total - u.device.margin)} of {show_size(memory)}"
        _text(root, LEFT + full + 10, y + 15, text)
        y += 30


def _rect(
    root: ET.Element, x: float, y: float, width: float, height: float, more: dict[str, str]
) -> ET.Element:
    sizes = {"x": x, "y": y, "width": width, "height": height}
    return ET.SubElement(root, "rect", {k: f"{v:.2f}" for k, v in sizes.items()} | more)


def _text(
    root: ET.Element, x: float, y: float, text: str, style: str = "", anchor: str = "start"
) -> None:
    attributes = {"x": f"{x:.1f}", "y": f"{y:.1f}", "text-anchor": anchor}
    ET.SubElement(root, "text", attributes | ({"class": style} if style else {})).text = text
