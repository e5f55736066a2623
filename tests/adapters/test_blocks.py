"""Names of blocks as original checkpoints number them, and factors by block."""

import pytest

from sdlora.adapters.blocks import parse_block_weights, unet_block


@pytest.mark.parametrize(
    ("path", "block"),
    [
        ("unet.conv_in", "IN00"),
        ("unet.down_blocks.0.resnets.0.conv1", "IN01"),
        ("unet.down_blocks.0.attentions.1.proj_in", "IN02"),
        ("unet.down_blocks.0.downsamplers.0.conv", "IN03"),
        ("unet.down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k", "IN04"),
        ("unet.down_blocks.2.attentions.1.proj_out", "IN08"),
        ("unet.down_blocks.3.resnets.1.conv2", "IN11"),
        ("unet.mid_block.attentions.0.proj_in", "MID"),
        ("unet.up_blocks.0.resnets.0.conv1", "OUT00"),
        ("unet.up_blocks.0.upsamplers.0.conv", "OUT02"),
        ("unet.up_blocks.1.attentions.0.proj_in", "OUT03"),
        ("unet.up_blocks.3.attentions.2.proj_in", "OUT11"),
        ("unet.time_embedding.linear_1", ""),
        ("unet.conv_out", ""),
        ("text_encoder.text_model.encoder.layers.0.mlp.fc1", ""),
    ],
)
def test_blocks_are_numbered_as_in_original_checkpoints(path, block):
    assert unet_block(path, 2) == block


def test_a_level_of_one_layer_counts_less():
    assert unet_block("unet.down_blocks.1.attentions.0.proj_in", 1) == "IN03"
    assert unet_block("unet.up_blocks.1.resnets.1.conv1", 1) == "OUT03"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("MIDD", {"IN01": 0, "IN04": 0, "IN05": 1, "MID": 1, "OUT06": 1, "OUT07": 0, "": 1}),
        ("outall", {"IN08": 0, "MID": 0, "OUT03": 1, "OUT11": 1}),
        (",".join(str(n) for n in range(17)), {"IN01": 1, "IN04": 3, "MID": 7, "OUT03": 8, "OUT11": 16, "IN00": 0}),
        (",".join(str(n) for n in range(26)), {"IN00": 1, "IN11": 12, "MID": 13, "OUT00": 14, "OUT11": 25}),
        (",".join(str(n) for n in range(12)), {"IN04": 1, "IN08": 4, "MID": 5, "OUT00": 6, "OUT05": 11, "OUT06": 0}),
        (",".join(str(n) for n in range(20)), {"IN00": 1, "IN08": 9, "MID": 10, "OUT08": 19}),
        ("IN=0.5, out04=-1, IN02=2", {"IN01": 0.5, "IN02": 2, "MID": 1, "OUT03": 1, "OUT04": -1, "": 1}),
    ],
)
def test_factors_by_block(text, expected):
    weights = parse_block_weights(text)
    assert {block: weights.of(block) for block in expected} == expected


def test_the_first_number_is_the_text_encoders():
    assert parse_block_weights("0.3," + ",".join("1" * 16)).text_encoders == 0.3
    assert parse_block_weights("BASE=0").text_encoders == 0
    assert parse_block_weights("MID=0").text_encoders == 1


@pytest.mark.parametrize(
    "text",
    ["", "MIDDLE", "1,2,3", "IN99=1", "IN=x", "IN", "1,,1", "=", "IN=1=2", "MID=nan", "1,2,3,inf,5,6,7,8,9,10,11,12"],
)
def test_anything_else_is_refused_with_what_is_expected(text):
    with pytest.raises(ValueError, match=r"expected a preset \(NONE, ALL, .* 12, 17, 20 or 26 numbers"):
        parse_block_weights(text)
