"""New words in prompts: what they stand for, where they are found, and that nothing else changes."""

import hashlib
from itertools import product

import pytest
import torch
from every_family import shape  # noqa: F401

from sdlora.adapters.inject import add_adapter, set_adapter_weights
from sdlora.config import BaseSection
from sdlora.data.embeddings import caption_store, encode_captions
from sdlora.errors import ConfigError, ModelError
from sdlora.families.registry import load_base
from sdlora.families.words import (
    check_words,
    clamp_norms,
    knowing,
    norm_range,
    random_vectors,
    same_word,
    start_vectors,
    token_counts,
)

WIDTH = 32
LONG = "a zorb " * 40


def tables(base):
    return {name: encoder.get_input_embeddings().weight for name, encoder in base.text_encoders.items()}


def drawn(base, count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(count, WIDTH, generator=generator) * 0.05 for name in base.text_encoders}


def encoded(base, *prompts):
    with torch.no_grad():
        return base.family.encode_prompts(base, list(prompts))


def equal(one, other):
    return torch.equal(one.states, other.states) and (one.pooled is None or torch.equal(one.pooled, other.pooled))


def close(one, other):
    """Whether they are equal but for what a batch of another size changes."""
    pooled = one.pooled is None or torch.allclose(one.pooled, other.pooled, atol=1e-5)
    return torch.allclose(one.states, other.states, atol=1e-5) and pooled


def looked_up(base, prompt):
    """What each text encoder's embedding layer gives for a prompt, [77,D], told by a hook of its own."""
    rows = {}

    def keep(name):
        return lambda module, arguments, named: rows.__setitem__(name, named["inputs_embeds"][0].detach().clone())

    hooks = []
    for name, encoder in base.text_encoders.items():
        inner = getattr(encoder, "text_model", encoder)
        hooks.append(inner.encoder.register_forward_pre_hook(keep(name), with_kwargs=True))
    try:
        encoded(base, prompt)
    finally:
        for hook in hooks:
            hook.remove()
    positions = {
        name: getattr(encoder, "text_model", encoder).embeddings.position_embedding.weight
        for name, encoder in base.text_encoders.items()
    }
    return {name: table - positions[name] for name, table in rows.items()}


def test_a_word_that_starts_as_its_own_tokens_changes_no_bit(tiny_base):
    base = tiny_base()
    prompts = ["a zorb on a wall", "ZORB", "", "zorb's (zorb), zorb; Zorb: zorb-hat", "no such word", LONG]
    before = encoded(base, *prompts)
    base.words = {"zorb": start_vectors(base, "zorb", 0)}
    assert equal(encoded(base, *prompts), before)
    assert base.family.excess_tokens(base, prompts) == [0, 0, 0, 0, 0, 40 * 5 + 2 - 77]
    base.words = {"zorb": drawn(base, 4)}
    after = encoded(base, *prompts)
    changed = [not torch.equal(a, b) for a, b in zip(after.states, before.states, strict=True)]
    assert changed == [True, True, False, True, False, True]


def test_each_place_of_the_word_gets_its_vectors_and_the_rest_its_rows(tiny_base):
    base = tiny_base()
    vectors = drawn(base, 3)
    base.words = {"zorb": vectors}
    rows = looked_up(base, "a zorb's red zorb")
    for name, table in tables(base).items():
        ids = lambda text, name=name: base.tokenizers[name](text, add_special_tokens=False).input_ids  # noqa: E731
        tokenizer = base.tokenizers[name]
        expected = torch.cat(
            [
                table[[tokenizer.bos_token_id, *ids("a")]],
                vectors[name],
                table[[*ids("'s red")]],
                vectors[name],
                table[[tokenizer.eos_token_id]],
            ]
        )
        padding = table[tokenizer.pad_token_id].expand(77 - len(expected), -1)
        torch.testing.assert_close(rows[name], torch.cat([expected, padding]), atol=1e-6, rtol=0)


