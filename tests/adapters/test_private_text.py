"""What of a header is private: everything that is, and nothing that is not."""

import base64
import io
import json
import struct
import time
import zlib

import pytest
from picture_files import png, png_chunk
from PIL import Image, ImageCms

from sdlora.adapters.private_text import private_entries, public_settings, public_text, tellings


def encoded(format, mode="RGB", **more):
    """Return the file of a small picture."""
    buffer = io.BytesIO()
    Image.new("RGB", (16, 16), "red").convert(mode).save(buffer, format=format, **more)
    return buffer.getvalue()


def exif():
    tags = Image.Exif()
    tags[0x010E] = "anna"
    return tags


def url(data):
    return "data:image/jpeg;base64," + base64.b64encode(data).decode()


OURS = {
    "ss_output_name": "zorb",
    "modelspec.trigger_phrase": "zorb, a blick",
    "ss_tag_frequency": json.dumps({"zorb-1": {"zorb": 3}, "zorb-2": {"a blick": 4}}),
    "ss_dataset_dirs": json.dumps(
        {"zorb-1": {"n_repeats": 1, "img_count": 3}, "zorb-2": {"n_repeats": 2, "img_count": 4}}
    ),
    "ss_network_args": '{"conv_dim": "4"}',
    "ss_sd_model_name": "runwayml/stable-diffusion-v1-5",
    "ss_optimizer": "bitsandbytes.optim.adamw.AdamW8bit(weight_decay=0.01,betas=(0.9, 0.99))",
    "ss_resolution": "(512, 512)",
    "modelspec.architecture": "stable-diffusion-v1/lora",
    "modelspec.license": "https://example.org/licences/a.txt",
    "modelspec.description": "a cat/dog, 1/2 & w/o <br/> hats: 3.5 / 4, and/or \u201cmore\u201d",
    "modelspec.thumbnail": url(encoded("JPEG")),
    "modelspec.date": "2024-01-02T03:04:05",
    "sdlora_words": '{"zorb": "4fcb"}',
    "sshs_model_hash": "ab" * 32,
    "<s1>": "<embed>",
    "unet:0:rank": "4",
}


def test_a_file_that_tells_nothing_stays_as_it_is():
    assert private_entries(OURS) == {}
    assert public_text(OURS) == OURS


@pytest.mark.parametrize(
    "text",
    [
        "/home/anna/models/sd.safetensors",
        "trained on /mnt/data",
        "x=/root",
        '{"preset": "/workspace/full.toml"}',
        "C:\\Users\\Anna\\sd.safetensors",
        "d:/models/sd.ckpt",
        '["E:\\\\pictures"]',
        "\\\\server\\share",
        "pictures\\cats",
        "file:///etc/hosts",
        "file:/etc",
        "~/models",
        "~anna/models",
        "../models/sd",
        "./a",
        "%USERPROFILE%\\x",
        "$HOME/x",
        "see https://example.org/a and /home/anna",
        "base=https://hf.co/x,out=/home/anna/loras",
        "[a](https://hf.co/x)|/home/anna/loras",
        "/home/anna/" + "loras/" * 50,
        "base=/mnt/" + "loras/" * 50,
    ],
)
def test_every_kind_of_path_is_found(text):
    assert private_entries({"ss_sd_model_name": text}) == {"ss_sd_model_name": "a path"}
    assert public_text({"ss_sd_model_name": text}) == {}


def test_a_file_in_a_folder_is_found():
    for text in ("models/my/sd.safetensors", f"models/{'x' * 200}/{'y' * 200}.png", "a/" * 150 + "sd.safetensors"):
        assert private_entries({"ss_sd_model_name": text}) == {"ss_sd_model_name": "a file in a folder"}
    assert private_entries({"ss_sd_model_name": "A0+/" * 60 + "=="}) == {}  # base64


