"""Charts as plain SVG, for pages that load nothing: bars, curves and named points over linear or logarithmic axes."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Final, NamedTuple

Point = tuple[float, float]

# Okabe and Ito's colours, which the colour-blind can tell apart.
COLOURS: Final = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_WIDTH, _HEIGHT = 560, 300
_LEFT, _RIGHT, _TOP, _BOTTOM = 70, 20, 30, 50
_TICKS: Final = 6


class Bar(NamedTuple):
    """A bin of a histogram."""

    lower: float
    upper: float
    n: float


class Label(NamedTuple):
    """A point with its name; a marked one stands out."""

    x: float
    y: float
    name: str
    marked: bool = False


@dataclass(frozen=True)
class Axis:
    """label: with the unit; log: base 10, for values above zero."""

    label: str
    low: float
    high: float
    log: bool = False

    @classmethod
    def over(cls, label: str, values: Iterable[float], *, log: bool = False, zero: bool = False) -> "Axis":
        """That all values fit on, with zero where wanted; those that no axis can show are left out."""
        known = [value for value in values if shows(value, log)]
        low, high = (min(known), max(known)) if known else (1.0, 10.0)
        if log:
            low, high = (low / 1.5, high * 1.5) if low == high else (low, high)
            return cls(label, low, high, log)
        low = min(low, 0.0) if zero else low
        if low == high:
            low, high = low - abs(low or 1) / 2, high + abs(high or 1) / 2
        return cls(label, low, high, log)

    def share(self, value: float) -> float:
        """Where a value lies between both ends, 0 to 1."""
        low, high, value = (math.log10(one) if self.log else one for one in (self.low, self.high, value))
        return (value - low) / (high - low)

    def ticks(self) -> list[float]:
        if not self.log:
            return _round_steps(self.low, self.high)
        first, last = math.ceil(math.log10(self.low) - 1e-9), math.floor(math.log10(self.high) + 1e-9)
        if last - first < 1:
            return _round_steps(self.low, self.high)
        return [10.0**power for power in range(first, last + 1, max(1, round((last - first) / _TICKS)))]


def bars(title: str, x_label: str, y_label: str, found: Sequence[Bar], *, log: bool = False) -> str:
    """A histogram."""
    x = Axis.over(x_label, [edge for bar in found for edge in (bar.lower, bar.upper)], log=log)
    if len(found) == 1 and not log:  # it would fill the chart
        x = Axis(x_label, max(0.0, 2 * x.low - x.high), 2 * x.high - x.low)
    y = Axis.over(y_label, [1.05 * bar.n for bar in found], zero=True)
    marks = []
    for bar in found:
        left, right, top, bottom = _x(x, bar.lower), _x(x, bar.upper), _y(y, bar.n), _y(y, 0)
        told = f"{_number(bar.lower)} to {_number(bar.upper)}: {_number(bar.n)}"
        size = f'width="{max(right - left - 0.5, 0.5):.1f}" height="{bottom - top:.1f}"'
        marks.append(f'<rect x="{left:.1f}" y="{top:.1f}" {size} fill="{COLOURS[0]}">{_told(told)}</rect>')
    return _chart(title, x, y, marks)


def curves(title: str, x_label: str, y_label: str, series: Mapping[str, Sequence[Point]], *, log: bool = False) -> str:
    """Lines by name; with `log` the y axis is logarithmic."""
    shown = {name: [point for point in points if shows(point[1], log)] for name, points in series.items()}
    x = Axis.over(x_label, [point[0] for points in shown.values() for point in points])
    y = Axis.over(y_label, [point[1] for points in shown.values() for point in points], log=log)
    marks = []
    for at, (name, points) in enumerate(shown.items()):
        colour = COLOURS[at % len(COLOURS)]
        path = " ".join(f"{_x(x, px):.1f},{_y(y, py):.1f}" for px, py in points)
        marks.append(
            f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.5">{_told(name)}</polyline>'
        )
        marks += [
            f'<circle cx="{_x(x, px):.1f}" cy="{_y(y, py):.1f}" r="2" fill="{colour}">'
            f"{_told(f'{name}, {_number(px)}: {_number(py)}')}</circle>"
            for px, py in (points if len(points) <= 50 else [])
        ]
        marks.append(_text(_WIDTH - _RIGHT - 4, _TOP + 12 + 14 * at, name, f'text-anchor="end" fill="{colour}"'))
    return _chart(title, x, y, marks)


def scatter(title: str, x_label: str, y_label: str, found: Sequence[Label], *, log: bool = False) -> str:
    """Named points; with `log` the x axis is logarithmic."""
    found = [one for one in found if shows(one.x, log) and shows(one.y, False)]
    x = _widened(Axis.over(x_label, [one.x for one in found], log=log))
    y = _widened(Axis.over(y_label, [one.y for one in found]))
    marks = []
    for one in found:
        colour = COLOURS[1] if one.marked else COLOURS[0]
        cx, cy = _x(x, one.x), _y(y, one.y)
        told = _told(f"{one.name}: {_number(one.x)}, {_number(one.y)}")
        marks.append(
            f'<circle cx="{cx:.1f}" cy="{cy:.1f}" r="{5 if one.marked else 3.5}" fill="{colour}">{told}</circle>'
        )
        anchor, place = ("end", cx - 8) if cx > _WIDTH * 0.75 else ("start", cx + 8)
        marks.append(_text(place, cy + 4, one.name, f'text-anchor="{anchor}" fill="{colour}"'))
    return _chart(title, x, y, marks)


def shows(value: float, log: bool) -> bool:
    """Whether an axis has a place for it."""
    return math.isfinite(value) and (value > 0 or not log)


def _widened(axis: Axis) -> Axis:
    """With room at both ends."""
    if axis.log:
        by = (axis.high / axis.low) ** 0.1
        return Axis(axis.label, axis.low / by, axis.high * by, True)
    by = (axis.high - axis.low) * 0.1
    return Axis(axis.label, axis.low - by, axis.high + by)


def _chart(title: str, x: Axis, y: Axis, marks: Sequence[str]) -> str:
    bottom, right = _HEIGHT - _BOTTOM, _WIDTH - _RIGHT
    parts = [_text(_WIDTH / 2, 18, title, 'text-anchor="middle" font-weight="bold"')]
    for value in x.ticks():
        at = _x(x, value)
        parts.append(f'<line x1="{at:.1f}" y1="{bottom}" x2="{at:.1f}" y2="{bottom + 4}" stroke="#666"/>')
        parts.append(_text(at, bottom + 17, _number(value), 'text-anchor="middle"'))
    for value in y.ticks():
        at = _y(y, value)
        parts.append(f'<line x1="{_LEFT}" y1="{at:.1f}" x2="{right}" y2="{at:.1f}" stroke="#ddd"/>')
        parts.append(_text(_LEFT - 6, at + 4, _number(value), 'text-anchor="end"'))
    parts.append(f'<path d="M{_LEFT} {_TOP}V{bottom}H{right}" fill="none" stroke="#666"/>')
    parts.append(_text((_LEFT + right) / 2, _HEIGHT - 10, x.label, 'text-anchor="middle"'))
    middle = (_TOP + bottom) / 2
    parts.append(_text(14, middle, y.label, f'text-anchor="middle" transform="rotate(-90 14 {middle:.1f})"'))
    if not marks:
        parts.append(_text((_LEFT + right) / 2, middle, "nothing to show yet", 'text-anchor="middle" fill="#666"'))
    body = "\n".join([*parts, *marks])
    size = f'viewBox="0 0 {_WIDTH} {_HEIGHT}" width="{_WIDTH}" height="{_HEIGHT}"'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img" aria-label="{escape(title)}" font-size="11" '
        f'font-family="sans-serif">\n{body}\n</svg>'
    )


def _x(axis: Axis, value: float) -> float:
    return _LEFT + axis.share(value) * (_WIDTH - _LEFT - _RIGHT)


def _y(axis: Axis, value: float) -> float:
    return _HEIGHT - _BOTTOM - axis.share(value) * (_HEIGHT - _TOP - _BOTTOM)


def _text(x: float, y: float, text: str, attributes: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" {attributes}>{escape(text)}</text>'


def _told(text: str) -> str:
    return f"<title>{escape(text)}</title>"


def _round_steps(low: float, high: float) -> list[float]:
    """Round numbers between both ends, about six."""
    rough = (high - low) / _TICKS
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(one * power for one in (1, 2, 2.5, 5, 10) if one * power >= rough)
    return [number * step for number in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def _number(value: float) -> str:
    """Short, for people."""
    if value == 0:
        return "0"
    if abs(value) >= 10_000 or abs(value) < 0.001:
        mantissa, _, exponent = f"{value:.1e}".partition("e")
        return f"{mantissa.removesuffix('.0')}e{int(exponent)}"
    return f"{value:.4g}"
