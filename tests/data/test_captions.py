from collections import Counter
from itertools import permutations
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sdlora.config import CaptionsSection
from sdlora.data.captions import caption_at, caption_variants, draw_caption, left_to_chance, plain_caption


def plain(*lines, trigger="", **rules):
    return plain_caption(lines, CaptionsSection(**rules), trigger)


def drawn(*lines, trigger="", draws=200, **rules):
    """Return how often each text came in so many draws."""
    random = Random(0)
    return Counter(draw_caption(lines, CaptionsSection(**rules), trigger, random) for _ in range(draws))


def text_at(*lines, seed=1, name="cat.png", epoch=0, occurrence=0, variants=None, **rules):
    where = {"seed": seed, "name": name, "epoch": epoch, "occurrence": occurrence, "variants": variants}
    return caption_at(lines, CaptionsSection(**rules), "", **where)


def shuffles(start, free, end=""):
    """Return every text that is `start`, the letters of `free` in any order, and `end`."""
    return {start + ", ".join(order) + end for order in permutations(free)}


def test_without_rules_a_caption_is_left_as_it_is():
    assert plain("a cat,on a  mat ,, {red|blue} |||;;; ") == "a cat,on a  mat ,, {red|blue} |||;;; "
    assert drawn("a cat,on a  mat ,,") == {"a cat,on a  mat ,,": 200}
    assert plain("") == ""


def test_prefix_and_suffix_are_joined_with_a_space_and_nothing_else():
    assert plain("a cat", prefix="photo of", suffix=", from side") == "photo of a cat , from side"
    assert plain("", prefix="photo", suffix="outdoors") == "photo outdoors"
    assert plain("", prefix="photo") == "photo"


def test_prefix_and_suffix_are_put_to_every_line():
    assert set(drawn("one", "two", "three", prefix="<", suffix=">")) == {"< one >", "< two >", "< three >"}


def test_tags_of_prefix_and_suffix_count_as_tags():
    rules = {"prefix": "p,", "suffix": ", s", "keep_tags": 1, "shuffle": True}
    assert set(drawn("a, b", **rules)) == shuffles("p, ", "abs")


def test_lines_are_alternatives_or_the_first_counts():
    counts = drawn("one", "two", "three", draws=3000)
    assert set(counts) == {"one", "two", "three"}
    assert all(900 < count < 1100 for count in counts.values())
    assert set(drawn("one", "two", lines="first")) == {"one"}
    assert plain("one", "two") == plain("one", "two", lines="first") == "one"


@pytest.mark.parametrize(
    ("line", "texts"),
    [
        ("a {red|blue} cat", {"a red cat", "a blue cat"}),
        ("{a|b}{c|d}", {"ac", "ad", "bc", "bd"}),
        ("a cat{, sitting|}", {"a cat, sitting", "a cat"}),
        ("{only}", {"only"}),
        ("{}", {"{}"}),
        ("a | b", {"a | b"}),
        ("{{retro style}}", {"{retro style}"}),
        ("{{a|b}}", {"{a|b}"}),
        ("{a|{{b}}}", {"a", "{b}"}),
        ("{{{a|b}}}", {"{a", "{b}"}),  # pairs are read from the left: "{{", then a wildcard of "a" and "b}}"
        ("{a|{b|c}}", {"{a|{b|c}"}),  # wildcards do not nest
        ("{a}}", {"{a}"}),
        ("{open", {"{open"}),
        ("shut}", {"shut}"}),
    ],
)
def test_wildcards(line, texts):
    assert set(drawn(line, wildcards=True)) == texts
    assert set(drawn(line)) == {line}


def test_choices_of_a_wildcard_come_equally_often():
    assert all(900 < count < 1100 for count in drawn("{a|b|c}", wildcards=True, draws=3000).values())


def test_plain_takes_the_first_choice_of_each_wildcard():
    assert plain("{a|b} of {{c|d}} in {|e}", wildcards=True) == "a of {c|d} in "


def test_wildcards_hold_in_prefix_and_suffix_and_before_tags_are_split():
    assert set(drawn("x", prefix="{a|b}", suffix="{c, d|e}", wildcards=True, shuffle=True)) == {
        "a x c, d",
        "d, a x c",
        "b x c, d",
        "d, b x c",
        "a x e",
        "b x e",
    }


def test_shuffling_gives_every_order_and_joins_with_comma_and_space():
    counts = drawn("a,b ,  c", shuffle=True, draws=3000)
    assert set(counts) == shuffles("", "abc")
    assert all(400 < count < 600 for count in counts.values())
    assert plain("a,b ,  c", shuffle=True) == "a, b, c"


