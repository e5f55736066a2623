"""The ablation: rows that change what they say, runs that are made once, and a report that adds up."""

import json
from dataclasses import asdict, replace

import ablation
import ablation_report
import ablation_run
import machine
import pytest
from ablation_plan import Book, Scale, choice_of, chosen_rows, key_of, sweep_jobs, table_jobs
from ablation_report import Measured, Spread, permutation_p, supported
from ablation_rows import DEMO, FIRST_DEFAULTS, ROWS, TIME_ROWS, Row, Sweep, config_of, settings_of
from ablation_run import Job, adapter_bytes, training_clock, training_seconds

from sdlora.config import require_complete

BY_NAME = {row.name: row for row in ROWS}
SCALE = Scale(steps=250, seeds=(1, 2), prompts=8, sweep_steps=250)
MACHINE = {
    "commit": "abc",
    "device": "CPU",
    "cores": 2,
    "python": "3.11",
    "versions": {"torch": "2"},
    "measured": "now",
}


# ------------------------------------------------------------------- rows


@pytest.mark.parametrize("row", [*ROWS, *TIME_ROWS], ids=lambda row: row.name)
def test_every_row_is_a_sound_configuration(row):
    swept = {row.sweep.key: row.sweep.values[0]} if row.sweep else {}
    settings = settings_of(row, {"training.steps": 250, **swept, "output.folder": "somewhere"})
    config = config_of(settings)
    require_complete(config)
    assert (config.base.path, config.data.trigger, config.output.folder) == ("tiny", "zorblin", "somewhere")


def test_names_are_unique_and_those_referred_to_exist():
    assert len(BY_NAME) == len(ROWS)
    for row in ROWS:
        assert set(row.against) <= set(BY_NAME) - {row.name}
        if row.swept_as:
            assert BY_NAME[row.swept_as].sweep and not BY_NAME[row.swept_as].swept_as


def test_rows_that_choose_a_value_try_at_least_three():
    assert all(len(set(row.sweep.values)) >= 3 for row in ROWS if row.sweep)


def flat(values, before=""):
    for key, value in values.items():
        yield from flat(value, f"{before}{key}.") if isinstance(value, dict) else [(f"{before}{key}", value)]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_a_row_differs_from_the_demo_in_what_it_says_alone(row):
    demo, own = (
        dict(flat(config_of(settings).model_dump())) for settings in (settings_of(Row("", "")), settings_of(row))
    )
    assert {key for key in own if own[key] != demo.get(key)} <= set(row.settings)


def test_the_demo_is_that_of_the_first_version():
    adapter = config_of(DEMO).adapter
    assert (adapter.rank, adapter.alpha, adapter.targets) == (3, 3.0, ("transformer", "conv1", "conv2"))
    config = config_of(FIRST_DEFAULTS)
    assert (config.adapter.rank, config.adapter.alpha, config.adapter.targets) == (16, 16.0, ("attention",))
    assert (config.optimizer.learning_rate, config.optimizer.kind, config.optimizer.warmup_steps) == (
        2e-4,
        "adamw8bit",
        10,
    )
    assert (config.optimizer.schedule, config.training.batch_size, config.objective.min_snr_gamma) == ("cosine", 1, 5.0)


def test_every_subject_of_the_table_has_a_row():
    for word in ("full fine-tune", "dora", "rslora", "locon", "loha", "lokr", "pissa", "olora", "min-snr off", "huber"):
        assert any(word in name for name in BY_NAME), word
    for word in (
        "text encoder",
        "words alone",
        "words first",
        "words and lora together",
        "lora+",
        "prior",
        "ema",
        "prodigy",
    ):
        assert any(word in name for name in BY_NAME), word
    grid = [row.name for row in chosen_rows(ROWS, ["base precision"])]
    assert {"rank 1, all, fp32", "rank 16, attention, int8", "rank 4, all, nf4"} <= set(grid)


# ------------------------------------------------------------------- runs


