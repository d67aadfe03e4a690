"""Line charts as SVG, one below the other, in a few lines of our own.

`python -m bench.plot RESULT.json OUT.svg` draws what `bench.soak` wrote.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from xml.sax.saxutils import escape

Points = Sequence[Sequence[float]]
WIDTH, HEIGHT = 760, 200
LEFT, RIGHT, TOP, BOTTOM = 56, 170, 28, 30
COLOURS = ("#1b6ca8", "#c2410c", "#15803d", "#7e22ce", "#b45309", "#475569", "#be185d", "#0f766e")


def main() -> None:
    result, target = Path(sys.argv[1]), Path(sys.argv[2])
    target.write_text(soak_charts(json.loads(result.read_text())["vitals"]))


def soak_charts(vitals: Mapping[str, Mapping[str, Mapping[str, Points]]]) -> str:
    """Return the charts of a soak: each figure of all processes, then rows and sizes."""
    titles = {"rss_mb": "Memory (RSS), MB", "descriptors": "Descriptors", "threads": "Threads"}
    charts: dict[str, Mapping[str, Points]] = {
        title: {name: of[figure] for name, of in vitals["processes"].items() if len(of[figure]) > 1}
        for figure, title in titles.items()
    }
    state: Mapping[str, Points] = vitals["state"]  # type: ignore[assignment]  # points, one deep
    rows = {name.removeprefix("rows of "): at for name, at in state.items() if "rows of" in name}
    busiest = sorted(rows, key=lambda name: -max(y for _, y in rows[name]))[:8]
    charts["Rows of the largest tables"] = {name: rows[name] for name in busiest}
    charts["State file and its write-ahead log, MB"] = {
        name: state[name] for name in ("file_mb", "wal_mb") if name in state
    }
    return page(charts)


def page(charts: Mapping[str, Mapping[str, Points]]) -> str:
    """Return an SVG with the charts below each other. x: seconds, shown as minutes."""
    total = HEIGHT * len(charts)
    drawn = "\n".join(
        f'<g transform="translate(0 {HEIGHT * number})">\n{_chart(title, lines)}\n</g>'
        for number, (title, lines) in enumerate(charts.items())
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {total}"'
        f' font-family="sans-serif" font-size="11">\n'
        f'<rect width="{WIDTH}" height="{total}" fill="white"/>\n{drawn}\n</svg>\n'
    )


def _chart(title: str, lines: Mapping[str, Points]) -> str:
    everything = [point for points in lines.values() for point in points]
    most_x = max((x for x, _ in everything), default=1.0) or 1.0
    most_y = max((y for _, y in everything), default=1.0) * 1.1 or 1.0
    wide, high = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM

    def place(x: float, y: float) -> str:
        return f"{LEFT + wide * x / most_x:.1f},{TOP + high * (1 - y / most_y):.1f}"

    parts = [f'<text x="{LEFT}" y="16" font-size="13">{escape(title)}</text>']
    for share in (0.0, 0.5, 1.0):
        y = TOP + high * (1 - share)
        parts.append(
            f'<line x1="{LEFT}" x2="{LEFT + wide}" y1="{y}" y2="{y}" stroke="#ddd"/>'
            f'<text x="{LEFT - 6}" y="{y + 4}" text-anchor="end">{most_y * share:.3g}</text>'
        )
        x = LEFT + wide * share
        minutes = f"{most_x * share / 60:.0f} min"
        parts.append(f'<text x="{x}" y="{HEIGHT - 12}" text-anchor="middle">{minutes}</text>')
    for number, (name, points) in enumerate(lines.items()):
        colour = COLOURS[number % len(COLOURS)]
        path = " ".join(place(x, y) for x, y in points)
        parts.append(f'<polyline fill="none" stroke="{colour}" points="{path}"/>')
        y = TOP + 10 + 16 * number
        parts.append(
            f'<text x="{LEFT + wide + 10}" y="{y}" fill="{colour}">{escape(name)}'
            f" ({points[-1][1]:.4g})</text>"
        )
    return "\n".join(parts)


if __name__ == "__main__":
    main()
