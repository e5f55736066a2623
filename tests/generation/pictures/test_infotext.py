import re
import time
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sdlora.generation.pictures.infotext import infotext, parse_infotext
from sdlora.generation.recipe import Recipe, UsedAdapter

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=80)
NAME = st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=20)


def test_the_infotext_is_what_other_programs_read(recipe):
    assert infotext(recipe) == (
        'ein roter Ball, "schön", 猫 <lora:zorb:0.8>\n'
        "Negative prompt: blurry, blue\n"
        "Steps: 20, Sampler: PLMS, CFG scale: 6.5, Seed: 41, Size: 24x16, Model hash: ababababab, "
        'Model: dreamy, RNG: CPU, Lora hashes: "zorb: efefefefefef", Version: sdlora 0.1.0, '
        'Hashes: {"model": "ababababab", "lora:zorb": "cdcdcdcdcd"}'
    )


def test_the_infotext_without_negative_prompt_and_adapter(recipe):
    lines = infotext(replace(recipe, negative_prompt="", adapters=(), prompt="a ball", base="a, b")).split("\n")
    assert lines[0] == "a ball"
    assert len(lines) == 2
    assert "Lora" not in lines[1]
    assert 'Model: "a, b", ' in lines[1]


def test_embeddings_are_named_by_their_hashes_and_have_no_tag(recipe):
    word = UsedAdapter("old:film", "12" * 32, "34" * 32, 1.0, embedding=True)
    text = infotext(replace(recipe, adapters=(word,)))
    assert "<lora" not in text and "Lora hashes" not in text
    assert 'TI hashes: "oldfilm: 121212121212"' in text
    said = parse_infotext(text)
    assert said.embedding_hashes == {"oldfilm": "121212121212"}
    assert said.hashes == {"model": "ababababab", "embed:oldfilm": "1212121212"}


def test_a_text_of_forge_is_read():
    said = parse_infotext(
        "masterpiece, (a cat:1.2),\nsecond line <lora:Kafka:0.8>\n"
        "Negative prompt: bad, worse\nlast of it\n"
        "Steps: 25, Sampler: DPM++ 2M, Schedule type: Karras, CFG scale: 7, Seed: 1234567890, Size: 832x1216, "
        'Model hash: 529c72f6c3, Model: pony "v6", VAE: sdxl_vae.safetensors, Lora hashes: "Kafka: dba941975e80, b: 12ab", '
        'TI hashes: "neg: 0123456789ab", Version: f0.0.17v1.8.0rc, '
        'Hashes: {"vae": "63aeecb90f", "lora:Kafka": "5a3385485b", "model": "529c72f6c3"}'
    )
    assert said.prompt == "masterpiece, (a cat:1.2),\nsecond line <lora:Kafka:0.8>"
    assert said.negative_prompt == "bad, worse\nlast of it"
    assert said.fields["Sampler"] == "DPM++ 2M" and said.fields["Schedule type"] == "Karras"
    assert (said.fields["Size-1"], said.fields["Size-2"]) == ("832", "1216") and "Size" not in said.fields
    assert said.fields["Model"] == 'pony "v6"' and said.fields["Version"] == "f0.0.17v1.8.0rc"
    assert said.lora_hashes == {"Kafka": "dba941975e80", "b": "12ab"}
    assert said.embedding_hashes == {"neg": "0123456789ab"}
    assert said.hashes["lora:Kafka"] == "5a3385485b"
    assert not {"lora", "model", "Hashes"} & said.fields.keys()


@pytest.mark.parametrize(
    ("text", "prompt", "negative", "count"),
    [
        ("", "", "", 0),
        ("a cat", "a cat", "", 0),
        ("a cat\nSteps: 20, Seed: 5", "a cat\nSteps: 20, Seed: 5", "", 0),  # two fields are none
        ("a cat\nSteps: 20, Seed: 5, CFG scale: 7", "a cat", "", 3),
        ("Steps: 20, Seed: 5, CFG scale: 7", "", "", 3),
        ("a cat\nNegative prompt: dog", "a cat", "dog", 0),
        ("Negative prompt: dog\nSteps: 1, Seed: 2, Size: 8x8", "", "dog", 4),
        ("a\nNegative prompt:\nSteps: 1, Seed: 2, Size: 8x", "a", "", 3),
        ('a\nSteps: 1, Model: "a \\"b\\": c", Seed: 2', "a", "", 3),
        ('a\nSteps: 1, Model: "never closed, Seed: 2, X: 3', "a", "", 3),
    ],
)
def test_which_line_counts(text, prompt, negative, count):
    said = parse_infotext(text)
    assert (said.prompt, said.negative_prompt) == (prompt, negative)
    assert len(said.fields) == count


