#!/usr/bin/env python3
"""Draws one training step of a sharded head: step.svg, and step-dark.svg for dark pages.

    docs/figures/step.py            writes both beside itself
    docs/figures/step.py --check    fails unless they are what this script draws
"""

import pathlib
import sys

# The example whose bytes the figure shows.
RANKS, BATCH, DIM = 64, 64, 512
ROWS = RANKS * BATCH

# Left edge, message, collective, what a rank passes to it, bytes of that in the example (float32).
MESSAGES = [
    (150, "labels", "all-gather", "b labels", 8 * (4 + BATCH)),
    (318, "embeddings", "all-gather", "b × d values", 4 * BATCH * DIM),
    (520, "sums", "all-reduce", "2B + 4 values", 4 * (2 * ROWS + 4)),
    (774, "gradient", "reduce-scatter", "B × d values", 4 * ROWS * DIM),
]

LIGHT = {
    "page": "#ffffff", "lane": "#f6f8fa", "box": "#ffffff", "line": "#6e7781", "border": "#d1d9e0", "text": "#1f2328", "muted": "#59636e",
    "message": "#0969da", "heading": "#0550ae", "rows": "#dafbe1", "rows_line": "#1a7f37", "rows_text": "#116329",
}
DARK = {
    "page": "#0d1117", "lane": "#151b23", "box": "#262c36", "line": "#9198a1", "border": "#3d444d", "text": "#f0f6fc", "muted": "#a7b0ba",
    "message": "#1f6feb", "heading": "#79b8ff", "rows": "#12301c", "rows_line": "#3fb950", "rows_text": "#7ee787",
}

WIDTH, HEIGHT = 1000, 534
LANES = (("rank 0", 106), ("rank N − 1", 302))
LANE, BOX, STRIP, BAR = 166, 56, 44, 28


