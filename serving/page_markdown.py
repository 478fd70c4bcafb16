"""Sanitise a model's Markdown for streamlit: keep layout and formulas, remove what makes a browser send requests.

    reply -> markdown-it-py -> syntax tree -> Markdown rendered from the tree

The output contains paragraphs, headings, lists, quotes, tables, code, rules, emphasis and formulas only. Text is
escaped, an image or link becomes its text and its address, and an address is shown as code, because browsers look up
the host names of links before they are clicked. HTML stays text.
`block_requests` adds a content security policy that allows requests to the page's own server only.
Called by page.py and sidebar.py.
"""

import re
from collections.abc import Iterable

import streamlit as st
from markdown_it import MarkdownIt
from markdown_it.rules_inline import StateInline
from markdown_it.tree import SyntaxTreeNode

from common.markdown import WHITESPACE, code_span, longest_backtick_run

URL = re.compile(r"(?:[a-z][a-z0-9+.-]*://|www\.)[!-~]*", re.IGNORECASE)
# $$ … $$ or $ … $; "$5 and $6" is not a formula, as in pandoc.
FORMULA = re.compile(r"\$\$([^$]+)\$\$|\$(?![\s$])([^$\n]*[^$\s])\$(?![\d$])")
# TeX that contains an address, defines commands, or that a Markdown parser without formulas takes for a link or code.
# KaTeX also rejects addresses unless its option `trust` is set.
UNSAFE_TEX = re.compile(
    r"\\(?:href|url|html|includegraphics|def|gdef|newcommand|let)|://|www\.|\][(\[:]|`|!\[", re.IGNORECASE
)
MARKDOWN_CHARS = re.compile(r"([!#$&()*+\-:<=>\[\\\]_`{|}~]|(?<=\d)\.(?= |$))")  # the last one: list items, "1. "

CONTENT_SECURITY_POLICY = (
    "default-src 'self' data: blob: 'unsafe-inline' 'unsafe-eval'; connect-src 'self' data: blob: ws: wss:"
)
_JAVASCRIPT = """
export default function ({ data }) {
    for (const [name, content] of Object.entries(data)) {
        if (document.head.querySelector(`meta[http-equiv="${name}"]`)) continue
        const meta = document.createElement("meta")
        meta.httpEquiv = name
        meta.content = content
        document.head.append(meta)
    }
}
"""


def block_requests() -> None:
    """Restrict the browser to requests to the page's own server and disable DNS prefetching of links."""
    mount = st.components.v2.component("block_requests", html="<span></span>", js=_JAVASCRIPT)
    data = {"Content-Security-Policy": CONTENT_SECURITY_POLICY, "x-dns-prefetch-control": "off"}
    mount(data=data, key="block_requests", width="content", height="content")


def escape_markdown(text: str) -> str:
    """Escape text for a widget that renders Markdown: on one line, with addresses as code."""
    text = WHITESPACE.sub(" ", text)
    written, done = "", 0
    for found in URL.finditer(text):
        written += MARKDOWN_CHARS.sub(r"\\\1", text[done : found.start()]) + code_span(found[0])
        done = found.end()
    return written + MARKDOWN_CHARS.sub(r"\\\1", text[done:])


def safe_markdown(text: str) -> str:
    """Markdown with the same layout, without images, links and HTML."""
    return "\n".join(_render_blocks(SyntaxTreeNode(MARKDOWN_PARSER.parse(text)).children))


def _formula_rule(state: StateInline, silent: bool) -> bool:
    """Inline rule of markdown-it: $ … $ and $$ … $$ become a token `formula`."""
    found = FORMULA.match(state.src, state.pos, state.posMax)
    if not found:
        return False
    if not silent:
        token = state.push("formula", "", 0)
        token.content, token.markup = found[1] or found[2], "$$" if found[1] else "$"
    state.pos = found.end()
    return True


MARKDOWN_PARSER = MarkdownIt("commonmark", {"html": False}).enable(["table", "strikethrough"])
MARKDOWN_PARSER.inline.ruler.before("escape", "formula", _formula_rule)


# ---- blocks ----------------------------------------------------------------------------------------------------------
def _render_blocks(nodes: Iterable[SyntaxTreeNode], tight: bool = False) -> list[str]:
    """The lines of blocks, separated by empty lines; a list inside the item of a tight list follows directly."""
    lines: list[str] = []
    for node in nodes:
        block = _render_block(node)
        joins = tight and (node.type == "bullet_list" or (block[:1] and re.match(r"1[.)] ", block[0])))
        lines += ["", *block] if lines and block and not joins else block
    return lines


