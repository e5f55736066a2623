"""Weighted prompts of any length: states against the encoder asked by hand, chunk by chunk."""

import pytest
import torch
from every_family import SHAPES

from sdlora.errors import ConfigError
from sdlora.families import prompts
from sdlora.families.base import PromptStyle
from sdlora.families.words import knowing


@pytest.fixture(params=SHAPES)
def shape(request) -> str:
    return request.param


LONG = [("a cat and " * 40, 1.0)]


def encode(base, *prompts, **style):
    with torch.no_grad():
        return base.family.encode_segments(base, list(prompts), PromptStyle(**style))


def by_hand(base, ids, layer=1):
    """Return the normed states of rows of token ids, of SD."""
    encoder = base.text_encoders["text_encoder"]
    with torch.no_grad():
        output = encoder(torch.tensor(ids), output_hidden_states=True)
        norm = getattr(encoder, "text_model", encoder).final_layer_norm
        return output.last_hidden_state if layer == 1 else norm(output.hidden_states[-layer])


def row(base, tokens):
    """Return a chunk's ids for the first encoder: start, tokens, end, filling."""
    tokenizer = base.tokenizers["text_encoder"]
    ids = [tokenizer.bos_token_id, *tokens, tokenizer.eos_token_id]
    return ids + [tokenizer.pad_token_id] * (77 - len(ids))


def tokens(base, text):
    return base.tokenizers["text_encoder"](text).input_ids[1:-1]


def test_a_plain_prompt_is_what_it_was(tiny_base, shape):
    base = tiny_base()
    with torch.no_grad():
        expected = base.family.encode_prompts(base, ["a red ball, on grass", None, ""])
    found = encode(base, [("a red ball, on grass", 1.0)], None, [("", 1.0)])
    assert torch.equal(found.states, expected.states)
    assert (found.pooled is None) == (expected.pooled is None)
    assert found.pooled is None or torch.equal(found.pooled, expected.pooled)


@pytest.mark.parametrize("family", ["sd1", "sd2"])
def test_a_long_prompt_is_encoded_in_chunks(tiny_base, family):
    base = tiny_base(family)
    ids = tokens(base, LONG[0][0])
    assert len(ids) > 75
    rows = [row(base, ids[start : start + 75]) for start in range(0, len(ids), 75)]
    found = encode(base, LONG, [("b", 1.0)])
    assert found.states.shape[1] == 77 * len(rows)
    torch.testing.assert_close(found.states[0], by_hand(base, rows).flatten(0, 1), atol=1e-5, rtol=1e-5)
    expected = by_hand(base, [row(base, tokens(base, "b")), *[row(base, [])] * (len(rows) - 1)])
    torch.testing.assert_close(found.states[1], expected.flatten(0, 1), atol=1e-5, rtol=1e-5)


def test_the_pooled_embedding_is_the_first_chunks(tiny_base):
    base = tiny_base("sdxl")
    first = encode(base, [("a cat", 1.0)])
    both = encode(base, [("a cat", 1.0), ("BREAK", -1.0), ("a dog", 1.0)])
    assert both.states.shape[1] == 2 * 77
    torch.testing.assert_close(both.pooled, first.pooled)
    torch.testing.assert_close(both.states[:, :77], first.states)
    torch.testing.assert_close(both.states[:, 77:], encode(base, [("a dog", 1.0)]).states)


