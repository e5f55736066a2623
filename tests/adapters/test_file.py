import json
import random
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from sdlora.adapters.file import AdapterFile, adapter_family, read_adapter
from sdlora.adapters.layers import LoraLayer
from sdlora.adapters.write import word_files, write_adapter
from sdlora.errors import ConfigError, FormatError
from sdlora.headers import read_header
from sdlora.storage import sha256_of_tensor_data

PATH = "unet.mid_block.attentions.0.proj_in"
NAME = "lora_unet_mid_block_attentions_0_proj_in"
VERSIONS = {"sd1": "sd_v1", "sd2": "sd_v2_v", "sdxl": "sdxl_base_v1-0"}


def adapter_of(layer: LoraLayer) -> AdapterFile:
    return AdapterFile({PATH: layer}, "sd1")


def test_write_read_write_gives_the_same_bytes(tiny_base, make_adapter, tmp_path, shape):
    base = tiny_base()
    adapter = make_adapter(base, alpha=0.7)
    adapter = replace(
        adapter, metadata={"ss_output_name": "zorb", "note": "ä", "ss_base_model_version": VERSIONS[shape]}
    )
    first, second = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    write_adapter(adapter, first)
    read = read_adapter(first)
    write_adapter(read, second)
    assert first.read_bytes() == second.read_bytes()
    assert read.family == shape == adapter_family(first)
    assert read.metadata["ss_output_name"] == "zorb"
    assert set(read.layers) == set(adapter.layers)
    for path, layer in adapter.layers.items():
        assert torch.equal(read.layers[path].down, layer.down)
        assert torch.equal(read.layers[path].up, layer.up)
        assert read.layers[path].alpha == pytest.approx(0.7, rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_halves_stay_halves_with_their_alpha(tmp_path, dtype):
    layer = LoraLayer(torch.randn(4, 8).to(dtype), torch.randn(8, 4).to(dtype), 2.5)
    write_adapter(adapter_of(layer), tmp_path / "a.safetensors")
    read = read_adapter(tmp_path / "a.safetensors")
    assert read.layers[PATH].down.dtype == dtype
    assert read.layers[PATH].alpha == 2.5
    write_adapter(read, tmp_path / "b.safetensors")
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


def test_the_hashes_in_the_header_are_recomputed(tmp_path):
    layer = LoraLayer(torch.ones(1, 2), torch.ones(2, 1), 1.0)
    stale = AdapterFile({PATH: layer}, "sd1", {"sshs_model_hash": "e3b0c442"})
    write_adapter(stale, tmp_path / "a.safetensors")
    written = read_header(tmp_path / "a.safetensors").metadata
    assert written["sshs_model_hash"] == sha256_of_tensor_data(tmp_path / "a.safetensors")
    assert set(written) == {"sshs_model_hash", "sshs_legacy_hash"}


def test_components_are_counted(tiny_base, make_adapter):
    base = tiny_base()
    adapter = make_adapter(base)
    assert set(adapter.components()) == {"unet", *base.text_encoders}
    assert adapter.components()["text_encoder"] == 8
    assert sum(adapter.components().values()) == len(adapter.layers)


def test_non_finite_weights_are_not_written_and_the_old_file_stays(tmp_path):
    path = tmp_path / "a.safetensors"
    write_adapter(adapter_of(LoraLayer(torch.ones(1, 2), torch.ones(2, 1), 1.0)), path)
    before = path.read_bytes()
    for value in (float("nan"), float("inf")):
        bad = LoraLayer(torch.ones(1, 2), torch.full((2, 1), value), 1.0)
        with pytest.raises(FormatError, match=f"layer {PATH} holds NaN or infinity; not written"):
            write_adapter(adapter_of(bad), path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_an_unknown_format_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="adapter format 'a1111' is unknown; known: kohya"):
        write_adapter(AdapterFile({}, "sd1"), tmp_path / "a.safetensors", "a1111")


def pair(name=NAME, suffixes=("lora_down.weight", "lora_up.weight")):
    return {f"{name}.{suffixes[0]}": torch.ones(1, 2), f"{name}.{suffixes[1]}": torch.ones(2, 1)}


REFUSED = {
    "half a pair": ({f"{NAME}.lora_up.weight": torch.ones(2, 1)}, "has no lora_down.weight; the file is incomplete"),
    "NaN": ({**pair(), f"{NAME}.lora_up.weight": torch.full((2, 1), float("nan"))}, "holds NaN or infinity"),
    "NaN in float8": (
        {key: torch.full_like(value, float("nan")).to(torch.float8_e4m3fn) for key, value in pair().items()},
        "holds NaN or infinity",
    ),
    "half a LyCORIS group": ({**pair(), "lora_unet_conv_in.hada_w1_a": torch.ones(1, 1)}, "lora_unet_conv_in"),
    "OFT": ({"lora_unet_conv_in.oft_blocks": torch.ones(1, 1, 1)}, "is an OFT adapter, which this version"),
    "a foreign tensor": ({**pair(), "x.y": torch.ones(1, 4)}, "1 tensors that this version does not understand"),
    "NaN in a word": ({"emb_params": torch.full((1, 4), float("nan"))}, "word 'a' holds NaN or infinity"),
    "a word without vectors": ({"emb_params": torch.ones(0, 4)}, "expected floating-point vectors"),
    "a word of integers": ({"clip_l": torch.ones(1, 4, dtype=torch.int64)}, "a tensor clip_l of torch.int64"),
    "a word twice": ({"clip_l": torch.ones(1, 4), "emb_params": torch.ones(1, 4)}, "holds the word 'a' twice"),
    "a bundled word without name": ({**pair(), "bundle_emb. .clip_l": torch.ones(1, 4)}, "without a word"),
    "half a pair of PEFT": (
        {"unet.conv_in.lora_A.weight": torch.ones(1, 2)},
        r"unet\.conv_in has no lora_B\.weight; the file is incomplete",
    ),
    "IA3": ({"lora_unet_conv_in.on_input": torch.ones(1)}, "is an IA3 adapter, which this version does not read"),
    "Flux": ({"lora_unet_double_blocks_0_img_attn_qkv.x": torch.ones(1, 2)}, "is an adapter for Flux or a like model"),
    "checkpoint": ({"model.diffusion_model.out.2.bias": torch.ones(4)}, "is a whole Stable Diffusion checkpoint"),
    "anything": ({"transformer.blocks.0": torch.ones(2, 8)}, r"holds no adapter \(1 tensors, such as 'transformer"),
    "nothing": ({}, r"holds no adapter \(0 tensors, none\)"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_readable_adapter_is_refused_in_one_sentence(tmp_path, name):
    tensors, sentence = REFUSED[name]
    path = tmp_path / "a.safetensors"
    save_file(tensors, path)
    with pytest.raises(FormatError, match=sentence) as caught:
        read_adapter(path)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


def test_a_missing_file_a_folder_and_a_web_page_are_refused(tmp_path):
    with pytest.raises(FormatError, match="there is no such adapter file"):
        read_adapter(tmp_path / "none.safetensors")
    with pytest.raises(FormatError, match="is a folder"):
        read_adapter(tmp_path)
    (tmp_path / "a.safetensors").write_text("<html>log in</html>")
    with pytest.raises(FormatError, match="is a web page"):
        read_adapter(tmp_path / "a.safetensors")


def test_random_damage_is_refused_or_harmless(tmp_path):
    path = tmp_path / "a.safetensors"
    write_adapter(adapter_of(LoraLayer(torch.ones(2, 3), torch.ones(3, 2), 1.0)), path)
    sound, draw, refused = path.read_bytes(), random.Random(11), 0
    for _ in range(600):
        data = bytearray(sound)
        for _ in range(draw.choice((1, 2, 4))):
            data[draw.randrange(len(data))] = draw.choice((draw.randrange(256), *b'0123"_.,[]'))
        path.write_bytes(data)
        try:
            layers = read_adapter(path).layers
        except FormatError as error:
            refused += 1
            assert str(error).startswith(str(path))
        else:
            assert all(layer.delta_weight().isfinite().all() for layer in layers.values())
    assert 100 < refused < 600


def words_of(base_or_encoders, *words, count=2, dtype=torch.float32):
    generator = torch.Generator().manual_seed(len(words))
    return {
        word: {name: torch.randn(count, 32, generator=generator).to(dtype) for name in base_or_encoders}
        for word in words
    }


def same_words(one, other) -> bool:
    return one.keys() == other.keys() and all(
        one[word].keys() == other[word].keys()
        and all(torch.equal(one[word][name], other[word][name]) for name in one[word])
        for word in one
    )


@pytest.mark.parametrize("bundle", [False, True])
def test_words_travel_beside_an_adapter_or_in_it(tiny_base, make_adapter, tmp_path, bundle):
    base = tiny_base()
    metadata = dict(base.family.metadata[base.prediction])
    words = words_of(base.text_encoders, "zorb", "<my word>/x")
    adapter = replace(make_adapter(base), metadata=metadata, tokens=words)
    first, second = tmp_path / "a" / "x.safetensors", tmp_path / "b" / "x.safetensors"
    write_adapter(adapter, first, bundle=bundle)
    read = read_adapter(first)
    assert same_words(read.tokens, adapter.tokens)
    assert set(read.layers) == set(adapter.layers)
    write_adapter(read, second, bundle=bundle)
    files = {path.relative_to(tmp_path / "a"): path.read_bytes() for path in (tmp_path / "a").rglob("*.*")}
    assert files == {path.relative_to(tmp_path / "b"): path.read_bytes() for path in (tmp_path / "b").rglob("*.*")}
    beside = sorted(path.name for path in files if path.parent.name == "embeddings")
    bundled = [key for key in read_header(first).tensors if key.startswith("bundle_emb.")]
    kinds = ["clip_g", "clip_l"] if "text_encoder_2" in base.text_encoders else ["string_to_param.*"]
    if bundle:
        assert beside == []
        assert sorted(bundled) == [f"bundle_emb.{word}.{kind}" for word in ("<my word>/x", "zorb") for kind in kinds]
    else:
        assert bundled == [] and len(beside) == 2
        assert beside[0].startswith("_my word__x-") and beside[1] == "zorb.safetensors"
        alone = read_adapter(first.parent / "embeddings" / beside[0])
        assert same_words(alone.tokens, {"<my word>/x": adapter.tokens["<my word>/x"]}) and alone.layers == {}


def test_a_pair_becomes_a_bundle_and_back(tiny_base, make_adapter, tmp_path):
    base = tiny_base()
    adapter = replace(make_adapter(base), tokens=words_of(base.text_encoders, "zorb"))
    write_adapter(adapter, tmp_path / "a.safetensors")
    write_adapter(read_adapter(tmp_path / "a.safetensors"), tmp_path / "b" / "a.safetensors", bundle=True)
    write_adapter(read_adapter(tmp_path / "b" / "a.safetensors"), tmp_path / "c" / "a.safetensors")
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "c" / "a.safetensors").read_bytes()
    assert not (tmp_path / "b" / "embeddings").exists()


def test_one_word_alone_is_an_embedding_file(tiny_base, tmp_path):
    base = tiny_base()
    metadata = dict(base.family.metadata[base.prediction]) | {"ss_network_dim": "16", "ss_seed": "3"}
    words = words_of(base.text_encoders, "zorb", dtype=torch.float16)
    first, second = tmp_path / "first.safetensors", tmp_path / "second.safetensors"
    write_adapter(AdapterFile({}, base.family.name, metadata, words), first)
    header = read_header(first)
    expected = {"clip_l", "clip_g"} if "text_encoder_2" in base.text_encoders else {"emb_params"}
    assert header.tensors.keys() == expected
    assert header.metadata["modelspec.architecture"].endswith("/textual-inversion")
    assert header.metadata["sdlora_word"] == "zorb" and header.metadata["ss_seed"] == "3"
    assert "ss_network_dim" not in header.metadata
    assert header.metadata["sshs_model_hash"] == sha256_of_tensor_data(first)
    read = read_adapter(first)
    assert read.family == base.family.name == adapter_family(first)
    assert same_words(read.tokens, words) and read.layers == {}
    assert read.token_digests() == {"zorb": sha256_of_tensor_data(first)}
    write_adapter(read, second)
    assert first.read_bytes() == second.read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["first.safetensors", "second.safetensors"]


@pytest.mark.parametrize(
    ("stem", "word_there", "others"),
    [("a", "zorb", ["blick.safetensors"]), ("blick", "blick", ["zorb.safetensors"])],
)
def test_several_words_without_layers_are_an_embedding_file_each(tmp_path, stem, word_there, others):
    words = words_of(["text_encoder"], "zorb", "blick")
    path = tmp_path / f"{stem}.safetensors"
    write_adapter(AdapterFile({}, "sd1", {}, words), path)
    assert sorted(file.name for file in tmp_path.iterdir()) == sorted([path.name, *others])
    assert word_files(path, words, with_layers=False)[word_there] == path
    for word, file in word_files(path, words, with_layers=False).items():
        assert read_header(file).tensors.keys() == {"emb_params"}
        assert same_words(read_adapter(file).tokens, {word: words[word]})


def test_several_words_without_layers_bundled_are_one_file(tmp_path):
    words = words_of(["text_encoder"], "zorb", "blick")
    write_adapter(AdapterFile({}, "sd1", {}, words), tmp_path / "a.safetensors", bundle=True)
    assert [file.name for file in tmp_path.iterdir()] == ["a.safetensors"]
    assert same_words(read_adapter(tmp_path / "a.safetensors").tokens, words)


FOREIGN_EMBEDDINGS = {
    "kohya's": ({"emb_params": (2, 768)}, {}, "my-file", "sd1"),
    "kohya's for SD2": ({"emb_params": (2, 1024)}, {}, "my-file", "sd2"),
    "kohya's for SDXL": ({"clip_l": (2, 768), "clip_g": (2, 1280)}, {}, "my-file", "sdxl"),
    "of unknown width": ({"emb_params": (2, 8)}, {}, "my-file", ""),
    "of told family": ({"emb_params": (2, 8)}, {"ss_base_model_version": "sd_v2"}, "my-file", "sd2"),
    "diffusers'": ({"<cat-toy>": (2, 768)}, {}, "<cat-toy>", "sd1"),
    "diffusers' with dots": ({"<v1.5>": (2, 1024)}, {}, "<v1.5>", "sd2"),
    "diffusers' of one vector": ({"zorb": (768,)}, {}, "zorb", "sd1"),
}


@pytest.mark.parametrize("kind", FOREIGN_EMBEDDINGS)
def test_embeddings_of_other_programs_are_read(tmp_path, kind):
    shapes, metadata, word, family = FOREIGN_EMBEDDINGS[kind]
    tensors = {key: torch.randn(shape) for key, shape in shapes.items()}
    save_file(tensors, tmp_path / "my-file.safetensors", metadata)
    read = read_adapter(tmp_path / "my-file.safetensors")
    (vectors,) = read.tokens.values()
    assert (list(read.tokens), read.family, dict(read.layers)) == ([word], family, {})
    assert adapter_family(tmp_path / "my-file.safetensors") == family
    encoders = {"clip_g": "text_encoder_2"}
    for key, tensor in tensors.items():
        assert torch.equal(vectors[encoders.get(key, "text_encoder")], torch.atleast_2d(tensor))


def test_a_bundle_of_another_program_is_read(tmp_path):
    tensors = {
        **pair(),
        "bundle_emb.a.b.string_to_param.*": torch.ones(2, 768),
        "bundle_emb.c.emb_params": torch.ones(1, 768),
    }
    save_file(tensors, tmp_path / "a.safetensors")
    read = read_adapter(tmp_path / "a.safetensors")
    assert {word: vectors["text_encoder"].shape for word, vectors in read.tokens.items()} == {
        "a.b": (2, 768),
        "c": (1, 768),
    }
    assert read.family == "sd1" and set(read.layers) == {PATH}


@pytest.fixture
def couple(tmp_path):
    """An adapter file with the word "zorb" beside it."""
    layers = {PATH: LoraLayer(torch.ones(1, 2), torch.ones(2, 1), 1.0)}
    adapter = AdapterFile(layers, "sd1", {}, words_of(["text_encoder"], "zorb"))
    write_adapter(adapter, tmp_path / "a.safetensors")
    return tmp_path / "a.safetensors", tmp_path / "embeddings" / "zorb.safetensors", adapter


def test_a_words_file_may_lie_beside_the_adapter_too(couple):
    path, beside, adapter = couple
    beside.rename(path.parent / beside.name)
    assert same_words(read_adapter(path).tokens, adapter.tokens)
    other = replace(adapter, tokens=words_of(["text_encoder"], "zorb", count=3))
    write_adapter(other, path.parent / "b.safetensors")
    assert beside.is_file()
    assert same_words(read_adapter(path).tokens, adapter.tokens)  # that of embeddings/ is another's


def test_an_adapter_without_its_word_is_refused(couple):
    path, beside, _ = couple
    beside.unlink()
    with pytest.raises(
        FormatError, match=r"the new word 'zorb', which is not there; put its own zorb\.safetensors"
    ) as caught:
        read_adapter(path)
    assert str(caught.value).startswith(f"{path}: was trained together with") and "\n" not in str(caught.value)
    assert str(beside.parent) in str(caught.value)
    write_adapter(AdapterFile({}, "sd1", {}, words_of(["text_encoder"], "zorb", count=3)), beside)
    with pytest.raises(FormatError, match=r"zorb\.safetensors holds other vectors than it was trained with"):
        read_adapter(path)
    beside.write_text("<html>")
    with pytest.raises(FormatError, match="is a web page"):
        read_adapter(path)


@pytest.mark.parametrize("named", ["[]", "not json", '{"": "ab"}', '{"zorb": 3}', "[" * 100_000])
def test_words_named_in_no_readable_way_are_refused(tmp_path, named):
    save_file(pair(), tmp_path / "a.safetensors", {"sdlora_words": named})
    with pytest.raises(FormatError, match="header entry sdlora_words does not name words"):
        read_adapter(tmp_path / "a.safetensors")


@pytest.mark.parametrize("word", ["../../secret", "/etc/passwd", "..", "a\\b", "a:b", "x" * 300, "\x00"])
def test_a_hostile_word_reaches_no_file_elsewhere(tmp_path, word):
    folder = tmp_path / "a" / "b"
    folder.mkdir(parents=True)
    words = words_of(["text_encoder"], word)
    write_adapter(
        AdapterFile({PATH: LoraLayer(torch.ones(1, 2), torch.ones(2, 1), 1.0)}, "sd1", {}, words),
        folder / "x.safetensors",
    )
    (written,) = [path for path in tmp_path.rglob("*.safetensors") if path.name != "x.safetensors"]
    assert written.parent == folder / "embeddings" and len(written.name) < 120
    assert same_words(read_adapter(folder / "x.safetensors").tokens, words)


def test_words_of_nan_are_not_written_and_nothing_changes(couple):
    path, beside, adapter = couple
    before = path.read_bytes(), beside.read_bytes()
    bad = {"zorb": {"text_encoder": torch.full((1, 32), float("inf"))}}
    with pytest.raises(FormatError, match="word 'zorb' holds NaN or infinity; not written"):
        write_adapter(replace(adapter, tokens=bad), path)
    assert (path.read_bytes(), beside.read_bytes()) == before
    assert json.loads(read_header(path).metadata["sdlora_words"]) == {"zorb": sha256_of_tensor_data(beside)}
