"""Small plots as inline SVG: axes, lines, points and intervals. Every text is escaped."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from markupsafe import Markup

WIDTH, HEIGHT = 540, 300
LEFT, RIGHT, TOP, BOTTOM = 64, 16, 14, 44
COLOURS = (
    "#2563eb",
    "#d97706",
    "#059669",
    "#dc2626",
    "#7c3aed",
    "#0891b2",
    "#be185d",
    "#65a30d",
)
QUIET = "#94a3b8"

Scale = Callable[[float], float]


@dataclass
class Plot:
    """Data coordinates in, SVG out. `log_x` and `log_y` are base 10."""

    x: tuple[float, float]
    y: tuple[float, float]
    x_label: str
    y_label: str
    log_x: bool = False
    log_y: bool = False
    height: int = HEIGHT
    left: int = LEFT
    y_names: Sequence[str] = ()
    parts: list[Markup] = field(default_factory=list)
    taken: list[tuple[float, float, float]] = field(default_factory=list)

    def px(self, value: float) -> float:
        """Pixels from the left."""
        return _place(value, self.x, self.log_x, self.left, WIDTH - RIGHT)

    def py(self, value: float) -> float:
        """Pixels from the top."""
        return _place(value, self.y, self.log_y, self.height - BOTTOM, TOP)

    def line(
        self, points: Iterable[tuple[float, float]], colour: str, title: str, width: float = 1.6
    ) -> None:
        """A polyline through the points that are finite; its title shows under the pointer."""
        kept = [(a, b) for a, b in points if math.isfinite(a) and math.isfinite(b)]
        path = " ".join(f"{self.px(a):.1f},{self.py(b):.1f}" for a, b in kept)
        self.parts.append(
            Markup(
                '<polyline points="{}" fill="none" stroke="{}" stroke-width="{}" '
                'stroke-linejoin="round"><title>{}</title></polyline>'
            ).format(path, colour, width, title)
        )

    def point(
        self, x: float, y: float, colour: str, title: str, radius: float = 4, hollow: bool = False
    ) -> None:
        """A dot, or a ring."""
        left, at = self.px(x), self.py(y)
        self.taken.append((left - radius, left + radius, at + 4))
        self.parts.append(
            Markup(
                '<circle cx="{:.1f}" cy="{:.1f}" r="{}" fill="{}" stroke="{}" stroke-width="1.6">'
                "<title>{}</title></circle>"
            ).format(left, at, radius, "#fff" if hollow else colour, colour, title)
        )

    def interval(self, low: float, high: float, y: float, colour: str, title: str) -> None:
        """A horizontal bar with ends."""
        a, b, at = self.px(low), self.px(high), self.py(y)
        path = f"M{a:.1f} {at:.1f}H{b:.1f}M{a:.1f} {at - 5:.1f}v10M{b:.1f} {at - 5:.1f}v10"
        self.parts.append(
            Markup(
                '<path d="{}" stroke="{}" stroke-width="2" fill="none"><title>{}</title></path>'
            ).format(path, colour, title)
        )

    def bar(self, x: float, y: float, colour: str, title: str, thick: float = 14) -> None:
        """A horizontal bar from the left edge to x."""
        self.parts.append(
            Markup(
                '<rect x="{}" y="{:.1f}" width="{:.1f}" height="{}" rx="2" fill="{}">'
                "<title>{}</title></rect>"
            ).format(
                self.left,
                self.py(y) - thick / 2,
                max(1.0, self.px(x) - self.left),
                thick,
                colour,
                title,
            )
        )

    def vertical(self, x: float, label: str = "", colour: str = QUIET) -> None:
        """A dashed line over the whole height."""
        at = f"{self.px(x):.1f}"
        self.parts.append(
            Markup('<path d="M{} {}V{}" stroke="{}" stroke-dasharray="4 4"/>').format(
                at, TOP, self.height - BOTTOM, colour
            )
            + (self._text(self.px(x) + 4, TOP + 10, label) if label else Markup(""))
        )

    def horizontal(self, y: float, label: str = "", colour: str = QUIET) -> None:
        """A dashed line over the whole width."""
        self.parts.append(
            Markup('<path d="M{} {:.1f}H{}" stroke="{}" stroke-dasharray="4 4"/>').format(
                self.left, self.py(y), WIDTH - RIGHT, colour
            )
            + (self._text(WIDTH - RIGHT, self.py(y) - 5, label, "end") if label else Markup(""))
        )

    def label(self, x: float, y: float, text: str) -> None:
        """A text beside a point, on its left near the right edge, moved where others stand."""
        width, left, at = 7.1 * len(text), self.px(x), self.py(y) + 4
        start = left + 9 if left + 9 + width < WIDTH - RIGHT else left - 9 - width
        for shift in (0, -14, 14, -28, 28, -42, 42, -56):
            if not any(
                start < b and a < start + width and abs(at + shift - line) < 13
                for a, b, line in self.taken
            ):
                at += shift
                break
        self.taken.append((start, start + width, at))
        self.parts.append(self._text(start, at, text))

    def render(self) -> Markup:
        """The whole element."""
        frame = Markup("").join([*self._x_axis(), *self._y_axis()])
        return Markup(
            '<svg class="plot" viewBox="0 0 {} {}" role="img" aria-label="{} by {}">{}{}</svg>'
        ).format(WIDTH, self.height, self.y_label, self.x_label, frame, Markup("").join(self.parts))

    def _text(self, x: float, y: float, text: str, anchor: str = "start") -> Markup:
        return Markup('<text x="{:.1f}" y="{:.1f}" text-anchor="{}">{}</text>').format(
            x, y, anchor, text
        )

    def _x_axis(self) -> list[Markup]:
        bottom = self.height - BOTTOM
        middle = (self.left + WIDTH - RIGHT) / 2
        parts = [
            Markup('<path d="M{} {}H{}" stroke="#cbd5e1"/>').format(
                self.left, bottom, WIDTH - RIGHT
            ),
            self._text(middle, self.height - 8, self.x_label, "middle"),
        ]
        for value in ticks(*self.x, self.log_x):
            parts.append(self._text(self.px(value), bottom + 17, shown(value), "middle"))
        return parts

    def _y_axis(self) -> list[Markup]:
        if self.y_names:
            return [
                self._text(self.left - 8, self.py(i) + 4, _cut(name), "end")
                for i, name in enumerate(self.y_names)
            ]
        middle = (TOP + self.height - BOTTOM) / 2
        parts = [
            Markup(
                '<text transform="translate(14 {}) rotate(-90)" text-anchor="middle">{}</text>'
            ).format(middle, self.y_label)
        ]
        for value in ticks(*self.y, self.log_y):
            at = self.py(value)
            grid = '<path d="M{} {:.1f}H{}" stroke="#e2e8f0"/>'
            parts.append(Markup(grid).format(self.left, at, WIDTH - RIGHT))
            parts.append(self._text(self.left - 6, at + 4, shown(value), "end"))
        return parts


def bounds(values: Iterable[float], log: bool = False, margin: float = 0.05) -> tuple[float, float]:
    """A little more than the finite values span."""
    kept = [value for value in values if math.isfinite(value) and (value > 0 or not log)]
    if not kept:
        return (1.0, 10.0) if log else (0.0, 1.0)
    low, high = min(kept), max(kept)
    if log:
        low, high = math.log10(low), math.log10(high)
    room = (high - low) * margin or abs(high) * margin or margin
    return (10 ** (low - room), 10 ** (high + room)) if log else (low - room, high + room)


def ticks(low: float, high: float, log: bool = False, count: int = 5) -> list[float]:
    """Round numbers between the two; on a logarithmic axis powers of ten, with 2 and 5 if few."""
    if log:
        powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        for steps in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 4, 5, 7)):
            found = [s * 10.0**p for p in powers for s in steps if low <= s * 10.0**p <= high]
            if len(found) >= 3:
                return found
        return found
    if not high > low:
        return [low]
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * s for s in (1, 2, 2.5, 5, 10) if power * s >= raw)
    first = math.ceil(low / step)
    return [n * step for n in range(first, math.floor(high / step + 1e-9) + 1)]


def shown(value: float) -> str:
    """A figure in few characters."""
    if value == 0:
        return "0"
    if abs(value) >= 1e6 or abs(value) < 1e-3:
        return f"{value:.1e}".replace("e-0", "e-").replace("e+0", "e")
    return f"{value:,.4g}"


def legend(entries: Sequence[tuple[str, str]]) -> Markup:
    """Names in their colours."""
    one = Markup('<span class="key"><i style="background:{}"></i>{}</span>')
    items = Markup("").join(one.format(colour, name) for name, colour in entries)
    return Markup('<div class="legend">{}</div>').format(items)


def _place(value: float, span: tuple[float, float], log: bool, start: float, end: float) -> float:
    low, high = span
    if log:
        value, low, high = (math.log10(max(each, 1e-300)) for each in (value, low, high))
    share = 0.5 if high == low else (value - low) / (high - low)
    return start + max(-0.02, min(1.02, share)) * (end - start)


def _cut(text: str, limit: int = 22) -> str:
    return text if len(text) <= limit else f"{text[: limit - 1]}…"