def test_empty_tags_are_left_out():
    assert plain(", a,, b, ", shuffle=True) == "a, b"
    assert set(drawn("a, {|b}, c", wildcards=True, keep_tags=3, shuffle=True)) == {"a, b, c", "a, c"}


def test_the_first_tags_are_kept():
    assert set(drawn("a, b, c, d, e", keep_tags=2, shuffle=True)) == shuffles("a, b, ", "cde")
    assert set(drawn("a, b", keep_tags=5, shuffle=True, tag_dropout=0.5)) == {"a, b"}
    assert set(drawn("a, b, c", keep_tags=1, tag_dropout=1.0)) == {"a"}


def test_tags_before_the_mark_are_kept_and_keep_tags_then_says_nothing():
    rules = {"keep_separator": "|||", "keep_tags": 4, "shuffle": True}
    assert set(drawn("a, b ||| c, d, e", **rules)) == shuffles("a, b, ", "cde")
    assert set(drawn("||| c, d, e", **rules)) == shuffles("", "cde")
    assert set(drawn("a, b, c, d, e, f", **rules)) == shuffles("a, b, c, d, ", "ef")  # no mark: keep_tags holds


def test_tags_after_the_second_mark_are_kept_at_the_end():
    rules = {"keep_separator": "|||", "shuffle": True}
    assert set(drawn("a, b ||| c, d, e ||| f, g", **rules)) == shuffles("a, b, ", "cde", ", f, g")
    assert set(drawn("a|||b, c|||d", tag_dropout=1.0, **rules)) == {"a, d"}
    assert set(drawn("a ||| b, c ||| d ||| e", **rules)) == {"a, b, c, d, e", "a, c, b, d, e"}


def test_marks_in_prefix_and_suffix():
    rules = {"prefix": "1girl, hatsune miku |||", "suffix": ", screencap ||| masterpiece, rating: general"}
    texts = {
        "1girl, hatsune miku, " + order + ", masterpiece, rating: general"
        for order in ("smile, screencap", "screencap, smile")
    }
    assert set(drawn("smile", keep_separator="|||", shuffle=True, **rules)) == texts


def test_the_mark_does_not_stay_where_no_tag_is_moved():
    assert plain("a,b ||| c ||| d", keep_separator="|||") == "a, b, c, d"
    assert set(drawn("a,b ||| c", keep_separator="|||")) == {"a, b, c"}


def test_the_share_of_dropped_tags():
    counts = Counter()
    for text, count in drawn("a, b, c, d", keep_tags=1, tag_dropout=0.3, draws=2000).items():
        assert text.split(", ") == sorted(text.split(", "))  # the order stays
        for tag in text.split(", "):
            counts[tag] += count
    assert counts["a"] == 2000
    assert all(1300 < counts[tag] < 1500 for tag in "bcd")
    assert plain("a, b, c", tag_dropout=0.9) == "a, b, c"


def test_all_tags_can_be_dropped():
    assert set(drawn("a, b", tag_dropout=0.5)) == {"a, b", "a", "b", ""}
    assert plain("a, b", tag_dropout=1.0) == ""  # nothing is left to chance there


def test_the_secondary_separator_binds_tags_and_becomes_the_separator():
    line = "a, sky;;;cloud;;;day, b"
    assert plain(line, secondary_separator=";;;") == "a, sky,cloud,day, b"
    rules = {"secondary_separator": ";;;", "keep_tags": 1}
    assert set(drawn(line, shuffle=True, **rules)) == {"a, sky,cloud,day, b", "a, b, sky,cloud,day"}
    assert set(drawn(line, tag_dropout=0.5, **rules)) == {"a, sky,cloud,day, b", "a, sky,cloud,day", "a, b", "a"}


def test_another_separator():
    rules = {"separator": ";", "shuffle": True, "secondary_separator": "+", "keep_tags": 1}
    assert set(drawn("a, b; c+d; e", **rules)) == {"a, b, c;d, e", "a, b, e, c;d"}


@pytest.mark.parametrize(
    ("line", "text"),
    [
        ("a cat", "sks, a cat"),
        ("a cat, sks", "a cat, sks"),
        ("(sks:1.2) cat", "(sks:1.2) cat"),
        ("a Sks cat", "sks, a Sks cat"),
        ("a sksy cat asks", "sks, a sksy cat asks"),
        ("a sks_cat", "sks, a sks_cat"),
        ("", "sks"),
    ],
)
def test_the_trigger_is_put_before_a_line_that_does_not_hold_it_as_a_word(line, text):
    assert plain(line, trigger="sks", insert_trigger=True) == text
    assert plain(line, trigger="sks") == line


