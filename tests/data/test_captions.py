"""Caption options: what is kept is kept, shares are those asked for, and a caption's variants depend on it alone."""

import random
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from sdxl_trainer.chunking import Prompt
from sdxl_trainer.config import Data
from sdxl_trainer.data import captions
from sdxl_trainer.data.records import Record
from sdxl_trainer.errors import UserError

SCRIPTS = {
    "Chinese": "红色的圆形，蓝天, 穿西装的男人",
    "Japanese": "赤い丸, 女の子、がっこう, ｶﾅ",
    "Korean": "빨간 원, 하늘",
    "Arabic": "دائرة حمراء, سماءٌ زرقاء",
    "Hebrew, with marks of direction": "\u200fעיגול אדום\u200f, שמיים",
    "Devanagari": "लाल वृत्त, नीला आकाश क्षत्रिय",
    "Thai": "วงกลมสีแดง, ท้องฟ้า",
    "emoji": "👩‍🚀 on the moon, 🏳️‍🌈, 👍🏽",
    "combining marks": "e\u0301te\u0301, a\u030a\u0323, Z\u0351\u036b\u0343a\u0323lgo",
    "outside of the basic plane": "𝔊𝔬𝔱𝔥𝔦𝔠, 𠮷野家, 🜁",
    "embedded directions": "\u202bred\u202c circle, a\u2067b\u2069c",
}


def record(*texts: str, seconds: Sequence[str] = (), name: str = "a.png") -> Record:
    return Record(name, texts, bytes, "stamp", seconds=tuple(seconds))


def choice(*texts: str, seconds: Sequence[str] = (), **options: Any) -> captions.Choice:
    data = Data(path="x", **options)
    return captions.Choices([data], [(0, record(*texts, seconds=seconds))])[0]


def worded(*texts: str, **options: Any) -> list[str]:
    return [prompt.text for prompt in choice(*texts, **options).prompts()]


def test_without_options_a_caption_is_what_was_written() -> None:
    for text in (*SCRIPTS.values(), "a  b\tc,d ,  e", "{a|b} __c__ (x:1.2) [trigger] |||"):
        assert choice(text) == captions.Choice((1.0,), ((Prompt(text),),))


@pytest.mark.parametrize("text", SCRIPTS.values(), ids=SCRIPTS)
def test_every_script_survives_shuffling(text: str) -> None:
    tags = sorted(tag.strip() for tag in text.split(","))
    for variant in worded(text, shuffle_tags=True, caption_prefix="p", caption_suffix="s", trigger="sks"):
        assert variant.startswith("p sks, ")
        assert variant.endswith(" s")
        assert sorted(variant.removeprefix("p sks, ").removesuffix(" s").split(", ")) == tags


def test_the_first_tags_are_kept_and_the_others_shuffled() -> None:
    text = ", ".join("abcdefgh")
    made = worded(text, shuffle_tags=True, keep_tags=3, caption_variants=400)
    assert {variant[:7] for variant in made} == {"a, b, c"}
    assert {"".join(sorted(variant)) for variant in made} == {"".join(sorted(text))}
    for place in range(3, 8):
        counts = Counter(variant.split(", ")[place] for variant in made)
        assert set(counts) == set("defgh")
        assert all(50 < count < 110 for count in counts.values())  # 80 expected; 5 sigma would be 40


def test_every_order_is_equally_likely() -> None:
    counts = Counter(v for i in range(1200) for v in worded(f"a{i}, b, c", shuffle_tags=True, caption_variants=1))
    orders = Counter("".join(tag[0] for tag in variant.split(", ")) for variant in counts.elements())
    assert set(orders) == {"abc", "acb", "bac", "bca", "cab", "cba"}
    assert sum((count - 200) ** 2 / 200 for count in orders.values()) < 20.5  # chi-squared, 5 degrees: p = 0.001


def test_a_separator_keeps_both_ends_and_disappears() -> None:
    made = worded("sks, dog ||| a, b, c ||| high quality", shuffle_tags=True, keep_separator="|||", caption_variants=64)
    assert {variant[:10] for variant in made} == {"sks, dog, "}
    assert all(variant.endswith(", high quality") for variant in made)
    assert len(set(made)) == 6
    assert "".join(made).count("|") == 0