def test_people_and_sessions_are_found():
    text = {
        "ss_training_comment": "",
        "ss_session_id": "123",
        "ss_datasets": "[]",
        "modelspec.author": "Anna",
        "modelspec.description": "ask anna.b+x@mail.example.org",
        "my_own": "x",
        "ss_loss_type": "x" * 100_001,
    }
    assert private_entries(text) == {
        "ss_training_comment": "a comment on the training",
        "ss_session_id": "which session trained it",
        "ss_datasets": "folders and captions of the pictures",
        "modelspec.author": "the author",
        "modelspec.description": "an e-mail address",
        "my_own": "something of unknown meaning",
        "ss_loss_type": "something of 100001 characters",
    }
    assert public_text(text | {"ss_seed": "3"}) == {"ss_seed": "3"}


def test_of_tags_the_trigger_words_stay_and_of_folders_the_counts():
    text = {
        "ss_output_name": "cat",
        "modelspec.trigger_phrase": "mycat, grey cat",
        "ss_tag_frequency": json.dumps(
            {"3_anna cat": {" mycat": 5, "at anna's": 2}, "1_b": {"mycat": 1, "grey cat": 2}}
        ),
        "ss_dataset_dirs": json.dumps({"3_anna cat": {"n_repeats": 3, "img_count": 5, "by": "anna"}, "1_b": 7}),
        "ss_reg_dataset_dirs": json.dumps({"1_people": {"n_repeats": 1, "img_count": 9}}),
    }
    public = public_text(text)
    assert json.loads(public["ss_tag_frequency"]) == {"cat": {"mycat": 6, "grey cat": 2}}
    assert json.loads(public["ss_dataset_dirs"]) == {"cat-1": {"n_repeats": 3, "img_count": 5}, "cat-2": {}}
    assert json.loads(public["ss_reg_dataset_dirs"]) == {"cat-prior": {"n_repeats": 1, "img_count": 9}}
    assert set(private_entries(text)) == {"ss_tag_frequency", "ss_dataset_dirs", "ss_reg_dataset_dirs"}
    assert private_entries(public) == {}  # nothing is left to find
    del text["modelspec.trigger_phrase"]
    assert "ss_tag_frequency" not in public_text(text)  # any tag may be a caption


def told_by(data):
    return private_entries({"modelspec.thumbnail": url(data)}).get("modelspec.thumbnail", "")


def png_of(name, data, *, behind):
    chunks = {"after" if behind else "before": [(name, data)]}
    return png(2, 1, 8, 2, bytes(6), **chunks)


def jpeg_of(segment, data):
    whole = encoded("JPEG")
    return whole[:2] + b"\xff" + bytes([segment]) + struct.pack(">H", len(data) + 2) + data + whole[2:]


@pytest.mark.parametrize("behind", [False, True])
@pytest.mark.parametrize(
    ("chunk", "data"),
    [
        (b"tEXt", b"parameters\0anna"),
        (b"tEXt", b"dpi\0anna"),  # called as what is harmless
        (b"zTXt", b"parameters\0\0" + zlib.compress(b"anna")),
        (b"iTXt", b"parameters\0\0\0\0\0anna"),
        (b"eXIf", b"II*\0anna"),
        (b"caBX", b"who made it"),
    ],
)
def test_text_in_a_png_is_found_before_its_pixels_and_behind(chunk, data, behind):
    assert told_by(png_of(chunk, data, behind=behind)) == "text inside a picture"


@pytest.mark.parametrize(
    ("segment", "data"),
    [
        (0xFE, b"by anna"),  # a comment
        (0xE1, exif().tobytes()),
        (0xE1, b"http://ns.adobe.com/xap/1.0/\0<x:xmpmeta/>"),
        (0xED, b"Photoshop 3.0\0008BIM\x04\x04\0\0\0\0\0\x04anna"),  # IPTC
        (0xEB, b"JP\0\1jumb, who made it"),
        (0xE0, b"JFXX\0\x10a small picture"),
        (0xE5, b"anna"),
    ],
)
def test_text_in_a_jpeg_is_found(segment, data):
    assert told_by(jpeg_of(segment, data)) == "text inside a picture"


def test_text_in_a_webp_and_profiles_are_found():
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for more in ({"exif": exif()}, {"xmp": b"<x:xmpmeta/>"}, {"icc_profile": profile}):
        assert told_by(encoded("WEBP", **more)) == "text inside a picture"
    for format in ("JPEG", "PNG"):
        assert told_by(encoded(format, icc_profile=profile)) == "text inside a picture"


