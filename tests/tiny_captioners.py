"""Image-to-text models of every kind with random weights, some 10 kB each, that say what a test wants to hear."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2Processor,
    BlipConfig,
    BlipForConditionalGeneration,
    BlipProcessor,
    CLIPVisionConfig,
    Florence2Config,
    Florence2ForConditionalGeneration,
    Florence2Processor,
    GitConfig,
    GitForCausalLM,
    GitProcessor,
    GPT2Config,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    OPTConfig,
    PreTrainedTokenizerFast,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    VisionEncoderDecoderConfig,
    VisionEncoderDecoderModel,
    ViTConfig,
)
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

_SPECIAL = ["<pad>", "<s>", "</s>", "<unk>", "<image>", "<video>", "<vision>"]
_PAD, _START, _END, _UNKNOWN, _IMAGE, _VIDEO, _VISION = range(len(_SPECIAL))
_WORDS = ["a", "the", "red", "blue", "cat", "dog", "photo", "of", "what", "is", "this", "?", "user", "assistant", ":"]
_WORDS += ["<think>", "</think>"]
_IDS = {word: number for number, word in enumerate(_SPECIAL + _WORDS)}
_TINY = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
_SEES = {"image_size": 16, "patch_size": 8}
_SIZE = {"height": 16, "width": 16}

CHAT = (
    "{% for m in messages %}{{ m.role }} : {% for part in m.content %}{% if part.type == 'image' %}<image>"
    "{% else %} {{ part.text }}{% endif %}{% endfor %}{% endfor %}{% if add_generation_prompt %} assistant :{% endif %}"
)
CHAT_OF_TEXTS = (
    "{{ bos_token }}{% for m in messages %}{{ m['role'] + ' : <image> ' + m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %} assistant :{% endif %}"
)


def save_captioner(kind: str, folder: Path, says: str = "a red cat", **options: Any) -> Path:
    """`folder` holds a model of that kind, a key of KINDS, whose captions are `says`; "": what chance says.

    Asked about a dog, a chat model says "blue". The BLIPs say "cat" all the time.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model, processors = KINDS[kind](**options)
    if says:
        _make_say(model, says)
    else:
        _make_lively(model)
    model.save_pretrained(folder)
    for processor in processors:
        processor.save_pretrained(folder)
    return folder


def _make_say(model: Any, says: str) -> None:
    words = [_IDS[word] for word in says.split()] + [_END]
    pairs = [[[first, second], 60.0] for first, second in pairwise(words)]
    about_dogs = [_IDS[word] for word in ("dog", "assistant", ":", "blue")]
    model.generation_config.sequence_bias = [
        [[words[0]], 30.0],
        *pairs,
        [about_dogs, 90.0],
        [[_IDS["blue"], _END], 60.0],
    ]


def _make_lively(model: Any) -> None:
    """The model's weights are so large that the picture decides what it says, words alone."""
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1:
                weight *= 10
    model.generation_config.suppress_tokens = list(range(len(_SPECIAL)))


def _tokenizer(*, begins: bool = False, ends: bool = False, **options: Any) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.WordLevel(dict(_IDS), unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=" ".join(["<s>"] * begins + ["$A"] + ["</s>"] * ends),
        special_tokens=[("<s>", _START), ("</s>", _END)],
    )
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "additional_special_tokens": _SPECIAL}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **(special | {"pad_token": "<pad>"} | options))


def _blip() -> tuple[Any, list[Any]]:
    ids = {"bos_token_id": _START, "eos_token_id": _END, "sep_token_id": _END, "pad_token_id": _PAD}
    text = {**_TINY, **ids, "vocab_size": len(_IDS), "encoder_hidden_size": 16, "projection_dim": 8}
    config = BlipConfig(text_config=text, vision_config={**_TINY, **_SEES, "projection_dim": 8})
    model = BlipForConditionalGeneration(config)
    with torch.no_grad():
        model.text_decoder.cls.predictions.bias[_IDS["cat"]] = 99.0
    tokenizer = _tokenizer(begins=True, ends=True)
    return model, [BlipProcessor(BlipImageProcessorPil(size=_SIZE), tokenizer)]


def _blip2() -> tuple[Any, list[Any]]:
    ids = {"bos_token_id": _START, "eos_token_id": _END, "pad_token_id": _PAD}
    sizes = {"hidden_size": 16, "word_embed_proj_dim": 16, "ffn_dim": 16, "num_hidden_layers": 1}
    text = OPTConfig(vocab_size=len(_IDS), num_attention_heads=2, max_position_embeddings=64, **sizes, **ids)
    config = Blip2Config(
        vision_config={**_TINY, **_SEES},
        qformer_config={**_TINY, "encoder_hidden_size": 16, "vocab_size": 9},
        text_config=text.to_dict(),
        num_query_tokens=4,
        image_token_index=_IMAGE,
    )
    model = Blip2ForConditionalGeneration(config)
    with torch.no_grad():  # the last hidden state is always the embedding of "cat"
        words = model.language_model.get_input_embeddings().weight
        words[_IDS["cat"]] *= 100
        norm = model.language_model.model.decoder.final_layer_norm
        norm.weight.zero_()
        norm.bias.copy_(words[_IDS["cat"]])
    return model, [Blip2Processor(BlipImageProcessorPil(size=_SIZE), _tokenizer(begins=True), num_query_tokens=4)]


