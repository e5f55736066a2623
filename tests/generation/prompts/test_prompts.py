"""The prompt language against AUTOMATIC1111's, and against whatever anyone may type."""

import math
import random

import pytest

from sdlora.generation.prompts import Composed, Tag, parse_attention, parse_composition, parse_schedule, parse_tags

PIECES = (
    "(", ")", "[", "]", ":", "|", ":1.3)", ":1.2.3)", ": .5 )", "\\", "\\(", "\\]", " BREAK ", "AND", "a", "b ", ",", "3", ".5",
    "-2", "9" * 400, "<lora:x:1>", "<", ">", "\n", "猫", "[a:b:3]", "[a|b]", "__c__", "{", "}", "$$",
)  # fmt: skip


def rounded(segments):
    return [(text, round(weight, 4)) for text, weight in segments]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("normal text", [("normal text", 1)]),
        ("an (important) word", [("an ", 1), ("important", 1.1), (" word", 1)]),
        ("(unbalanced", [("unbalanced", 1.1)]),
        (r"\(literal\]", [("(literal]", 1)]),
        ("(unnecessary)(parens)", [("unnecessaryparens", 1.1)]),
        (
            "a (((house:1.3)) [on] a (hill:0.5), sun, (((sky))).",
            [
                ("a ", 1), ("house", 1.573), (" ", 1.1), ("on", 1), (" a ", 1.1), ("hill", 0.55), (", sun, ", 1.1),
                ("sky", 1.4641), (".", 1.1),
            ],
        ),
        ("", [("", 1)]),
        ("[[a]]", [("a", 0.8264)]),
        ("(a:0)", [("a", 0)]),
        ("(a: -1.5 )", [("a", -1.5)]),
        ("a:1.3)", [("a:1.3)", 1)]),
        (r"\\(a)", [("\\", 1), ("a", 1.1)]),
        ("(a:1.2.3)", [("a:1.2.3", 1.1)]),
        ("a\nBREAK b", [("a", 1), ("BREAK", -1), ("b", 1)]),
        ("(a BREAK b:1.5)", [("a", 1.5), ("BREAK", -1), ("b", 1.5)]),
        ("a BREAK", [("a", 1), ("BREAK", -1), ("", 1)]),
        (" BREAK BREAK b ", [("", 1), ("BREAK", -1), ("", 1), ("BREAK", -1), ("b ", 1)]),
        ("BREAKING BREAKs", [("BREAKING BREAKs", 1)]),
    ],
)  # fmt: skip
def test_weights(text, expected):
    assert rounded(parse_attention(text)) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("test", [(10, "test")]),
        ("a [b:3]", [(3, "a "), (10, "a b")]),
        ("a [b: 3]", [(3, "a "), (10, "a b")]),
        ("a [[[b]]:2]", [(2, "a "), (10, "a [[b]]")]),
        ("[(a:2):3]", [(3, ""), (10, "(a:2)")]),
        ("a [b : c : 1] d", [(1, "a b  d"), (10, "a  c  d")]),
        ("a[b:[c:d:2]:1]e", [(1, "abe"), (2, "ace"), (10, "ade")]),
        ("a [unbalanced", [(10, "a [unbalanced")]),
        ("a [b:.5] c", [(5, "a  c"), (10, "a b c")]),
        ("((a][:b:c [d:3]", [(3, "((a][:b:c "), (10, "((a][:b:c d")]),
        ("[a|(b:1.1)]", [(step, ("(b:1.1)", "a")[step % 2]) for step in range(1, 11)]),
        ("[fe|]male", [(step, ("male", "female")[step % 2]) for step in range(1, 11)]),
        ("[fe|||]male", [(step, "female" if step % 4 == 1 else "male") for step in range(1, 11)]),
        ("[a::3]", [(3, "a"), (10, "")]),
        ("[a:b:0]", [(10, "b")]),
        ("[a:b:20]", [(10, "a")]),
        ("[a:b:-2]", [(10, "b")]),
        ("[a:b:1.5]", [(10, "a")]),
        ("[" * 20 + "a" + "]" * 20 + "[b:3]", [(3, "[" * 20 + "a" + "]" * 20), (10, "[" * 20 + "a" + "]" * 20 + "b")]),
        ("[a:b:١]", [(10, "[a:b:١]")]),
        (r"[a\:b:3]", [(3, ""), (10, r"a\:b")]),
        (r"a\[b:3]", [(10, r"a\[b:3]")]),
        ("a|b [c:3]", [(10, "a|b [c:3]")]),
        ("[a:b|c:3]", [(10, "[a:b|c:3]")]),
        ("[a:b:c:3]", [(10, "[a:b:c:3]")]),
        ("[a:3] \\", [(10, "[a:3] \\")]),
        ("[a:b:1e400]", [(10, "a")]),
    ],
)
def test_schedules(text, expected):
    assert parse_schedule(text, 10) == expected


