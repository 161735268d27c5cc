"""A chart of lines with logarithmic axes, as SVG."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 640, 320, 70, 170, 30, 45  # pixels, and of the margins
COLOURS = ("#888888", "#1f77b4", "#d62728", "#2ca02c", "#9467bd")
Points = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Figure:
    """A line for each series; numbers are positive."""

    name: str
    title: str
    across: str
    up: str
    series: Mapping[str, Points]

    def svg(self) -> str:
        """The drawing, by itself."""
        return "\n".join(
            [
                f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" '
                'font-size="12">',
                f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
                _text(LEFT, 18, self.title, "start", 'font-weight="bold"'),
                *self._axes(),
                *(part for number, name in enumerate(self.series) for part in self._line(number, name)),
                "</svg>\n",
            ]
        )

    def _axes(self) -> Iterator[str]:
        bottom, right = HEIGHT - BOTTOM, WIDTH - RIGHT
        yield _text((LEFT + right) / 2, HEIGHT - 8, self.across)
        yield _text(16, HEIGHT / 2, self.up, "middle", f'transform="rotate(-90 16 {HEIGHT / 2})"')
        for x in sorted({x for points in self.series.values() for x, _ in points}):
            yield _text(self._x(x), bottom + 16, f"{x:g}")
            yield _path([(self._x(x), TOP), (self._x(x), bottom)], "#eeeeee")
        for power in range(*self._powers()):
            yield _text(LEFT - 6, self._y(10.0**power) + 4, f"{10.0**power:g}", "end")
            yield _path([(LEFT, self._y(10.0**power)), (right, self._y(10.0**power))], "#cccccc")
        yield _path([(LEFT, TOP), (LEFT, bottom), (right, bottom)], "#444444")

    def _line(self, number: int, name: str) -> Iterator[str]:
        colour = COLOURS[number % len(COLOURS)]
        points = [(self._x(x), self._y(y)) for x, y in self.series[name]]
        yield _path(points, colour, 2)
        yield from (f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>' for x, y in points)
        yield _text(WIDTH - RIGHT + 14, TOP + 14 + 18 * number, name, "start", f'fill="{colour}"')

    def _powers(self) -> tuple[int, int]:
        """The powers of ten between the smallest and the largest number."""
        low, high = self._ends(1)
        return math.ceil(low - 1e-9), math.floor(high + 1e-9) + 1

    def _ends(self, axis: int) -> tuple[float, float]:
        """Logarithms of the ends of an axis: of whole powers of ten upwards, of the numbers themselves across."""
        logs = [math.log10(point[axis]) for points in self.series.values() for point in points]
        return (math.floor(min(logs)), math.ceil(max(logs))) if axis else (min(logs), max(logs))

    def _x(self, number: float) -> float:
        return LEFT + 12 + _part(number, self._ends(0)) * (WIDTH - LEFT - RIGHT - 24)

    def _y(self, number: float) -> float:
        return HEIGHT - BOTTOM - _part(number, self._ends(1)) * (HEIGHT - TOP - BOTTOM)


def _part(number: float, ends: tuple[float, float]) -> float:
    low, high = ends
    return (math.log10(number) - low) / ((high - low) or 1)


def _path(points: Points, colour: str, width: float = 1) -> str:
    steps = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    return f'<polyline points="{steps}" fill="none" stroke="{colour}" stroke-width="{width}"/>'


def _text(x: float, y: float, text: str, anchor: str = "middle", more: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" {more}>{escape(text)}</text>'