def _render_block(node: SyntaxTreeNode) -> list[str]:
    match node.type:
        case "paragraph":
            lines = (line.strip(" ") for line in _render_inline(node.children).split("\n"))
            return [line for line in lines if line]
        case "heading":
            return [f"{'#' * int(node.tag[1])} {_render_one_line(node)}"]
        case "blockquote":
            return [f"> {line}".rstrip() for line in _render_blocks(node.children) or [""]]
        case "bullet_list":
            return _render_list(node, [node.markup] * len(node.children))
        case "ordered_list":
            first = int(node.attrs.get("start", 1))
            return _render_list(node, [f"{first + i}{node.markup}" for i in range(len(node.children))])
        case "fence" | "code_block":
            return _render_code(node)
        case "table":
            return _render_table(node)
        case "hr":
            return ["---"]
    return [escape_markdown(node.content)] if node.content else []


def _render_list(node: SyntaxTreeNode, markers: list[str]) -> list[str]:
    lines: list[str] = []
    for item, marker in zip(node.children, markers, strict=True):
        is_tight = all(child.hidden for child in item.children if child.type == "paragraph")
        inner = _render_blocks(item.children, is_tight) or [""]
        indent = " " * (len(marker) + 1)
        lines += [] if is_tight or not lines else [""]
        lines += [f"{marker} {inner[0]}".rstrip(), *(f"{indent}{line}".rstrip() for line in inner[1:])]
    return lines


def _render_code(node: SyntaxTreeNode) -> list[str]:
    lines = node.content.removesuffix("\n").split("\n")
    fence = "`" * max(3, 1 + longest_backtick_run(node.content))
    language = re.match(r"[\w+#-]*", node.info.strip()) if node.type == "fence" else None
    return [fence + (language[0] if language else ""), *lines, fence]


def _render_table(node: SyntaxTreeNode) -> list[str]:
    rows = [row for part in node.children for row in part.children]
    lines = [
        "| " + " | ".join(_render_one_line(cell).replace("\n", " ") for cell in row.children) + " |" for row in rows
    ]
    sides = [str(cell.attrs.get("style", "")) for cell in rows[0].children]
    rule = [":---:" if "center" in side else "---:" if "right" in side else "---" for side in sides]
    return [lines[0], "| " + " | ".join(rule) + " |", *lines[1:]]


# ---- inside a block --------------------------------------------------------------------------------------------------
def _render_one_line(node: SyntaxTreeNode) -> str:
    return _render_inline(node.children, single_line=True)


def _render_inline(nodes: Iterable[SyntaxTreeNode], single_line: bool = False) -> str:
    """`single_line`: for headings and table cells, which have no line breaks and where `|` ends a cell."""
    written = ""
    for piece in (_render_node(node, single_line) for node in nodes):
        joins = piece[:1] in ("`", "$") and written.endswith(piece[:1])  # two code spans must not become one
        written += f" {piece}" if joins else piece
    return written


def _render_node(node: SyntaxTreeNode, single_line: bool) -> str:
    inner = _render_inline(node.children, single_line)
    match node.type:
        case "inline":
            return inner
        case "em" | "strong" | "s":
            return f"{node.markup.replace('_', '*')}{inner}{node.markup.replace('_', '*')}" if inner else ""
        case "softbreak" | "hardbreak":
            return " " if single_line else "\\\n" if node.type == "hardbreak" else "\n"
        case "code_inline":
            return _escape_cell(code_span(node.content), single_line)
        case "formula":
            return _render_formula(node, single_line)
        case "link" | "image":
            address = str(node.attrs.get("href") or node.attrs.get("src") or "")
            inner = inner if node.type == "link" else escape_markdown(node.content)
            shown = _escape_cell(code_span(address), single_line) if address else ""
            return inner if not address or inner == shown else f"{inner} ({shown})" if inner else shown
    return _escape_cell(escape_markdown(node.content), False) if node.content else ""


def _render_formula(node: SyntaxTreeNode, single_line: bool) -> str:
    """A formula; as code if its TeX is unsafe."""
    if UNSAFE_TEX.search(node.content):
        return _escape_cell(code_span(node.content), single_line)
    tex = node.content.strip().replace("<", r"\lt ").replace(">", r"\gt ")  # otherwise they could be parsed as HTML
    if node.markup == "$$" and not single_line:
        lines = [line.strip() for line in tex.split("\n")]
        return "\n".join(["", "$$", *(line for line in lines if line), "$$", ""])
    return _escape_cell(f"${WHITESPACE.sub(' ', tex)}$", single_line)


def _escape_cell(text: str, single_line: bool) -> str:
    return text.replace("|", r"\|") if single_line else text