def test_without_a_trigger_none_is_put():
    assert plain("a cat", insert_trigger=True) == "a cat"


def test_each_line_gets_the_trigger_for_itself():
    assert set(drawn("a cat", "sks on a mat", trigger="sks", insert_trigger=True)) == {"sks, a cat", "sks on a mat"}


def test_a_trigger_of_signs_is_taken_literally():
    rules = {"trigger": "<s+{1|2}>, x", "insert_trigger": True, "wildcards": True, "tag_dropout": 1.0}
    assert plain("<ss>, {a|b}", **rules) == "<s+{1|2}>, x"
    assert plain("{a|b}", **{**rules, "tag_dropout": 0}) == "<s+{1|2}>, x, a"


def test_the_inserted_trigger_comes_after_the_prefix():
    assert plain("a cat", trigger="sks", insert_trigger=True, prefix="photo of") == "photo of sks, a cat"
    assert plain("a cat; b", trigger="sks", insert_trigger=True, separator=";") == "sks; a cat; b"


def test_the_inserted_trigger_is_one_more_kept_tag():
    rules = {"trigger": "sks", "insert_trigger": True, "shuffle": True}
    assert set(drawn("a, b, c", **rules)) == shuffles("sks, ", "abc")
    assert set(drawn("a, b, c", keep_tags=1, **rules)) == {"sks, a, b, c", "sks, a, c, b"}
    assert set(drawn("a, b", tag_dropout=0.5, **rules)) == {"sks", "sks, a", "sks, b", "sks, a, b", "sks, b, a"}
    assert set(drawn("a ||| b, c", keep_separator="|||", **rules)) == {"sks, a, b, c", "sks, a, c, b"}


def test_the_inserted_trigger_stays_where_tags_before_it_do_not():
    rules = {"trigger": "sks", "insert_trigger": True}
    assert set(drawn("a, b", prefix="p,", shuffle=True, **rules)) == {
        f"{first}, sks, {second}, {third}" for first, second, third in permutations("pab")
    }
    assert set(drawn("a, b", prefix="p,", keep_tags=1, shuffle=True, **rules)) == {"p, sks, a, b", "p, sks, b, a"}
    assert set(drawn("a, b", prefix="p, q,", keep_tags=1, tag_dropout=1.0, **rules)) == {"p, sks"}
    assert set(drawn("a", prefix="p |||", keep_separator="|||", tag_dropout=0.5, **rules)) == {"p, sks", "p, sks, a"}


def test_a_trigger_that_the_caption_itself_holds_is_a_tag_like_others():
    texts = drawn("a, sks", trigger="sks", insert_trigger=True, shuffle=True)
    assert set(texts) == {"a, sks", "sks, a"}


def test_all_rules_together():
    rules = {
        "insert_trigger": True,
        "prefix": "art of",
        "suffix": "||| signed",
        "wildcards": True,
        "keep_separator": "|||",
        "secondary_separator": ";;;",
        "tag_dropout": 0.5,
        "shuffle": True,
    }
    lines = ("{old|new} ship ||| sea;;;sky, {{x}}", "sks")
    kept = {f"art of sks, {age} ship" for age in ("old", "new")}
    free = ("", ", sea,sky", ", {x}", ", sea,sky, {x}", ", {x}, sea,sky")
    texts = {start + middle + ", signed" for start in kept for middle in free}
    texts |= {"art of sks, signed", "art of sks"}  # one mark there, so "signed" may go
    assert set(drawn(*lines, trigger="sks", draws=1000, **rules)) == texts
    assert plain(*lines, trigger="sks", **rules) == "art of sks, old ship, sea,sky, {x}, signed"