class Children:
    """Stands in for the processes: a loss that depends on rate and seed, and a failure of one row."""

    def __init__(self):
        self.jobs = []

    def __call__(self, script, options):
        job = json.loads(options["job"].read_text())
        self.jobs.append(job)
        if job["settings"].get("adapter.dora"):
            raise RuntimeError("ablation_run.py failed:\nTraceback\nSomething: broke")
        if not job["trains"]:
            return {**job, "unet_bytes": 2_000_000, "concept_share": 0.0, "following": 1.0}
        rate = job["settings"]["optimizer.learning_rate"]
        found = {
            "loss_before": 0.06,
            "loss_after": abs(rate - 4e-3) + 0.03 + 0.001 * job["seed"],
            "seconds": 10.0 * job["seed"],
            "cpu_seconds": 10.0 * job["seed"],
        }
        found |= {"steps": 250, "parameters": 1234, "adapter_bytes": 5_000, "peak_gb": 0.5, "startup_seconds": 3.0}
        found["curve"] = [[0, 0.0, 0.06], [10, 4.0 * job["seed"], 0.04], [20, 9.0, 0.03]]
        judged = {"unet_bytes": 2_000_000, "concept_share": 0.25 * job["seed"], "following": 1.0}
        return {**job, **found, **(judged if job["prompts"] else {})}


@pytest.fixture
def children(monkeypatch):
    monkeypatch.setattr(machine, "describe", lambda: MACHINE)
    children = Children()
    monkeypatch.setattr(machine, "run_child", children)
    return children


def options(tmp_path, command, *more):
    folders = ["--out", str(tmp_path / "runs"), "--docs", str(tmp_path), "--results", str(tmp_path)]
    return [command, *folders, "--seeds", "1", "2", "--prompts", "8", "--jobs", "1", *more]


def test_values_are_chosen_first_and_then_taken_for_all_seeds_and_dependent_rows(children, tmp_path, capsys):
    assert ablation.main(options(tmp_path, "run", "--rows", "debiased")) == 0
    trained = [job for job in children.jobs if job["trains"]]
    assert [(job["row"], job["seed"], job["prompts"]) for job in trained] == [
        *[("lora", 0, 0)] * 3,
        ("debiased", 1, 8),
        ("debiased", 2, 8),
    ]
    assert [job["settings"]["optimizer.learning_rate"] for job in trained] == [4e-3, 8e-3, 1.6e-2, 4e-3, 4e-3]
    assert [job["settings"]["training.steps"] for job in trained] == [150] * 3 + [300] * 2
    assert [job["settings"]["objective.weighting"] for job in trained] == ["min-snr"] * 3 + ["debiased"] * 2
    assert "debiased, seed 2, loss 0.0320, concept 50%, followed 100%, 20 s" in capsys.readouterr().out


def test_what_is_there_is_not_run_again_unless_the_code_changed(children, tmp_path, monkeypatch):
    first = options(tmp_path, "run", "--rows", "debiased")
    ablation.main(first)
    made = len(children.jobs)
    ablation.main(first)
    assert len(children.jobs) == made
    monkeypatch.setattr(ablation, "code_id", lambda: "other")
    ablation.main(first)
    assert len(children.jobs) == 2 * made


def test_a_row_that_fails_stops_no_other_and_is_tried_again(children, tmp_path, capsys):
    words = options(tmp_path, "run", "--rows", "dora", "debiased")
    ablation.main(words)
    assert "dora, seed 0: FAILED: Something: broke" in capsys.readouterr().out
    made = len(children.jobs)
    ablation.main(words)
    assert [job["row"] for job in children.jobs[made:]] == ["dora"] * 3
    ablation.main(options(tmp_path, "report", "--rows", "dora", "debiased"))
    text = (tmp_path / "ablation.md").read_text()
    assert "## Not measured\n\n- dora: Something: broke" in text
    assert "| debiased |" in text


def test_the_report_holds_means_and_spreads_of_the_runs(children, tmp_path):
    words = ["--rows", "debiased", "kinds"]
    ablation.main(options(tmp_path, "run", *words))
    ablation.main(options(tmp_path, "report", *words))
    text = (tmp_path / "ablation.md").read_text()
    # losses of seeds 1 and 2: 0.031 and 0.032; 10 and 20 s; a quarter and a half show the concept
    expected = (
        "1,234 | 5 | 2.0 | 500 | 15 (10 - 20) | **0.0315 (0.0310 - 0.0320)** | **38% (25% - 50%)** | **100%** | 2 |"
    )
    assert f"| lora | {expected}" in text
    assert "| fp32 | 2.0 | 0.0600 | 0% | 100% |" in text
    assert (
        "| lora | optimizer.learning_rate | 0.004 (at the edge) | 0.004: 0.0300, 0.008: 0.0340, 0.016: 0.0420 |" in text
    )
    # the smallest rate tried is the best one of loha too: |4e-3 - 4e-3| = 0
    assert "| loha | optimizer.learning_rate | 0.004 (at the edge) |" in text
    assert '- debiased: objective.weighting = "debiased"' in text
    assert "Commit abc; CPU, 2 cores, 1 run(s) at once" in text
    kept = json.loads((tmp_path / "ablation.json").read_text())
    (lora,) = [row for row in kept["rows"] if row["name"] == "lora"]
    assert [run["loss_after"] for run in lora["runs"]] == [0.031, 0.032]
    assert lora["chosen"]["value"] == 0.004


