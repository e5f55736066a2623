"""Choices in prompts: what they can become, how often, and that the seed alone decides."""

import random
from collections import Counter
from itertools import permutations

import pytest

from sdlora.errors import ConfigError
from sdlora.generation.prompts.wildcards import Wildcards, expand_wildcards, read_wildcards

FILES = Wildcards(
    {
        "colour": ["red", "green"],
        "animals/cat": ["tabby"],
        "animals/bird": ["{robin|wren}"],
        "self": ["__self__ again"],
        "empty": [],
    }
)


def outcomes(text, wildcards=FILES, seeds=300):
    return Counter(expand_wildcards(text, seed, wildcards) for seed in range(seeds))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a {red|green} ball", {"a red ball", "a green ball"}),
        ("{a|}", {"a", ""}),
        ("{a|{b|c}}", {"a", "b", "c"}),
        ("{a|b}{c|d}", {"ac", "ad", "bc", "bd"}),
        ("{2$$a|b|c}", {"a, b", "b, a", "a, c", "c, a", "b, c", "c, b"}),
        ("{2$$ and $$a|b}", {"a and b", "b and a"}),
        ("{1-2$$+$$a|b}", {"a", "b", "a+b", "b+a"}),
        ("{-1$$a|b}", {"a", "b"}),
        ("{2$$__colour__}", {"red, green", "green, red"}),
        (
            "{2$$ and $$__animals/*__}",
            {f"{a} and {b}" for a, b in permutations(["tabby", "robin", "wren"], 2)}
            - {"robin and wren", "wren and robin"},
        ),
        ("foo__bar, __colour__ dress", {"foo__bar, red dress", "foo__bar, green dress"}),
        (r"{:\[|:\]}", {r":\[", r":\]"}),
        ("{]a|b[}", {"]a", "b["}),
        ("{2-$$a|b}", {"a, b", "b, a"}),
        ("{5$$a|b}", {"a, b", "b, a"}),
        ("{0::a|b}", {"b"}),
        ("__colour__ dress", {"red dress", "green dress"}),
        ("__animals/*__", {"tabby", "robin", "wren"}),
        ("{__colour__|blue}", {"red", "green", "blue"}),
        ("{[a|b]|c}", {"[a|b]", "c"}),
        ("{a]|b}", {"a]", "b"}),
    ],
)
def test_all_that_a_prompt_can_become(text, expected):
    assert outcomes(text).keys() == expected


@pytest.mark.parametrize(
    "text",
    ["plain", "{one}", "{", "}", "{a|b", "a|b}", "[a|b]", "__nowhere__", "__empty__", "__ colour__", "snake__case", "{$$}", "____", "{}"],
)  # fmt: skip
def test_what_is_no_choice_is_text(text):
    assert outcomes(text, seeds=5).keys() == {text}


def test_the_order_in_which_files_are_known_makes_no_difference():
    other = Wildcards(dict(reversed(FILES.lines.items())))
    assert [expand_wildcards("__animals/*__", n, other) for n in range(9)] == [
        expand_wildcards("__animals/*__", n, FILES) for n in range(9)
    ]


def test_weights_say_how_often():
    found = outcomes("{3::a|b}", seeds=4000)
    assert found["a"] / 4000 == pytest.approx(0.75, abs=0.03)


def test_the_seed_alone_decides():
    text = "{a|b|c|d} __colour__ {2$$x|y|z}"
    random.seed(1)
    first = [expand_wildcards(text, seed, FILES) for seed in range(20)]
    random.seed(2)
    assert [expand_wildcards(text, seed, FILES) for seed in range(20)] == first
    assert len(set(first)) > 5


def test_a_file_that_names_itself_ends():
    assert expand_wildcards("__self__", 0, FILES).endswith(" again")
    twice = Wildcards({"x": ["a __x__, __x__"], "y": ["{__y__|__y__} __y__ {2$$__y__|__y__}"]})
    assert len(expand_wildcards("__x__", 1, twice)) <= 100_000
    assert len(expand_wildcards("__y__", 1, twice)) <= 100_000


def test_files_are_read_line_by_line(tmp_path):
    (tmp_path / "animals").mkdir()
    (tmp_path / "animals" / "cat.txt").write_text("\ufefftabby\n\n# no cat\n  siamese \n", encoding="utf-8")
    assert read_wildcards(tmp_path).lines == {"animals/cat": ["tabby", "siamese"]}
    (tmp_path / "._hidden.txt").write_bytes(b"\xff")
    (tmp_path / "folder.txt").mkdir()
    (tmp_path / "LOUD.TXT").write_text("x")
    assert read_wildcards(tmp_path).lines == {"animals/cat": ["tabby", "siamese"], "LOUD": ["x"]}
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    with pytest.raises(ConfigError, match=r"latin\.txt: cannot be read as text in UTF-8"):
        read_wildcards(tmp_path)
    with pytest.raises(ConfigError, match="there is no such folder"):
        read_wildcards(tmp_path / "nowhere")


def test_anything_at_all_expands():
    random.seed(3)
    pieces = [
        "{",
        "}",
        "|",
        "$$",
        "2",
        "-",
        "::",
        "__",
        "colour",
        "__self__",
        "[",
        "]",
        " ",
        "a",
        "1-3$$",
        "9" * 50 + "$$",
    ]
    for seed in range(3000):
        text = "".join(random.choice(pieces) for _ in range(random.randint(0, 20)))
        assert isinstance(expand_wildcards(text, seed, FILES), str)
    for piece in ("{", "{a|", "__self__", "{a|b}", "}", "__a ", "9", " "):
        assert isinstance(expand_wildcards(piece * 8000, 1, FILES), str)
    for text in ("{" + "9" * 8000 + "$$a|b}", "{" + "9" * 8000 + "x$$a|b}", "{" + "9" * 400 + "::a|b}"):
        assert isinstance(expand_wildcards(text, 1, FILES), str)


@pytest.mark.parametrize(
    ("text", "made"),
    [
        (r"a \{b|c\}", r"a \{b|c\}"),
        (r"a \{b|c}", r"a \{b|c}"),
        (r"{x \{b\}}", r"{x \{b\}}"),
        (r"{0::x|\{b|0::y}", r"\{b"),
        (r"{0::x|y\}|0::z}", r"y\}"),
    ],
)
def test_braces_behind_a_backslash_are_bare(text, made):
    assert {expand_wildcards(text, seed) for seed in range(20)} == {made}


def test_a_backslash_behind_a_backslash_makes_nothing_bare():
    assert {expand_wildcards(r"\\{b|c}", seed) for seed in range(20)} == {r"\\b", r"\\c"}
