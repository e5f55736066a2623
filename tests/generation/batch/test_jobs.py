"""Jobs files as people write them, and everything that can be wrong with one, told line by line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from sdlora.errors import ConfigError
from sdlora.generation.batch.grid import label, make_axis, parse_axis
from sdlora.generation.batch.jobs import Job, read_jobs
from sdlora.generation.batch.jobs_text import parse_line
from sdlora.generation.control_text import split_control


def write(folder: Path, name: str, text: str) -> Path:
    (folder / name).write_text(text, encoding="utf-8")
    return folder / name


def said(jobs: list[Job], *fields: str) -> list[Any]:
    """The values of some settings of each job."""
    return [tuple(getattr(job.request, field) for field in fields) for job in jobs]


def problem(path: Path | None, **options: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        read_jobs(path, **options)
    return str(caught.value)


@pytest.mark.parametrize(
    ("line", "values"),
    [
        ("a cat, (red:1.2)", {"prompt": "a cat, (red:1.2)"}),
        (
            "a cat --n low quality, blurry --w 512 --h 768 --d 7 --l 7.5 --s 28",
            {
                "prompt": "a cat",
                "negative_prompt": "low quality, blurry",
                "width": "512",
                "height": "768",
                "seed": "7",
                "guidance_scale": "7.5",
                "steps": "28",
            },
        ),
        (
            r'--prompt "a \"tall\" cat, \(red\)" --negative_prompt "x --w y" --seed 1 --steps 20 --cfg_scale 7',
            {
                "prompt": r'a "tall" cat, \(red\)',
                "negative_prompt": "x --w y",
                "seed": "1",
                "steps": "20",
                "guidance_scale": "7",
            },
        ),
        ("--prompt a big cat --seed=5", {"prompt": "a big cat", "seed": "5"}),
        ("--prompt 'a cat' --batch_size 2 --n_iter 3", {"prompt": "a cat", "count": 6}),
        ("a cat's hat -- and more", {"prompt": "a cat's hat -- and more"}),
        ('a "quoted" cat --d 3', {"prompt": 'a "quoted" cat', "seed": "3"}),
        ("a cat --lora my-cat:0.8;old:0.5", {"prompt": "a cat", "adapters": "my-cat:0.8;old:0.5"}),
        ("a cat --n --d 4", {"prompt": "a cat", "negative_prompt": "", "seed": "4"}),
    ],
)
def test_a_line_of_text(line: str, values: dict[str, Any]) -> None:
    assert parse_line(line) == values


@pytest.mark.parametrize(
    "text",
    [
        '[defaults]\nsize = "64x64"\n[[jobs]]\nprompt = "a"\nwidth = 128\nheight = 64',
        '[defaults]\nwidth = 64\n[[jobs]]\nprompt = "a"\nsize = "128x64"',
        '[defaults]\nsize = "64x64"\n[grid]\nprompt = ["a"]\nwidth = [128]\nheight = 64',
    ],
)
def test_what_a_job_says_of_its_size_counts(tmp_path, text):
    (tmp_path / "jobs.toml").write_text(text)
    (job,) = read_jobs(tmp_path / "jobs.toml")
    assert (job.request.width, job.request.height) == (128, 64)


def test_defaults_that_do_nothing_for_a_job_are_left_out(tmp_path):
    text = '[defaults]\nstrength = 0.5\nmask = "m.png"\n[[jobs]]\nprompt = "a"\n[[jobs]]\nprompt = "b"\nimage = "x.png"'
    jobs = read_jobs(write(tmp_path, "jobs.toml", text), {"hires_scale": 2, "hires_steps": 3, "mask_blur": 2.0})
    assert said(jobs, "image", "mask", "strength", "mask_blur") == [("", "", 0.75, 4.0), ("x.png", "m.png", 0.5, 2.0)]
    assert said(jobs, "hires_scale", "hires_steps") == [(2, 3), (1, 0)]
    grid = [parse_axis("hires_scale=1,2")]
    assert said(read_jobs(None, {"prompt": "a", "hires_steps": 3}, grid), "hires_steps") == [(3,), (3,)]


def test_what_a_job_says_or_no_job_takes_is_refused_where_it_does_nothing(tmp_path):
    path = write(tmp_path, "jobs.txt", "a --strength 0.5\nb\nc --hires_scale 1 --hires_steps 3")
    told = problem(path, defaults={"weight": 0.5})
    assert "jobs.txt:1: strength does nothing without image; give that too, or leave it out" in told
    assert "jobs.txt: the default weight does nothing for any job; leave it out" in told
    assert "jobs.txt:2" not in told and "jobs.txt:3" not in told
    assert "hires_steps does nothing without hires_scale" in problem(None, defaults={"prompt": "a", "hires_steps": 3})
    painted = write(tmp_path, "painted.txt", "a\nb --image x.png --mask m.png --masked_padding 8")
    assert (
        problem(painted)
        == f"{painted}:2: masked_padding does nothing without inpaint_area 'only masked'; give that too, or "
        "leave it out"
    )
    for area in ("only masked", "whole picture"):  # the second may be compared with the first
        assert said(read_jobs(painted, {"inpaint_area": area}), "inpaint_area")[1] == (area,)
    axis = [parse_axis("strength=0.2,0.4")]
    assert "strength does nothing" in problem(None, defaults={"prompt": "a"}, grid=axis)


def test_a_default_weight_is_that_of_adapters_that_name_none(tmp_path):
    for name in "ab":
        (tmp_path / f"{name}.safetensors").touch()
    text = '[defaults]\nweight = 0.5\n[[jobs]]\nprompt = "a"\nadapters = "a.safetensors:0.8;b.safetensors"\n'
    text += '[[jobs]]\nprompt = "b"\nadapters = "a.safetensors:0.8"\nweight = 0.3\n[[jobs]]\nprompt = "c"'
    jobs = read_jobs(write(tmp_path, "jobs.toml", text))
    assert [[adapter.weight for adapter in job.request.adapters] for job in jobs] == [[0.8, 0.5], [0.3], []]


def test_files_are_looked_for_beside_the_jobs_and_from_here(tmp_path, monkeypatch):
    """What the command line says is looked for from here first."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "night"
    (folder / "wild").mkdir(parents=True)
    for place in ("both.png", "night/both.png", "here.png", "night/mask.png", "night/lanczos", "a.safetensors"):
        (tmp_path / place).touch()
    line = "a --image both.png --mask mask.png --wildcards wild\nb --image here.png --adapter a.safetensors\nc --hires_scale 2"
    defaults = {"hires_upscaler": "lanczos"}
    jobs = read_jobs(write(folder, "jobs.txt", line), defaults)
    assert said(jobs, "image", "mask", "wildcards", "hires_upscaler") == [
        (str(folder / "both.png"), str(folder / "mask.png"), str(folder / "wild"), "latent"),
        ("here.png", "", "", "latent"),
        ("", "", "", "lanczos"),
    ]
    assert jobs[1].request.adapters[0].path == "a.safetensors"
    (folder / "a.safetensors").touch()
    assert read_jobs(folder / "jobs.txt", defaults)[1].request.adapters[0].path == str(folder / "a.safetensors")
    flags = {"image": "both.png", "mask": "mask.png", "adapters": [{"path": "a.safetensors"}]}
    (job,) = read_jobs(write(folder, "one.txt", "a"), flags)
    assert (job.request.image, job.request.mask) == ("both.png", str(folder / "mask.png"))
    assert job.request.adapters[0].path == "a.safetensors"
    axis = [parse_axis("image=both.png,here.png")]
    assert said(read_jobs(folder / "one.txt", {}, axis), "image") == [("both.png",), ("here.png",)]
    assert said(read_jobs(write(folder, "two.txt", "a --image both.png"), {"image": "here.png"}), "image") == [
        (str(folder / "both.png"),)
    ]


