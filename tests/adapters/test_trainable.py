"""Adapters to be trained: what they start as, what they hold, how they act, and that the base never changes."""

import math

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import nn
from trained_kinds import EVERYWHERE, KINDS, NAME, changed, outputs, section, trained, unet_output

from sdlora.adapters.inject import adapters_off, has_float32_adapter, remove_adapter, set_adapter_weights
from sdlora.adapters.layers import DeltaLayer, DenseLayer, DoraLayer, LohaLayer, LokrLayer, LoraLayer
from sdlora.adapters.live import base_weight, locate
from sdlora.adapters.starts import orthonormal_factors, principal_factors
from sdlora.adapters.trainable import choose_targets, new_adapter
from sdlora.config import AdapterSection, BaseSection
from sdlora.errors import ConfigError
from sdlora.families.registry import load_base

CONV = "unet.mid_block.resnets.0.conv1"
LINEAR = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
ROUNDED = ("pissa", "olora")
"""Kinds that start as the difference of two equal products."""
# One family shows what does not depend on the family.
one_family = pytest.mark.parametrize("shape", ["sd1"])
every_kind = pytest.mark.parametrize("kind", KINDS)
everywhere = pytest.mark.parametrize(("shape", "kind"), EVERYWHERE)


def assert_same_bits(one, other) -> None:
    for a, b in zip(one, other, strict=True):
        assert torch.equal(a, b)


def assert_close(one, other, tolerance=1e-5) -> None:
    for a, b in zip(one, other, strict=True):
        assert (a - b).norm() <= tolerance * b.norm()


def assert_different(one, other) -> None:
    for a, b in zip(one, other, strict=True):
        assert (a - b).norm() > 1e-2 * b.norm()


def add_to_weights(base, layers) -> None:
    """What an adapter means: its update is added to each base weight."""
    modules = dict(base.components())
    for path, layer in layers.items():
        live = locate(modules, path)
        with torch.no_grad():
            live.weight += layer.update_of(live.weight)


# --- what it starts as -------------------------------------------------------------------------------


def test_plain_lora_is_pefts_own_drawn_from_the_seed_in_the_models_order(tiny_base):
    chosen = AdapterSection(rank=4, alpha=2.0, targets=("transformer",), text_encoder=True)
    base, reference = tiny_base(), tiny_base()
    adapter = new_adapter(base, NAME, chosen, seed=7)
    expected = []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        for component, paths in choose_targets(reference, chosen).items():
            module = dict(reference.components())[component]
            config = LoraConfig(r=4, lora_alpha=2.0, lora_dropout=0.0, target_modules=paths, init_lora_weights=True)
            inject_adapter_in_model(config, module, adapter_name=NAME)
            expected += [parameter for key, parameter in module.named_parameters() if ".lora_" in key]
    assert len(adapter.weights) == len(expected) > 50
    assert_same_bits([weight.parameter for weight in adapter.weights], expected)
    changed(adapter)
    with torch.no_grad():
        for parameter, weight in zip(expected, adapter.weights, strict=True):
            parameter.copy_(weight.parameter)
    assert_same_bits(outputs(base), outputs(reference))


@everywhere
def test_a_fresh_adapter_changes_nothing_and_only_its_weights_train(tiny_base, kind):
    base = tiny_base()
    bare = outputs(base)
    adapter = new_adapter(base, NAME, section(kind), seed=7)
    (assert_close if kind in ROUNDED else assert_same_bits)(outputs(base), bare)
    weights = [weight.parameter for weight in adapter.weights]
    assert all(parameter.dtype == torch.float32 and parameter.requires_grad for parameter in weights)
    thawed = {id(p) for _, module in base.components() for p in module.parameters() if p.requires_grad}
    assert thawed <= {id(parameter) for parameter in weights}
    assert kind == "full" or len(thawed) == len(weights)
    assert {weight.component for weight in adapter.weights} == {"unet", *base.text_encoders}
    assert len({weight.name for weight in adapter.weights}) == len(weights)