def test_what_a_report_holds_is_not_run_again(children, tmp_path):
    words = ["--rows", "|lora|", "debiased", "|loha|"]
    ablation.main(options(tmp_path, "run", *words))
    ablation.main(options(tmp_path, "report", *words))
    page, made = (tmp_path / "ablation.md").read_text(), len(children.jobs)
    elsewhere = tmp_path / "elsewhere"
    taken = ["--reported", str(tmp_path / "ablation.json"), "--any-code"]
    ablation.main(options(elsewhere, "run", *words, *taken))
    assert len(children.jobs) == made
    ablation.main(options(elsewhere, "report", *words))
    assert (elsewhere / "ablation.md").read_text() == page


def test_a_report_without_runs_says_how_to_make_them(children, tmp_path):
    with pytest.raises(SystemExit, match=r"start with: ablation\.py run"):
        ablation.main(options(tmp_path, "report"))


def test_a_key_is_of_all_that_is_measured_but_not_of_the_rows_name():
    job = Job("a", {"training.steps": 3}, seed=1, prompts=2)
    assert key_of(replace(job, row="b")) == key_of(job)
    others = [replace(job, seed=2), replace(job, prompts=3), replace(job, validate_every=1), replace(job, trains=False)]
    others.append(replace(job, settings={"training.steps": 4}))
    assert len({key_of(one) for one in [job, *others]}) == 6


def test_a_sweep_without_any_result_is_no_choice(tmp_path):
    row, book = BY_NAME["dora"], Book(tmp_path)
    with pytest.raises(LookupError, match="not run"):
        choice_of(row, book, SCALE)
    for job, loss in zip(sweep_jobs(row, book, SCALE), (0.03, None, 0.02), strict=True):
        book.keep(job, "code", {"loss_after": loss, "measured": "1"})
    choice = choice_of(row, book, SCALE)
    assert (choice.value, choice.at_edge) == (1.6e-2, True)
    assert [job.settings["optimizer.learning_rate"] for job in table_jobs(row, book, SCALE)] == [1.6e-2, 1.6e-2]


def test_a_row_with_a_sweep_of_its_own_inherits_another_too(tmp_path):
    book = Book(tmp_path)
    for job, loss in zip(sweep_jobs(BY_NAME["lora"], book, SCALE), (0.03, 0.04, 0.05), strict=True):
        book.keep(job, "code", {"loss_after": loss, "measured": "1"})
    jobs = sweep_jobs(BY_NAME["text encoder too"], book, SCALE)
    assert {job.settings["optimizer.learning_rate"] for job in jobs} == {4e-3}
    assert [job.settings["optimizer.text_encoder_learning_rate"] for job in jobs] == [1e-4, 1e-3, 4e-3]


def test_the_newest_success_counts(tmp_path):
    book, job = Book(tmp_path), Job("a", {}, 1, 0)
    book.keep(job, "one", {"loss_after": 1.0, "measured": "2026-01-01"})
    book.keep(job, "two", {"loss_after": 2.0, "measured": "2026-01-02"})
    book.keep(job, "three", {"error": "x", "measured": "2026-01-03"})
    assert book.newest(job)["loss_after"] == 2.0
    assert [book.holds(job, code) for code in ("one", "three", "four")] == [True, False, False]


# ------------------------------------------------------------------- what follows from them


def test_a_difference_counts_beyond_both_spreads_together():
    low = Spread((1.0, 2.0, 1.5))
    assert supported(low, Spread((5.0, 6.0, 5.5)))  # 4 apart, spreads 1 + 1
    assert not supported(low, Spread((2.5, 3.5, 3.0)))  # 1.5 apart
    assert not supported(low, Spread((5.0, 6.0)))  # too few seeds