def test_what_follows_a_late_comma_goes_on_to_the_next_chunk(tiny_base):
    base = tiny_base("sd1")
    (word,) = tokens(base, "a")
    comma = tokens(base, ",")[0]
    text = "a " * 60 + ", " + "a " * 30
    expected = [row(base, [word] * 60 + [comma]), row(base, [word] * 30)]
    torch.testing.assert_close(
        encode(base, [(text, 1.0)]).states[0], by_hand(base, expected).flatten(0, 1), atol=1e-5, rtol=1e-5
    )
    text = "a " * 55 + ", " + "a " * 30  # full 20 tokens behind the comma's place
    expected = [row(base, [word] * 55 + [comma]), row(base, [word] * 30)]
    torch.testing.assert_close(
        encode(base, [(text, 1.0)]).states[0], by_hand(base, expected).flatten(0, 1), atol=1e-5, rtol=1e-5
    )
    early = "a " * 50 + ", " + "a " * 30  # more than 20 tokens from the end
    expected = [row(base, [word] * 50 + [comma] + [word] * 24), row(base, [word] * 6)]
    torch.testing.assert_close(
        encode(base, [(early, 1.0)]).states[0], by_hand(base, expected).flatten(0, 1), atol=1e-5, rtol=1e-5
    )


def test_weights_multiply_states_and_keep_the_mean(tiny_base, shape):
    base = tiny_base()
    for name, parameter in [pair for part in base.text_encoders.values() for pair in part.named_parameters()]:
        if "layer_norm" in name and name.endswith("bias"):  # as trained ones have them: else the mean is 0
            parameter.fill_(0.2)
    count = len(tokens(base, "red"))
    plain = encode(base, [("a ", 1.0), ("red", 1.0), (" ball", 1.0)]).states
    weights = torch.ones(77)
    start = 1 + len(tokens(base, "a "))
    weights[start : start + count] = 1.5
    changed = plain * weights[:, None]
    prompt = [("a ", 1.0), ("red", 1.5), (" ball", 1.0)]
    torch.testing.assert_close(encode(base, prompt, emphasis="no norm").states, changed)
    found = encode(base, prompt).states
    start = 0
    for encoder in base.text_encoders.values():  # each encoder's mean for itself
        part = slice(start, start + encoder.config.hidden_size)
        expected = changed[..., part] * (plain[..., part].mean() / changed[..., part].mean())
        torch.testing.assert_close(found[..., part], expected, atol=1e-5, rtol=1e-4)
        start += encoder.config.hidden_size


def test_comfys_weights_move_away_from_the_empty_prompt(tiny_base, shape):
    base = tiny_base()
    plain, empty = encode(base, [("red", 1.0)]).states, encode(base, [("", 1.0)]).states
    weights = torch.ones(77)
    weights[1 : 1 + len(tokens(base, "red"))] = 0.4
    expected = empty + weights[:, None] * (plain - empty)
    torch.testing.assert_close(encode(base, [("red", 0.4)], emphasis="comfy").states, expected)


@pytest.mark.parametrize("family", ["sd1", "sd2"])
def test_clip_skip_takes_earlier_layers(tiny_base, family):
    base = tiny_base(family)
    for skip in (1, 2):
        found = encode(base, [("a cat", 1.0)], clip_skip=skip).states
        expected = by_hand(base, [row(base, tokens(base, "a cat"))], layer=skip)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    layers = base.text_encoders["text_encoder"].config.num_hidden_layers
    with pytest.raises(ConfigError, match=f"clip skip {layers + 1} is too much: the text_encoder of .* has {layers}"):
        encode(base, [("a cat", 1.0)], clip_skip=layers + 1)


def test_sdxls_clip_skip_begins_at_its_own_layer(tiny_base):
    base = tiny_base("sdxl")
    one, two = (encode(base, [("a cat", 1.0)], clip_skip=skip).states for skip in (1, 2))
    assert torch.equal(one, two)
    ids = torch.tensor([row(base, tokens(base, "a cat"))])
    encoder = base.text_encoders["text_encoder"]
    with torch.no_grad():
        hidden = encoder(ids, output_hidden_states=True).hidden_states
    torch.testing.assert_close(one[..., : hidden[-2].shape[-1]], hidden[-2])


def test_each_prompt_is_pooled_from_its_own_first_chunk(tiny_base):
    base = tiny_base("sdxl")
    long, short = [("a cat", 1.0), ("BREAK", -1.0), ("a dog", 1.0)], [("a bird", 1.0)]
    both = encode(base, long, short)
    torch.testing.assert_close(both.pooled, torch.cat([encode(base, long).pooled, encode(base, short).pooled]))


