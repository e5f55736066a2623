import pytest
import torch
from encoded import encode_texts

from sdlora.config import DataSection
from sdlora.data.embeddings import caption_store, encode_captions

WORDS = ["red", "blue", "red", "green"]
TEXTS = [f"a picture of {word}" for word in WORDS]


@pytest.fixture
def calls(monkeypatch):
    """`calls(base)`: a list that grows by the number of prompts of each call of the base's encoder."""

    def watch(base):
        sizes = []
        encode = base.family.encode_prompts
        monkeypatch.setattr(
            type(base.family),
            "encode_prompts",
            lambda self, base, prompts: (sizes.append(len(prompts)), encode(base, prompts))[1],
        )
        return sizes

    return watch


def test_each_text_has_the_conditioning_of_its_own_and_no_prompt_too(tiny_base):
    base = tiny_base()
    rows = encode_texts(base, TEXTS)
    assert set(rows) == {*TEXTS, None} and len(rows) == 4
    for text, conditioning in rows.items():
        alone = base.family.encode_prompts(base, [text])
        assert not conditioning.states.requires_grad
        torch.testing.assert_close(conditioning.states, alone.states, atol=1e-5, rtol=1e-5)
        if alone.pooled is None:
            assert conditioning.pooled is None
        else:
            torch.testing.assert_close(conditioning.pooled, alone.pooled, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(rows[TEXTS[0]].states, rows[TEXTS[1]].states, atol=1e-3)


def test_texts_are_encoded_once_for_all_runs(tiny_base, calls):
    base = tiny_base()
    sizes = calls(base)
    first = encode_texts(base, TEXTS)
    assert sizes == [4]  # three texts and no prompt
    again = encode_texts(base, [*TEXTS, "a new one"])
    assert sizes == [4, 2]
    assert torch.equal(first[TEXTS[0]].states, again[TEXTS[0]].states)


def test_another_text_encoder_or_precision_meets_no_stale_entry(tiny_base, calls):
    base = tiny_base()
    sizes = calls(base)
    before = encode_texts(base, TEXTS)[TEXTS[0]].states
    encoder = next(iter(base.text_encoders.values()))
    with torch.no_grad():
        next(encoder.parameters()).mul_(1.5)
    assert not torch.equal(encode_texts(base, TEXTS)[TEXTS[0]].states, before)
    for module in base.text_encoders.values():
        module.to(torch.bfloat16)
    assert encode_texts(base, TEXTS)[TEXTS[0]].states.dtype == torch.bfloat16
    assert sizes == [4, 4, 4]


def test_texts_that_the_encoder_sees_alike_share_an_entry(tiny_base, calls):
    base = tiny_base()
    sizes = calls(base)
    rows = encode_texts(base, ["a red ball", "A  red ball"])
    assert sum(sizes) == 3
    tokens = {str(tokenizer(["a red ball"]).input_ids) for tokenizer in base.tokenizers.values()}
    if tokens == {str(tokenizer(["A  red ball"]).input_ids) for tokenizer in base.tokenizers.values()}:
        assert torch.equal(rows["a red ball"].states, rows["A  red ball"].states)


def test_many_texts_go_in_small_batches_and_progress_is_told(tiny_base, tmp_path):
    base = tiny_base()
    texts = [f"number {number}" for number in range(20)]
    steps = []
    section = DataSection(cache={"folder": str(tmp_path)})
    store = caption_store(base, tmp_path)
    rows = encode_captions(base, texts, store, on_progress=lambda done, of: steps.append((done, of)))
    assert steps == [(16, 21), (21, 21)]
    assert torch.equal(rows["number 7"].states, encode_texts(base, texts, section)["number 7"].states)


def test_tokens_that_do_not_fit_are_counted(tiny_base):
    base = tiny_base()
    length = len(base.tokenizers["text_encoder"](["red " * 100], truncation=False).input_ids[0])
    assert base.family.excess_tokens(base, ["red", "red " * 100, ""]) == [0, length - 77, 0]
    assert base.family.excess_tokens(base, []) == []
