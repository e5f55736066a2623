"""The tensors of each kind of layer: their names and shapes, both ways, and what is refused."""

import pytest
import torch
from adapter_kinds import KINDS, LINEAR, random_layer
from format_help import read

from sdlora.adapters.formats import kohya
from sdlora.adapters.formats.detect import contents_of
from sdlora.adapters.formats.layer_parts import layer_of, parts_of
from sdlora.adapters.layers import DenseLayer, DoraLayer, LokrLayer, LoraLayer
from sdlora.errors import FormatError
from sdlora.storage import serialize_tensors

# Names and shapes as LyCORIS writes them, for a convolution with a kernel of 3 x 3 from 6 to 8 channels, rank 3.
CONVOLUTION = {
    "lora": {"lora_down.weight": (3, 6, 3, 3), "lora_up.weight": (8, 3, 1, 1), "alpha": ()},
    "tucker": {
        "lora_down.weight": (3, 6, 1, 1),
        "lora_mid.weight": (3, 3, 3, 3),
        "lora_up.weight": (8, 3, 1, 1),
        "alpha": (),
    },
    "loha": {"hada_w1_a": (8, 3), "hada_w1_b": (3, 54), "hada_w2_a": (8, 3), "hada_w2_b": (3, 54), "alpha": ()},
    "loha tucker": {
        "hada_t1": (3, 3, 3, 3),
        "hada_w1_a": (3, 8),
        "hada_w1_b": (3, 6),
        "hada_t2": (3, 3, 3, 3),
        "hada_w2_a": (3, 8),
        "hada_w2_b": (3, 6),
        "alpha": (),
    },
    "lokr": {"lokr_w1": (4, 2), "lokr_w2": (2, 3, 3, 3), "alpha": ()},
    "lokr pair": {"lokr_w1": (4, 2), "lokr_w2_a": (2, 3), "lokr_w2_b": (3, 27), "alpha": ()},
    "lokr pairs": {
        "lokr_w1_a": (4, 3),
        "lokr_w1_b": (3, 2),
        "lokr_w2_a": (2, 3),
        "lokr_w2_b": (3, 27),
        "alpha": (),
    },
    "lokr tucker": {
        "lokr_w1": (4, 2),
        "lokr_t2": (3, 3, 3, 3),
        "lokr_w2_a": (3, 2),
        "lokr_w2_b": (3, 3),
        "alpha": (),
    },
    "dense": {"diff": (8, 6, 3, 3)},
    "dora": {
        "lora_down.weight": (3, 6, 3, 3),
        "lora_up.weight": (8, 3, 1, 1),
        "alpha": (),
        "dora_scale": (8, 1, 1, 1),
    },
    "dora by column": {
        "lora_down.weight": (3, 6, 3, 3),
        "lora_up.weight": (8, 3, 1, 1),
        "alpha": (),
        "dora_scale": (1, 6, 1, 1),
    },
    "dora of loha": {
        "hada_w1_a": (8, 3),
        "hada_w1_b": (3, 54),
        "hada_w2_a": (8, 3),
        "hada_w2_b": (3, 54),
        "alpha": (),
        "dora_scale": (8, 1, 1, 1),
    },
}


@pytest.mark.parametrize("kind", KINDS)
def test_names_and_shapes_are_those_of_lycoris(kind):
    parts = parts_of(random_layer(kind, (8, 6, 3, 3)))
    assert {suffix: tuple(tensor.shape) for suffix, tensor in parts.items()} == CONVOLUTION[kind]


@pytest.mark.parametrize(
    ("kind", "shape"), [(kind, (8, 6)) for kind in LINEAR] + [(kind, (8, 6, 3, 3)) for kind in KINDS]
)
@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_write_read_write_gives_the_same_bytes_and_the_same_update(kind, shape, family):
    path = "unet.mid_block.resnets.0.conv1"
    layer = random_layer(kind, shape)
    tensors = kohya.write({path: layer}, family)
    layers, unknown = read(tensors)
    assert unknown == () and list(layers) == [path]
    assert type(layers[path]) is type(layer)
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    assert torch.equal(layers[path].update_of(weight), layer.update_of(weight))
    assert serialize_tensors(kohya.write(layers, family), {}) == serialize_tensors(tensors, {})