def test_each_new_word_has_its_own_vectors(tiny_base, shape):
    base = tiny_base()
    widths = {name: module.get_input_embeddings().weight.shape[1] for name, module in base.text_encoders.items()}
    words = {word: {name: torch.randn(2, width) for name, width in widths.items()} for word in ("zorb", "blob")}
    with knowing(base, words), torch.no_grad():
        expected = base.family.encode_prompts(base, ["a zorb and a blob"]).states
        torch.testing.assert_close(encode(base, [("a zorb and a blob", 1.0)]).states, expected)
        torch.testing.assert_close(encode(base, [("a zorb", 1.0), (" and a blob", 1.0)]).states, expected)


def test_encoders_that_split_a_text_differently_get_equally_many_chunks(tiny_base, monkeypatch):
    base = tiny_base("sdxl")
    plain = prompts.spelled

    def doubled(base, encoder, text):
        for token in plain(base, encoder, text):
            yield token
            if encoder == "text_encoder_2":
                yield token

    monkeypatch.setattr(prompts, "spelled", doubled)
    assert encode(base, [("a " * 50, 1.0)]).states.shape[1] == 2 * 77


@pytest.mark.parametrize("emphasis", ["original", "no norm", "comfy"])
def test_weights_are_multiplied_in_float32(tiny_base, emphasis):
    base = tiny_base("sd1")
    exact = encode(base, [("cat", 1.003)], emphasis=emphasis).states
    base.text_encoders["text_encoder"].to(torch.bfloat16)
    plain = encode(base, [("cat", 1.0)]).states
    for weight in (1.003, 1e6, -1e6):
        found = encode(base, [("cat", weight)], emphasis=emphasis).states
        assert found.dtype == torch.bfloat16 and bool(found.isfinite().all())
    weighted = encode(base, [("cat", 1.003)], emphasis=emphasis).states
    assert (weighted.float() - exact).abs().max() < 0.1
    if emphasis == "comfy":  # what weighs 1 is not touched at all
        assert torch.equal(weighted[:, 4:], plain[:, 4:])


def test_a_new_word_is_weighted_and_not_torn_apart(tiny_base, shape):
    base = tiny_base()
    widths = {name: module.get_input_embeddings().weight.shape[1] for name, module in base.text_encoders.items()}
    words = {"zorb": {name: torch.randn(6, width) for name, width in widths.items()}}
    with knowing(base, words):
        fitting = encode(base, [("a " * 69, 1.0), ("zorb", 1.0)]).states
        moved = encode(base, [("a " * 70, 1.0), ("zorb", 1.0)]).states
        alone = encode(base, [("zorb", 1.0)]).states
        with torch.no_grad():
            expected = base.family.encode_prompts(base, ["zorb"]).states
        weighted = encode(base, [("zorb", 2.0)], emphasis="no norm").states
    assert fitting.shape[1] == 77 and moved.shape[1] == 2 * 77
    torch.testing.assert_close(alone, expected)
    torch.testing.assert_close(moved[:, 77:], alone)
    torch.testing.assert_close(weighted[:, 1:7], 2 * alone[:, 1:7])
    torch.testing.assert_close(weighted[:, 7:], alone[:, 7:])


def test_a_word_of_more_vectors_than_a_chunk_holds_goes_on(tiny_base):
    base = tiny_base("sd1")
    width = base.text_encoders["text_encoder"].config.hidden_size
    with knowing(base, {"zorb": {"text_encoder": torch.randn(100, width)}}):
        assert encode(base, [("zorb", 1.0)]).states.shape[1] == 2 * 77


def test_weights_of_zero_stay_finite(tiny_base, shape):
    base = tiny_base()
    for emphasis in ("original", "no norm", "comfy"):
        for weight in (0.0, -1.0, 1e6):
            states = encode(base, [("cat", weight)], emphasis=emphasis).states
            assert bool(states.isfinite().all()), (emphasis, weight)