@pytest.mark.parametrize("kind", ["locon", "loha", "lokr"])
@one_family
def test_it_is_drawn_from_its_seed_alone(tiny_base, kind):
    def drawn(seed):
        base = tiny_base()
        torch.rand(seed + 1)  # the global generator must not matter
        state = torch.get_rng_state()
        adapter = new_adapter(base, NAME, section(kind), seed)
        assert torch.equal(torch.get_rng_state(), state)
        return [weight.parameter for weight in adapter.weights]

    first = drawn(1)
    assert_same_bits(first, drawn(1))
    assert any(not torch.equal(a, b) for a, b in zip(first, drawn(2), strict=True))


@pytest.mark.parametrize("kind", ["dora", "pissa", "olora", "loha", "lokr"])
@one_family
def test_a_step_of_one_rate_changes_the_model_about_as_much_for_every_kind(tiny_base, kind):
    """So that no kind learns nothing at the defaults; full has more to move and needs lower rates."""

    def change(kind) -> float:
        base = tiny_base()
        chosen = AdapterSection(**KINDS[kind] | {"rank": 16, "alpha": 16.0, "targets": ("attention",)})
        adapter = new_adapter(base, NAME, chosen, seed=1)
        unet_output(base).square().mean().backward()
        torch.optim.AdamW([weight.parameter for weight in adapter.weights], lr=1e-4, weight_decay=0).step()
        return math.sqrt(
            sum(float(layer.update_of(base_weight(base, p)).norm()) ** 2 for p, layer in adapter.layers().items())
        )

    assert 1 / 3 < change(kind) / change("lora") < 8


@pytest.mark.parametrize("start", ROUNDED)
@one_family
def test_a_start_is_pefts_own_and_the_base_keeps_its_weights(tiny_base, start):
    base, reference = tiny_base(), tiny_base()
    weight = base.unet.get_submodule(LINEAR[5:]).weight.clone()
    (part,) = new_adapter(base, NAME, section(start, targets=(LINEAR[5:],), text_encoder=False), seed=0).parts
    config = LoraConfig(r=4, lora_alpha=2.0, target_modules=[LINEAR[5:]], init_lora_weights=start)
    inject_adapter_in_model(config, reference.unet, adapter_name=NAME)
    theirs = reference.unet.get_submodule(LINEAR[5:])
    down, up = (weight.parameter for weight in part.weights)
    torch.testing.assert_close(down, theirs.lora_A[NAME].weight)
    torch.testing.assert_close(up, theirs.lora_B[NAME].weight)
    torch.testing.assert_close(weight - 0.5 * up @ down, theirs.base_layer.weight)
    assert torch.equal(base_weight(base, LINEAR), weight)


def test_start_factors_are_what_their_papers_say():
    weight = torch.randn(6, 9, generator=torch.Generator().manual_seed(0)).double()
    down, up = principal_factors(weight, 2, scale=0.5)
    rest = torch.linalg.svdvals(weight - 0.5 * up @ down)
    torch.testing.assert_close(rest[:4], torch.linalg.svdvals(weight)[2:])
    torch.testing.assert_close(up.T @ up, down @ down.T)  # the singular values are shared out evenly
    down, up = orthonormal_factors(weight, 6, scale=0.5)
    torch.testing.assert_close(up @ down, weight)
    down, up = orthonormal_factors(weight, 2, scale=0.5)
    torch.testing.assert_close(up.T @ up, torch.eye(2, dtype=torch.float64))


@pytest.mark.parametrize("start", ROUNDED)
@one_family
def test_a_start_may_have_more_ranks_than_the_layer(tiny_base, start):
    base = tiny_base()
    bare = outputs(base)
    chosen = section(start, rank=40, targets=("conv_out", "conv_in", "attn1.to_q"))  # conv_out has 4 rows
    adapter = new_adapter(base, NAME, chosen, seed=0)
    assert_close(outputs(base), bare)
    assert {layer.rank for layer in adapter.layers().values()} == {80}