def test_lists_of_a_grid_are_looked_for_as_other_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "night").mkdir()
    path = write(tmp_path / "night", "jobs.toml", '[grid]\nprompt = "@list.txt"\n')
    write(tmp_path, "list.txt", "from here\n")
    assert said(read_jobs(path), "prompt") == [("from here",)]
    write(tmp_path / "night", "list.txt", "beside one\nbeside two\n")
    assert said(read_jobs(path), "prompt") == [("beside one",), ("beside two",)]


def test_controlnets_are_written_as_words_or_tables(tmp_path, monkeypatch):
    """Their files are looked for as pictures are."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "jobs").mkdir()
    for name in ("edges.png", "my net.safetensors"):
        (tmp_path / "jobs" / name).touch()
    net, image = str(tmp_path / "jobs" / "my net.safetensors"), str(tmp_path / "jobs" / "edges.png")
    table = '{"model": "my net.safetensors", "image": "edges.png", "strength": 0.5}'
    path = write(
        tmp_path / "jobs",
        "a.jsonl",
        '{"prompt": "a", "control": "\'my net.safetensors\' edges.png 0.5 0-0.6"}\n'
        f'{{"prompt": "b", "control": {table}}}\n{{"prompt": "c", "control": [{table}, "net edges.png"]}}\n',
    )
    jobs = read_jobs(path.relative_to(tmp_path))
    made = [[tuple(choice.model_dump().values()) for choice in job.request.control] for job in jobs]
    seen = [str(Path("jobs") / Path(name).name) for name in (net, image)]
    assert made[0] == [(*seen, 0.5, 0.0, 0.6)]
    assert made[1] == [(*seen, 0.5, 0.0, 1.0)]
    assert made[2] == [made[1][0], ("net", seen[1], 1.0, 0.0, 1.0)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("net.safetensors C:\\maps\\a.png", {"model": "net.safetensors", "image": "C:\\maps\\a.png"}),
        ("o/net m.png 0.25-1", {"model": "o/net", "image": "m.png", "start": 0.25, "end": 1.0}),
        (
            "net 'my map.png' .5-.75 2",
            {"model": "net", "image": "my map.png", "start": 0.5, "end": 0.75, "strength": 2.0},
        ),
    ],
)
def test_a_controlnet_in_words(text, expected):
    assert split_control(text) == expected


@pytest.mark.parametrize("text", ["net", "net m.png 1 0-1 more", "net m.png 0.5 0.6", "net m.png strong", "net 'm.png"])
def test_words_that_are_no_controlnet_are_refused(text):
    with pytest.raises(ConfigError, match=r"^control is .*expected MODEL IMAGE, and perhaps STRENGTH"):
        split_control(text)


def test_size_and_width_of_one_job_are_refused(tmp_path):
    (tmp_path / "jobs.txt").write_text("a --w 128 --size 64x64")
    with pytest.raises(ConfigError, match="size is given beside width or height"):
        read_jobs(tmp_path / "jobs.txt")


@pytest.mark.parametrize(
    ("together", "sentence"),
    [('[["prompt", "seed"], ["prompt", "steps"]]', "zip names 'prompt' twice"), ('[[["seed"]]]', "which is no list")],
)
def test_axes_advance_with_one_group_alone(tmp_path, together, sentence):
    (tmp_path / "jobs.toml").write_text(f'[grid]\nprompt = ["a", "b"]\nseed = [1, 2]\nsteps = [3, 4]\nzip = {together}')
    with pytest.raises(ConfigError, match=sentence):
        read_jobs(tmp_path / "jobs.toml")


def test_labels_tell_blocks_and_steps():
    table = {"path": "lib/cat.safetensors", "weight": 0.5, "blocks": "MIDD", "steps": "5-"}
    assert label(table) == "cat:0.5 blocks MIDD steps 5-"


def test_ranges_of_a_mask():
    assert parse_axis("mask_blur=0..2").values == (0, 1, 2)
    assert parse_axis("masked_padding=0..64:32").values == (0, 32, 64)


def test_values_that_are_no_list_are_refused():
    assert parse_axis("prompt=a\rb").values == ("a b",)
    with pytest.raises(ConfigError, match="cannot be told apart"):
        parse_axis("prompt=" + "a" * 200_000)


@pytest.mark.parametrize("name", ["x" * 300, "sheets/contact-1", "Sheets/a"])
def test_names_that_are_taken_or_too_long_are_refused(tmp_path, name):
    (tmp_path / "jobs.txt").write_text(f"a --name {name}")
    with pytest.raises(ConfigError, match="name"):
        read_jobs(tmp_path / "jobs.txt")


def test_text_jobs_skip_comments_and_know_their_lines(tmp_path: Path) -> None:
    path = write(tmp_path, "jobs.txt", "\ufeff# night\n\na cat --s 5\n  \na dog\n")
    jobs = read_jobs(path, {"steps": 9})
    assert said(jobs, "prompt", "steps") == [("a cat", 5), ("a dog", 9)]
    assert [job.where for job in jobs] == [f"{path}:3", f"{path}:5"]


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
def test_csv_with_any_delimiter(tmp_path: Path, delimiter: str) -> None:
    rows = [
        "Prompt,Negative Prompt,cfg_scale,size,adapters,name",
        '"a cat, big",bad,3.5,64x128,,one',
        ",,,,,",
        "a dog,,,,,",
    ]
    text = "\n".join(rows)
    swapped = "".join(delimiter if c == "," else c for c in text).replace(f"a cat{delimiter} big", "a cat, big")
    path = write(tmp_path, "jobs.csv", "\ufeff" + swapped)
    first, second = read_jobs(path, {"guidance_scale": 5})
    assert said([first], "prompt", "negative_prompt", "guidance_scale", "width", "height") == [
        ("a cat, big", "bad", 3.5, 64, 128)
    ]
    assert first.name == "one" and first.where.endswith(":2")
    assert said([second], "prompt", "guidance_scale", "width") == [("a dog", 5.0, 0)]
    assert second.where.endswith(":4")


def test_csv_cells_may_hold_ends_of_lines_and_excels_own_line_is_known(tmp_path: Path) -> None:
    path = write(tmp_path, "jobs.csv", 'sep=;\nprompt;seed\n"a cat\non a mat";1\na dog;2\n')
    jobs = read_jobs(path)
    assert said(jobs, "prompt", "seed") == [("a cat\non a mat", 1), ("a dog", 2)]
    assert [job.where.rpartition(":")[2] for job in jobs] == ["3", "5"]


def test_jsonl(tmp_path: Path) -> None:
    adapter = tmp_path / "a.safetensors"
    adapter.touch()
    lines = [
        '{"prompt": "a cat", "seed": 3, "steps": null}',
        '{"prompt": "b", "adapters": [{"path": "a.safetensors", "weight": 0.5, "text_encoder_weight": 0.1}]}',
        '{"prompt": "c", "adapter": "a.safetensors:0.25"}',
        '{"prompt": "d", "adapter": "a.safetensors", "weight": -1}',
    ]
    jobs = read_jobs(write(tmp_path, "jobs.jsonl", "\n".join(lines)), {"steps": 4})
    assert said(jobs, "prompt", "seed", "steps") == [("a cat", 3, 4), ("b", 0, 4), ("c", 0, 4), ("d", 0, 4)]
    used = [[(a.path, a.weight, a.text_encoder_weight) for a in job.request.adapters] for job in jobs]
    place = str(adapter)  # seen from the jobs file's folder
    assert used == [[], [(place, 0.5, 0.1)], [(place, 0.25, None)], [(place, -1.0, None)]]


TOML = """
[defaults]
steps = 7
negative_prompt = "blurry"

