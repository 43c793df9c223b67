"""Elements of a page. Plain text is escaped wherever it goes in; only what `element` made is taken as it stands."""

import html
from collections.abc import Iterable

VOID = ("img", "meta", "line", "circle", "polyline", "rect")


class Html(str):
    """Markup that was made here."""

    __slots__ = ()


Child = str | Html | None


def escaped(text: str) -> Html:
    """Text as it is to be read."""
    return text if isinstance(text, Html) else Html(html.escape(text, quote=True))


def joined(children: Iterable[Child]) -> Html:
    """Children one after another; None is nothing."""
    return Html("".join(escaped(child) for child in children if child is not None))


def element(name: str, /, *children: Child, **attributes: str | float | bool | None) -> Html:
    """One element.

    Args:
        name: as in HTML or SVG.
        children: text, which is escaped, or elements.
        attributes: `class_` for class, `stroke_width` for stroke-width; None and False: left out; True: without a value.
    """
    words = [name]
    for key, value in attributes.items():
        if value is None or value is False:
            continue
        label = key.rstrip("_").replace("_", "-")
        words.append(label if value is True else f'{label}="{html.escape(str(value), quote=True)}"')
    start = " ".join(words)
    return Html(f"<{start}/>" if name in VOID else f"<{start}>{joined(children)}</{name}>")