def test_a_schedule_inside_what_is_not_shown_still_makes_a_step():
    assert parse_schedule("[[a:b:5]:c:2]", 10) == [(2, "a"), (5, "c"), (10, "c")]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a cat", [Composed("a cat")]),
        (
            "a cat :1.2 AND a dog AND  a bird:-.5 ",
            [Composed("a cat", 1.2), Composed(" a dog"), Composed("  a bird", -0.5)],
        ),
        ("a :1 :2 AND b", [Composed("a :1", 2.0), Composed(" b")]),
        ("a poster, ratio 16:9 ", [Composed("a poster, ratio 16:9 ")]),
        ("SAND AND ANDY", [Composed("SAND"), Composed(" ANDY")]),
        ("(a:1.3) AND b", [Composed("(a:1.3)"), Composed(" b")]),
        ("AND a:" + "9" * 400, [Composed(""), Composed(" a:" + "9" * 400)]),
    ],
)
def test_prompts_between_ands(text, expected):
    assert parse_composition(text) == expected


@pytest.mark.parametrize(
    ("tag", "expected"),
    [
        ("<lora:cat>", Tag("cat")),
        ("<lora:cat:0.8>", Tag("cat", 0.8, 0.8)),
        ("<lora:cat:0.5:1>", Tag("cat", 0.5, 1.0)),
        ("<lyco:cat:te=0.2>", Tag("cat", 0.2, 0.2)),
        ("<lora:cat:1:unet=0.3>", Tag("cat", 1.0, 0.3)),
        ("<LORA:a=b:te=0:unet=-1.5>", Tag("a=b", 0.0, -1.5)),
        ("<lora:cat:1:1:8>", Tag("cat", 1.0, 1.0, {"dyn": "8"})),
        ("<lora:cat:1:lbw=MIDD>", Tag("cat", 1.0, 1.0, {"lbw": "MIDD"})),
    ],
)
def test_tags_are_taken_out(tag, expected):
    found = parse_tags(f"a {tag}, [b{tag}:3]")
    assert found.text == "a , [b:3]"
    assert [(t.name, t.text_encoder, t.unet, dict(t.options)) for t in found.tags] == 2 * [
        (expected.name, expected.text_encoder, expected.unet, dict(expected.options))
    ]


@pytest.mark.parametrize(
    "text",
    [
        "<lora:cat:strong>",
        "<lora: :1>",
        "<lora:cat:inf>",
        "<lora:x:0,8>",
        "<lora:x:1_0>",
        "<lora:x:>",
        "a < b > c",
        "<lora:>",
        "<lora>",
    ],
)
def test_what_is_no_tag_is_text(text):
    found = parse_tags(text)
    assert (found.text, found.tags, found.others) == (text, (), ())


def test_tags_of_other_kinds_are_taken_out_and_named():
    found = parse_tags("a <hypernet:old:1> b")
    assert (found.text, found.others) == ("a  b", ("<hypernet:old:1>",))


def test_anything_at_all_parses_into_finite_weights():
    random.seed(7)
    for _ in range(4000):
        text = "".join(random.choice(PIECES) for _ in range(random.randint(0, 24)))
        for segment, weight in parse_attention(text):
            assert isinstance(segment, str) and abs(weight) <= 1e6
        schedule = parse_schedule(text, 7)
        assert [end for end, _ in schedule] == sorted({end for end, _ in schedule}) and schedule[-1][0] == 7
        assert all(math.isfinite(part.weight) for part in parse_composition(text))
        assert all(math.isfinite(tag.text_encoder + tag.unet) for tag in parse_tags(text).tags)


@pytest.mark.parametrize(
    "piece", ["(", "[", "[a:", "(a", "[(", "[a|", "\\", "(:1.9)", "<lora:", "AND:", "a:1 ", " ", "9", "BREAK ", "[a:9"]
)
def test_long_nonsense_is_quick_and_harmless(piece):
    text = piece * 2_000
    assert all(math.isfinite(weight) for _, weight in parse_attention(text))
    assert parse_schedule(text, 30)[-1][0] == 30
    assert parse_composition(text) and parse_tags(text)