def test_a_spread_that_is_small_by_chance_counts_as_the_usual_one():
    one, other = Spread((1.0, 1.0, 1.0)), Spread((2.0, 2.1, 2.2))
    assert supported(one, other, usual=0.5)  # 1.1 apart, 0.5 + 0.5
    assert not supported(one, other, usual=0.6)


def test_many_seeds_are_compared_by_permutation():
    # Of the 20 ways to share out six values, 2 have means as far apart as 1, 2, 3 and 10, 11, 12 have.
    assert permutation_p((1.0, 2.0, 3.0), (10.0, 11.0, 12.0)) == pytest.approx(0.1)
    low, high = Spread((1.0, 2.0, 3.0, 4.0, 5.0)), Spread((6.0, 7.0, 8.0, 9.0, 10.0))  # 5 apart, spreads 4 + 4
    assert permutation_p(low.values, high.values) == pytest.approx(2 / 252)
    assert supported(low, high)
    assert not supported(Spread(low.values[:4]), Spread(high.values[:4]))
    assert not supported(low, Spread((4.5, 6.0, 2.5, 7.0, 8.0)))


def test_a_share_has_at_least_its_counting_error():
    column = ablation_report.COLUMNS[-2]
    runs = [{"prompts": 32, "concept_share": 0.5}] * 3
    # 64 pictures, 33 / 66 = 0.5: sqrt(0.25 / 64) = 0.0625
    assert column.of(runs).width == pytest.approx(0.0625)
    nothing = [{"prompts": 32, "concept_share": 0.0}] * 3
    # 1 / 66: sqrt(0.015152 * 0.984848 / 64) = 0.015270
    assert column.of(nothing).width == pytest.approx(0.015270, abs=1e-6)


def made(name, against=(), problem="", **numbers):
    runs = [
        dict(zip(["prompts", *numbers], [32, *values], strict=True)) for values in zip(*numbers.values(), strict=True)
    ]
    return Measured(Row(name, "group", against=against), runs, problem=problem)


def test_findings_say_what_differs_and_list_what_does_not():
    rows = [
        made("lora", loss_after=(0.030, 0.031, 0.0305), concept_share=(0.5, 0.5, 0.5), cpu_seconds=(10, 11, 10.5)),
        made(
            "good",
            ("lora",),
            loss_after=(0.020, 0.021, 0.0205),
            concept_share=(0.9, 0.9, 0.9),
            cpu_seconds=(20, 21, 20.5),
        ),
        made(
            "same",
            ("lora",),
            loss_after=(0.0305, 0.0315, 0.031),
            concept_share=(0.55, 0.5, 0.5),
            cpu_seconds=(10, 11, 10.5),
        ),
        made("absent", ("lora",)),
    ]
    assert ablation_report.findings(rows) == [
        "good, against lora: held-out loss 0.0205 instead of 0.0305, better; concept share 90% instead of 50%, better.",
        "No difference from lora beyond the spreads: same.",
    ]


def test_a_table_begins_with_the_rows_that_its_own_are_compared_with():
    lora, other, dora = made("lora"), made("other"), made("dora", ("lora",))
    dora = replace(dora, row=replace(dora.row, group="kinds"))
    assert ablation_report.groups([lora, other, dora]) == {"group": [lora, other], "kinds": [lora, dora]}


def test_the_best_means_are_bold_in_judged_columns():
    rows = [
        made("one", loss_after=(0.03,), concept_share=(0.2,)),
        made("two", loss_after=(0.02,), concept_share=(0.2,)),
    ]
    lines = ablation_report.row_table(rows).splitlines()[2:]
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    assert cells == [
        ["one", "-", "-", "-", "-", "-", "0.0300", "**20%**", "-", "1"],
        ["two", "-", "-", "-", "-", "-", "**0.0200**", "**20%**", "-", "1"],
    ]


# ------------------------------------------------------------------- time to concept

EVENTS = [
    {"event": "start", "time": 100.0},
    {"event": "validation", "time": 103.0, "step": 0, "loss": 0.06},
    {"event": "step", "time": 104.0, "step": 1},
    {"event": "step", "time": 104.5, "step": 2},
    {"event": "validation", "time": 110.0, "step": 2, "loss": 0.05},
    {"event": "sample", "time": 120.0, "step": 2},
    {"event": "skipped", "time": 120.75, "step": 3},
    {"event": "validation", "time": 121.0, "step": 3, "loss": 0.04},
    {"event": "done", "time": 130.0, "step": 3},
]