class Figure:
    def __init__(self, colors):
        self.colors, self.parts = colors, []
        self.rect(0.5, 0.5, WIDTH - 1, HEIGHT - 1, "page", "border", 12)
        for _, top in LANES:
            self.rect(14, top, WIDTH - 28, LANE, "lane", "border", 10)
        for left, *_ in MESSAGES:
            self.link(left + BAR / 2)
        for name, top in LANES:
            self.lane(name, top)
        self.headings()
        self.footer()

    def add(self, element, body=None, **attributes):
        words = " ".join(f'{name.replace("_", "-")}="{value}"' for name, value in attributes.items())
        self.parts.append(f"  <{element} {words}/>" if body is None else f"  <{element} {words}>{body}</{element}>")

    def rect(self, x, y, width, height, fill, line, radius=6):
        self.add("rect", x=x, y=y, width=width, height=height, rx=radius, fill=self.colors[fill], stroke=self.colors[line])

    def text(self, x, y, words, color="text", size=14, weight=400, anchor="middle", **more):
        self.add("text", words, x=x, y=y, fill=self.colors[color], font_size=size, font_weight=weight, text_anchor=anchor, **more)

    def arrow(self, *points, color="line"):
        path = "M" + " L".join(f"{x} {y}" for x, y in points)
        self.add("path", d=path, fill="none", stroke=self.colors[color], stroke_width=1.6, marker_end=f"url(#{color})")

    def link(self, x):
        """What joins a message's ranks, behind the contents of the lanes."""
        start, end = LANES[0][1] + 100, LANES[1][1] + 26
        self.add("path", d=f"M{x} {start} V{end}", stroke=self.colors["message"], stroke_width=2.5, stroke_dasharray="1 6", stroke_linecap="round")

    def box(self, x, middle, width, title, line=None):
        self.rect(x, middle - BOX / 2, width, BOX, "box", "line")
        self.text(x + width / 2, middle + (-4 if line else 5), title, weight=600)
        if line:
            self.text(x + width / 2, middle + 15, line, "muted", 12.5)

    def lane(self, name, top):
        """A rank: its boxes in a row, between them the messages, below them its class centers."""
        middle = top + 64
        below = middle + BOX / 2
        strip = below + 24
        self.text(28, top + 22, name, weight=600, anchor="start")
        steps = [(28, 100, "backbone", "b embeddings"), (200, 96, "sample", "S classes"), (368, 130, "forward", "B × S cosines, exp"),
                 (570, 72, "loss", None), (662, 92, "backward", None), (830, 142, "backbone", "gradient of its b rows")]
        edges = sorted([(x, x + width) for x, width, *_ in steps] + [(left, left + BAR) for left, *_ in MESSAGES])
        for (_, right), (left, _) in zip(edges, edges[1:]):
            self.arrow((right + 1, middle), (left - 2, middle))
        for x, width, title, line in steps:
            self.box(x, middle, width, title, line)
        for left, message, *_ in MESSAGES:
            self.rect(left, middle - 42, BAR, 84, "message", "message", 5)
            place = f"translate({left + BAR / 2 + 4} {middle}) rotate(-90)"
            self.add("text", message, transform=place, fill="#ffffff", font_size=11.5, font_weight=600, text_anchor="middle")

        self.rect(200, strip, 394, STRIP, "rows", "rows_line")
        self.text(397, strip + 19, "shard of W", "rows_text", weight=600)
        self.text(397, strip + 36, "C / N class centers of d values, optimizer state", "rows_text", 12.5)
        self.arrow((433, strip), (433, below + 2), color="rows_line")
        self.text(441, below + 17, "S rows", "rows_text", 12.5, anchor="start")
        self.rect(662, strip, 92, STRIP, "box", "line")
        self.text(708, strip + 27, "update", weight=600)
        self.arrow((708, below), (708, strip - 2))
        self.arrow((662, strip + STRIP / 2), (596, strip + STRIP / 2), color="rows_line")
        self.text(630, strip + STRIP / 2 - 7, "S rows", "rows_text", 12.5)

    def headings(self):
        for y, words in ((30, "message"), (50, "collective"), (69, "a rank passes"), (88, "for example")):
            self.text(28, y, words, "muted", 13, anchor="start")
        for left, message, collective, passed, number in MESSAGES:
            x = left + BAR / 2
            self.text(x, 30, message, "heading", 16, 600)
            self.text(x, 50, collective, "muted", 13)
            self.text(x, 69, passed, "text", 13)
            self.text(x, 88, size(number), "text", 13)

    def footer(self):
        total = size(sum(number for *_, number in MESSAGES))
        self.text(28, 494, f"Each of N ranks has a batch of b rows; B = N b. The example: N = {RANKS}, b = {BATCH}, d = {DIM}, float32: "
                  f"{total} a rank and step.", "text", 13.5, anchor="start")
        self.text(28, 515, "The B × S logits and their gradients never leave their rank. "
                  "While the gradient is sent, each rank updates its S sampled rows.", "text", 13.5, anchor="start")

    def svg(self):
        def marker(color):
            return (f'    <marker id="{color}" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="6.5" markerHeight="6.5" orient="auto">'
                    f'<path d="M0 0 L10 5 L0 10 z" fill="{self.colors[color]}"/></marker>')

        head = (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" role="img" '
                'font-family="-apple-system, BlinkMacSystemFont, \'Segoe UI\', \'Noto Sans\', Helvetica, Arial, sans-serif">')
        title = "  <title>One training step of a sharded head: four messages between ranks, and the work between them</title>"
        return "\n".join([head, title, "  <defs>", marker("line"), marker("rows_line"), "  </defs>", *self.parts, "</svg>"]) + "\n"


def size(number):
    """1234567 as 1.2 MB."""
    for unit, factor in (("MB", 1e6), ("kB", 1e3)):
        if number >= factor:
            return f"{number / factor:.{1 if number < 100 * factor else 0}f} {unit}"
    return f"{number} B"


def main():
    folder = pathlib.Path(__file__).resolve().parent
    for name, colors in (("step.svg", LIGHT), ("step-dark.svg", DARK)):
        drawn, file = Figure(colors).svg(), folder / name
        if "--check" not in sys.argv[1:]:
            file.write_text(drawn, encoding="utf-8")
        elif not file.is_file() or file.read_text(encoding="utf-8") != drawn:
            sys.exit(f"{file} is not what docs/figures/step.py draws: run it")


if __name__ == "__main__":
    main()