@pytest.mark.parametrize(
    ("lines", "rules", "expected"),
    [
        (["a, b"], {}, False),
        (["a, b", "c"], {}, True),
        (["a, b", "c"], {"lines": "first"}, False),
        (["a", "a"], {}, False),
        (["a", "sks, a"], {"insert_trigger": True}, False),
        (["{a|b}"], {}, False),
        (["{a|b}"], {"wildcards": True}, True),
        (["{a|a} {{b|c}} {d"], {"wildcards": True}, False),
        (["a, b"], {"shuffle": True}, True),
        (["a"], {"shuffle": True}, False),
        (["a, a"], {"shuffle": True}, False),
        (["a, b"], {"shuffle": True, "keep_tags": 1}, False),
        (["a ||| b ||| c, d"], {"shuffle": True, "keep_separator": "|||"}, False),
        (["a"], {"shuffle": True, "prefix": "p,"}, True),
        (["a"], {"shuffle": True, "insert_trigger": True}, False),
        (["a"], {"tag_dropout": 0.1}, True),
        (["a"], {"tag_dropout": 0.1, "keep_tags": 1}, False),
        (["a, b"], {"tag_dropout": 1.0, "shuffle": True}, False),
        (["a", "{b|c}"], {"wildcards": True, "lines": "first"}, False),
        (["", ""], {"tag_dropout": 0.5, "shuffle": True}, False),
        (["a"], {"dropout": 0.5}, False),
    ],
)
def test_what_is_left_to_chance(lines, rules, expected):
    section = CaptionsSection(**rules)
    assert left_to_chance(lines, section, "sks") is expected
    texts = set(drawn(*lines, trigger="sks", **rules))
    assert texts == {plain_caption(lines, section, "sks")} if not expected else len(texts) > 1
    if not expected:
        assert caption_variants(lines, section, "sks", 1, "cat.png", 8) == tuple(texts)


def test_variants_do_not_change_when_more_are_asked_for():
    rules = CaptionsSection(shuffle=True)
    longest = caption_variants(["a, b, c, d"], rules, "", 1, "cat.png", 30)
    assert 10 < len(set(longest)) == len(longest) <= 24
    assert all(sorted(text.split(", ")) == list("abcd") for text in longest)
    for count in range(1, 30):
        variants = caption_variants(["a, b, c, d"], rules, "", 1, "cat.png", count)
        assert 1 <= len(variants) <= count
        assert variants == longest[: len(variants)]


def test_variants_depend_on_seed_and_name():
    rules = CaptionsSection(shuffle=True)
    sets = {
        caption_variants(["a, b, c, d, e"], rules, "", seed, name, 3) for seed in (1, 2) for name in ("x", "y", "x/1")
    }
    assert len(sets) == 6


def test_every_line_is_among_as_many_variants():
    lines = [f"line {number}" for number in range(12)]
    for name in ("a.png", "b.png", "c.png"):
        assert set(caption_variants(lines, CaptionsSection(), "", 1, name, 12)) == set(lines)


def test_few_variants_are_not_the_same_lines_of_every_picture():
    lines = ["one", "two", "three", "four"]
    firsts = Counter(caption_variants(lines, CaptionsSection(), "", 1, str(number), 1) for number in range(400))
    assert set(firsts) == {(line,) for line in lines}
    assert all(70 < count < 130 for count in firsts.values())


def test_a_text_at_a_time_is_a_fixed_function_of_where_it_is():
    def texts(**where):
        return [text_at("a, b, c, d, e", shuffle=True, epoch=epoch, **where) for epoch in range(8)]

    for variants in (None, 16):
        first = texts(variants=variants)
        assert first == texts(variants=variants)
        assert len(set(first)) > 4
        assert first != texts(variants=variants, occurrence=1)
        assert first != texts(variants=variants, seed=2)
        assert first != texts(variants=variants, name="dog.png")


def test_the_texts_of_many_epochs_are_the_variants():
    rules = CaptionsSection(shuffle=True)
    variants = caption_variants(["a, b, c, d, e, f"], rules, "", 1, "cat.png", 5)
    assert len(variants) == 5
    for occurrence in (0, 1):
        texts = [
            text_at("a, b, c, d, e, f", epoch=epoch, occurrence=occurrence, variants=5, shuffle=True)
            for epoch in range(20)
        ]
        for turn in range(4):  # each comes once before one comes again
            assert sorted(texts[5 * turn : 5 * turn + 5]) == sorted(variants)
        assert texts[:5] != texts[5:10]


def test_variants_keep_to_the_share_of_dropped_tags():
    def share(variants):
        texts = [
            text_at("a cat", name=str(number), epoch=epoch, variants=variants, tag_dropout=0.1)
            for number in range(100)
            for epoch in range(16)
        ]
        return texts.count("") / len(texts)

    assert 0.07 < share(None) < 0.13
    assert 0.07 < share(16) < 0.13


