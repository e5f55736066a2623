"""Models that say in words what a picture shows: the image-to-text models of transformers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from jinja2 import TemplateError
from PIL import Image
from safetensors import SafetensorError
from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING
from transformers.utils import is_torchvision_available
from transformers.utils import logging as transformers_logging

from sdlora.errors import DataError, ModelError, first_line
from sdlora.families.detect import read_json
from sdlora.families.registry import choose_dtype, find_device
from sdlora.families.sources import download, is_hub_id

DEFAULT_QUESTION = "Describe this image in one sentence."
# What models without chat were trained to be asked; the others need no prompt.
_OWN_PROMPTS = {"florence2": "<CAPTION>", "paligemma": "caption en"}
_DOWNLOADED = ("*.json", "*.safetensors", "*.jinja", "*.txt", "*.model")
_LEFT_OUT = ("original/*", "onnx/*", "consolidated*")  # the same weights in other programs' forms
_PREPARATION_FILES = ("preprocessor_config.json", "processor_config.json")
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_LIBRARY_ERRORS = (
    OSError, ImportError, ValueError, RuntimeError, LookupError, AttributeError, TypeError, SafetensorError, TemplateError,
)  # fmt: skip

Prepare = Callable[[Sequence[Image.Image]], Any]
"""From pictures to a model's inputs."""


class Captioner:
    """An image-to-text model with the question that it is asked about each picture."""

    def __init__(self, name: str, model: Any, tokenizer: Any, prepare: Prepare) -> None:
        """`prepare` puts the question beside the pictures."""
        self.name = name
        self._model = model
        self._tokenizer = tokenizer
        self._prepare = prepare

    def describe(self, pictures: Sequence[Image.Image], *, max_tokens: int = 75, beams: int = 0) -> list[str]:
        """Return what the model says of each RGB picture, without the prompt and special tokens; the same every time.

        `beams` 0: as many as the model's own settings say. Raises DataError where the model's preparation
        refuses a picture, ModelError where the model fails.
        """
        try:
            inputs = self._prepare(pictures)
        except _LIBRARY_ERRORS as error:
            raise DataError(f"the model cannot take this picture ({first_line(error)})") from error
        with _explained(self.name, "cannot describe pictures"):
            return self._generate(inputs, max_tokens, beams)

    def try_out(self) -> None:
        """The model has said a word about a white picture. Raises ModelError where it cannot."""
        advice = "give --prompt in the form that the model's page shows"
        with _explained(self.name, "cannot be asked for a caption", advice):
            self._generate(self._prepare([Image.new("RGB", (64, 64), "white")]), 1, 0)

    @torch.inference_mode()
    def _generate(self, inputs: Any, max_tokens: int, beams: int) -> list[str]:
        inputs = inputs.to(self._model.device, self._model.dtype)
        search = {"num_beams": beams} if beams else {}
        said = self._model.generate(**inputs, max_new_tokens=max_tokens, do_sample=False, **search)
        # A decoder's output begins with what it was given; what an encoder was given is not in it.
        begun = inputs.get("decoder_input_ids" if self._model.config.is_encoder_decoder else "input_ids")
        asked = self._texts(begun) or [""] * len(said)
        return [_answer(text, prompt) for text, prompt in zip(self._texts(said), asked, strict=True)]

    def _texts(self, tokens: torch.Tensor | None) -> list[str]:
        return [] if tokens is None else list(self._tokenizer.batch_decode(tokens, skip_special_tokens=True))


def load_captioner(
    name: str,
    *,
    prompt: str | None = None,
    revision: str = "",
    precision: str = "auto",
    device: torch.device | str | None = None,
) -> Captioner:
    """Return the model in the folder or under the Hugging Face id `name`, ready to describe pictures.

    `prompt` is what a chat model is asked, or the words that the captions of another model begin with; None: what
    suits the model. No code from the model's folder is run, and no pickle is opened.
    Raises ModelError, with one sentence, for anything that cannot describe pictures.
    """
    target = find_device(device)
    folder = _find(name, revision)
    kind = str(read_json(folder / "config.json")["model_type"])
    transformers_logging.disable_progress_bar()
    with _explained(name, "cannot be loaded"):
        images, tokenizer, processor = _load_processor(folder, kind)
        model = _load_model(name, folder, target, choose_dtype(precision, target))
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
        if not model.config.is_encoder_decoder:
            tokenizer.padding_side = "left"  # what is generated follows the prompt at once
        prepare = _preparation(kind, model, images, tokenizer, processor, prompt)
    captioner = Captioner(name, model, tokenizer, prepare)
    captioner.try_out()
    return captioner


# --- finding -----------------------------------------------------------------------------------------


