"""Markup to text that a person would want to read: reStructuredText, gettext catalogues, dialogue files.

Every function takes the file's text and returns text (or dialogues); none knows about tables or splits.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any, ClassVar

import polib
from docutils import nodes
from docutils.core import publish_doctree
from docutils.parsers.rst import Directive, directives, roles
from ruamel.yaml import YAML

Dialogue = list[dict[str, str]]

CODE = {"code-block", "console", "sourcecode", "productionlist"}
SILENT = {"module", "currentmodule", "toctree", "index", "highlight", "program", "contents", "image", "default-domain"}
SILENT |= {"raw", "include"}
NATIVE = {"note", "admonition", "warning", "tip", "important", "hint", "caution", "rubric", "parsed-literal", "code"}
NATIVE |= {"figure", "table", "list-table", "csv-table", "math", "epigraph", "topic", "sidebar", "line-block"}
PROSE_ROLES = {"doc", "ref", "term", "menuselection", "abbr", "guilabel", "sup", "sub", "title"}
PREFIXES = {"rfc": "RFC ", "pep": "PEP ", "cve": "CVE-", "ticket": "#", "bpo": "bpo-"}
TITLED = re.compile(r"(.+?)\s*<[^<>]*>$", re.DOTALL)
PO_MARKUP = re.compile(r"</?[a-zA-Z][^<>]*>")
SETTINGS = {
    "report_level": 5,
    "halt_level": 5,
    "file_insertion_enabled": False,
    "raw_enabled": False,
    "input_encoding": "unicode",
    "_disable_config": True,
    "smart_quotes": False,
    "line_length_limit": 1_000_000,
}


def rst_to_text(source: str) -> str:
    """reStructuredText, Sphinx's directives and roles included, as light Markdown: # titles, `code`, - lists."""
    for name in set(re.findall(r"^\s*\.\.\s+([\w:+-]+)::", source, re.MULTILINE)):
        if name.lower() not in NATIVE:
            directives.register_directive(name, _directive(name))
    for name in set(re.findall(r":([a-zA-Z][\w:+-]*):`", source)):
        roles.register_local_role(name, _role)
    return "\n\n".join(_blocks(publish_doctree(source, settings_overrides=SETTINGS), 0))


def po_to_text(source: str) -> str:
    """The translations of a gettext catalogue, one paragraph each; the original where the catalogue is the original."""
    catalogue = polib.pofile(f"{source}\n", check_for_duplicates=False)  # one line alone may be the name of a file
    original = catalogue.metadata.get("Language", "").lower() == "en"
    paragraphs: dict[str, None] = {}
    for entry in catalogue:
        if entry.obsolete or (entry.fuzzy and not original):
            continue
        forms = [entry.msgid, entry.msgid_plural] if original else [entry.msgstr, *entry.msgstr_plural.values()]
        for form in forms:
            text = " ".join(PO_MARKUP.sub("", form).split()) if "\n\n" not in form else form.strip()
            if text:
                paragraphs.setdefault(text)
    return "\n".join(paragraphs)


def dialogues_in(source: str) -> tuple[list[Dialogue], int]:
    """(dialogues of a `conversations:` YAML file, how many entries were malformed); speakers alternate, user first."""
    try:
        entries = (YAML(typ="safe", pure=True).load(source) or {}).get("conversations") or []
    except Exception:  # noqa: BLE001  the parser raises errors of many kinds for a damaged file
        return [], 1
    if not isinstance(entries, list):
        return [], 1
    found = [as_dialogue({"content": turn} for turn in entry) if isinstance(entry, list) else None for entry in entries]
    good = [dialogue for dialogue in found if dialogue]
    return good, len(found) - len(good)


