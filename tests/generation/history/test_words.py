import random

import pytest

from sdlora.generation.history.index import History
from sdlora.generation.history.row import PictureRow, insert
from sdlora.generation.history.words import asked, indexed


def test_a_text_as_the_index_has_it():
    assert indexed("A red Ball, naïve café") == "a red ball naive cafe"
    assert (
        indexed("猫が赤い、犬") == "\ue000猫か \ue000か赤 \ue000赤い \ue000い \ue000犬"
    )  # が is か with a mark that is folded
    assert indexed("catの絵") == "\ue000ca \ue000at \ue000tの \ue000の絵 \ue000絵 cat"
    assert indexed("long_hair 猫_犬") == "long_hair \ue000猫\ue001 \ue000\ue001犬 \ue000犬 _"
    assert indexed("हिन्दी") == "हिनदी"  # vowel signs belong to words


def test_what_a_search_asks_the_index():
    assert asked("Red red 猫 赤い帽") == ['"red"*', '"\ue000猫"*', '"\ue000赤い \ue000い帽"']
    assert asked("_ __, long_hair!") == ['"long_hair"*'] and asked("_ ?!") == []


@pytest.fixture
def known(tmp_path):
    """`known(texts)(search)`: which of the texts the index finds."""

    def find(texts):
        history = History(tmp_path)
        facts = [{"prompt": text} for text in texts]
        rows = [PictureRow(f"{number}".encode(), f"1:{number}", facts=told) for number, told in enumerate(facts)]
        history._index.do(lambda connection: insert(connection, rows))

        def found(search):
            command, values = "SELECT rowid FROM words WHERE words MATCH ?", [" AND ".join(asked(search))]
            return {number for (number,) in history._index.do(lambda found: found.execute(command, values).fetchall())}

        return found

    return find


@pytest.mark.parametrize(
    ("characters", "of_others", "between"),
    [
        ("猫犬の", "_a1", "、 -"),
        ("กขั", "a_", " ?"),
        ("မြကာ", "1", " ။"),
        ("\U00020000\U00030000", "x", " ."),
    ],
)
def test_characters_are_found_exactly_where_they_stand_in_a_row(known, characters, of_others, between):
    draw = random.Random(0)
    alphabet = characters * 2 + of_others + between
    texts = ["".join(draw.choices(alphabet, k=draw.randint(1, 12))) for _ in range(300)]
    find = known(texts)
    counts = []
    for _ in range(60):
        word = "".join(draw.choices(characters * 2 + of_others, k=draw.randint(1, 4)))
        if set(word) & set(characters):
            expected = {number for number, text in enumerate(texts) if word in text}
            assert find(word) == expected, word
            counts.append(len(expected))
    assert min(counts) < 10 < 100 < max(counts)


def test_parts_of_other_scripts_are_words(known):
    find = known(["黒猫catの絵", "concat 猫", "cat"])
    assert find("cat") == {0, 2} and find("at") == set() and find("猫 cat") == {0} and find("猫c") == {0}


def test_the_longest_search_has_an_answer(known):
    assert known(["の夜" * 600, "の夜" * 300, "猫" * 999])("の夜" * 500) == {0}


@pytest.mark.parametrize(
    ("search", "found"), [("__ a", {0}), ("b _ ?", {1}), ('" a', {0}), ("\ue000a", {0}), ("a\0b", set())]
)
def test_no_text_is_one_that_the_index_cannot_answer(known, search, found):
    assert known(["_ a", "b"])(search) == found