def _find(name: str, revision: str) -> Path:
    """Return the local folder of an image-to-text model. Raises ModelError where `name` is none."""
    path = Path(name).expanduser()
    if path.is_file():
        raise ModelError(
            f"{name}: is a file; --model takes the folder of an image-to-text model, or its Hugging Face id"
        )
    if path.is_dir():
        folder = path
        _refuse_other_kinds(name, folder)
    elif is_hub_id(name):
        _refuse_other_kinds(name, download(name, revision, ["config.json"]))  # before its weights are downloaded
        folder = download(name, revision, _DOWNLOADED, _LEFT_OUT)
    else:
        raise ModelError(
            f"{name}: there is no such folder; --model takes the folder of an image-to-text model, "
            "or a Hugging Face id such as Salesforce/blip-image-captioning-large"
        )
    if not any(folder.glob("*.safetensors")):
        pickles = sorted(file.name for pattern in _PICKLES for file in folder.glob(pattern))
        raise ModelError(
            f"{name}: holds no weights in .safetensors files"
            + (f" (there: {', '.join(pickles[:3])}, pickles that could run code when opened)" if pickles else "")
            + "; choose a model that does, or with --revision a branch of it that does"
        )
    if not any((folder / file).is_file() for file in _PREPARATION_FILES):
        raise ModelError(
            f"{name}: does not say how its pictures are prepared (it has neither {' nor '.join(_PREPARATION_FILES)}); "
            "download it again, whole"
        )
    return folder


def _refuse_other_kinds(name: str, folder: Path) -> None:
    """Raise ModelError unless `folder` describes an image-to-text model that transformers itself knows."""
    if not (folder / "config.json").is_file():
        raise ModelError(
            f"{name}: is no image-to-text model (it has no config.json); --model takes one such as BLIP, GIT, "
            "Florence-2, LLaVA or Qwen-VL, in the form of transformers"
        )
    config = read_json(folder / "config.json")
    kind = config.get("model_type")
    if kind in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES:
        return
    if "auto_map" in config:
        raise ModelError(
            f"{name}: comes with program code of its own, which sdlora never runs; choose a version for "
            "transformers itself (their names often end in -hf), or another model"
        )
    raise ModelError(
        f"{name}: is no image-to-text model (its config.json says {kind!r}); --model takes one such as BLIP, GIT, "
        "Florence-2, LLaVA or Qwen-VL"
    )


# --- loading -----------------------------------------------------------------------------------------

_SAFELY: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}  # None would ask the user


def _load_model(name: str, folder: Path, device: torch.device, dtype: torch.dtype) -> Any:
    """Return the model on `device`. Raises ModelError where its files lack weights, which would make it babble."""
    model, report = AutoModelForImageTextToText.from_pretrained(
        folder, dtype=dtype, device_map={"": str(device)}, use_safetensors=True, output_loading_info=True, **_SAFELY
    )
    # The pooler of a vision encoder plays no part in captions; TrOCR's files have none.
    missing = sorted(key for key in report["missing_keys"] if "encoder.pooler." not in key)
    if missing:
        raise ModelError(
            f"{name}: its files lack {len(missing)} of the model's weights, such as {missing[0]}; "
            "download it again, or choose a version for transformers"
        )
    return model.eval()


def _load_processor(folder: Path, kind: str) -> tuple[Any, Any, Any]:
    """Return what prepares pictures and what prepares text, and what joins both, None where nothing does."""
    if kind == "vision-encoder-decoder":
        return (
            AutoImageProcessor.from_pretrained(folder, **_SAFELY),
            AutoTokenizer.from_pretrained(folder, **_SAFELY),
            None,
        )
    try:
        processor = AutoProcessor.from_pretrained(folder, **_SAFELY)
    except ImportError as error:
        if "VideoProcessor" not in str(error):
            raise
        processor = _processor_without_videos(folder, kind)
    if not hasattr(processor, "image_processor"):
        raise ValueError("none of its files says how pictures are prepared")
    return processor.image_processor, processor.tokenizer, processor


def _processor_without_videos(folder: Path, kind: str) -> Any:
    """Return the processor of a model that could also watch videos, without the part that needs torchvision for them."""
    from transformers import CONFIG_MAPPING

    whole: Any = PROCESSOR_MAPPING[CONFIG_MAPPING[kind]]

    class ForPictures(whole):
        def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> Any:
            return argument and super().check_argument_for_proper_class(argument_name, argument)

    loaders = {"image_processor": AutoImageProcessor, "tokenizer": AutoTokenizer}
    parts = [
        None if name == "video_processor" else loaders[name].from_pretrained(folder, **_SAFELY)
        for name in whole.get_attributes()
    ]
    return ForPictures.from_args_and_dict(parts, whole.get_processor_dict(folder)[0])


