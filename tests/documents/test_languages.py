"""README.zh-CN.md says what README.md says: the same headings, code, links, pictures and figures, in the same order."""

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
ENGLISH, CHINESE = ((ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "README.zh-CN.md"))
FENCE = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)


def prose(text: str) -> str:
    return FENCE.sub("", text)


def test_headings() -> None:
    levels = [re.findall(r"^(#+) ", prose(text), re.MULTILINE) for text in (ENGLISH, CHINESE)]
    assert levels[0] == levels[1]


def test_code() -> None:
    """The commands are the same; comments behind them are translated. What is drawn as a tree stays as it is."""
    blocks = [[re.sub(r" *#.*", "", block) for block in FENCE.findall(text)] for text in (ENGLISH, CHINESE)]
    assert blocks[0] == blocks[1]


def test_links_and_pictures() -> None:
    """Each links to the other; all other links are the same."""
    for text, other in ((ENGLISH, "README.zh-CN.md"), (CHINESE, "README.md")):
        assert f"]({other})" in text.split("\n\n")[1]
    links = [re.findall(r"!?\]\(([^)]+)\)", prose(text))[1:] for text in (ENGLISH, CHINESE)]
    assert links[0] == links[1]


def test_tables_and_inline_code() -> None:
    for pattern in (r"^\|.*\|$", r"`[^`]+`"):
        found = [re.findall(pattern, prose(text), re.MULTILINE) for text in (ENGLISH, CHINESE)]
        assert len(found[0]) == len(found[1])
    code = [sorted(re.findall(r"`([^`]+)`", prose(text))) for text in (ENGLISH, CHINESE)]
    assert code[0] == code[1]


def test_figures() -> None:
    """Every number of the tables, in order."""
    rows = [re.findall(r"^\|.*\|$", prose(text), re.MULTILINE) for text in (ENGLISH, CHINESE)]
    figures = [[sorted(re.findall(r"\d[\d,.]*\d|\d", row)) for row in some] for some in rows]
    assert figures[0] == figures[1]
