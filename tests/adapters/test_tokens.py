"""New words while they are trained."""

import pytest
import torch

from sdlora.adapters.file import AdapterFile, read_adapter
from sdlora.adapters.tokens import new_tokens, start_words, unheard_words
from sdlora.adapters.write import write_adapter
from sdlora.config import TokensSection
from sdlora.errors import ConfigError


def section(**values) -> TokensSection:
    return TokensSection(**{"train": "alone", **values})


def tables(base):
    return {name: encoder.get_input_embeddings().weight for name, encoder in base.text_encoders.items()}


def train(base, tokens, steps=3, rate=0.5):
    optimizer = torch.optim.AdamW([weight.parameter for weight in tokens.weights], lr=rate)
    for _ in range(steps):
        encoded = base.family.encode_prompts(base, ["a zorb here"])
        loss = (encoded.states - 1).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        tokens.keep_norms()
    return float(loss.detach())


def test_weights_are_named_by_encoder_and_word_and_are_float32(tiny_base):
    base = tiny_base()
    tokens = new_tokens(base, {"zorb": "", "b.c d": ""}, section(vectors=2), 0)
    expected = [f"tokens.{encoder}.{word}" for word in ("zorb", "b.c d") for encoder in base.text_encoders]
    assert [weight.path for weight in tokens.weights] == expected
    assert {(weight.role, weight.component) for weight in tokens.weights} == {("vectors", "tokens")}
    for weight in tokens.weights:
        assert weight.parameter.shape == (2, 32)
        assert weight.parameter.dtype == torch.float32 and weight.parameter.requires_grad
    live = [vectors for parts in base.words.values() for vectors in parts.values()]
    assert all(one is weight.parameter for one, weight in zip(live, tokens.weights, strict=True))


def test_at_first_nothing_changes(tiny_base):
    base = tiny_base()
    before = base.family.encode_prompts(base, ["a zorb's hat", "none"])
    new_tokens(base, {"zorb": ""}, section(), 0)
    after = base.family.encode_prompts(base, ["a zorb's hat", "none"])
    assert torch.equal(before.states, after.states)
    assert before.pooled is None or torch.equal(before.pooled, after.pooled)


def test_a_start_is_the_trigger_the_class_given_words_or_drawn(tiny_base):
    base = tiny_base()
    triggers = {"zorb": "red ball", "other": "cat"}

    def start(seed=0, **values):
        return new_tokens(base, triggers, section(**values), seed).words()

    for name, table in tables(base).items():
        rows = {
            text: table[base.tokenizers[name](text, add_special_tokens=False).input_ids].detach()
            for text in ("zorb", "other", "red ball", "cat", "a blue box")
        }
        for word, text in (("zorb", "zorb"), ("other", "other")):
            assert torch.equal(start(start="trigger")[word][name], rows[text])
        assert torch.equal(start(start="class")["zorb"][name], rows["red ball"])
        assert torch.equal(start(start="class")["other"][name], rows["cat"])
        assert torch.equal(start(start="words", words="a blue box", vectors=3)["other"][name], rows["a blue box"])
        drawn = start(start="random", vectors=5)
        assert drawn["zorb"][name].shape == (5, 32)
        assert not torch.equal(drawn["zorb"][name], drawn["other"][name])
        assert torch.equal(drawn["zorb"][name], start(start="random", vectors=5)["zorb"][name])
        assert not torch.equal(drawn["zorb"][name], start(1, start="random", vectors=5)["zorb"][name])
        assert start(start="random")["zorb"][name].shape == rows["zorb"].shape


def test_training_moves_the_vectors_and_nothing_else(tiny_base):
    base = tiny_base()
    digest = base.weights_sha256()
    tables_before = {name: table.clone() for name, table in tables(base).items()}
    tokens = new_tokens(base, {"zorb": ""}, section(vectors=2, keep_norm=False), 0)
    before = tokens.words()
    first = train(base, tokens, 1)
    assert train(base, tokens, 5) < first
    for name, table in tables(base).items():
        assert table.shape == tables_before[name].shape and torch.equal(table, tables_before[name])
        assert (tokens.words()["zorb"][name] != before["zorb"][name]).any(dim=1).all()
    assert base.weights_sha256() == digest
    assert before["zorb"]["text_encoder"].grad_fn is None and not before["zorb"]["text_encoder"].requires_grad