def as_dialogue(turns: Iterable[Any]) -> Dialogue | None:
    """Alternating user and assistant turns that end with the assistant's; None when there are not two of them.

    turns: {"content": text} or {"role": "user" | "assistant", "content": text}; a role that breaks the alternation
    or a turn without text makes the dialogue malformed.
    """
    dialogue: Dialogue = []
    for number, turn in enumerate(turns):
        role = ("user", "assistant")[number % 2]
        content = turn.get("content") if isinstance(turn, dict) else None
        if not isinstance(content, str) or not content.strip() or turn.get("role", role) != role:
            return None
        dialogue.append({"role": role, "content": " ".join(content.split(" ")).strip()})
    dialogue = dialogue[: len(dialogue) // 2 * 2]
    return dialogue or None


class _AnyOption(dict[str, Any]):
    """Accepts every option of a directive, as text."""

    def __missing__(self, name: str) -> Any:
        return directives.unchanged


def _directive(name: str) -> type[Directive]:
    kind = name.lower()
    run = _run_code if kind in CODE else _run_silent if kind in SILENT else _run_described
    return type("Directive", (_Sphinx,), {"run": run})


class _Sphinx(Directive):
    """A directive that docutils does not know."""

    has_content, optional_arguments, final_argument_whitespace = True, 1, True
    option_spec: ClassVar[dict[str, Any]] = _AnyOption({"class": directives.unchanged})


def _run_code(self: Directive) -> list[nodes.Node]:
    text = "\n".join(self.content)
    return [nodes.literal_block(text, text)]


def _run_silent(self: Directive) -> list[nodes.Node]:
    return []


def _run_described(self: Directive) -> list[nodes.Node]:
    """What is described on a line of its own, then the description."""
    body = nodes.container()
    self.state.nested_parse(self.content, self.content_offset, body)
    signature = " ".join(self.arguments).strip()
    heading = {"versionadded": "New in", "versionchanged": "Changed in", "deprecated": "Deprecated since"}.get(
        self.name
    )
    if heading:
        return [nodes.paragraph("", f"{heading} version {signature.split(' ')[0]}:"), *body.children]
    inline = nodes.literal(signature, signature)
    return [nodes.paragraph("", "", inline), *body.children] if signature else list(body.children)


def _role(name: str, rawtext: str, text: str, *_: Any, **__: Any) -> tuple[list[nodes.Node], list[Any]]:
    """What a reader sees of a cross-reference."""
    kind = name.rsplit(":", 1)[-1].lower()
    titled = TITLED.match(text)
    shown = titled[1] if titled else text
    if not titled:
        shown = shown.lstrip("!")
        shown = shown.rsplit(".", 1)[-1] if shown.startswith("~") else shown
        shown = shown.strip("/").replace("-", " ") if kind in ("ref", "doc") else shown
        shown = PREFIXES.get(kind, "") + shown
    prose = titled or kind in PROSE_ROLES or kind in PREFIXES
    return [nodes.inline("", shown) if prose else nodes.literal(shown, shown)], []


def _blocks(node: nodes.Node, depth: int) -> list[str]:
    """Blocks of text of a document tree, in reading order; depth: how many sections are around it."""
    match node:
        case (
            nodes.comment() | nodes.target() | nodes.system_message() | nodes.substitution_definition() | nodes.image()
        ):
            return []
        case nodes.pending() | nodes.docinfo() | nodes.meta() | nodes.transition():
            return []
        case nodes.title() | nodes.subtitle():
            in_box = isinstance(node.parent, (nodes.Admonition, nodes.topic, nodes.sidebar, nodes.table))
            return [f"{_inline(node)}:" if in_box else f"{'#' * max(depth, 1)} {_inline(node)}"]
        case nodes.literal_block() | nodes.doctest_block() | nodes.math_block():
            return ["\n".join(f"    {line}".rstrip() for line in node.astext().strip("\n").split("\n"))]
        case nodes.line_block():
            return ["\n".join(_inline(line) for line in node.findall(nodes.line))]
        case nodes.bullet_list() | nodes.enumerated_list():
            return _list(node, depth)
        case nodes.definition_list_item() | nodes.field():
            return _definition(node, depth)
        case nodes.table():
            return [
                "\n".join(
                    " | ".join(" ".join(cell.astext().split()) for cell in row) for row in node.findall(nodes.row)
                )
            ]
        case nodes.TextElement():
            text = _inline(node)
            return [text] if text else []
        case _:
            inner = depth + isinstance(node, nodes.section)
            label = [f"{type(node).__name__.capitalize()}:"] if _bare_admonition(node) else []
            return label + [block for child in node.children for block in _blocks(child, inner)]


def _bare_admonition(node: nodes.Node) -> bool:
    return isinstance(node, nodes.Admonition) and not isinstance(node, (nodes.admonition, nodes.system_message))


def _list(node: nodes.Element, depth: int) -> list[str]:
    """Items with their mark; short lists stay one block."""
    items = []
    for number, item in enumerate(node.children, start=int(node.get("start", 1))):
        mark = f"{number}. " if isinstance(node, nodes.enumerated_list) else "- "
        text = "\n\n".join(block for child in item.children for block in _blocks(child, depth))
        items.append(mark + text.replace("\n", "\n" + " " * len(mark)))
    items = [re.sub(r"[ ]+$", "", item, flags=re.MULTILINE) for item in items]
    return ["\n".join(items)] if all("\n\n" not in item for item in items) else items


def _definition(node: nodes.Element, depth: int) -> list[str]:
    """The term with a colon, then what it means."""
    head, *rest = node.children
    return [f"{_inline(head)}:", *(block for child in rest for block in _blocks(child, depth))]


def _inline(node: nodes.Node) -> str:
    """Text of one paragraph on one line, code in backticks."""
    pieces = []
    for child in node.children:
        match child:
            case nodes.Text():
                pieces.append(child.astext())
            case nodes.literal():
                pieces.append(f"`{child.astext()}`")
            case nodes.problematic():
                pieces.append(child.astext())
            case nodes.system_message() | nodes.target() | nodes.image():
                continue
            case _:
                pieces.append(_inline(child))
    return " ".join("".join(pieces).split())