def test_quoted_values_lose_their_quotes_alone():
    fields = parse_infotext('a\nSteps: 1, Model: "a \\"b\\": c\\n猫", Odd: "x\\q", Seed: 2').fields
    assert fields["Model"] == 'a "b": c\n猫'
    assert fields["Odd"] == '"x\\q"'


def stripped(text: str) -> str:
    """What reading leaves of a text: space around lines and empty lines at its ends are gone."""
    return "\n".join(line.strip() for line in text.split("\n")).strip("\n")


@settings(deadline=None, max_examples=300)
@given(prompt=TEXT, negative=TEXT, base=NAME, name=NAME, weight=st.floats(-5, 5), scale=st.floats(0, 30))
def test_what_is_written_is_read_again(prompt, negative, base, name, weight, scale):
    if any(line.strip().startswith("Negative prompt:") for line in f"{prompt}\n{negative}".split("\n")):
        return
    if re.fullmatch(r"\d{1,9}x\d{1,9}", base):
        return  # a model that is called like a size is read as one, by every program
    used = UsedAdapter(name, "cd" * 32, "ef" * 32, weight)
    recipe = Recipe(
        prompt, negative, 7, 20, scale, 512, 768, base, "sd1", "ab" * 32, (used,), "Euler", {}, "cpu", "fp32", "cpu", {}
    )
    said = parse_infotext(infotext(recipe))
    assert said.prompt == stripped(f"{prompt} <lora:{name}:{weight:g}>")
    assert said.negative_prompt == stripped(negative)
    assert said.fields["Model"] == base
    assert said.fields["CFG scale"] == f"{scale:g}"
    assert (said.fields["Size-1"], said.fields["Size-2"], said.fields["Seed"]) == ("512", "768", "7")
    assert said.hashes["model"] == "ab" * 5


@settings(deadline=None, max_examples=300)
@given(st.text(alphabet=st.sampled_from('aB1 ,:"\\\nx-/{}'), max_size=300))
def test_no_text_is_refused(text):
    said = parse_infotext(text)
    assert isinstance(said.lora_hashes, dict) and all(isinstance(value, str) for value in said.fields.values())


@pytest.mark.parametrize(
    "text",
    [
        "a" * 300_000,
        " " * 300_000 + "x",
        'a:"' * 100_000,
        "a: " * 100_000,
        "a:\\" * 100_000,
        "Hashes: {" * 30_000,
        "\n" * 300_000,
    ],
)
def test_hostile_texts_are_read_at_once(text):
    started = time.process_time()
    parse_infotext(f"{text}, b: 1, c: 2, d: 3")
    assert time.process_time() - started < 5  # seconds; what grows with the square takes minutes


@pytest.mark.parametrize(
    ("scheduler", "settings", "called"),
    [
        ("EulerDiscreteScheduler", {}, "Euler"),
        ("EulerDiscreteScheduler", {"use_karras_sigmas": True}, "EulerDiscreteScheduler"),
        ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}, "DPM++ 2M"),
        ("DPMSolverMultistepScheduler", {}, "DPMSolverMultistepScheduler"),  # A1111's DPM++ 2M would be on Karras'
        (
            "DPMSolverMultistepScheduler",
            {"use_karras_sigmas": True, "algorithm_type": "sde-dpmsolver++"},
            "DPMSolverMultistepScheduler",
        ),
        ("DEISMultistepScheduler", {}, "DEISMultistepScheduler"),
    ],
)
def test_a_bases_own_sampler_is_called_as_people_do_where_that_means_it(recipe, scheduler, settings, called):
    own = replace(recipe, sampler="", schedule="", scheduler=scheduler, scheduler_config=settings)
    assert f"Sampler: {called}, CFG scale" in infotext(own)