def test_the_clock_stands_still_while_anything_but_a_step_goes_on():
    assert training_seconds(EVENTS) == 2.25
    assert training_clock(EVENTS) == [[0, 0.0, 0.06], [2, 1.5, 0.05], [3, 2.25, 0.04]]


def test_the_concept_is_reached_at_the_first_measurement_below():
    curve = [[0, 0.0, 0.06], [10, 3.0, 0.04], [20, 6.0, 0.03], [30, 9.0, 0.05]]
    assert ablation_report.reached(curve, 0.035) == (20, 6.0)
    assert ablation_report.reached(curve, 0.04) == (10, 3.0)
    assert ablation_report.reached(curve, 0.02) is None


def test_times_that_were_never_reached_are_bounds(children, tmp_path, capsys):
    words = options(tmp_path, "time-to-concept", "--rows", "first", "--target")
    ablation.main([*words, "0.03"])
    lines = {cells[1].strip(): [cell.strip() for cell in cells[2:-1]] for cells in table_of(tmp_path)}
    # 9 s of both seeds, 3 s of start-up
    assert lines["first defaults"][:5] == ["250", "20", "9", "12", "1.00"]
    ablation.main([*words, "0.04"])
    lines = {cells[1].strip(): [cell.strip() for cell in cells[2:-1]] for cells in table_of(tmp_path)}
    assert lines["first demo"][:5] == ["250", "10", "6 (4 - 8)", "9", "1.00"]
    ablation.main([*words, "0.01"])
    lines = {cells[1].strip(): [cell.strip() for cell in cells[2:-1]] for cells in table_of(tmp_path)}
    # runs of 10 and 20 s
    assert lines["first defaults"][:5] == ["250", "never", "> 15 (10 - 20)", "> 18", "-"]
    assert {job["validate_every"] for job in children.jobs} == {10}


def table_of(folder):
    lines = (folder / "time_to_concept.md").read_text().splitlines()
    return [line.split("|") for line in lines if line.startswith("|")][2:]


# ------------------------------------------------------------------- one real run


def test_a_run_measures_itself(tiny_folder, tmp_path):
    settings = {
        **settings_of(BY_NAME["no prior"]),
        "base.path": str(tiny_folder("sd1")),
        "base.precision": "fp32",
        "data.resolution": 64,
        "optimizer.warmup_steps": 0,
        "training.steps": 2,
        "training.batch_size": 2,
    }
    job = Job("tiny", settings, seed=1, prompts=1, validate_every=1)
    file = tmp_path / "job.json"
    file.write_text(json.dumps(asdict(job)))
    found = machine.run_child("ablation_run.py", {"job": file})
    assert "error" not in found, found["error"]
    assert found["steps"] == 2 and found["parameters"] > 0
    assert [step for step, *_ in found["curve"]] == [0, 1, 2]
    assert found["curve"][0][1] == 0 < found["curve"][1][1] < found["curve"][2][1] == found["seconds"]
    assert found["startup_seconds"] > 0.5 and 0.1 < found["peak_gb"] < 4
    assert found["adapter_bytes"] > 4 * found["parameters"]
    assert {found["concept_share"], found["following"]} <= {0.0, 0.5, 1.0}


def test_a_refused_job_prints_why(tmp_path, capsys):
    file = tmp_path / "job.json"
    file.write_text(
        json.dumps(asdict(Job("wrong", settings_of(BY_NAME["lora"], {"adapter.rank": 0}), seed=1, prompts=1)))
    )
    assert ablation_run.main(["--job", str(file)]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["row"] == "wrong"
    assert printed["error"].startswith("ConfigError: row of the ablation: adapter.rank")


def test_an_adapter_counts_with_its_words_files(tmp_path):
    (tmp_path / "adapter.safetensors").write_bytes(b"12345")
    (tmp_path / "embeddings").mkdir()
    (tmp_path / "embeddings" / "zorblin.safetensors").write_bytes(b"123")
    assert adapter_bytes(tmp_path / "adapter.safetensors") == 8


def test_a_sweep_names_its_setting():
    assert all(row.sweep.key.split(".")[0] in {"optimizer", "tokens"} for row in ROWS if isinstance(row.sweep, Sweep))