def test_tags_are_left_out_as_often_as_asked_and_kept_ones_never() -> None:
    text = ", ".join(f"t{i}" for i in range(10))
    made = worded(text, tag_dropout=0.25, keep_tags=2, caption_variants=40)
    counts = Counter(tag for variant in made for tag in variant.split(", "))
    assert counts["t0"] == counts["t1"] == 40
    assert all(counts[f"t{i}"] == 30 for i in range(2, 10))  # a Latin hypercube: exact where the share allows it
    assert [variant for variant in made if variant.split(", ") != sorted(variant.split(", "))] == []


def test_a_few_variants_of_many_captions_have_the_share_too() -> None:
    made = [v for i in range(800) for v in worded(f"a{i}, b", tag_dropout=0.1, keep_tags=1, caption_variants=2)]
    assert sum(", b" not in variant for variant in made) / 1600 == pytest.approx(0.1, abs=0.03)


def test_a_caption_without_tags_left_is_left_out() -> None:
    assert set(worded("a, b", tag_dropout=1.0)) == {""}
    assert set(worded("a, b", tag_dropout=1.0, trigger="sks")) == {"sks"}


@pytest.mark.parametrize(
    ("text", "result"),
    [
        ("a dog", "sks, a dog"),
        ("[trigger] runs, [trigger] sits", "sks runs, sks sits"),
        ("a SKS dog", "a SKS dog"),
        ("asks", "sks, asks"),
    ],
)
def test_the_trigger_is_in_every_caption(text: str, result: str) -> None:
    assert worded(text, trigger="sks") == [result]
    assert all(captions.has_trigger(v, "sks") for v in worded(text, trigger="sks", tag_dropout=1.0))


def test_wildcards(tmp_path: Path) -> None:
    (tmp_path / "colour.txt").write_text("\ufeffred\n\n# no colour\n{light|dark} blue\n", encoding="utf-8")
    (tmp_path / "of").mkdir()
    (tmp_path / "of" / "animals.txt").write_text("a __colour__ cat\n", encoding="utf-8")
    options = {"wildcards": True, "wildcards_dir": str(tmp_path), "caption_variants": 60}
    assert Counter(worded("{a|b|c} x", **options)) == {"a x": 20, "b x": 20, "c x": 20}
    assert Counter(worded("{a|a|b}", **options)) == {"a": 40, "b": 20}
    assert Counter(worded("__colour__", **options))["red"] == 30
    assert set(worded("__of/animals__", **options)) == {"a red cat", "a light blue cat", "a dark blue cat"}
    assert set(worded("{a|{b|c}}", **options)) == {"a", "b", "c"}
    assert set(worded("{{a|b}} {x} snake_case 1__2 _ {open|ended", **options)) == {
        "{a|b} x snake_case 1__2 _ {open|ended"
    }


@pytest.mark.parametrize(
    ("text", "files", "what", "fix"),
    [
        ("__coluor__", {"colour": "red"}, "'coluor.txt' is missing", "'colour'"),
        ("__colour__", {}, "'colour.txt' is missing", "add it"),
        ("__../secret__", {"a": "b"}, None, ""),
        ("__empty__", {"empty": "# nothing\n"}, "no options", "one option per line"),
        ("__a__", {"a": "__b__", "b": "__a__"}, "without end", "break the circle"),
        ("{2$$a|b}", {}, "more than one", r"\{a\|b\|c\}"),
        ("{0.3::a|b}", {}, "more than one", r"\{a\|b\|c\}"),
    ],
)
def test_wildcards_that_cannot_be_read(
    tmp_path: Path, text: str, files: dict[str, str], what: str | None, fix: str
) -> None:
    import re

    for name, content in files.items():
        (tmp_path / f"{name}.txt").write_text(content)
    if what is None:
        assert set(worded(text, wildcards=True, wildcards_dir=str(tmp_path))) == {text}
        return
    with pytest.raises(UserError) as caught:
        worded(text, wildcards=True, wildcards_dir=str(tmp_path))
    assert what in caught.value.what
    assert re.search(fix, caught.value.fix)


def test_captions_are_drawn_with_their_weights() -> None:
    made = choice("a", "b", "c", caption_weights=(0.5, 0.0, 1.5))
    assert made.odds == pytest.approx((0.25, 0.25, 1.0))
    drawn = Counter(made.pick(i / 1000, 0.0).text for i in range(1000))
    assert drawn == {"a": 250, "c": 750}
    assert Counter(choice("a", "b").pick(i / 1000, 0.0).text for i in range(1000)) == {"a": 500, "b": 500}