@contextmanager
def _explained(name: str, what: str, advice: str = "") -> Iterator[None]:
    """Inside, what the libraries raise becomes a ModelError that says what the model cannot do."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise ModelError(
            f"{name}: does not fit into the GPU's memory; set --batch-size to 1 or --precision to bf16 or fp16, "
            "or choose a smaller model"
        ) from error
    except _LIBRARY_ERRORS as error:
        if "torchvision" in str(error).lower() and not is_torchvision_available():
            raise ModelError(
                f"{name}: prepares its pictures with torchvision, which is not installed; install the version that "
                "goes with your torch (pip install torchvision), or choose another model"
            ) from error
        raise ModelError(f"{name}: {what} ({first_line(error)})" + (f"; {advice}" if advice else "")) from error


# --- asking ------------------------------------------------------------------------------------------


def _preparation(kind: str, model: Any, images: Any, tokenizer: Any, processor: Any, prompt: str | None) -> Prepare:
    """Return what puts pictures and question into the form that a model of this kind takes."""
    if processor is None:
        return _ask_decoder(images, tokenizer, _decoder_start(model), prompt or "")
    template = processor.chat_template or tokenizer.chat_template
    if template and kind not in _OWN_PROMPTS:
        return _ask_in_chat(processor, template, DEFAULT_QUESTION if prompt is None else prompt)
    own = _OWN_PROMPTS.get(kind, "") if prompt is None else prompt
    return _ask_plainly(processor, own, ends=kind == "git")


def _ask_in_chat(processor: Any, template: Any, question: str) -> Prepare:
    """Return what shows a chat model each picture in a conversation of its own and asks it `question`."""
    text = _conversation(processor, template, question)
    begun = processor.tokenizer.bos_token and text.startswith(processor.tokenizer.bos_token)
    options = {"add_special_tokens": False} if begun else {}

    def prepare(pictures: Sequence[Image.Image]) -> Any:
        each = [[picture] for picture in pictures]
        return processor(images=each, text=[text] * len(each), padding=True, return_tensors="pt", **options)

    return prepare


def _conversation(processor: Any, template: Any, question: str) -> str:
    """Return the conversation up to where the model answers, with the mark of the picture in it."""
    # Models that think aloud would spend all tokens on it.
    options = {"enable_thinking": False} if "enable_thinking" in str(template) else {}
    refusal: Exception = ValueError("its chat template leaves out what is asked")
    # Some templates take the content in parts; those that put the picture's mark there themselves take a text.
    for content in ([{"type": "image"}, {"type": "text", "text": question}], question):
        try:
            text = processor.apply_chat_template(
                [{"role": "user", "content": content}], chat_template=template, add_generation_prompt=True, **options
            )
        except (TemplateError, TypeError, ValueError) as error:
            refusal = error
            continue
        if question in text and "{'type': 'text'" not in text:
            return str(text)
    raise refusal


def _ask_plainly(processor: Any, prompt: str, *, ends: bool) -> Prepare:
    """Return what gives a model the pictures and `prompt`, if any; `ends`: the tokenizer adds an end, to be cut off."""

    def prepare(pictures: Sequence[Image.Image]) -> Any:
        texts = {"text": [prompt] * len(pictures), "padding": True} if prompt else {}
        inputs = processor(images=list(pictures), return_tensors="pt", **texts)
        if prompt and ends:
            inputs |= {name: inputs[name][:, :-1] for name in ("input_ids", "attention_mask")}
        return inputs

    return prepare


def _ask_decoder(images: Any, tokenizer: Any, start: int | None, prompt: str) -> Prepare:
    """Return what gives the encoder the pictures, and the decoder `prompt`, if any, to go on from."""
    begun = [] if start is None else [start]
    tokens = [*begun, *tokenizer(prompt, add_special_tokens=False)["input_ids"]] if prompt else []

    def prepare(pictures: Sequence[Image.Image]) -> Any:
        inputs = images(list(pictures), return_tensors="pt")
        if tokens:
            inputs["decoder_input_ids"] = torch.tensor([tokens] * len(pictures))
        return inputs

    return prepare


def _decoder_start(model: Any) -> int | None:
    settings = model.generation_config
    start = settings.decoder_start_token_id
    return settings.bos_token_id if start is None else start


def _answer(said: str, prompt: str) -> str:
    """Return what was said after the prompt and after thoughts; "" where it never came to the end of them."""
    if (prompt + said.removeprefix(prompt)).count("<think>") > said.count("</think>"):
        return ""
    return said.strip().removeprefix(prompt.strip()).rpartition("</think>")[2].strip()