# --- sizes -------------------------------------------------------------------------------------------


@one_family
def test_ranks_of_layers(tiny_base):
    base = tiny_base()
    chosen = section(
        conv_rank=6, ranks={"unet.*.attn*": 3, "attn2.to_v": 5, "unet.mid_block.*": 8, "text_model.*.fc1": 2}
    )
    layers = new_adapter(base, NAME, chosen, seed=0).layers()
    found = {
        path: (layer.rank, layer.alpha)
        for path, layer in layers.items()
        if "down_blocks" not in path and "up_blocks" not in path
    }
    assert found[CONV] == found[LINEAR] == (8, 4.0)
    assert layers["unet.down_blocks.1.resnets.0.conv1"].rank == 6
    assert layers["unet.down_blocks.1.resnets.0.conv1"].alpha == 3.0  # in proportion: 2 / 4 * 6
    assert layers["unet.down_blocks.1.resnets.0.time_emb_proj"].rank == 4
    block = "unet.up_blocks.1.attentions.0.transformer_blocks.0"
    assert (layers[f"{block}.attn1.to_q"].rank, layers[f"{block}.attn2.to_v"].rank) == (3, 5)
    encoder = "text_encoder.text_model.encoder.layers.0"
    assert (layers[f"{encoder}.mlp.fc1"].rank, layers[f"{encoder}.self_attn.q_proj"].rank) == (2, 4)
    assert layers[f"{encoder}.mlp.fc1"].alpha == 1.0


@one_family
def test_convolutions_may_have_rank_and_alpha_of_their_own(tiny_base):
    layers = new_adapter(tiny_base(), NAME, section("locon"), seed=0).layers()
    assert (layers[CONV].rank, layers[CONV].alpha) == (2, 3.0)
    assert (layers[LINEAR].rank, layers[LINEAR].alpha) == (4, 2.0)
    assert layers[CONV].down.shape[2:] == (3, 3)


def test_a_one_by_one_convolution_counts_as_linear(tiny_base, shape):
    layers = new_adapter(tiny_base(), NAME, section("locon"), seed=0).layers()
    projection = layers["unet.mid_block.attentions.0.proj_in"]
    assert projection.rank == 4 and projection.down.ndim == (4 if shape == "sd1" else 2)


@one_family
def test_a_rank_stabilized_adapter_is_written_with_alpha_times_the_root_of_the_rank(tiny_base):
    adapter = new_adapter(tiny_base(), NAME, section("rank-stabilized", ranks={"to_q": 16}), seed=0)
    layers = adapter.layers()
    assert layers[CONV].alpha == 4.0  # alpha 2, rank 4
    assert layers[CONV].scale == 2 / math.sqrt(4)
    assert layers[LINEAR].scale == pytest.approx(8 / math.sqrt(16))  # alpha in proportion: 8


# --- how it acts -------------------------------------------------------------------------------------


@everywhere
def test_it_acts_as_its_layers_added_to_the_weights(tiny_base, kind):
    base, dense = tiny_base(), tiny_base()
    bare, digest = outputs(base), base.weights_sha256()
    layers = trained(base, kind).layers()
    add_to_weights(dense, layers)
    live = outputs(base)
    assert_close(live, outputs(dense), 1e-4)
    assert_different(live, bare)
    assert base.weights_sha256() == digest
    types = {"dora": DoraLayer, "loha": LohaLayer, "lokr": LokrLayer, "lokr-whole": LokrLayer, "full": DenseLayer}
    assert {type(layer) for layer in layers.values()} == {types.get(kind, LoraLayer)}
    assert all(t.dtype == torch.float32 and not t.requires_grad for layer in layers.values() for t in layer.tensors())


