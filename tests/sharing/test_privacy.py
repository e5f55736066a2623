"""What in a header is private."""

import base64
import json

import pytest

from sdlora.adapters.private_text import public_text
from sdlora.sharing.privacy import paths_in_card, private_findings


@pytest.mark.parametrize(
    "text",
    [
        "/home/anna/pictures/cat",
        r"C:\Users\Anna\cat",
        "D:/training/cat.toml",
        r'{"dir": "C:\\Users\\Anna"}',
        r"\\server\share\cat",
        "file:///srv/cat",
        "~/cat/1.png",
        "~anna/cat",
        "base=/workspace/models",
        "trained with --data=/mnt/big disk/cat",
        '["/opt/models/x"]',
        "/content",
    ],
)
def test_paths_are_found_wherever_they_stand(text):
    (finding,) = private_findings({"ss_comment": text}, user="")
    assert (finding.kind, finding.key) == ("path", "ss_comment")
    assert finding.sentence().startswith("ss_comment tells a path of a machine: ")


@pytest.mark.parametrize(
    "text",
    [
        "https://huggingface.co/owner/name/tree/main",
        "stable-diffusion-v1/lora",
        "owner/name",
        "1/2 and/or 3 / 4",
        "data:image/jpeg;base64," + base64.b64encode(bytes(range(256)) * 4).decode(),
        json.dumps([base64.b64encode(b"\xff\xd8\xff\xe0/" * 200).decode()]),
        "2026-11-21T07:56:34",
        "a photo of <lora:cat:1>, (cat:1.2)",
    ],
)
def test_what_only_looks_like_a_path_is_left_alone(text):
    assert private_findings({"ss_sd_model_name": text}, user="") == []


def test_names_are_whole_words_and_nobodys_name_is_no_name():
    keys = ("modelspec.title", "modelspec.license", "modelspec.usage_hint", "ss_output_name")
    metadata = dict(zip(keys, ("by Anna_K", "Annabel", "mail anna@example.org", "root user"), strict=True))
    found = [(finding.key, finding.kind, finding.text) for finding in private_findings(metadata, user="anna")]
    assert found == [
        ("modelspec.usage_hint", "private", "anna@example.org"),
        ("modelspec.title", "name", "anna"),
        ("modelspec.usage_hint", "name", "anna"),
    ]
    assert private_findings({"ss_output_name": "root user"}, user="root") == []


def test_everything_that_strip_leaves_out_is_told_and_nothing_else_is_refused():
    words = json.dumps({"~/x": "0" * 8})
    pattern = json.dumps({"unet.target_modules": r"attn\d\.to_q", "unet.r": 4})
    metadata = {
        "ss_datasets": "[]",
        "ss_dataset_dirs": json.dumps({"5_grandma": {"n_repeats": 5, "img_count": 2}}),
        "ssmd_cover_images": "[]",
        "ss_training_comment": "mine",
        "something_else": "1",
        "/home/anna/x": "1",
        "lora_adapter_metadata": pattern,
        "sdlora_words": words,
    }
    found = private_findings(metadata, user="")
    assert [finding.sentence() for finding in found] == [
        "/home/anna/x tells a path of a machine: /home/anna/x",
        "something_else tells something of unknown meaning",
        "ss_dataset_dirs tells folder names",
        "ss_datasets tells folders and captions of the pictures",
        "ss_training_comment tells a comment on the training",
        "ssmd_cover_images tells pictures, with what their own text says",
        "sdlora_words tells a path of a machine: ~/x",
    ]
    assert [finding.kind for finding in found] == ["path", *["private"] * 5, "needed"]
    left = private_findings(public_text(metadata), user="")
    assert [(finding.kind, finding.key) for finding in left] == [("needed", "sdlora_words")]


def test_of_pefts_settings_strip_leaves_nothing_that_is_refused():
    for place in ("/home/anna/sd", ["/home/anna/sd"], {"a": {"b": "C:\\Users\\anna"}}):
        metadata = {"lora_adapter_metadata": json.dumps({"unet.base": place, "unet.layers_pattern": r"\d\w"})}
        assert [finding.kind for finding in private_findings(metadata, user="")] == ["path"]
        left = public_text(metadata)
        assert private_findings(left, user="") == []
        assert json.loads(left["lora_adapter_metadata"]) == {"unet.base": None, "unet.layers_pattern": r"\d\w"}


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("# Mine, from /home/anna/x", ["/home/anna/x"]),
        ("see `C:\\Users\\anna\\x` and (/mnt/data/y)", ["C:\\Users\\anna\\x", "/mnt/data/y)"]),
        (r"\\\\server\\share in Markdown", [r"\\server\share"]),
        ("~anna/x", ["~anna/x"]),
        (r"my\_cat \| it\'s <br/></p> ![](./samples/00.png) and/or 5 /10 /imagine w/o", []),
        ('print("a\\nb", "$HOME/models"); https://example.org/home/anna [x](https://hf.co/anna/zorb)', []),
        ("put it into ~/ComfyUI/models", []),
    ],
)
def test_paths_in_a_card_are_those_of_a_machine(text, found):
    assert paths_in_card(text) == found


def test_tags_beyond_the_triggers_are_captions():
    tags = {"10_cat": {"mycat": 5, "sofa": 2, "grandma": 1}, "20_dog": {"mydog": 3}}
    metadata = {"ss_tag_frequency": json.dumps(tags), "modelspec.trigger_phrase": "mycat, mydog"}
    (finding,) = private_findings(metadata, user="")
    assert finding.sentence() == "ss_tag_frequency tells captions"
    metadata["ss_tag_frequency"] = json.dumps({"10_cat": {"mycat": 5}})
    assert [finding.what for finding in private_findings(metadata, user="")] == ["folder names"]
    metadata["ss_tag_frequency"] = json.dumps({"adapter": {"mycat": 5}})
    assert private_findings(metadata, user="") == []


@pytest.mark.parametrize("text", ["[", "[1]", '{"a": 1}', '{"a": {"b": {}}}', "[" * 100_000, "null"])
def test_odd_json_is_no_obstacle(text):
    found = private_findings({"ss_tag_frequency": text, "ss_dataset_dirs": text}, user="")
    assert {finding.kind for finding in found} <= {"private"}


def test_findings_are_short_and_of_one_line():
    (finding,) = private_findings({"k\n" * 500: "x\n/home/anna\n\x1b[31m" + "y" * 500}, user="")
    assert len(finding.key) <= 80 and len(finding.text) <= 80 and "\n" not in finding.sentence()
    assert "\x1b" not in finding.sentence()
