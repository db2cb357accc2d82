"""The section of the page on pairs with the dense model: their numbers, and those that differ most."""

from html import escape
from typing import Any

from PIL.Image import Image

from .html import html_image, html_table
from .words import number


def pairs_section(results: dict[str, Any], pairs: list[tuple[dict[str, Any], Image, Image]]) -> str:
    """What `Run` holds of them: the numbers with their intervals, and the pairs that differ most."""
    first = next(iter(results.values()))
    setting = [f"{number(first['images'])} pairs, each of one seed and prompt."]
    setting += [f"{name}: {there} with the dense model, {here} with experts." for name, (here, there) in
                first["differs"].items()]
    rows = [[escape(name), escape(_value(result)), escape(result["protocol"])] for name, result in results.items()]
    parts = [f"<p>{escape(' '.join(setting))}</p>", html_table(["Metric", "Value", "What it is"], {"": rows})]
    if pairs:
        pictures = [
            ["dense", *(html_image(dense, "shot", f"dense: {about['title']}") for about, dense, _ in pairs)],
            ["experts", *(html_image(image, "shot", f"experts: {about['title']}") for about, _, image in pairs)]]
        numbers = [[escape(name), *(escape(about["values"].get(name, "–")) for about, _, _ in pairs)]
                   for name in results]
        parts += ["<p>The pairs that differ most, the worst first:</p>",
                  html_table(["", *(escape(about["title"]) for about, _, _ in pairs)], {"": pictures + numbers})]
    return "\n".join(parts)


def _value(result: dict[str, Any]) -> str:
    """With its interval, where there is one."""
    if result["ci95"] is None:
        return number(result["value"])
    low, high = result["ci95"]
    return f"{number(result['value'])} (95%: {number(low)} to {number(high)})"