def test_variants_are_equally_likely() -> None:
    made = choice("{a|b|c|d}", wildcards=True, caption_variants=4)
    assert Counter(made.pick(0.0, i / 1000).text for i in range(1000)) == dict.fromkeys("abcd", 250)


def test_the_second_encoder_may_read_another_text() -> None:
    made = choice("tags, of, it", seconds=["A sentence."], trigger="sks")
    assert made.prompts() == [Prompt("sks, tags, of, it", "sks, A sentence.")]


def test_variants_depend_on_the_caption_alone() -> None:
    data = Data(path="x", shuffle_tags=True)
    texts = [f"a{i}, b, c, d, e" for i in range(5)]
    made = captions.Choices([data], [(0, record(text)) for text in texts])
    edited = captions.Choices([data], [(0, record(text)) for text in ["new", texts[3], "x, y", *texts[:2], texts[4]]])
    assert [edited[i] for i in (1, 3, 4, 5)] == [made[i] for i in (3, 0, 1, 4)]
    again = captions.Choices([data], [(0, record(texts[0], name="other.png"))])
    assert again[0] == made[0]


def test_tags_within_brackets_stay_together_where_emphasis_is_read() -> None:
    text = "(red, blue:1.2), [a, b], \\(c, d"
    assert captions.split_tags(text, ",", emphasis=True) == ["(red, blue:1.2)", "[a, b]", "\\(c", "d"]
    assert captions.split_tags(text, ",") == ["(red", "blue:1.2)", "[a", "b]", "\\(c", "d"]
    assert {prompt.emphasis for prompt in choice(text, emphasis=True).prompts()} == {True}


def test_fuzzed_lines_lose_nothing() -> None:
    """200 lines of odd characters: shuffling permutes the tags, and no option breaks or loses a character."""
    draw = random.Random(0)
    pools = [
        "abc ,",
        ",;|[](){}_:\\",
        "\u200d\u200b\u202e\ufeff\u0301\u00ad",
        "猫م🏳️",
        "\x00\x01\x7f\x1b\r\n\t",
        "0.1:)",
    ]
    for _ in range(200):
        line = "".join(draw.choice(draw.choice(pools)) for _ in range(draw.randint(1, 80))).strip()
        tags = sorted(tag.strip() for tag in line.split(",") if tag.strip())
        for variant in worded(line, shuffle_tags=True, caption_variants=3):
            assert sorted(tag.strip() for tag in variant.split(",") if tag.strip()) == tags
        braces = line.replace("{", "{{").replace("}", "}}").replace("__", "_")
        assert set(worded(braces + "{!|!}", wildcards=True)) == {line.replace("__", "_") + "!"}
        assert "".join(sorted("".join(captions.split_tags(line, ",", emphasis=True)))).count("a") == line.count("a")
        emphasised = worded(line, shuffle_tags=True, emphasis=True, caption_variants=2)
        assert all(Counter(v)[c] == Counter(line)[c] for v in emphasised for c in "abc猫م()[]:.")


@pytest.mark.parametrize(
    ("texts", "options", "what"),
    [
        (["a"], {"shuffle_tags": True, "keep_separator": "|||"}, "keep_separator = '|||' has no effect"),
        (["a"], {"wildcards": True}, "wildcards has no effect"),
        (["a"], {"caption_weights": (1.0, 2.0)}, "caption_weights has no effect"),
        (["a", "b", "c"], {"caption_weights": (1.0, 2.0)}, "the picture has 3 captions"),
        (["{a__x__"], {"wildcards": True}, "names the wildcard file 'x'"),
    ],
)
def test_options_that_find_nothing_are_refused(texts: list[str], options: dict[str, Any], what: str) -> None:
    with pytest.raises(UserError) as caught:
        choice(*texts, **options)
    assert what in caught.value.what


def test_pictures_that_are_measured_have_their_first_caption_in_its_order() -> None:
    data = Data(path="x", shuffle_tags=True, tag_dropout=0.9, keep_separator="|||", wildcards=True, trigger="sks")
    (made,) = captions.plain([data], [(0, record("a ||| b, c, {d|e}", "other"))])
    assert made == captions.Choice((1.0,), ((Prompt("sks, a, b, c, e"),),))