@every_kind
@one_family
def test_switching_it_off_on_and_removing_it(tiny_base, kind):
    base = tiny_base()
    bare, before = outputs(base), dict(base.unet.named_modules())
    adapter = trained(base, kind)
    active = outputs(base)
    with adapters_off(base):
        assert_same_bits(outputs(base), bare)
    adapter.set_active(0.0)
    assert_same_bits(outputs(base), bare)
    set_adapter_weights(base, {})
    assert_same_bits(outputs(base), bare)
    set_adapter_weights(base, {NAME: 1.0})
    assert_same_bits(outputs(base), active)
    assert all(weight.parameter.requires_grad for weight in adapter.weights)
    assert has_float32_adapter(base)
    remove_adapter(base, NAME)
    assert_same_bits(outputs(base), bare)
    assert dict(base.unet.named_modules()) == before and not hasattr(base.unet, "peft_config")
    assert not any(layer._forward_hooks for layer in base.unet.modules() if isinstance(layer, nn.Linear | nn.Conv2d))


@pytest.mark.parametrize("kind", ["lora", "loha", "lokr", "full"])
@one_family
def test_half_its_weight_is_half_its_update(tiny_base, kind):
    base, dense = tiny_base(), tiny_base()
    adapter = trained(base, kind)
    modules = dict(dense.components())
    for path, layer in adapter.layers().items():
        weight = locate(modules, path).weight
        with torch.no_grad():
            weight += 0.5 * layer.update_of(weight)
    adapter.set_active(0.5)
    assert_close(outputs(base), outputs(dense), 1e-4)


@one_family
def test_its_layers_are_copies(tiny_base):
    base = tiny_base()
    adapter = trained(base, "dora")
    before = adapter.layers()
    kept = {path: [t.clone() for t in layer.tensors()] for path, layer in before.items()}
    changed(adapter, seed=1)
    assert all(
        torch.equal(a, b) for path, layer in before.items() for a, b in zip(layer.tensors(), kept[path], strict=True)
    )
    assert list(adapter.layers()) == list(before)


@pytest.mark.parametrize(
    ("kind", "precision"),
    [(kind, "bf16") for kind in ("lora", "dora", "pissa", "loha", "lokr", "full")] + [("dora", "fp16")],
)
@one_family
def test_over_a_base_in_half_precision_it_is_float32_and_trains(tiny_folder, shape, kind, precision):
    base = load_base(BaseSection(path=str(tiny_folder(shape)), precision=precision), "cpu")
    bare, digest = outputs(base), base.weights_sha256()
    adapter = new_adapter(base, NAME, section(kind, text_encoder=False), seed=7)
    (lambda a, b: assert_close(a, b, 0.01) if kind in ROUNDED else assert_same_bits(a, b))(outputs(base), bare)
    losses = train_some_steps(base, adapter)
    assert losses[-1] < losses[0]
    assert all(weight.parameter.dtype == torch.float32 for weight in adapter.weights)
    assert base.weights_sha256() == digest


@pytest.mark.parametrize("quantize", ["int8", "nf4"])
@pytest.mark.parametrize("kind", ["lora", "dora", "loha", "lokr", "full"])
@one_family
def test_over_a_quantised_base(tiny_folder, shape, kind, quantize):
    base = load_base(BaseSection(path=str(tiny_folder(shape)), precision="bf16", quantize=quantize), "cpu")
    bare, digest = outputs(base), base.weights_sha256()
    refused = (kind == "dora" and quantize == "int8") or (kind in ("loha", "lokr") and quantize == "nf4")
    chosen = section(kind, text_encoder=False)
    if refused:
        with pytest.raises(
            ConfigError, match=rf'adapter\.\w+ is .*base\.quantize = "{quantize}"; set base\.quantize = .*, or adapter'
        ):
            choose_targets(base, chosen)
        with pytest.raises(ConfigError):
            new_adapter(base, NAME, chosen, seed=7)
        assert_same_bits(outputs(base), bare)
        return
    adapter = new_adapter(base, NAME, chosen, seed=7)
    assert_same_bits(outputs(base), bare)
    losses = train_some_steps(base, adapter)
    assert losses[-1] < losses[0]
    assert base.weights_sha256() == digest