def test_the_pooled_embedding_is_that_of_the_end_token(tiny_base):
    """Also in models that look for it at the largest id, as those whose configuration says 2 do."""
    base = tiny_base("sdxl")
    base.words = {"zorb": drawn(base, 3)}
    usual = encoded(base, "a zorb there", LONG)
    encoder = base.text_encoders["text_encoder_2"]
    inner = getattr(encoder, "text_model", encoder)
    last = base.tokenizers["text_encoder_2"].eos_token_id
    assert last == len(base.tokenizers["text_encoder_2"]) - 1
    inner.eos_token_id = 2
    assert equal(encoded(base, "a zorb there", LONG), usual)


def test_longer_texts_are_cut_within_a_word_and_what_is_cut_is_counted(tiny_base):
    base = tiny_base()
    base.words = {"zorb": drawn(base, 7)}
    prompt = "zorb " * 11  # 77 vectors, of which 75 are seen
    assert base.family.excess_tokens(base, [prompt, "zorb", "a " * 80]) == [2, 0, 5]
    assert token_counts(base, "text_encoder", [prompt, "zorb", "a"]) == [79, 9, 3]
    rows = looked_up(base, prompt)
    for name, table in tables(base).items():
        seen = torch.cat([base.words["zorb"][name]] * 11)[:75]
        tokenizer = base.tokenizers[name]
        ends = table[[tokenizer.bos_token_id, tokenizer.eos_token_id]]
        torch.testing.assert_close(rows[name], torch.cat([ends[:1], seen, ends[1:]]), atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("prompt", "found"),
    [
        ("zorb", ["zorb"]),
        ("a ZoRb!", ["zorb"]),
        ("zorbs, azorb, zorb2, zorb_x, zorbé", []),
        ("zorb-zorb zorb's", ["zorb", "zorb", "zorb"]),
        ("zorb  Cat", ["zorb cat"]),
        ("zorb catty", ["zorb"]),
        ("zorb <zorb> x<zorb>y", ["zorb", "<zorb>", "<zorb>"]),
        ("cafe\u0301, CAFÉ, cafe", ["café", "café"]),
        ("猫 猫猫", ["猫"]),
        ("a.b axb", ["a.b"]),
    ],
)
def test_whole_words_in_any_case_are_found_and_the_longest_first(tiny_base, prompt, found):
    base = tiny_base("sd1")
    counts = {"zorb": 20, "zorb cat": 21, "<zorb>": 22, "café": 23, "猫": 24, "a.b": 25}
    ordinary = token_counts(base, "text_encoder", [prompt])[0]
    base.words = {word: {"text_encoder": torch.zeros(count, WIDTH)} for word, count in counts.items()}
    with_words = token_counts(base, "text_encoder", [prompt])[0]
    replaced = sum(len(base.tokenizers["text_encoder"](word).input_ids) - 2 for word in found)
    # "<" and ">" of a word may have been one token with their neighbours; only those prompts differ by more.
    slack = 2 * found.count("<zorb>")
    assert abs(with_words - (ordinary - replaced + sum(counts[word] for word in found))) <= slack


def test_pieces_between_words_tokenize_as_in_the_whole_text(tiny_base):
    base = tiny_base("sd1")
    befores, afters = ["", "a ", "(", "ball, ", "12 ", "it's ", "'"], ["", " hat", "'s", ")!?", ", ball", " 3", "\n\tx"]
    prompts = [f"{before}zorb{after}" for before, after in product(befores, afters)]
    before = encoded(base, *prompts)
    base.words = {"zorb": start_vectors(base, "zorb", 0)}
    assert equal(encoded(base, *prompts), before)


def test_gradients_reach_the_vectors_and_nothing_else(tiny_base):
    base = tiny_base()
    base.words = {
        word: {name: torch.nn.Parameter(vectors) for name, vectors in drawn(base, 2, seed).items()}
        for seed, word in enumerate(("zorb", "unused"))
    }
    result = base.family.encode_prompts(base, ["a zorb", "zorb zorb"])
    loss = result.states.square().sum() + (0 if result.pooled is None else result.pooled.sum())
    loss.backward()
    for name, vectors in base.words["zorb"].items():
        assert (vectors.grad != 0).any(dim=1).all(), name
    assert all((vectors.grad == 0).all() for vectors in base.words["unused"].values())
    assert all(p.grad is None for _, module in base.components() for p in module.parameters())


