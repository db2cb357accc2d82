"""The parts of an HTML page that needs nothing else: its style, tables, details, and pictures inside the page."""

import base64
import io
import re
from html import escape
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure
from PIL import Image

from .drawing import INK

BOX = '<div class="box" tabindex="0">'  # scrolls where its content is wider than the page
CSS = """
:root { color-scheme: light dark; --ink: #1a1f26; --paper: #fff; --soft: #f0f2f5; --line: #b3bac4; --muted: #525c69;
  --link: #0b57a4 }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e7eaee; --paper: #14181d; --soft: #20262d; --line: #56606d; --muted: #a9b2bd; --link: #8ec2ff } }
* { box-sizing: border-box }
body { margin: 0 auto; padding: 1rem .75rem 3rem; max-width: 68rem; background: var(--paper); color: var(--ink);
  font: 1rem/1.5 system-ui, sans-serif; overflow-wrap: anywhere }
h1, h2, h3 { line-height: 1.25; margin: 1.8rem 0 .8rem }
h1 { margin: .6rem 0 }
h2 { border-top: 1px solid var(--line); padding-top: 1.4rem }
a { color: var(--link) }
nav ul { list-style: none; margin: .2rem 0; padding: 0; display: flex; flex-wrap: wrap; gap: .2rem 1.1rem }
.headline { font-size: 1.1rem; max-width: 52rem; margin: .8rem 0 }
.figures { display: grid; gap: 1rem 1.5rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 27rem), 1fr)) }
.absent { grid-column: 1 / -1 }
figure { margin: 0 0 1rem; min-width: 0 }
p, figcaption { max-width: 46rem }
.absent, figcaption { color: var(--muted); font-size: .9rem }
.box { overflow-x: auto }
.box:focus-visible, summary:focus-visible, a:focus-visible { outline: 2px solid currentColor }
svg { display: block; width: 100%; height: auto }
svg * { stroke-linejoin: round; stroke-linecap: butt }
img { display: block; background: #fff }
img.samples { width: 100%; min-width: 56rem }
img.shot { width: 8rem; image-rendering: pixelated }
table { border-collapse: collapse; overflow-wrap: normal; font-size: .95rem }
th, td { text-align: left; vertical-align: top; padding: .3rem .9rem .3rem 0; border-bottom: 1px solid var(--line) }
th { font-weight: 500 }
thead th, th[colspan] { font-weight: 700 }
thead th { max-width: 11rem }
th[colspan] { padding-top: .9rem }
pre { background: var(--soft); padding: .8rem; white-space: pre-wrap; font-size: .85rem }
summary { cursor: pointer; padding: .3rem 0 }
"""


def html_page(title: str, parts: list[str]) -> str:
    """A whole page."""
    return ('<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
            '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
            f"<title>{escape(title)}</title>\n<style>{CSS}</style>\n</head>\n<body>\n<main>\n"
            + "\n".join(parts) + "\n</main>\n</body>\n</html>\n")


def html_table(head: list[str], groups: dict[str, list[list[str]]]) -> str:
    """Rows of cells, each of them HTML, under the title of their group; the first of a row is its heading."""
    columns = "".join(f'<th scope="col">{name}</th>' for name in head)
    bodies = []
    for title, rows in groups.items():
        over = f'<tr><th scope="rowgroup" colspan="{len(head)}">{title}</th></tr>\n' if title else ""
        lines = (f'<tr><th scope="row">{name}</th>' + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>\n"
                 for name, *cells in rows)
        bodies.append(f"<tbody>\n{over}{''.join(lines)}</tbody>")
    return f"{BOX}<table><thead><tr>{columns}</tr></thead>{''.join(bodies)}</table></div>"


def html_details(title: str, text: str) -> str:
    """Text that is shown on request."""
    return f"<details><summary>{title}</summary><pre>{escape(text)}</pre></details>"


def html_figure(content: str, caption: str) -> str:
    """A picture with its caption."""
    return f"<figure>{BOX}{content}</div><figcaption>{escape(caption)}</figcaption></figure>"


def html_image(picture: Path | Image.Image, kind: str, description: str) -> str:
    """A PNG file or an image, inside the page."""
    if isinstance(picture, Path):
        content = picture.read_bytes()
    else:
        written = io.BytesIO()
        picture.save(written, "PNG")
        content = written.getvalue()
    data = base64.b64encode(content).decode()
    return f'<img class="{kind}" alt="{escape(description)}" src="data:image/png;base64,{data}">'


def html_drawing(figure: Figure, prefix: str) -> str:
    """The figure as inline SVG in the page's colours, with text as text; its ids begin with `prefix`."""
    written, size = io.StringIO(), figure.get_size_inches() * 72
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "alter"}):
        figure.savefig(written, format="svg", transparent=True, dpi=200)
    _, _, svg = re.sub(r"<(metadata|style).*?</\1>", "", written.getvalue(), flags=re.DOTALL).partition("<svg")
    for pattern, replacement in ((INK, "currentColor"), ("xlink:href", "href"),
                                 (r"font-family: [^;\"]*", "font-family: inherit"),
                                 (r'(\bid="|href="#|url\(#)', rf"\g<1>{prefix}")):
        svg = re.sub(pattern, replacement, svg)
    return (f'<svg role="img" aria-label="{escape(str(figure.get_label()))}" viewBox="0 0 {size[0]:g} {size[1]:g}" '
            f'style="min-width: {size[0]:g}pt; max-width: {1.3 * size[0]:g}pt">{svg.partition(">")[2]}')