def test_whole_captions_are_dropped_by_chance():
    def dropped(variants, **rules):
        return [
            text_at("a, b", name=name, epoch=epoch, occurrence=occurrence, variants=variants, shuffle=True, **rules)
            is None
            for name in ("a.png", "b.png")
            for epoch in range(250)
            for occurrence in range(4)
        ]

    fresh = dropped(None, dropout=0.1)
    assert 150 < sum(fresh) < 250
    assert dropped(16, dropout=0.1) == dropped(1, dropout=0.1) == fresh
    assert fresh[:1000] != fresh[1000:]
    assert fresh[0::4] != fresh[1::4]  # repeats within an epoch have chances of their own
    assert not any(dropped(None, dropout=0.0))
    assert all(dropped(None, dropout=1.0))


@pytest.mark.parametrize(("every", "epochs"), [(0, []), (1, [0, 1, 2, 3, 4, 5, 6]), (2, [1, 3, 5]), (3, [2, 5])])
def test_epochs_without_captions(every, epochs):
    """Counted from one, they are epochs n, 2n, ... as in kohya's trainer."""
    for variants in (None, 4):
        texts = [text_at("a", epoch=epoch, dropout_every_epochs=every, variants=variants) for epoch in range(7)]
        assert [epoch for epoch, text in enumerate(texts) if text is None] == epochs
        assert set(texts) <= {None, "a"}


TAG = st.text("abcxyz 01()_", min_size=1, max_size=6).map(str.strip).filter(bool)
TAGS = st.lists(TAG, max_size=8)
SEEDS = st.integers(0, 2**32)
thorough = settings(derandomize=True, deadline=None, max_examples=150)


@thorough
@given(tags=TAGS, keep=st.integers(0, 4), seed=SEEDS)
def test_shuffling_loses_and_invents_no_tag(tags, keep, seed):
    text = draw_caption([",".join(tags)], CaptionsSection(shuffle=True, keep_tags=keep), "", Random(seed))
    came = text.split(", ") if text else []
    assert came[:keep] == tags[:keep]
    assert Counter(came) == Counter(tags)


@thorough
@given(start=TAGS, free=TAGS, end=TAGS, shuffle=st.booleans(), share=st.sampled_from([0.0, 0.3, 0.9, 1.0]), seed=SEEDS)
def test_marked_tags_stay_and_the_others_are_shuffled_or_dropped(start, free, end, shuffle, share, seed):
    rules = CaptionsSection(keep_separator="|||", shuffle=shuffle, tag_dropout=share)
    text = draw_caption(["|||".join(map(",".join, (start, free, end)))], rules, "", Random(seed))
    came = text.split(", ") if text else []
    assert came[: len(start)] == start
    assert came[len(came) - len(end) :] == end
    middle = Counter(came[len(start) : len(came) - len(end)])
    assert middle <= Counter(free)
    if share == 0:
        assert middle == Counter(free)


@thorough
@given(
    lines=st.lists(st.lists(st.one_of(TAG, st.lists(TAG, min_size=1, max_size=3)), max_size=5), min_size=1, max_size=3),
    marks=st.integers(0, 4),
    prefix=st.sampled_from(["", "p,", "{p|q} |||", "p |||"]),
    shuffle=st.booleans(),
    share=st.sampled_from([0.0, 0.4]),
    insert=st.booleans(),
    seed=SEEDS,
)
def test_no_mark_of_ours_stays_in_a_text(lines, marks, prefix, shuffle, share, insert, seed):
    def written(tags):
        texts = [tag if isinstance(tag, str) else "{" + "|".join(tag) + "};;;tail" for tag in tags]
        return ",".join(texts) + "|||x" * marks

    written_lines = [written(tags) for tags in lines]
    rules = CaptionsSection(
        insert_trigger=insert,
        prefix=prefix,
        wildcards=True,
        keep_separator="|||",
        secondary_separator=";;;",
        shuffle=shuffle,
        tag_dropout=share,
    )
    texts = [plain_caption(written_lines, rules, "sks")]
    texts += caption_variants(written_lines, rules, "sks", seed, "cat.png", 4)
    assert not any(sign in text for text in texts for sign in "{}|;\ufdd0")
    assert all("sks" in text for text in texts) or not insert
    assert len(set(texts[1:])) == len(texts[1:])
    where = {"seed": seed, "name": "cat.png", "occurrence": 0, "variants": 4}
    came = {caption_at(written_lines, rules, "sks", epoch=epoch, **where) for epoch in range(4)}
    assert came == set(texts[1:])