def test_the_gradient_is_the_finite_difference(tiny_base):
    base = tiny_base()
    for encoder in base.text_encoders.values():
        encoder.double()
    start = {name: vectors.double() for name, vectors in drawn(base, 2).items()}
    probe = torch.Generator().manual_seed(5)
    base.words = {"zorb": {name: torch.nn.Parameter(vectors.clone()) for name, vectors in start.items()}}
    weights = torch.randn(base.family.encode_prompts(base, ["a"]).states.shape, generator=probe, dtype=torch.float64)

    def value():
        return (base.family.encode_prompts(base, ["zorb and zorb"]).states * weights).sum()

    value().backward()
    for parameter in base.words["zorb"].values():
        direction = torch.randn(parameter.shape, generator=probe, dtype=torch.float64)
        slopes = []
        for step in (1e-5, -1e-5):
            with torch.no_grad():
                parameter.add_(direction * step)
                slopes.append(float(value()))
                parameter.sub_(direction * step)
        expected = (slopes[0] - slopes[1]) / 2e-5
        assert float((parameter.grad * direction).sum()) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_halves_take_the_vectors_in_their_precision(tiny_folder, shape, precision):  # noqa: F811
    base = load_base(BaseSection(path=str(tiny_folder(shape)), precision=precision), "cpu")
    before = encoded(base, "a zorb")
    vectors = start_vectors(base, "zorb", 0)
    assert {tensor.dtype for tensor in vectors.values()} == {torch.float32}
    base.words = {"zorb": {name: torch.nn.Parameter(tensor) for name, tensor in vectors.items()}}
    assert equal(encoded(base, "a zorb"), before)
    base.family.encode_prompts(base, ["a zorb"]).states.float().sum().backward()
    for parameter in base.words["zorb"].values():
        assert parameter.grad.dtype == torch.float32 and parameter.grad.isfinite().all()


def test_words_go_with_an_adapter_of_the_text_encoder(tiny_base, make_adapter):
    base = tiny_base()
    add_adapter(base, "a", make_adapter(base))
    set_adapter_weights(base, {"a": 1.0})
    adapted = encoded(base, "a zorb")
    base.words = {"zorb": start_vectors(base, "zorb", 0)}
    assert equal(encoded(base, "a zorb"), adapted)
    set_adapter_weights(base, {})
    assert not equal(encoded(base, "a zorb"), adapted)


def test_the_base_is_never_written_and_an_error_leaves_nothing_behind(tiny_base, monkeypatch):
    base = tiny_base()
    digest, before = base.weights_sha256(), encoded(base, "a zorb")
    with knowing(base, {"zorb": drawn(base, 3)}):
        assert not equal(encoded(base, "a zorb"), before)
        encoder = base.text_encoders["text_encoder"]
        inner = getattr(encoder, "text_model", encoder)
        with monkeypatch.context() as context:
            context.setattr(inner.final_layer_norm, "forward", None)
            with pytest.raises(TypeError):
                encoded(base, "a zorb")
    assert not encoder.get_input_embeddings()._forward_hooks
    assert base.words == {}
    assert equal(encoded(base, "a zorb"), before)
    assert base.weights_sha256() == digest


def test_start_vectors_are_the_tables_rows_fewer_averaged_more_repeated(tiny_base):
    base = tiny_base()
    for name, table in tables(base).items():
        ids = base.tokenizers[name]("zorb", add_special_tokens=False).input_ids
        assert len(ids) == 4
        rows = table.detach()[ids]
        assert torch.equal(start_vectors(base, "zorb", 0)[name], rows)
        assert torch.equal(start_vectors(base, "zorb", 6)[name], rows[[0, 1, 2, 3, 0, 1]])
        three = torch.stack([(rows[0] + rows[1]) / 2, rows[2], rows[3]])
        torch.testing.assert_close(start_vectors(base, "zorb", 3)[name], three)
        torch.testing.assert_close(start_vectors(base, "zorb", 1)[name], rows.mean(dim=0, keepdim=True))
    with pytest.raises(ConfigError, match="' ' has no tokens to start a new word from"):
        start_vectors(base, " ", 0)