def test_magnitudes_without_further_dimensions_are_written_with_them():
    for shape, written in (((8, 6), (8, 1)), ((8, 6, 3, 3), (8, 1, 1, 1))):
        lora = random_layer("lora", shape)
        assert parts_of(DoraLayer(lora, torch.ones(8)))["dora_scale"].shape == written


@pytest.mark.parametrize(
    ("shape", "by_column"), [((8,), False), ((8, 1), False), ((1, 8), True), ((8, 1, 1, 1), False)]
)
def test_of_a_square_layer_the_axis_is_told_by_the_shape_and_else_it_is_the_rows(shape, by_column):
    layer = layer_of("x", {**parts_of(random_layer("lora", (8, 8))), "dora_scale": torch.ones(shape)})
    assert isinstance(layer, DoraLayer)
    assert layer.by_column == by_column


def test_a_missing_alpha_means_scale_one():
    for kind in ("loha", "lokr pair", "lokr pairs", "lokr", "loha tucker", "tucker"):
        parts = parts_of(random_layer(kind, (8, 6, 3, 3)))
        del parts["alpha"]
        layer = layer_of("x", parts)
        assert layer.alpha == layer.rank


def test_alpha_means_nothing_beside_a_dense_difference_and_between_whole_factors():
    delta = torch.ones(4, 4)
    assert layer_of("x", {"diff": delta, "alpha": torch.tensor(9.0)}) == DenseLayer(delta)
    whole = layer_of("x", {"lokr_w1": torch.ones(2, 2), "lokr_w2": torch.ones(2, 2), "alpha": torch.tensor(9.0)})
    assert isinstance(whole, LokrLayer) and whole.scale == 1.0 and whole.alpha == 9.0


def test_half_precision_stays_as_stored():
    for kind in KINDS:
        parts = {suffix: tensor.half() for suffix, tensor in parts_of(random_layer(kind, (8, 6, 3, 3))).items()}
        assert {tensor.dtype for tensor in parts_of(layer_of("x", parts)).values()} == {torch.float16}


def replaced(kind: str, **tensors: torch.Tensor | None) -> dict[str, torch.Tensor]:
    """The parts of a layer of `kind`, some replaced or, given as None, missing; "__" stands for a dot."""
    parts = parts_of(random_layer(kind, (8, 6, 3, 3))) | {k.replace("__", "."): v for k, v in tensors.items()}
    return {suffix: tensor for suffix, tensor in parts.items() if tensor is not None}


