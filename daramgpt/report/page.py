"""The page around the report's sections: head, style for light and dark, tables. It asks no host for anything."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

STYLE = """
:root { color-scheme: light dark; --back: #fff; --ink: #1d2430; --soft: #5c6675; --rule: #dde2ea; --card: #f5f7fa;
  --c1: #1f6feb; --c2: #d1660a; --c3: #7a4fc4; --c4: #12805c; --c5: #c2255c; --c6: #8a6d00; --good: #12805c;
  --warn: #a45a00; }
@media (prefers-color-scheme: dark) { :root { --back: #12161d; --ink: #e4e9f1; --soft: #9aa6b6; --rule: #2c3441;
  --card: #1a202a; --c1: #6cabff; --c2: #f2a154; --c3: #b596f2; --c4: #5cc9a0; --c5: #f783ac; --c6: #e2c044;
  --good: #5cc9a0; --warn: #f2b45c; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1180px; padding: 24px 16px 64px; background: var(--back); color: var(--ink);
  font: 15px/1.55 system-ui, "Noto Sans KR", "Apple SD Gothic Neo", "Malgun Gothic", sans-serif; }
h1 { margin: 0; font-size: 28px; overflow-wrap: anywhere; } h2 { margin: 40px 0 12px; font-size: 20px; }
p { margin: 8px 0; } .soft, figcaption { color: var(--soft); }
.state { display: inline-block; margin-left: 10px; padding: 2px 10px; border: 1px solid; border-radius: 12px;
  font-size: 14px; font-weight: 600; vertical-align: middle; color: var(--warn); } .state.done { color: var(--good); }
.tiles { display: grid; gap: 12px; margin-top: 20px; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); }
.tile { padding: 12px 14px; border-radius: 8px; background: var(--card); }
.tile b { display: block; font-size: 21px; font-variant-numeric: tabular-nums; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: 6px 10px; border-bottom: 1px solid var(--rule); text-align: right; white-space: nowrap; }
th { font-weight: 600; color: var(--soft); } .name { text-align: left; }
th:first-child, td:first-child { padding-left: 0; }
table.facts td { text-align: left; white-space: normal; overflow-wrap: anywhere; }
table.facts td:first-child { width: 24%; color: var(--soft); }
.charts { display: grid; gap: 24px; grid-template-columns: repeat(auto-fit, minmax(min(100%, 440px), 1fr)); }
figure { margin: 0; } svg { display: block; width: 100%; height: auto; }
svg * { stroke-linejoin: round; } svg text { font-family: inherit; fill: var(--soft); }
.c1 { --c: var(--c1); } .c2 { --c: var(--c2); } .c3 { --c: var(--c3); } .c4 { --c: var(--c4); }
.c5 { --c: var(--c5); } .c6 { --c: var(--c6); }
figcaption > * { margin-right: 14px; } .key { display: inline-block; white-space: nowrap; }
.key i { display: inline-block; width: 16px; margin-right: 6px; vertical-align: middle;
  border-top: 3px solid var(--c); } .key i.dashed { border-top-style: dashed; }
.samples { display: grid; gap: 12px; grid-template-columns: repeat(auto-fit, minmax(min(100%, 280px), 1fr)); }
.samples + .samples { margin-top: 24px; }
.sample { padding: 12px 14px; border-radius: 8px; background: var(--card); word-break: keep-all;
  overflow-wrap: anywhere; }
.sample small { display: block; margin-bottom: 4px; color: var(--soft); }
pre { overflow-x: auto; padding: 12px 14px; border-radius: 8px; background: var(--card); font-size: 13px; }
summary { cursor: pointer; color: var(--soft); }
"""


def page(title: str, sections: Iterable[str]) -> str:
    """A whole HTML document.

    Args:
        title: plain text.
        sections: HTML; empty ones are left out.
    """
    body = "\n".join(section for section in sections if section)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        # An empty icon of its own keeps browsers from asking the host for one.
        f'<link rel="icon" href="data:,">\n<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n'
        f"<body>\n{body}\n</body>\n</html>\n"
    )


def section(heading: str, *parts: str) -> str:
    """A heading with HTML below it."""
    return f"<h2>{escape(heading)}</h2>\n" + "\n".join(parts)


def table(cells: Sequence[Sequence[str]], num_left: int = 1) -> str:
    """Plain texts, header first, in a box that scrolls by itself on a narrow screen.

    Args:
        num_left: so many columns are names, set to the left; the others are figures, set to the right.
    """

    def line(kind: str, texts: Sequence[str]) -> str:
        marks = (' class="name"' if place < num_left else "" for place in range(len(texts)))
        return "".join(f"<{kind}{mark}>{escape(text)}</{kind}>" for mark, text in zip(marks, texts, strict=True))

    head, *body = (line(kind, texts) for kind, texts in zip(["th", *["td"] * (len(cells) - 1)], cells, strict=True))
    rows = "".join(f"<tr>{row}</tr>" for row in body)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>'


def facts(rows: Iterable[tuple[str, str]]) -> str:
    """Names and what is to be said of them; those without a text are left out."""
    body = "".join(f"<tr><td>{escape(name)}</td><td>{escape(value)}</td></tr>" for name, value in rows if value)
    return f'<table class="facts"><tbody>{body}</tbody></table>'


def tiles(rows: Iterable[tuple[str, str]]) -> str:
    """Large figures, each with its name below."""
    return (
        '<div class="tiles">'
        + "".join(
            f'<div class="tile"><b>{escape(value)}</b><span class="soft">{escape(name)}</span></div>'
            for name, value in rows
        )
        + "</div>"
    )
