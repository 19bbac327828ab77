"""What is written in Chinese says what the English page says: the same headings, code, links, pictures and figures, in
the same order."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
PAGES = ["README.md", "docs/guide.md"]
FENCE = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)


@pytest.fixture(params=PAGES)
def both(request: pytest.FixtureRequest) -> tuple[str, str]:
    """The English page and the Chinese one."""
    paths = ROOT / request.param, (ROOT / request.param).with_suffix(".zh-CN.md")
    english, chinese = (path.read_text(encoding="utf-8") for path in paths)
    for text, other in ((english, paths[1]), (chinese, paths[0])):
        assert f"]({other.name})" in text.split("\n\n")[1], "each links to the other"
    return english, chinese


def prose(text: str) -> str:
    return FENCE.sub("", text)


def test_headings(both: tuple[str, str]) -> None:
    levels = [re.findall(r"^(#+) ", prose(text), re.MULTILINE) for text in both]
    assert levels[0] == levels[1]


def test_code(both: tuple[str, str]) -> None:
    """The commands are the same; comments behind them are translated. What is drawn as a tree stays as it is."""
    blocks = [[re.sub(r" *#.*", "", block) for block in FENCE.findall(text)] for text in both]
    assert blocks[0] == blocks[1]


def test_links_and_pictures(both: tuple[str, str]) -> None:
    """The same, to pages in the same language where there are some."""
    links = [[link.replace(".zh-CN.md", ".md") for link in re.findall(r"!?\]\(([^)]+)\)", prose(t))[1:]] for t in both]
    assert links[0] == links[1]


def test_tables_and_inline_code(both: tuple[str, str]) -> None:
    for pattern in (r"^\|.*\|$", r"`[^`]+`"):
        found = [re.findall(pattern, prose(text), re.MULTILINE) for text in both]
        assert len(found[0]) == len(found[1])
    code = [sorted(re.findall(r"`([^`]+)`", prose(text))) for text in both]
    assert code[0] == code[1]


def test_figures(both: tuple[str, str]) -> None:
    """Every number of the tables, in order."""
    rows = [re.findall(r"^\|.*\|$", prose(text), re.MULTILINE) for text in both]
    figures = [[sorted(re.findall(r"\d[\d,.]*\d|\d", row)) for row in some] for some in rows]
    assert figures[0] == figures[1]