def _git() -> tuple[Any, list[Any]]:
    ids = {"bos_token_id": _START, "eos_token_id": _END, "pad_token_id": _PAD}
    vision = {**_TINY, **_SEES}
    config = GitConfig(vision_config=vision, vocab_size=len(_IDS), max_position_embeddings=64, **_TINY, **ids)
    images = CLIPImageProcessorPil(size=_SIZE, crop_size=_SIZE)
    return GitForCausalLM(config), [GitProcessor(images, _tokenizer(begins=True, ends=True))]


def _vit_gpt2() -> tuple[Any, list[Any]]:
    decoder = GPT2Config(vocab_size=len(_IDS), n_positions=64, n_embd=16, n_layer=1, n_head=2, bos_token_id=_START)
    config = VisionEncoderDecoderConfig.from_encoder_decoder_configs(ViTConfig(**_TINY, **_SEES), decoder)
    config.decoder_start_token_id, config.eos_token_id, config.pad_token_id = _START, _END, _END
    return VisionEncoderDecoderModel(config), [_tokenizer(), ViTImageProcessorPil(size=_SIZE)]


def _llava(chat_template: str | None = CHAT) -> tuple[Any, list[Any]]:
    ids = {"bos_token_id": _START, "eos_token_id": _END, "pad_token_id": None}
    text = LlamaConfig(vocab_size=len(_IDS), num_key_value_heads=2, max_position_embeddings=256, **_TINY, **ids)
    vision = CLIPVisionConfig(**_TINY, **_SEES, projection_dim=8)
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=_IMAGE, vision_feature_layer=-1)
    processor = LlavaProcessor(
        CLIPImageProcessorPil(size=_SIZE, crop_size=_SIZE),
        _tokenizer(begins=True, pad_token=None),
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=chat_template,
    )
    return LlavaForConditionalGeneration(config), [processor]


def _qwen2_vl() -> tuple[Any, list[Any]]:
    config = Qwen2VLConfig(
        vision_config={"depth": 1, "embed_dim": 16, "hidden_size": 16, "num_heads": 2, "patch_size": 4, "mlp_ratio": 1},
        text_config={
            **_TINY,
            "vocab_size": len(_IDS),
            "num_key_value_heads": 2,
            "max_position_embeddings": 2048,
            "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2]},
            "eos_token_id": _END,
            "pad_token_id": _PAD,
        },
        image_token_id=_IMAGE,
        video_token_id=_VIDEO,
        vision_start_token_id=_VISION,
        vision_end_token_id=_VISION,
    )
    tokenizer = _tokenizer(extra_special_tokens={"image_token": "<image>", "video_token": "<video>"})
    tokenizer.chat_template = CHAT.replace("<image>", "<vision> <image> <vision>")
    images = Qwen2VLImageProcessorPil(patch_size=4, size={"shortest_edge": 64, "longest_edge": 4096})
    return Qwen2VLForConditionalGeneration(config), [images, tokenizer]


def _florence2() -> tuple[Any, list[Any]]:
    vision = {
        "embed_dim": [8, 8], "depths": [1, 1], "num_heads": [2, 2], "num_groups": [2, 2], "window_size": 2,
        "patch_size": [7, 3], "patch_stride": [4, 2], "patch_padding": [3, 1], "patch_prenorm": [False, True],
        "projection_dim": 16, "max_temporal_embeddings": 4, "max_position_embeddings": 10,
    }  # fmt: skip
    text = {
        "model_type": "bart", "vocab_size": len(_IDS), "d_model": 16, "encoder_layers": 1, "decoder_layers": 1,
        "encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16,
        "max_position_embeddings": 64, "bos_token_id": _START, "eos_token_id": _END, "pad_token_id": _PAD,
        "decoder_start_token_id": _END, "forced_eos_token_id": None,
    }  # fmt: skip
    images = CLIPImageProcessorPil(size=_SIZE, crop_size=_SIZE)
    images.image_seq_length = 5
    tokenizer = _tokenizer(extra_special_tokens={"image_token": "<image>"})
    config = Florence2Config(vision_config=vision, text_config=text, image_token_id=_IMAGE)
    return Florence2ForConditionalGeneration(config), [Florence2Processor(images, tokenizer)]


KINDS: dict[str, Callable[..., tuple[Any, list[Any]]]] = {
    "blip": _blip,
    "blip-2": _blip2,
    "git": _git,
    "vit-gpt2": _vit_gpt2,
    "llava": _llava,
    "qwen2-vl": _qwen2_vl,
    "florence2": _florence2,
}
