"""Converting beside other files: nothing of theirs is lost, and what would be wrong is not written."""

from dataclasses import replace

import pytest
import torch
from adapter_kinds import random_layer

from sdlora.adapters.convert import convert_adapter, write_checked
from sdlora.adapters.file import AdapterFile, read_adapter
from sdlora.adapters.inspect import inspect_adapter
from sdlora.adapters.layers import LoraLayer
from sdlora.adapters.verify import verify_written
from sdlora.adapters.write import write_adapter
from sdlora.errors import ConfigError, FormatError, OutputError

Q = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"


def words(value, *names):
    return {name: {"text_encoder": torch.full((2, 8), value)} for name in names}


def adapter(value=0.3, *names):
    return AdapterFile({Q: random_layer("lora", (64, 48))}, "sd1", {}, words(value, *(names or ("zorb",))))


def test_a_copy_in_half_precision_leaves_the_original_readable(tmp_path):
    write_adapter(adapter(), tmp_path / "cat.safetensors")
    convert_adapter(tmp_path / "cat.safetensors", tmp_path / "cat16.safetensors", "kohya", precision="fp16")
    for name in ("cat", "cat16"):
        assert torch.equal(
            read_adapter(tmp_path / f"{name}.safetensors").tokens["zorb"]["text_encoder"],
            words(0.3, "zorb")["zorb"]["text_encoder"],
        )


def test_another_adapters_word_of_the_same_name_is_not_replaced(tmp_path):
    write_adapter(adapter(), tmp_path / "cat.safetensors")
    with pytest.raises(OutputError, match=r"zorb\.safetensors: is there already and knows 'zorb' with other vectors"):
        write_checked(adapter(0.5), tmp_path / "dog.safetensors", "kohya")
    assert not (tmp_path / "dog.safetensors").exists()
    assert read_adapter(tmp_path / "cat.safetensors").tokens


def test_words_alone_are_compared_with_their_own_files(tmp_path):
    several = AdapterFile({}, "sd1", {}, words(0.3, "zorb", "blick"))
    path = tmp_path / "a.safetensors"
    write_adapter(several, path)
    verify_written(several, path)
    write_adapter(several, tmp_path / "bundle" / "b.safetensors", bundle=True)
    found = convert_adapter(tmp_path / "bundle" / "b.safetensors", tmp_path / "new" / "c.safetensors", "kohya")
    assert found.same and len(list((tmp_path / "new").iterdir())) == 2
    with pytest.raises(FormatError, match="the word 'blick' has other vectors"):
        verify_written(replace(several, tokens=several.tokens | words(0.4, "blick")), path)


def test_an_earlier_target_stays_where_the_new_one_cannot_be_written(tmp_path):
    source, target = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    write_adapter(AdapterFile({Q: random_layer("lokr", (64, 48))}, "sd1"), source)
    target.write_text("mine")
    with pytest.raises(FormatError, match="which diffusers and PEFT do not hold") as caught:
        convert_adapter(source, target, "diffusers", overwrite=True)
    assert str(caught.value).startswith(f"{target}: not written: ")
    assert target.read_text() == "mine"


def test_a_pickle_is_no_target(tmp_path):
    with pytest.raises(
        ConfigError, match=r"adapters are written as safetensors; name a file that ends in \.safetensors"
    ):
        write_adapter(adapter(), tmp_path / "a.pt")


@pytest.mark.parametrize("alpha", [301.0, 17.3, 0.7])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_alpha_is_kept_exactly_whatever_the_weights_type(tmp_path, alpha, dtype):
    layer = LoraLayer(torch.ones(4, 8).to(dtype), torch.ones(8, 4).to(dtype), alpha)
    write_adapter(AdapterFile({Q: layer}, "sd1"), tmp_path / "a.safetensors")
    assert read_adapter(tmp_path / "a.safetensors").layers[Q].alpha == pytest.approx(alpha, rel=1e-7)


def test_small_scales_in_halves_survive_diffusers_format(tmp_path):
    torch.manual_seed(0)
    layer = LoraLayer((torch.randn(128, 320) * 0.1).half(), (torch.randn(320, 128) * 1e-3).half(), 1.0)
    write_adapter(AdapterFile({Q: layer}, "sd1"), tmp_path / "a.safetensors")
    assert convert_adapter(tmp_path / "a.safetensors", tmp_path / "b.safetensors", "diffusers").largest < 1e-3


def test_pefts_folder_is_replaced_only_where_it_holds_nothing_else(tmp_path):
    write_adapter(adapter(), tmp_path / "mine", "peft")
    (tmp_path / "mine" / "README.md").write_text("about it")
    with pytest.raises(OutputError, match=r"is there already and holds README\.md besides; name another folder"):
        write_adapter(adapter(), tmp_path / "mine", "peft")
    assert (tmp_path / "mine" / "README.md").is_file()
    (tmp_path / "mine" / "README.md").unlink()
    (tmp_path / "link").symlink_to(tmp_path / "mine")
    write_adapter(adapter(0.5), tmp_path / "link", "peft")
    assert (tmp_path / "link").is_symlink()
    assert float(read_adapter(tmp_path / "mine").tokens["zorb"]["text_encoder"][0, 0]) == 0.5
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "mine"]


def test_pefts_weights_named_directly_keep_their_scale(tmp_path):
    layer = random_layer("lora", (64, 48))
    write_adapter(AdapterFile({Q: layer}, "sd1", {}, words(0.3, "zorb")), tmp_path / "mine", "peft")
    file = tmp_path / "mine" / "unet" / "adapter_model.safetensors"
    assert read_adapter(file).tokens.keys() == {"zorb"}
    assert read_adapter(file).layers[Q].scale == layer.scale == inspect_adapter(file).alpha / 3
    (tmp_path / "mine" / "unet" / "adapter_config.json").unlink()
    with pytest.raises(FormatError, match=r"is PEFT's, without the adapter_config\.json that holds its scale"):
        read_adapter(file)


def test_a_projection_comes_through_peft(tmp_path):
    layers = {"text_encoder_2.text_projection": random_layer("lora", (64, 48))}
    write_adapter(AdapterFile(layers, "sdxl"), tmp_path / "mine", "peft")
    assert read_adapter(tmp_path / "mine").layers.keys() == layers.keys()


def test_a_pickled_embedding_is_inspected(tmp_path):
    torch.save({"string_to_param": {"*": torch.ones(2, 768)}}, tmp_path / "cat.pt")
    report = inspect_adapter(tmp_path / "cat.pt")
    assert (report.format, report.family, report.tokens) == ("embedding", "sd1", ["cat"])