[[jobs]]
prompt = "a cat"
steps = 3

[grid]
prompt = ["a red ball", "a box"]
seed = "1..2"
guidance_scale = [2.5, 5]
count = 2
"""


def test_toml_jobs_and_grids(tmp_path: Path) -> None:
    jobs = read_jobs(write(tmp_path, "jobs.toml", TOML), {"width": 64})
    assert said(jobs[:1], "prompt", "steps", "negative_prompt", "count") == [("a cat", 3, "blurry", 1)]
    assert said(jobs[1:4], "prompt", "seed", "guidance_scale") == [
        ("a red ball", 1, 2.5),
        ("a red ball", 1, 5.0),
        ("a red ball", 2, 2.5),
    ]
    assert len(jobs) == 1 + 8
    assert set(said(jobs[1:], "steps", "count", "width")) == {(7, 2, 64)}
    assert jobs[-1].point == (("prompt", "a box"), ("seed", "2"), ("guidance_scale", "5"))


def test_toml_lists_that_advance_together(tmp_path: Path) -> None:
    text = 'grid = [{prompt = ["a", "b"], seed = [1, 2], steps = [3, 4], zip = ["prompt", "steps"]}]'
    jobs = read_jobs(write(tmp_path, "jobs.toml", text))
    assert said(jobs, "prompt", "steps", "seed") == [("a", 3, 1), ("a", 3, 2), ("b", 4, 1), ("b", 4, 2)]
    unequal = text.replace("[3, 4]", "[3, 4, 5]")
    assert "prompt has 2, steps has 3" in problem(write(tmp_path, "jobs.toml", unequal))


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("seed=1..4", (1, 2, 3, 4)),
        ("seed=4..1:2", (4, 2)),
        ("weight=0.2..1.0:0.2", (0.2, 0.4, 0.6, 0.8, 1.0)),
        ("cfg=-1..1", (-1, 0, 1)),
        ("seed=1..3, 7,9..10", (1, 2, 3, "7", 9, 10)),
        ("steps=20,30", ("20", "30")),
        ('prompt="a cat, big","say ""hi""",1..8', ("a cat, big", 'say "hi"', "1..8")),
        ("adapter=a:0.8;b:0.5,none", ("a:0.8;b:0.5", "none")),
        ("size=64x64,64x128", ("64x64", "64x128")),
    ],
)
def test_axes(text: str, values: tuple[Any, ...]) -> None:
    assert parse_axis(text).values == values


