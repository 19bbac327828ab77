"""Bad inputs: captions and how they are read."""

from tests.bad_inputs.place import Bad, Place

TAGS = {"data.0.shuffle_tags": True}


def lines(place: Place, *rows: object, **more: object) -> None:
    """The pictures' captions, in place of those that are there."""
    import json

    written = [{"file_name": f"{i}.png", "text": row, **more} for i, row in enumerate(rows)]
    place.put("pictures/metadata.jsonl", "".join(json.dumps(row) + "\n" for row in written))


def wild(place: Place, **files: str) -> None:
    (place / "wild").mkdir()
    for name, content in files.items():
        place.put(f"wild/{name}.txt", content)
    lines(place, *["a __colour__ cat"] * 6)


WILD = {"data.0.wildcards": True, "data.0.wildcards_dir": "wild"}
ROWS = [
    Bad(
        "kept tags without shuffling",
        "data.0.keep_tags has no effect without shuffle_tags or tag_dropout",
        "remove it",
        options={"data.0.keep_tags": 1},
    ),
    Bad(
        "kept separator without shuffling",
        "keep_separator has no effect without",
        "set shuffle_tags",
        options={"data.0.keep_separator": "|||"},
    ),
    Bad("separator without tags", "tag_separator has no effect", "set shuffle", options={"data.0.tag_separator": ";"}),
    Bad(
        "variants of nothing",
        "caption_variants has no effect without",
        "wildcards",
        options={"data.0.caption_variants": 3},
    ),
    Bad("wildcard folder alone", "wildcards_dir has no effect", "wildcards", options={"data.0.wildcards_dir": "wild"}),
    Bad(
        "two ways to keep tags",
        "keep_tags and data.0.keep_separator are two ways",
        "one of them",
        options={**TAGS, "data.0.keep_tags": 1, "data.0.keep_separator": "|||"},
    ),
    Bad(
        "keep separator within the separator",
        "also stands in every tag_separator",
        r"\|\|\|",
        options={**TAGS, "data.0.keep_separator": ","},
    ),
    Bad("empty trigger", "data.0.trigger is empty", "remove it", options={"data.0.trigger": " "}),
    Bad(
        "keep separator in no caption",
        "keep_separator = '###' has no effect: no caption holds it",
        "keep_tags",
        "pictures",
        options={**TAGS, "data.0.keep_separator": "###"},
    ),
    Bad("wildcards in no caption", "wildcards has no effect: no caption", "remove", options={"data.0.wildcards": True}),
    Bad(
        "wildcard file missing",
        "the wildcard file 'colour.txt' is missing",
        "did you mean 'colours'",
        "wild",
        make=lambda p: wild(p, colours="red"),
        options=WILD,
    ),
    Bad(
        "wildcard file empty",
        "has no options",
        "one option per line",
        "colour.txt",
        make=lambda p: wild(p, colour="# none\n"),
        options=WILD,
    ),
    Bad(
        "wildcard files in a circle",
        "name each other without end",
        "circle",
        make=lambda p: wild(p, colour="__colour__"),
        options=WILD,
    ),
    Bad(
        "wildcard file without a folder",
        "names the wildcard file 'colour'.*wildcards_dir is not given",
        "set wildcards_dir",
        "data.0.wildcards",
        make=lambda p: wild(p),
        options={"data.0.wildcards": True},
    ),
    Bad(
        "wildcard of several",
        "asks for more than one",
        r"\{a\|b\|c\}",
        make=lambda p: lines(p, *["a {2$$red|blue|green} cat"] * 6),
        options={"data.0.wildcards": True},
    ),
    Bad(
        "weights of one caption",
        "caption_weights has no effect: no picture has more than one caption",
        "remove",
        options={"data.0.caption_weights": [0.5, 0.5]},
    ),
    Bad("weights all zero", "caption_weights are all zero", "positive", options={"data.0.caption_weights": [0.0]}),
    Bad(
        "negative weight",
        "caption_weights.0 = -1",
        "greater than or equal to 0",
        options={"data.0.caption_weights": [-1.0]},
    ),
    Bad(
        "more captions than weights",
        "the picture has 3 captions, their weights are",
        "as many weights",
        "0.png",
        make=lambda p: lines(p, *[["a", "b", "c"]] * 6),
        options={"data.0.caption_weights": [0.5, 0.5]},
    ),
    Bad("emphasis that is off", "data.0.emphasis has no effect", "text.emphasis", options={"data.0.emphasis": True}),
    Bad(
        "emphasis of nothing",
        "text.emphasis = 'a1111' has no effect",
        "emphasis = true",
        options={"text.emphasis": "a1111"},
    ),
    Bad(
        "chunks of what is cut",
        "max_chunks = 2 has no effect",
        "remove",
        options={"text.long_captions": "cut", "text.max_chunks": 2},
    ),
    Bad("too many chunks", "text.max_chunks = 13", "less than or equal to 12", options={"text.max_chunks": 13}),
    Bad("clip_skip below the encoder", "a text encoder has 2 layers", "give 1 to 2", options={"text.clip_skip": 3}),
    Bad(
        "unknown way of chunks",
        'text.long_captions = "a111"',
        "did you mean 'a1111'",
        options={"text.long_captions": "a111"},
    ),
    Bad(
        "second column missing",
        "no column 'long'",
        "set caption_column_2",
        options={"data.0.caption_column_2": "long"},
    ),
    Bad(
        "second column of other length",
        "have not one caption in caption_column_2 for each",
        "lists of one length",
        make=lambda p: lines(p, *["a"] * 6, long=["b", "c"]),
        options={"data.0.caption_column_2": "long"},
    ),
    Bad(
        "lines without caption files",
        "caption_per_line has no effect",
        "remove",
        options={"data.0.caption_per_line": True},
    ),
    Bad(
        "uncached text that learns",
        "text.cache = false has no effect: text encoders that learn",
        "remove it",
        options={"text.cache": False, "learn": [{"match": ".*"}]},
    ),
    Bad(
        "sample with prompt editing",
        r"'\[cat:dog:0.5\]' changes the prompt while the picture is drawn",
        "one prompt for each",
        command=("sample", "base", "--prompt", "a [cat:dog:0.5]", "--emphasis", "a1111"),
    ),
    Bad(
        "sample with unknown emphasis",
        "--emphasis a111 is not known",
        "did you mean 'a1111'",
        "command line",
        command=("sample", "base", "--prompt", "a", "--emphasis", "a111"),
    ),
    Bad(
        "sample below the encoder's layers",
        "a text encoder has 2 layers",
        "give 1 to 2",
        command=("sample", "base", "--prompt", "a", "--clip-skip", "5"),
    ),
]