def train_some_steps(base, adapter) -> list[float]:
    optimizer = torch.optim.AdamW([weight.parameter for weight in adapter.weights], lr=3e-3)
    goal = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    losses = []
    for _ in range(3):
        loss = (unet_output(base).float() - goal).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


# --- bounds and dropout ------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["locon", "rank-stabilized", "loha", "lokr", "lokr-whole", "full"])
@one_family
def test_no_update_is_larger_than_the_limit(tiny_base, kind):
    base = tiny_base()
    adapter = trained(base, kind, ranks={"time_emb_proj": 2})
    before = {path: layer.update_of(base_weight(base, path)) for path, layer in adapter.layers().items()}
    norms = sorted(float(update.norm()) for update in before.values())
    limit = norms[len(norms) // 2]
    adapter.limit_norms(limit)
    for path, layer in adapter.layers().items():
        norm = float(before[path].norm())
        expected = before[path] * min(1.0, limit / norm)
        torch.testing.assert_close(layer.update_of(base_weight(base, path)), expected, rtol=1e-4, atol=1e-6)
        assert isinstance(layer, DeltaLayer) and layer.delta_norm() <= limit * (1 + 1e-5)


@one_family
def test_factors_are_scaled_evenly(tiny_base):
    adapter = trained(tiny_base(), "lora", targets=("mid_block.attentions.0.*.attn1.to_q",), text_encoder=False)
    down, up = (weight.parameter.detach().clone() for weight in adapter.weights)
    norm = float((0.5 * up @ down).norm())
    adapter.limit_norms(norm / 4)
    assert_close([weight.parameter for weight in adapter.weights], [down / 2, up / 2])
    again = [weight.parameter.detach().clone() for weight in adapter.weights]
    adapter.limit_norms(norm)
    assert_same_bits([weight.parameter for weight in adapter.weights], again)


@pytest.mark.parametrize(
    ("kind", "setting"),
    [(kind, "dropout") for kind in ("lora", "dora")]
    + [(kind, "rank_dropout") for kind in ("locon", "pissa", "loha", "lokr")]
    + [(kind, "module_dropout") for kind in ("lora", "loha", "lokr")],
)
@one_family
def test_dropout_acts_while_training_alone_and_is_drawn_from_the_global_generator(tiny_base, kind, setting):
    base = tiny_base()
    bare = outputs(base)
    trained(base, kind, **{setting: 0.5})
    other = tiny_base()
    trained(other, kind)
    assert_same_bits(outputs(base), outputs(other))

    def drawn(seed):
        torch.manual_seed(seed)
        return unet_output(base).detach()

    base.unet.train()
    first = drawn(1)
    assert torch.equal(drawn(1), first)
    assert not torch.equal(drawn(2), first)
    assert not torch.equal(first, outputs(other)[0])
    with adapters_off(base):
        assert torch.equal(drawn(1), bare[0])


@pytest.mark.parametrize("start", ROUNDED)
@one_family
def test_dropout_of_ranks_leaves_a_fresh_start_without_effect(tiny_base, start):
    base = tiny_base()
    bare = outputs(base)
    new_adapter(base, NAME, section(start, rank_dropout=0.5, module_dropout=0.5), seed=0)
    base.unet.train()
    assert_close([unet_output(base)], bare[:1])


@pytest.mark.parametrize("kind", ["lora", "locon", "loha"])
@one_family
def test_dropped_ranks_are_made_up_for_on_average(tiny_base, kind):
    base = tiny_base()
    path = CONV if kind == "locon" else LINEAR
    trained(base, kind, targets=(path[5:],), text_encoder=False, rank_dropout=0.25)
    layer = base.unet.get_submodule(path[5:])
    layer.eval()
    inputs = torch.randn(1, layer.in_features, *(() if path == LINEAR else (4, 4)), generator=torch.manual_seed(0))
    with torch.no_grad():
        bare, whole = layer.get_base_layer()(inputs), layer(inputs)
        layer.train()
        torch.manual_seed(0)
        mean = torch.stack([layer(inputs) for _ in range(2000)]).mean(0)
    assert (mean - whole).norm() < 0.06 * (whole - bare).norm()


@one_family
def test_dropped_ranks_are_drawn_for_each_example(tiny_base):
    base = tiny_base()
    trained(base, "lora", targets=(LINEAR[5:],), text_encoder=False, rank=2, rank_dropout=0.5)
    layer = base.unet.get_submodule(LINEAR[5:]).train()
    row = torch.randn(1, 1, layer.in_features, generator=torch.manual_seed(0))
    with torch.no_grad():
        rows = layer(row.expand(64, 3, -1)) - layer.get_base_layer()(row)
    down, up = layer.lora_A[NAME].weight, layer.lora_B[NAME].weight
    ranks = [layer.scaling[NAME] * 2 * (row[0, 0] @ down[r]) * up[:, r] for r in range(2)]
    possible = [torch.zeros_like(ranks[0]), ranks[0], ranks[1], ranks[0] + ranks[1]]
    seen = set()
    for example in rows:
        assert torch.equal(example[0], example[1])
        (match,) = [n for n, update in enumerate(possible) if torch.allclose(example[0], update, atol=1e-5)]
        seen.add(match)
    assert seen == {0, 1, 2, 3}


# --- refusals ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"targets": ("attention", "attn3.*")}, r"adapter\.targets: 'attn3\.\*' matches no layer of this base"),
        ({"text_encoder_targets": ("ff",)}, r"adapter\.text_encoder_targets: 'ff' matches no layer"),
        ({"ranks": {"attn2.to_k": 3}}, r"adapter\.ranks: 'attn2\.to_k' matches no layer that gets an adapter; name"),
        ({"text_encoder_parts": ()}, r"adapter\.text_encoder_parts: nothing is not in this base \(Stable Diff"),
        ({"dora": True, "max_norm": 1.0}, r"adapter\.max_norm is 1\.0, and adapter\.dora .*; remove adapter\.max_norm"),
        ({"start": "pissa", "max_norm": 1.0}, r'adapter\.max_norm is 1\.0, and adapter\.start is "pissa"'),
        (
            {"targets": ("attention", "proj_in"), "conv_rank": 2},
            r'adapter\.conv_rank is 2, .* no convolution larger than 1 x 1 of this base; add one there, such as "resnet"',
        ),
        (
            {"targets": ("time_emb_proj",), "conv_alpha": 0.5},
            r"adapter\.conv_alpha is 0\.5, .*remove adapter\.conv_alpha",
        ),
    ],
)
@one_family
def test_settings_that_do_not_fit_are_refused_before_anything_is_changed(tiny_base, settings, message):
    base = tiny_base()
    for call in (lambda s: choose_targets(base, s), lambda s: new_adapter(base, NAME, s, 0)):
        with pytest.raises(ConfigError, match=message) as caught:
            call(section(**settings))
        assert "\n" not in str(caught.value)
    assert not hasattr(base.unet, "peft_config")


@pytest.mark.parametrize("shape", ["sd1"])
def test_a_second_text_encoder_is_sdxls_alone(tiny_base):
    with pytest.raises(ConfigError, match=r"text_encoder_2 is not in this base \(.*\); it has text_encoder$"):
        choose_targets(tiny_base(), section(text_encoder_parts=("text_encoder_2",)))


@pytest.mark.parametrize("shape", ["sdxl"])
def test_one_of_the_text_encoders_may_be_trained(tiny_base):
    targets = choose_targets(tiny_base(), section(text_encoder_parts=("text_encoder_2",)))
    assert list(targets) == ["unet", "text_encoder_2"]


@pytest.mark.parametrize("start", ROUNDED)
@one_family
def test_a_start_needs_the_weights_as_they_are(tiny_folder, shape, start):
    base = load_base(BaseSection(path=str(tiny_folder(shape)), precision="fp32", quantize="nf4"), "cpu")
    with pytest.raises(ConfigError, match=rf'adapter\.start is "{start}", .*; set base\.quantize = "none", or adapter'):
        choose_targets(base, section(start))
