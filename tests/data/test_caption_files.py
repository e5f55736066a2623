"""Which pictures get a caption file, and that no text of a person's is lost."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from PIL import Image

from sdlora.data import caption_files
from sdlora.data.caption_files import caption_pictures, plan_captions, write_caption
from sdlora.errors import DataError, OutputError


def put(path: Path, size: tuple[int, int] = (8, 6), colour: str = "red") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)
    return path


def write(path: Path, text: str = "") -> Path:
    path.write_text(text)
    return path


def contents(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in folder.iterdir() if path.suffix != ".png"}


# --- planning ----------------------------------------------------------------------------------------


def test_pictures_without_caption_file_get_one(tmp_path):
    bare = [put(tmp_path / "a.png"), put(tmp_path / "sub" / "deep" / "b.v2.JPG"), put(tmp_path / "z.webp")]
    kept = [put(tmp_path / "c.png"), put(tmp_path / "sub" / "d.png"), put(tmp_path / "e.v2.png")]
    write(tmp_path / "c.txt", "a cat")
    write(tmp_path / "sub" / "d.caption")
    write(tmp_path / "e.v2.txt", "a dog")
    put(tmp_path / ".hidden" / "f.png")
    put(tmp_path / "a-masklabel.png")
    write(tmp_path / "b.v2.txt", "of another folder")
    plan = plan_captions(tmp_path)
    assert (plan.pictures, plan.kept, plan.shared) == (tuple(sorted(bare)), tuple(sorted(kept)), ())


def test_overwriting_takes_all(tmp_path):
    pictures = put(tmp_path / "a.png"), put(tmp_path / "b.png")
    write(tmp_path / "b.txt", "a cat")
    plan = plan_captions(tmp_path, overwrite=True)
    assert (plan.pictures, plan.kept) == (pictures, ())


def test_two_pictures_of_one_name_get_one_caption(tmp_path):
    jpg, png = put(tmp_path / "a.jpg"), put(tmp_path / "a.png")
    assert (plan_captions(tmp_path).pictures, plan_captions(tmp_path).shared) == ((jpg,), (png,))
    write(tmp_path / "a.txt", "a cat")
    plan = plan_captions(tmp_path)
    assert (plan.pictures, plan.kept, plan.shared) == ((), (jpg,), (png,))


def test_a_place_without_pictures_is_an_error(tmp_path):
    with pytest.raises(DataError, match="nothing: there is no such folder"):
        plan_captions(tmp_path / "nothing")
    with pytest.raises(DataError, match=r"a\.png: is a file; name the folder it lies in"):
        plan_captions(put(tmp_path / "a.png"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"empty: holds no pictures; expected files of type \.avif, \.bmp"):
        plan_captions(tmp_path / "empty")


# --- describing --------------------------------------------------------------------------------------


class Describer:
    """Says the size of each picture; `refused` sizes are of no use to it."""

    def __init__(self, *refused: tuple[int, int]) -> None:
        self.refused = refused
        self.batches: list[list[tuple[int, int]]] = []

    def __call__(self, pictures: Sequence[Image.Image]) -> list[str]:
        assert all(picture.mode == "RGB" for picture in pictures)
        self.batches.append([picture.size for picture in pictures])
        if any(picture.size in self.refused for picture in pictures):
            raise DataError("the model cannot take this picture (too flat)")
        return [f" {picture.width}\n by  {picture.height} " for picture in pictures]


def test_captions_are_one_clean_line_and_saved_before_they_are_told(tmp_path):
    pictures = [put(tmp_path / f"{number}.png", (number, 5)) for number in (1, 2, 3)]
    saved: list[tuple[Path, str]] = []

    def save(picture: Path, caption: str) -> bool:
        saved.append((picture, caption))
        return picture != pictures[1]

    told = caption_pictures(pictures, Describer(), prefix="[trigger],  ", suffix=", oil\tpaint\n", save=save)
    for number, outcome in enumerate(told, start=1):
        assert saved[-1] == (outcome.picture, outcome.caption) == (pictures[number - 1], saved[-1][1])
        assert outcome.caption == f"[trigger], {number} by 5, oil paint"
        assert (outcome.problem, outcome.saved) == ("", number != 2)
    assert len(saved) == 3


def test_nothing_is_saved_where_nothing_saves(tmp_path):
    [outcome] = caption_pictures([put(tmp_path / "a.png")], Describer())
    assert (outcome.caption, outcome.saved) == ("8 by 6", False)
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


def test_batches_are_filled_past_unreadable_pictures(tmp_path):
    pictures = [put(tmp_path / f"{number}.png", (number, 5)) for number in range(1, 6)]
    pictures[1].write_bytes(pictures[1].read_bytes()[:40])
    pictures[3].unlink()
    describe = Describer()
    outcomes = {outcome.picture: outcome for outcome in caption_pictures(pictures, describe, batch_size=2)}
    assert describe.batches == [[(1, 5), (3, 5)], [(5, 5)]]
    assert [outcomes[picture].caption for picture in pictures] == ["1 by 5", "", "3 by 5", "", "5 by 5"]
    assert outcomes[pictures[1]].problem.startswith(f"{pictures[1]}: ")
    assert outcomes[pictures[3]].problem.startswith(f"{pictures[3]}: ")


def test_a_picture_that_the_model_refuses_does_not_spoil_its_batch(tmp_path):
    pictures = [put(tmp_path / "1.png", (1, 5)), put(tmp_path / "2.png", (2, 5)), put(tmp_path / "3.png", (3, 5))]
    describe = Describer((2, 5))
    outcomes = list(caption_pictures(pictures, describe, batch_size=3))
    assert describe.batches == [[(1, 5), (2, 5), (3, 5)], [(1, 5)], [(2, 5)], [(3, 5)]]
    assert [outcome.caption for outcome in outcomes] == ["1 by 5", "", "3 by 5"]
    assert outcomes[1].problem == f"{pictures[1]}: the model cannot take this picture (too flat)"


def test_silence_is_no_caption(tmp_path):
    picture = put(tmp_path / "a.png")
    saved: list[Path] = []

    def save(path: Path, _: str) -> bool:
        saved.append(path)
        return True

    [outcome] = caption_pictures([picture], lambda _: [" \n"], prefix="[trigger], ", save=save)
    assert (outcome.caption, saved) == ("", [])
    assert outcome.problem == f"{picture}: the model said nothing; a larger --max-tokens may help, or another --prompt"


@pytest.mark.parametrize("name", ["a.png", "a.jpg"])
def test_large_pictures_are_shown_reduced(tmp_path, name):
    large, exact = put(tmp_path / name, (2000, 1000)), put(tmp_path / f"exact-{name}", (2048, 512))
    describe = Describer()
    list(caption_pictures([large, exact], describe))
    # 2000 * sqrt(1024 * 1024 / 2,000,000) = 1448.2; 2048 * 512 is as many pixels as are shown.
    assert describe.batches == [[(1448, 724)], [(2048, 512)]]


def test_pictures_are_read_a_little_ahead(tmp_path, monkeypatch):
    pictures = [put(tmp_path / f"{number:02}.png") for number in range(30)]
    read: list[Path] = []
    real: Callable[..., Image.Image] = caption_files.read_picture

    def read_picture(path: Path, **options: object) -> Image.Image:
        read.append(path)
        return real(path, **options)

    monkeypatch.setattr(caption_files, "read_picture", read_picture)
    told = caption_pictures(pictures, Describer(), batch_size=2)
    next(told)
    assert 2 <= len(read) <= 9  # two described, and the batch and four readers ahead
    told.close()
    assert len(read) <= 9


def test_other_errors_end_it_and_leave_what_is_done(tmp_path):
    pictures = [put(tmp_path / f"{number}.png") for number in (1, 2, 3)]
    calls = iter([["one"], KeyboardInterrupt()])

    def describe(_: Sequence[Image.Image]) -> list[str]:
        answer = next(calls)
        if isinstance(answer, KeyboardInterrupt):
            raise answer
        return answer

    with pytest.raises(KeyboardInterrupt):
        list(caption_pictures(pictures, describe, save=write_caption))
    assert contents(tmp_path) == {"1.txt": "one\n"}
    assert plan_captions(tmp_path).pictures == tuple(pictures[1:])


# --- writing -----------------------------------------------------------------------------------------


def test_a_caption_file_is_utf8_and_ends_its_line(tmp_path):
    picture = put(tmp_path / "a.b.png")
    assert write_caption(picture, "ein Bär")
    assert (tmp_path / "a.b.txt").read_bytes() == "ein Bär\n".encode()
    other = put(tmp_path / "c.png")
    assert write_caption(other, "a cat", ending=".caption")
    assert contents(tmp_path) == {"a.b.txt": "ein Bär\n", "c.caption": "a cat\n"}


@pytest.mark.parametrize("name", ["a.txt", "a.caption"])
@pytest.mark.parametrize("ending", [".txt", ".caption"])
@pytest.mark.parametrize("text", ["mine", ""])
def test_what_somebody_wrote_meanwhile_is_left_as_it_is(tmp_path, name, ending, text):
    picture = put(tmp_path / "a.png")
    write(tmp_path / name, text)
    assert not write_caption(picture, "a cat", ending=ending)
    assert contents(tmp_path) == {name: text}


def test_overwriting_keeps_every_text_once(tmp_path):
    picture = put(tmp_path / "[a] (1).png")
    file = write(tmp_path / "[a] (1).txt", "mine")
    for caption in ("first", "first", "second"):
        assert write_caption(picture, caption, overwrite=True)
    copies = {"[a] (1).txt.bak": "mine", "[a] (1).txt.bak2": "first\n"}
    assert contents(tmp_path) == copies | {"[a] (1).txt": "second\n"}
    write(file, "mine")
    assert write_caption(picture, "third", overwrite=True)
    assert contents(tmp_path) == copies | {"[a] (1).txt": "third\n"}
    assert write_caption(picture, "fourth", overwrite=True)
    assert contents(tmp_path) == copies | {"[a] (1).txt.bak3": "third\n", "[a] (1).txt": "fourth\n"}


@pytest.mark.parametrize("text", ["", " \n"])
def test_of_a_blank_file_no_copy_is_kept(tmp_path, text):
    write(tmp_path / "a.txt", text)
    assert write_caption(put(tmp_path / "a.png"), "a cat", overwrite=True)
    assert contents(tmp_path) == {"a.txt": "a cat\n"}


def test_after_overwriting_there_is_one_caption_file(tmp_path):
    """Programs differ in which of two they read."""
    picture = put(tmp_path / "a.png")
    write(tmp_path / "a.txt", "mine")
    write(tmp_path / "a.caption", "mine too")
    assert write_caption(picture, "a cat", ending=".caption", overwrite=True)
    assert contents(tmp_path) == {"a.caption": "a cat\n", "a.txt.bak": "mine", "a.caption.bak": "mine too"}


def test_a_file_that_cannot_be_replaced_is_an_error(tmp_path):
    (tmp_path / "a.txt").mkdir()
    with pytest.raises(OutputError, match=r"a\.txt: cannot be replaced \(Is a directory\)"):
        write_caption(put(tmp_path / "a.png"), "a cat", overwrite=True)
