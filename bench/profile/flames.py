"""A flame graph as SVG: callers below, width is samples, and the colour of a frame is that of its layer."""

from __future__ import annotations

import zlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from xml.sax.saxutils import escape

from bench.profile.layers import Stack, layer_of

WIDTH, ROW, TEXT = 1600.0, 17, 7.0
"""Pixels: of the picture, of a frame's height, of a character."""
NARROWEST = 0.5


@dataclass(slots=True)
class Frame:
    samples: int = 0
    callees: dict[str, Frame] = field(default_factory=dict)

    def depth(self) -> int:
        return 1 + max((callee.depth() for callee in self.callees.values()), default=0)


def flame_graph(title: str, stacks: Iterable[Stack]) -> str:
    root = Frame()
    for stack in stacks:
        root.samples += stack.samples
        at = root
        for name in stack.frames:
            at = at.callees.setdefault(name, Frame())
            at.samples += stack.samples
    height = root.depth() * ROW
    body = "\n".join(_drawn(root, f"{title}: {root.samples:,} samples", (), root, 0.0, height - ROW))
    size = f'width="{WIDTH:.0f}" height="{height}"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="monospace" font-size="11">\n{body}\n</svg>\n'


def _drawn(root: Frame, name: str, path: tuple[str, ...], frame: Frame, x: float, y: float) -> Iterable[str]:
    """Its rectangle and those of all that it called."""
    width = frame.samples / max(1, root.samples) * WIDTH
    if width < NARROWEST:
        return
    layer = layer_of(path)
    hue = zlib.crc32(layer.encode()) % 360
    words = escape(f"{name} [{layer}] {frame.samples / max(1, root.samples):.1%}")
    yield f'<g><title>{words}</title><rect x="{x:.1f}" y="{y}" width="{width:.1f}" height="{ROW - 1}"'
    yield f'fill="hsl({hue},60%,75%)"/><text x="{x + 2:.1f}" y="{y + 12}">{escape(name[: int(width / TEXT)])}</text></g>'
    for callee, called in sorted(frame.callees.items()):
        yield from _drawn(root, callee, (*path, callee), called, x, y - ROW)
        x += called.samples / max(1, root.samples) * WIDTH
