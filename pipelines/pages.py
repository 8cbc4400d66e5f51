"""HTML pages in one file each: templates and style sheet from pipelines/templates, figures inside, no network."""

from __future__ import annotations

import base64
import io
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, select_autoescape
from markupsafe import Markup, escape

from pipelines.stage import replacing

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TEMPLATES = Path(__file__).parent / "templates"


def write(page: Path, template: str, **content: Any) -> None:
    """Render `template` with `content` into the file `page`; everything is escaped."""
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES), autoescape=select_autoescape(["html", "j2"]), undefined=StrictUndefined
    )
    environment.filters["code"] = _code
    style = (TEMPLATES / "page.css").read_text(encoding="utf-8")
    with replacing(page) as fresh:
        fresh.write_text(environment.get_template(template).render(style=style, **content), encoding="utf-8")


def _code(text: str) -> Markup:
    """What stands between backticks as code, everything escaped."""
    return Markup(re.sub("`([^`]+)`", r"<code>\1</code>", str(escape(text))))


def inline_svg(figure: Figure) -> str:
    """A figure as a data address for <img>, the same bytes for the same figure."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None}, bbox_inches="tight", transparent=True)
    return "data:image/svg+xml;base64," + base64.b64encode(buffer.getvalue()).decode()