def test_random_vectors_have_the_tables_mean_and_deviation(tiny_base):
    base = tiny_base()
    for name, table in tables(base).items():
        with torch.no_grad():
            table.add_(torch.arange(WIDTH)).mul_(2)
        vectors = random_vectors(base, 20_000, torch.Generator().manual_seed(0))[name]
        torch.testing.assert_close(vectors.mean(dim=0), table.mean(dim=0), atol=3e-3, rtol=1e-3)
        torch.testing.assert_close(vectors.std(dim=0), table.std(dim=0), atol=0, rtol=0.05)
    again = [random_vectors(base, 2, torch.Generator().manual_seed(3)) for _ in range(2)]
    assert all(torch.equal(again[0][name], again[1][name]) for name in base.text_encoders)


def test_norms_are_clamped_into_the_range_of_the_bases_own(tiny_base):
    base = tiny_base()
    for name, (low, high) in norm_range(base).items():
        lengths = [sum(x * x for x in row) ** 0.5 for row in tables(base)[name].tolist()]
        assert (low, high) == (pytest.approx(min(lengths)), pytest.approx(max(lengths)))
    rows = torch.tensor([[3.0, 4.0], [0.3, 0.4], [0.0, 1.0], [0.0, 0.0]])
    clamp_norms(rows, 0.8, 2.0)
    torch.testing.assert_close(rows, torch.tensor([[1.2, 1.6], [0.48, 0.64], [0.0, 1.0], [0.0, 0.0]]))


def test_words_that_do_not_fit_the_base_are_refused(tiny_base, shape):  # noqa: F811
    base = tiny_base()
    check_words(base, {"zorb": drawn(base, 2)})
    too_wide = {name: torch.ones(2, 768) for name in base.text_encoders}
    with pytest.raises(ModelError, match=r"the new word 'zorb' has vectors of width 768( and 768)?, the text encoders"):
        check_words(base, {"zorb": too_wide})
    other = {"text_encoder": torch.ones(1, WIDTH)} | ({} if shape == "sdxl" else {"text_encoder_2": torch.ones(1, 32)})
    with pytest.raises(ModelError, match="choose an embedding made for this family"):
        check_words(base, {"zorb": other})


def test_spellings_of_one_word():
    assert same_word("Zorb  Cat", "zorb cat") and same_word("cafe\u0301", "CAFÉ")
    assert not same_word("zorb", "zorbs")


def test_the_cache_of_captions_tells_words_apart(tiny_base, tmp_path):
    base = tiny_base()
    store = caption_store(base, tmp_path)
    texts = ["a zorb", "a ball"]
    plain = encode_captions(base, texts, store)
    expected = {}
    for seed in (0, 1):
        base.words = {"zorb": drawn(base, 2, seed)}
        rows = encode_captions(base, texts, store)
        expected[seed] = encoded(base, "a zorb")
        assert close(rows["a zorb"], expected[seed]) and not close(rows["a zorb"], plain["a zorb"])
        assert close(rows["a ball"], plain["a ball"])
    assert not close(expected[0], expected[1])
    base.words = {}
    assert close(encode_captions(base, texts, store)["a zorb"], plain["a zorb"])


def test_without_words_captions_keep_the_names_they_had(tiny_base):
    from sdlora.data.embeddings import _names_of

    base = tiny_base()
    ids = [tokenizer(["a zorb"]).input_ids[0] for tokenizer in base.tokenizers.values()]
    assert _names_of(base, ["a zorb"]) == [hashlib.sha256(repr(ids).encode()).hexdigest()[:32]]