def test_an_axis_of_a_files_lines(tmp_path: Path) -> None:
    path = write(tmp_path, "prompts.txt", "a cat, big\n# no\n\na dog --w 5\n")
    assert parse_axis(f"prompt=@{path}").values == ("a cat, big", "a dog --w 5")
    assert make_axis("prompt", ["@prompts.txt", "x"], tmp_path).values == ("a cat, big", "a dog --w 5", "x")


def test_a_grid_multiplies_every_job_and_the_first_axis_changes_least(tmp_path: Path) -> None:
    path = write(tmp_path, "jobs.txt", "a red cat --n red\na dog in red --s 2\n")
    grid = [parse_axis("replace=red,blue"), parse_axis("seed=5..6")]
    jobs = read_jobs(path, {"steps": 1}, grid)
    assert said(jobs, "prompt", "negative_prompt", "seed") == [
        ("a red cat", "red", 5),
        ("a red cat", "red", 6),
        ("a blue cat", "blue", 5),
        ("a blue cat", "blue", 6),
        ("a dog in red", "", 5),
        ("a dog in red", "", 6),
        ("a dog in blue", "", 5),
        ("a dog in blue", "", 6),
    ]
    assert jobs[3].point == (("replace red", "blue"), ("seed", "6"))


def test_replacing_comes_last_whatever_the_order_of_axes() -> None:
    grid = [parse_axis("replace=cat,dog"), parse_axis("prompt=a cat,my cat")]
    assert said(read_jobs(None, {}, grid), "prompt") == [("a cat",), ("my cat",), ("a dog",), ("my dog",)]


