import pytest
import torch

from sdlora.config import BaseSection
from sdlora.errors import ConfigError
from sdlora.families.base import Conditioning, match_targets
from sdlora.families.registry import load_base


def test_conditioning_rows_and_concatenation():
    states = torch.arange(6.0).reshape(3, 1, 2)
    plain = Conditioning(states)
    assert plain.rows([2, 0, 2]).states.flatten().tolist() == [4, 5, 0, 1, 4, 5]
    assert plain.rows([1]).pooled is None
    pooled = Conditioning(states, torch.tensor([[1.0], [2.0], [3.0]]))
    assert pooled.rows([2, 1]).pooled.flatten().tolist() == [3, 2]
    both = Conditioning.concatenate([pooled.rows([0]), pooled.rows([2])])
    assert torch.equal(both.states, states[[0, 2]])
    assert both.pooled.flatten().tolist() == [1, 3]
    assert Conditioning.concatenate([plain, plain]).pooled is None
    half = pooled.to(torch.device("cpu"), torch.float16)
    assert half.states.dtype == half.pooled.dtype == torch.float16


@pytest.mark.parametrize(
    ("patterns", "found"),
    [
        (["2"], ["0.2", "1.2"]),
        (["0.2", "1.2", "2"], ["0.2", "1.2"]),
        (["0.*"], ["0.0", "0.2"]),
        (["*"], ["0.0", "0.2", "1.2"]),
    ],
)
def test_match_targets_matches_whole_steps_from_the_end(patterns, found):
    layers = torch.nn.Sequential(
        torch.nn.Sequential(torch.nn.Linear(1, 1), torch.nn.GroupNorm(1, 1), torch.nn.Conv2d(1, 1, 1)),
        torch.nn.Sequential(torch.nn.SiLU(), torch.nn.GroupNorm(1, 1), torch.nn.Linear(1, 1)),
    )
    assert match_targets(layers, patterns) == found


def test_match_targets_does_not_match_the_end_of_a_name(tiny_base):
    unet = tiny_base().unet
    assert all(path.endswith(".attn2.to_k") for path in match_targets(unet, ["attn2.to_k"]))
    with pytest.raises(ConfigError, match=r"'_k' matches no layer of this base; name a pattern such as"):
        match_targets(unet, ["attn2.to_k", "_k"])
    with pytest.raises(ConfigError, match=r"'attn2\.norm' matches no layer"):
        match_targets(unet, ["attn2.norm"])


def test_the_weights_hash_follows_every_weight_of_every_component(tiny_base):
    base = tiny_base()
    digest = base.weights_sha256()
    assert digest == base.weights_sha256() == tiny_base().weights_sha256()
    assert [name for name, _ in base.components()] == ["unet", "text_encoder", "vae"]
    for _, module in base.components():
        parameter = list(module.parameters())[-1]
        with torch.no_grad():
            kept = parameter.clone()
            parameter.flatten()[0] += 1e-6
            assert base.weights_sha256() != digest
            parameter.copy_(kept)
            assert base.weights_sha256() == digest


def test_dropped_encoders_are_gone(tiny_base):
    base = tiny_base()
    base.drop_encoders()
    assert [name for name, _ in base.components()] == ["unet"]
    assert base.vae is None
    assert base.text_encoders == {}


SHAPES = ["sd1", "sd2", "sdxl"]


@pytest.mark.parametrize("shape", SHAPES)
def test_the_unets_weights_can_come_after_the_encoders_are_gone(tiny_folder, tiny_base, shape):
    base = load_base(BaseSection(path=str(tiny_folder(shape)), precision="fp32"), "cpu", unet=False)
    assert all(parameter.is_meta for parameter in base.unet.parameters())
    assert match_targets(base.unet, ["attn2.to_k"])
    base.drop_encoders()
    base.fetch_unet()
    base.fetch_unet()
    expected = tiny_base(shape).unet.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in base.unet.state_dict().items())


def test_text_encoders_can_stay_where_they_are_trained(tiny_base):
    base = tiny_base()
    base.drop_encoders(keep_text=True)
    assert base.vae is None and set(base.text_encoders) == {"text_encoder"}


def test_presets_are_names_for_patterns():
    layers = torch.nn.Sequential(torch.nn.Linear(1, 1), torch.nn.Linear(1, 1))
    assert match_targets(layers, ["first", "1"], {"first": ("0", "7")}) == ["0", "1"]
    with pytest.raises(ConfigError, match=r"'second' matches no layer of this base; name first, or a pattern"):
        match_targets(layers, ["second"], {"first": ("0",)})