@pytest.mark.parametrize(
    ("parts", "sentence"),
    [
        (replaced("tucker", lora_mid__weight=torch.ones(3, 2, 3, 3)), r"mid \(3, 2, 3, 3\) and down \(3, 6, 1, 1\)"),
        (replaced("lora", lora_mid__weight=torch.ones(3, 3, 3, 3)), "which do not go together"),
        (replaced("tucker", lora_up__weight=None), r"has no lora_up\.weight; the file is incomplete"),
        (replaced("loha", hada_w2_b=None), "has no hada_w2_b; the file is incomplete"),
        (replaced("loha tucker", hada_t1=None), "has no hada_t1; the file is incomplete"),
        (replaced("loha", hada_w1_a=torch.ones(8, 2)), r"hada_w1_a and hada_w1_b \(8, 2\) and \(3, 54\), which make no"),
        (replaced("loha", hada_w2_a=torch.ones(7, 3)), r"halves for \(8, 54\) and \(7, 54\); expected the same shape"),
        (replaced("loha", hada_w2_b=torch.ones(3, 6, 3, 3)), "which make no product"),
        (replaced("loha tucker", hada_t2=torch.ones(3, 3, 2, 2)), "expected the same shape"),
        (replaced("loha tucker", hada_t2=torch.ones(2, 3, 3, 3)), r"with the core \(2, 3, 3, 3\), which make no product"),
        (replaced("loha", hada_w1_a=torch.ones(8, 0), hada_w1_b=torch.ones(0, 54)), "which make no product"),
        (replaced("lokr", lokr_w1=None), "has no lokr_w1_a; the file is incomplete"),
        (replaced("lokr pair", lokr_w2_b=None), "has no lokr_w2_b; the file is incomplete"),
        (replaced("lokr", lokr_w2_a=torch.ones(2, 3)), "has lokr_w2 both whole and as a pair; expected one of them"),
        (replaced("lokr", lokr_t2=torch.ones(3, 3, 3, 3)), "has lokr_t2 beside a whole lokr_w2"),
        (replaced("lokr", lokr_w1=torch.ones(4)), r"lokr_w1 has shape \(4,\), which is no factor of a weight"),
        (replaced("lokr", lokr_w2=torch.ones(2, 3, 3)), r"lokr_w2 has shape \(2, 3, 3\)"),
        (replaced("lokr pair", lokr_w2_a=torch.ones(2, 4)), "which make no product"),
        (replaced("dense", diff=torch.ones(8)), r"diff has shape \(8,\), which is no layer's weight"),
        (replaced("dense", diff=torch.ones(8, 0)), "which is no layer's weight"),
        (replaced("dense", dora_scale=torch.ones(8, 1)), "has dora_scale beside a dense difference"),
        (replaced("dora", dora_scale=torch.ones(7, 1, 1, 1)), r"dora_scale has shape \(7, 1, 1, 1\); expected \(8, 1\)"),
        (replaced("dora", dora_scale=torch.ones(1, 7, 1, 1)), r"or \(1, 6\) for the weight \(8, 6, 3, 3\)"),
        (replaced("dora", dora_scale=torch.ones(8, 1, 3, 3)), "dora_scale has shape"),
        (replaced("dora", dora_scale=torch.ones(8, 1, 1, 1, 1)), "dora_scale has shape"),
        (replaced("dora", dora_scale=torch.tensor(1.0)), r"dora_scale has shape \(\)"),
        (replaced("dora of loha", dora_scale=torch.ones(1, 7, 1, 1)), "dora_scale has shape"),
        ({"dora_scale": torch.ones(8, 1)}, r"has no lora_down\.weight; the file is incomplete"),
        (replaced("lora", hada_w1_a=torch.ones(8, 3)), r"has both hada_w1_a and lora_down\.weight; a layer is of one"),
        (replaced("lokr", diff=torch.ones(8, 6)), "has both lokr_w1 and diff; a layer is of one kind"),
        (replaced("loha", hada_w1_a=torch.ones(8, 3, dtype=torch.int8)), r"x\.hada_w1_a holds torch.int8; expected floating"),
        (replaced("dora", dora_scale=torch.ones(8, dtype=torch.int32)), r"x\.dora_scale holds torch.int32"),
        (replaced("loha", alpha=torch.tensor(float("nan"))), "alpha is nan; expected a finite number"),
        (replaced("lokr pair", alpha=torch.ones(2)), "alpha has 2 numbers; expected one"),
    ],
)  # fmt: skip
def test_what_makes_no_layer_is_refused_in_one_sentence(parts, sentence):
    with pytest.raises(FormatError, match=sentence) as caught:
        layer_of("x", parts)
    assert str(caught.value).startswith("x") and "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_recognised(kind):
    name = "lora_unet_mid_block_resnets_0_conv1"
    assert kohya.places({f"{name}.{part}": () for part in parts_of(random_layer(kind, (8, 6, 3, 3)))}, {})


@pytest.mark.parametrize("kind", ["lora", "loha", "lokr", "lokr pair", "lokr pairs", "dense", "dora"])
@pytest.mark.parametrize(("width", "family"), [(768, "sd1"), (1024, "sd2"), (2048, "sdxl"), (320, "")])
def test_the_family_is_told_from_the_width_of_cross_attention(kind, width, family):
    name = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"
    parts = parts_of(random_layer(kind, (8, width)))
    shapes = {f"{name}.{suffix}": tuple(tensor.shape) for suffix, tensor in parts.items()}
    assert contents_of(shapes, {}).family == family


def test_a_file_may_hold_layers_of_several_kinds():
    layers = {
        "unet.conv_in": random_layer("lokr", (8, 6, 3, 3)),
        "unet.conv_out": random_layer("lora", (8, 6, 3, 3)),
        "unet.time_embedding.linear_1": random_layer("dora", (8, 6)),
    }
    again, unknown = read(kohya.write(layers, "sd1"))
    assert unknown == ()
    assert [type(again[path]) for path in layers] == [LokrLayer, LoraLayer, DoraLayer]