def test_weights_and_adapters_of_a_grid(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / f"{name}.safetensors").touch()
    found = {name: tmp_path / f"{name}.safetensors" for name in "ab"}
    grid = [parse_axis("weight=0.5,1"), parse_axis("adapter=a,a;b,none")]
    jobs = read_jobs(None, {"prompt": "x"}, grid, found.__getitem__)
    used = [[(Path(a.path).stem, a.weight) for a in job.request.adapters] for job in jobs]
    assert used == [[("a", 0.5)], [("a", 0.5), ("b", 0.5)], [], [("a", 1.0)], [("a", 1.0), ("b", 1.0)], []]
    assert jobs[1].point == (("weight", "0.5"), ("adapter", "a;b"))


def test_all_faults_of_a_file_are_told_at_once_by_lines(tmp_path: Path) -> None:
    text = (
        "prompt,seed,steps,adapters,width,name\n"
        "a cat,1,0,,64,\n"
        "a dog,x,5,nowhere:0.5,65,\n"
        "a bird,1,5,,64,../up\n"
        "a fish,1,5,,64,,more\n"
        ",1,5,,64,\n"
        "fine,1,5,,64,\n"
    )
    path = write(tmp_path, "jobs.csv", text)
    told = problem(path).splitlines()
    assert told[0] == f"5 things are wrong with {path}:"
    assert told[1] == f"  {path}:2: steps is '0'; input should be greater than 0"
    assert told[2].startswith(f"  {path}:3: nowhere: there is no such adapter file; seed is 'x'; ")
    assert "width is '65'; input should be a multiple of 8" in told[2]
    assert told[3].startswith(f"  {path}:4: name is '../up'; expected")
    assert told[4].startswith(f"  {path}:5: has 7 cells, the header 6")
    assert told[5] == f"  {path}:6: prompt is not given"
    assert len(told) == 6  # the row that is right is not among them


def test_a_thousand_faults_are_counted(tmp_path: Path) -> None:
    told = problem(write(tmp_path, "jobs.txt", "a --s 0\n" * 1000))
    assert told.startswith("1000 things") and told.endswith("and 900 more") and told.count("\n") == 101


