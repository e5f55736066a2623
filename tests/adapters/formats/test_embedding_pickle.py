"""Embeddings as pickles: weights alone are read, nothing in them is run."""

import os
import pickle

import pytest
import torch

from sdlora.adapters.file import adapter_family, read_adapter
from sdlora.errors import FormatError


def test_automatic1111s_and_diffusers_pickles(tmp_path):
    vectors = torch.randn(3, 768)
    torch.save(
        {
            "string_to_token": {"*": 265},
            "string_to_param": {"*": vectors.clone().requires_grad_()},
            "name": "another-name",
            "step": 1000,
            "sd_checkpoint": None,
            "sd_checkpoint_name": None,
        },
        tmp_path / "my-cat.pt",
    )
    torch.save({"<dog>": torch.randn(1024)}, tmp_path / "learned_embeds.bin")
    cat, dog = read_adapter(tmp_path / "my-cat.pt"), read_adapter(tmp_path / "learned_embeds.bin")
    assert list(cat.tokens) == ["my-cat"] and torch.equal(cat.tokens["my-cat"]["text_encoder"], vectors)
    assert list(dog.tokens) == ["<dog>"] and dog.tokens["<dog>"]["text_encoder"].shape == (1, 1024)
    assert (cat.family, dog.family) == ("sd1", "sd2") == (adapter_family(tmp_path / "my-cat.pt"), "sd2")
    assert not cat.tokens["my-cat"]["text_encoder"].requires_grad


class Payload:
    def __init__(self, folder):
        self.command = f"touch {folder}/was-run"

    def __reduce__(self):
        return os.system, (self.command,)


def test_a_pickle_that_would_run_code_is_refused(tmp_path):
    path = tmp_path / "a.pt"
    path.write_bytes(pickle.dumps({"string_to_param": {"*": Payload(tmp_path)}}))
    with pytest.raises(FormatError, match="or holds more than weights, which is never run"):
        read_adapter(path)
    torch.save({"string_to_param": {"*": torch.ones(1, 4)}, "name": Payload(tmp_path)}, path)
    with pytest.raises(FormatError, match="never run"):
        read_adapter(path)
    assert not (tmp_path / "was-run").exists()


@pytest.mark.parametrize(
    "content",
    [
        {},
        {"a": 1},
        {"a": torch.ones(1, 4), "b": torch.ones(1, 4)},
        {"string_to_param": {}},
        {"string_to_param": 3},
        [torch.ones(1, 4)],
        {"a": torch.ones(0, 4)},
        {"a": torch.ones(2, 2, 2)},
        {"a": torch.ones(1, 4, dtype=torch.int64)},
        {"a": torch.full((1, 4), float("nan"))},
        {"a": torch.ones(1, 4).to_sparse()},
        {"a": torch.ones(1, 4, device="meta")},
        {"a": torch.ones(1, 4, dtype=torch.complex64)},
        {"a": torch.ones(1).expand(1000, 4)},
    ],
)
def test_other_pickles_are_refused(tmp_path, content):
    path = tmp_path / "a.pt"
    torch.save(content, path)
    with pytest.raises(FormatError) as caught:
        read_adapter(path)
    assert str(caught.value).startswith(str(path)) and "\n" not in str(caught.value)


def test_a_damaged_pickle_is_refused(tmp_path):
    path = tmp_path / "a.bin"
    for data in (b"", b"x", b"\x80\x04", b"PK\x03\x04" + b"\0" * 50, os.urandom(200)):
        path.write_bytes(data)
        with pytest.raises(FormatError, match="is no embedding that can be read"):
            read_adapter(path)
