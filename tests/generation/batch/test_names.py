import json
from pathlib import Path
from typing import Any

import pytest

from sdlora.adapters.write import write_adapter
from sdlora.config import BaseSection
from sdlora.errors import ConfigError
from sdlora.generation.batch.jobs import read_jobs
from sdlora.generation.batch.making import make_pictures, standing
from sdlora.generation.batch.manifest import NAME, ManifestWriter
from sdlora.generation.batch.names import identity_mark
from sdlora.generation.batch.plan import BatchPlan, plan_batch
from sdlora.generation.engine import Engine
from sdlora.generation.pictures.files import FileFormat, read_recipe
from sdlora.generation.pictures.names import FIELDS, FIELDS_OF_THE_MOMENT, picture_path

pytestmark = pytest.mark.parametrize("shape", ["sd1"])


@pytest.fixture
def plan(tiny_folder: Any, shape: str, tmp_path: Path) -> Any:
    """`plan(template, *jobs)`: the plan of jobs, of which those that say no name have that template."""

    def make(template: str | None, *jobs: dict[str, Any], form: str = ".png") -> BatchPlan:
        path = tmp_path / "jobs.jsonl"
        path.write_text("".join(json.dumps({"prompt": "a ball", "steps": 1, **job}) + "\n" for job in jobs))
        found = read_jobs(path, {} if template is None else {"name": template})
        return plan_batch(found, BaseSection(path=str(tiny_folder(shape)), precision="fp32"), form=FileFormat(form))

    return make


def files(plan: BatchPlan) -> list[str]:
    return [picture.file for picture in plan.pictures]


def test_a_template_names_every_picture_that_says_no_name(plan: Any) -> None:
    jobs = ({"seed": 7, "count": 2}, {"prompt": "A Cat!", "name": "mine/one"}, {"prompt": "A Cat!", "width": 24})
    assert files(plan("{base}/{prompt}-{seed:03}", *jobs)) == [
        "sd1/a-ball-007.png",
        "sd1/a-ball-008.png",
        "mine/one.png",
        "sd1/a-cat-000.png",
    ]
    assert files(plan("{number:02}-{width}.webp", {}, {"width": 24}, form=".webp"))[1] == "02-24.webp"
    with pytest.raises(ConfigError, match=r"\.jpg files; give --format webp"):
        plan("{number}.webp", {}, form=".jpg")
    assert files(plan(None, {"name": "{seed}/{guidance}", "seed": 5}, {"name": "plain"})) == ["5/7.5.png", "plain.png"]


def test_a_name_that_another_picture_has_is_followed_by_the_pictures_number(plan: Any) -> None:
    jobs = [{"seed": seed} for seed in range(3)]
    assert files(plan("{prompt}", *jobs)) == ["a-ball.png", "a-ball-2.png", "a-ball-3.png"]
    assert files(plan("{prompt}", *jobs, {"seed": 1})) == ["a-ball.png", "a-ball-2.png", "a-ball-3.png", "a-ball-2.png"]
    said = {
        "name": "A-ball",
        "seed": 9,
    }  # what a job says itself stays, wherever it stands; case may not tell files apart
    assert files(plan("{prompt}", {"seed": 0}, said)) == ["a-ball-1.png", "A-ball.png"]
    taken = [{"name": "a-ball-2"}, {"seed": 1}, {"name": "a-ball", "seed": 2}, {"name": "a-ball-2-2", "seed": 3}]
    assert files(plan("{prompt}", *taken))[1] == "a-ball-2-3.png"
    with pytest.raises(ConfigError, match=r"the name one\.png is that of another picture, of .*a field such as {seed}"):
        plan("one", *jobs)


@pytest.mark.parametrize(
    ("template", "sentence"),
    [
        ("{date}/{seed}", "names are decided before it begins, .*: write what you want for {date} itself"),
        ("{prompt}-{time}", "for {time} itself"),
        ("{sed}", "has the unknown field {sed}; did you mean {seed}"),
        ("{seed", "has a brace that belongs to no field"),
        ("../{seed}", "names no file below the folder"),
        ("{prompt:03}", "only numbers are filled up"),
        ("Sheets/{seed}", "the folder sheets is for contact sheets"),
        ("{prompt}/{seed}", "the folder sheets is for contact sheets"),
    ],
)
def test_templates_that_make_no_names_are_refused(plan: Any, template: str, sentence: str) -> None:
    with pytest.raises(ConfigError, match=rf"jobs\.jsonl:1: .*{sentence}"):
        plan(template, {"prompt": "sheets"})


def test_names_are_those_that_generate_gives(
    plan: Any, tiny_base: Any, make_adapter: Any, tmp_path: Path, shape: str
) -> None:
    write_adapter(make_adapter(tiny_base()), tmp_path / "my cat.safetensors")
    template = "_".join(f"{{{field}}}" for field in FIELDS if field not in FIELDS_OF_THE_MOMENT)
    jobs = ({"adapters": [{"path": "my cat.safetensors"}]}, {"sampler": "Euler a", "guidance_scale": 1, "seed": 3})
    planned = plan(template, *jobs)
    engine = Engine(planned.base, device="cpu")
    out = tmp_path / "out"
    out.mkdir()
    make_pictures(engine, planned.pictures, out, ManifestWriter(out / NAME), batch_size=1)
    for number, picture in enumerate(planned.pictures, start=1):
        recipe = read_recipe(out / picture.file)
        assert picture.file == str(picture_path(recipe, template, number=number))
    assert "my-cat" in planned.pictures[0].file and recipe.sampler == "Euler a"


def test_a_batch_goes_on_under_the_same_names(plan: Any, tiny_base: Any, tmp_path: Path) -> None:
    jobs = [{"seed": seed} for seed in range(3)]
    planned, out = plan("{prompt}/{base}", *jobs), tmp_path / "out"
    out.mkdir()
    engine = Engine(tiny_base())
    make_pictures(engine, planned.pictures[1:2], out, ManifestWriter(out / NAME), batch_size=1)
    again = plan("{prompt}/{base}", *jobs)
    assert files(again) == files(planned) == ["a-ball/sd1.png", "a-ball/sd1-2.png", "a-ball/sd1-3.png"]
    assert [picture.file for picture in standing(again, out).pending] == ["a-ball/sd1.png", "a-ball/sd1-3.png"]
    (out / NAME).unlink()
    assert len(standing(again, out).pending) == 2  # known by its recipe
    later = plan("{seed}/{number}", {"seed": 9}, *jobs)
    assert files(later) == ["9/1.png", "0/2.png", "1/3.png", "2/4.png"]
    assert {p.identity for p in later.pictures} & {p.identity for p in plan("{seed}/{number}", *jobs).pictures}
    with pytest.raises(ConfigError, match=r"jobs\.jsonl:2: .*sd1-2\.png is there and is another picture"):
        standing(plan("{prompt}/{base}", {"seed": 9}, *jobs), out)


def test_digits_of_a_name_are_no_identity(shape: str) -> None:
    assert identity_mark("00001-a-ball-0123abcd.png") == "0123abcd"
    assert identity_mark("cat-00000012.png", "f" * 64) == "" and identity_mark("cat.png") == ""