@pytest.mark.parametrize(
    ("format", "more"),
    [
        ("JPEG", {"dpi": (72, 72), "progressive": True}),
        ("PNG", {"dpi": (72, 72)}),
        ("WEBP", {}),
        ("WEBP", {"lossless": True}),
    ],
)
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK", "RGBA", "P"])
def test_a_picture_of_pixels_alone_stays(format, more, mode):
    if mode in {"JPEG": ("RGB", "L", "CMYK"), "PNG": ("RGB", "L", "RGBA", "P"), "WEBP": ("RGB", "RGBA")}[format]:
        assert told_by(encoded(format, mode, **more)) == ""


@pytest.mark.parametrize(
    "data",
    [
        encoded("GIF", comment=b"anna"),
        encoded("GIF"),
        encoded("TIFF"),
        b"<svg xmlns='http://www.w3.org/2000/svg'><desc>anna</desc></svg>",
        encoded("JPEG")[:300],
        encoded("PNG")[:50],
        b"anna",
    ],
)
def test_what_is_no_plain_picture_does_not_stay(data):
    assert told_by(data) == "a picture that is no plain JPEG, PNG or WebP"
    assert public_text({"modelspec.thumbnail": url(data)}) == {}


def test_a_picture_of_too_many_pixels_is_not_decoded():
    header = struct.pack(">IIBBBBB", 20_000, 5_000, 8, 2, 0, 0, 0)
    whole = png(2, 1, 8, 2, bytes(6))
    huge = whole[:8] + png_chunk(b"IHDR", header) + whole[33:]
    assert told_by(huge) == "a picture that is no plain JPEG, PNG or WebP"  # Pillow warns
    huge = whole[:8] + png_chunk(b"IHDR", struct.pack(">IIBBBBB", 5000, 5000, 8, 2, 0, 0, 0)) + whole[33:]
    assert told_by(huge) == "a picture too large to look into"


def test_a_picture_elsewhere_is_found():
    assert private_entries({"modelspec.thumbnail": "https://a.example/b.png"}) == {
        "modelspec.thumbnail": "a picture elsewhere"
    }
    assert "ssmd_cover_images" in private_entries({"ssmd_cover_images": "[]"})


def test_the_bases_place_is_taken_out_of_pefts_settings():
    pattern = r"blocks\.\d+\.(to_q|to_k)"
    settings = {"r": 4, "base_model_name_or_path": "/home/anna/sd", "revision": None, "target_modules": pattern}
    public = public_settings(settings)
    assert public == settings | {"base_model_name_or_path": None}
    odd = {"note": "one\ntwo", "name": 'a "b"', "kept": ["to_q", {"x": 1.5}]}
    assert public_settings(odd) == odd  # as written in JSON they have backslashes
    assert public_settings({"a": ["/home/anna"], "b": {"c": "~/x"}}) == {"a": None, "b": None}
    named = {f"unet.{key}": value for key, value in settings.items()}
    found = public_text({"lora_adapter_metadata": json.dumps(named)})
    assert json.loads(found["lora_adapter_metadata"]) == {f"unet.{key}": value for key, value in public.items()}


@pytest.mark.parametrize(
    "text", ["[" * 100_000, "\\ud800", "a" * 99_999, "~" * 99_999, "x/" * 40_000, "a@" * 40_000, "a-" * 49_999, "."]
)
def test_odd_text_is_judged_quickly(text):
    started = time.perf_counter()
    for key in ("ss_tag_frequency", "ss_dataset_dirs", "ss_optimizer", "lora_adapter_metadata", "modelspec.thumbnail"):
        public_text({key: text, "modelspec.trigger_phrase": text})
    assert time.perf_counter() - started < 5


@pytest.mark.parametrize(
    "part", ["a-", "~", "x/", "a@", "a.", "%a", "data:", "A" * 199 + "/", "http://", "/9j/", "a/. "]
)
def test_text_without_end_is_searched_in_a_time_like_its_length(part):
    """A path behind it is found, which a limit would miss."""
    text = part * (1_000_000 // len(part)) + ' "C:\\Users'
    started = time.perf_counter()
    assert any(what == "a path" for what, _ in tellings(text))
    assert time.perf_counter() - started < 5