def test_lengths_stay_within_those_of_the_base_where_asked(tiny_base):
    def lengths(keep_norm):
        base = tiny_base()
        tokens = new_tokens(base, {"zorb": ""}, section(vectors=2, keep_norm=keep_norm), 0)
        train(base, tokens)
        longest = {name: float(table.norm(dim=1).max()) for name, table in tables(base).items()}
        return [float(v.norm(dim=1).max()) / longest[name] for name, v in tokens.words()["zorb"].items()]

    assert all(length <= 1 + 1e-6 for length in lengths(True))
    assert all(length > 1.5 for length in lengths(False))


def test_trained_words_are_those_of_the_file(tiny_base, tmp_path):
    base = tiny_base()
    tokens = new_tokens(base, {"zorb": ""}, section(), 0)
    train(base, tokens)
    live = base.family.encode_prompts(base, ["a zorb here"])
    write_adapter(AdapterFile({}, base.family.name, {}, tokens.words()), tmp_path / "zorb.safetensors")
    fresh = tiny_base()
    fresh.words = read_adapter(tmp_path / "zorb.safetensors").tokens
    again = fresh.family.encode_prompts(fresh, ["a zorb here"])
    assert torch.equal(live.states, again.states)


def test_what_words_start_as_is_known_before_any_is_trained(tiny_base):
    base = tiny_base()
    triggers = {"zorb": "", "other": ""}
    starts = start_words(base, triggers, section(start="random"), 3)
    assert base.words == {}
    trained = new_tokens(base, triggers, section(start="random"), 3).words()
    for word, parts in trained.items():
        for encoder, vectors in parts.items():
            assert torch.equal(starts[word][encoder], vectors)


UNHEARD = {
    "in another case and spacing": (["zorb cat", "wuff"], ["a Zorb  CAT, and a WUFF"], []),
    "in different texts": (["zorb", "wuff"], ["a zorb", "none", "my wuff"], []),
    "inside another word": (["zorb"], ["zorbs and azorb"], ["zorb"]),
    "within a longer new word": (["zorb", "zorb cat"], ["a zorb cat"], ["zorb"]),
    "one of two": (["zorb", "wuff"], ["a wuff"], ["zorb"]),
    "no text": (["zorb"], [], ["zorb"]),
    "no word": ([], ["a zorb"], []),
}


@pytest.mark.parametrize("case", UNHEARD)
def test_words_that_no_text_holds(tiny_base, case):
    words, texts, unheard = UNHEARD[case]
    base = tiny_base()
    starts = start_words(base, dict.fromkeys(words, ""), section(), 0)
    assert unheard_words(base, starts, texts) == unheard
    assert base.words == {}


REFUSED = {
    "one word twice": ({"Zorb": "", "zorb": ""}, {}, r"data\.trigger: 'Zorb' and 'zorb' are one word to a prompt"),
    "too long": ({"zorb" * 30: ""}, {}, r"would stand for \d+ vectors and a prompt holds 75; choose a shorter word"),
    "no class": ({"zorb": ""}, {"start": "class"}, r"the text '' has no tokens to start a new word from; write"),
    "no words": ({"zorb": ""}, {"start": "words"}, r"the text '' has no tokens to start a new word from; write"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_makes_no_word_is_refused_and_the_base_stays_as_it_was(tiny_base, case):
    triggers, values, sentence = REFUSED[case]
    base = tiny_base()
    for make in (start_words, new_tokens):
        with pytest.raises(ConfigError, match=sentence) as caught:
            make(base, triggers, section(**values), 0)
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 250
        assert base.words == {}