@pytest.mark.parametrize(
    ("name", "text", "sentence"),
    [
        ("a.txt", "a --sed 5", "a.txt:1: unknown setting 'sed'; did you mean seed?"),
        ("a.txt", "a --tiling true", "a.txt:1: tiling is a setting of AUTOMATIC1111 that sdlora does not have"),
        ("a.txt", "a --w 64 --width 64", "a.txt:1: width is given twice, as w and width"),
        ("a.txt", "a --seed -1", "a.txt:1: seed is -1; a batch that can go on"),
        ("a.txt", "a --size big", "a.txt:1: size is 'big'; expected for example '512x768'"),
        ("a.txt", "a --weight 0.5", "a.txt:1: weight is '0.5' but no adapter is named"),
        ("a.txt", "a --n_iter x --batch_size 2", "a.txt:1: count is 'x'"),
        ("a.txt", "# nothing\n", "a.txt: holds no jobs"),
        ("a.csv", "", "a.csv: is empty"),
        ("a.csv", "prompt,sed\na,1", "a.csv:1: unknown setting 'sed'; did you mean seed?"),
        ("a.csv", 'prompt\n"a', "a.csv:2: is no row of a CSV file"),
        ("a.jsonl", '{"prompt": "a"\n', "a.jsonl:1: is not valid JSON"),
        ("a.jsonl", "[1]", "a.jsonl:1: is no object"),
        ("a.jsonl", '{"prompt": "a", "adapters": 5}', "a.jsonl:1: adapters is 5; expected"),
        ("a.jsonl", '{"prompt": "a", "steps": NaN}', "a.jsonl:1: steps is nan"),
        ("a.jsonl", "[" * 100_000, "a.jsonl:1: is not valid JSON"),
        ("a.toml", "jobs = 5", "a.toml: jobs: is no table"),
        ("a.toml", "[job]\nprompt='a'", "a.toml: unknown table job"),
        ("a.toml", "x = = 1", "a.toml: is not valid TOML"),
        ("a.toml", "[grid]\nprompt='a'\nseed='1..9000000'", "a batch has at most 1,000,000 pictures"),
        ("a.toml", "[grid]\nprompt='a'\nseed='1..2000'\nsteps='1..900'", "makes 1,800,000 jobs"),
        ("a.toml", "[grid]\nprompt='a'\nseed=[1,2]\nzip=['seed','steps']", "zip names 'steps', which is no list"),
        ("a.pdf", "a", "a.pdf: is no jobs file; expected .txt, .csv"),
    ],
)
def test_wrong_files_are_one_sentence(tmp_path: Path, name: str, text: str, sentence: str) -> None:
    assert sentence in problem(write(tmp_path, name, text))


@pytest.mark.parametrize(
    ("axis", "sentence"),
    [
        ("seed", "--grid 'seed' is no axis"),
        ("sed=1", "unknown setting 'sed'; did you mean seed?"),
        ("seed=1..x", "seed: '1..x' is no range"),
        ("weight=0..1:0", "weight: '0..1:0' is no range"),
        ("replace=red", "replace has nothing to put in"),
        ("prompt=@nowhere.txt", "nowhere.txt: cannot be read"),
    ],
)
def test_wrong_axes_are_one_sentence(axis: str, sentence: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_axis(axis)
    assert sentence in str(caught.value)


def test_products_that_make_no_sense_are_refused() -> None:
    seeds = [parse_axis("seed=1..2000"), parse_axis("steps=1..1000")]
    assert problem(None, defaults={"prompt": "a"}, grid=seeds).startswith("2,000,000 jobs are asked for")
    many = problem(None, defaults={"prompt": "a", "count": 1000}, grid=[parse_axis("seed=1..2000")])
    assert many.startswith("2,000,000 pictures are asked for")
    assert "seed is an axis twice" in problem(None, grid=[parse_axis("d=1"), parse_axis("seed=1")])
    replaced = problem(None, defaults={"prompt": "a"}, grid=[parse_axis("replace=red,blue")])
    assert "the prompt does not hold 'red', which 'replace red' is to replace" in replaced


def test_a_missing_file_is_said_to_be_missing(tmp_path: Path) -> None:
    assert problem(tmp_path / "no.txt").endswith("no.txt: there is no such jobs file")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    assert "cannot be read as text in UTF-8" in problem(tmp_path / "latin.txt")
