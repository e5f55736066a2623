"""The text of a model card. What a header says stands in code spans, where no mark-up of a stranger acts."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
from datetime import timedelta

from sdlora.adapters.formats import diffusers, kohya
from sdlora.adapters.formats.embedding_keys import EMBEDDINGS, file_name
from sdlora.families.traits import family_title
from sdlora.sharing.address import fetched_name
from sdlora.sharing.bases import prediction_of
from sdlora.sharing.facts import AdapterFacts, numbers

_COMPONENTS = {"unet": "UNet", "text_encoder": "text encoder", "text_encoder_2": "second text encoder"}
_MARKUP = str.maketrans({character: f"\\{character}" for character in "\\`*_{}[]<>#|!&~$"})
_LINKED = re.compile(r"(?i)(?<=http)(?=s?://)|(?<=www)(?=\.)|(?=@)")
"""Where what GitHub and the Hub would make a link of is broken: by a comment, which is not seen."""
_FENCE = "```"
_ANY_BASE = "a-base/of-this-family"


def body(facts: AdapterFacts, base: str, author: str, repository: str, gallery: bool) -> str:
    """Return everything below the front matter; `base` and `repository` are Hub ids, or ""."""
    parts = [f"# {escaped(facts.name)}"]
    if gallery:
        parts.append("<Gallery />")
    parts += [_summary(facts, base, author), *_words(facts), "## Use", *_other_programs(facts)]
    parts += [*_in_diffusers(facts, base, repository), *_in_sdlora(facts, base, repository)]
    for title, rows in (("## Training", dict(_training(facts))), ("## Hashes", dict(_hashes(facts)))):
        parts += [title, _table(rows)] if rows else []
    return "\n\n".join(parts) + "\n"


def escaped(text: str) -> str:
    """Return the text as Markdown that shows it, and makes no link of an address in it."""
    return _LINKED.sub("<!-- -->", text.translate(_MARKUP))


def code(text: str) -> str:
    """Return the text as a code span."""
    return "`{}`".format(text.replace("`", "'"))


def _summary(facts: AdapterFacts, base: str, author: str) -> str:
    sentences = [f"{facts.title[0].upper()}{facts.title[1:]}{f' by {escaped(author)}' if author else ''}."]
    if facts.pictures:
        concepts = f" of {facts.concepts} concepts" if facts.concepts > 1 else ""
        sentences.append(f"Trained on {facts.pictures} pictures{concepts}.")
    if facts.base and not base:
        sentences.append(
            f"Its header says that it was trained on a base called {code(facts.base)}; "
            "on others of the family the pictures may differ."
        )
    return " ".join(sentences)


def _words(facts: AdapterFacts) -> Iterator[str]:
    yield "## Trigger words"
    if facts.triggers:
        yield f"Say {', '.join(code(trigger) for trigger in facts.triggers)} in the prompt."
    else:
        yield "The file names none."


def _other_programs(facts: AdapterFacts) -> Iterator[str]:
    yield "### AUTOMATIC1111, Forge, ComfyUI"
    name, stem = facts.path.name, facts.path.stem
    if facts.is_embedding:
        yield (
            f"Put {code(name)} into {code('embeddings')} (ComfyUI: {code('models/embeddings')}) and say {code(stem)} "
            f"in the prompt (ComfyUI: {code(f'embedding:{stem}')})."
        )
        return
    if facts.report.format != kohya.NAME:
        yield (
            f"Their own loaders do not all read this file, which is of {facts.report.format}'s kind; "
            f"{code(f'sdlora adapter convert {name} OUT.safetensors')} makes one that they do."
        )
        return
    yield (
        f"Put {code(name)} into {code('models/Lora')} (ComfyUI: {code('models/loras')}). In AUTOMATIC1111 and Forge "
        f"write {code(f'<lora:{stem}:1>')} into the prompt; in ComfyUI add a node that loads LoRA."
    )
    if facts.words:
        files = ", ".join(code(f"{EMBEDDINGS}/{file_name(word)}") for word in facts.words)
        yield (
            f"It was trained together with new words: put {files} into {code('embeddings')} (ComfyUI: "
            f"{code('models/embeddings')}, in prompts {code(f'embedding:{file_name(next(iter(facts.words)))[:-12]}')})."
        )
    if any(kind.startswith("dora") for kind in facts.report.kinds):
        yield (
            "It is a DoRA: ComfyUI and Forge show it a little differently, and AUTOMATIC1111, which takes the norms "
            "the other way round, wrongly."
        )
    if facts.settings.get("zero terminal SNR"):
        yield "It was trained on a schedule that ends in pure noise (zero terminal SNR); choose that one."


def _in_diffusers(facts: AdapterFacts, base: str, repository: str) -> Iterator[str]:
    yield "### diffusers"
    if facts.unread_by_diffusers:
        yield f"Not with this file: {facts.unread_by_diffusers}. Use one of the other programs."
        return
    yield f"{_FENCE}python\n" + "\n".join(_snippet(facts, base, repository)) + f"\n{_FENCE}"


def _snippet(facts: AdapterFacts, base: str, repository: str) -> Iterator[str]:
    """Yield code that makes a picture. The strings in it are JSON's, which Python reads alike."""
    family = facts.report.family
    pipeline = {"sd1": "StableDiffusionPipeline", "sd2": "StableDiffusionPipeline", "sdxl": "StableDiffusionXLPipeline"}
    name, encoders = pipeline.get(family, "DiffusionPipeline"), family == "sdxl"
    words = [(facts.path.stem, facts.path.name)] if facts.is_embedding else []
    if facts.is_embedding and facts.report.tokens:
        words = [(facts.report.tokens[0], facts.path.name)]
    words += [(word, f"{EMBEDDINGS}/{file_name(word)}") for word in facts.words]
    rescaled = bool(facts.settings.get("zero terminal SNR"))
    yield "import torch"
    yield f"from diffusers import {'EulerDiscreteScheduler, ' * rescaled}{name}"
    if words and encoders:
        if repository:
            yield "from huggingface_hub import hf_hub_download"
        yield "from safetensors.torch import load_file"
    yield ""
    remark = _told_of_base(facts) if not base else f"or another base of {family_title(family)}" if family else ""
    yield (
        f"pipeline = {name}.from_pretrained({_text(base or _ANY_BASE)}, torch_dtype=torch.float16)"
        f'.to("cuda"){f"  # {remark}" if remark else ""}'
    )
    if not facts.is_embedding:
        where = f"{_text(repository)}, weight_name={_text(facts.path.name)}" if repository else _text(facts.path.name)
        yield f"pipeline.load_lora_weights({where})"
    for word, file in words:
        yield from _load_word(word, file, repository, encoders)
    if rescaled:
        yield "pipeline.scheduler = EulerDiscreteScheduler.from_config("
        yield '    pipeline.scheduler.config, rescale_betas_zero_snr=True, timestep_spacing="trailing"'
        yield ")"
    prompt = ", ".join(facts.triggers) or "a photo"
    yield f'pipeline({_text(prompt)}).images[0].save("picture.png")'


def _told_of_base(facts: AdapterFacts) -> str:
    """Return what the header tells of a base that has no known id."""
    told = [f"it was trained on {json.dumps(facts.base)}"] if facts.base else []
    if prediction := prediction_of(facts.report.metadata):
        told.append(f"the base has to predict {prediction}")
    return ", ".join(told)


def _load_word(word: str, file: str, repository: str, encoders: bool) -> Iterator[str]:
    """Yield the lines that teach the pipeline a word; of SDXL diffusers wants each encoder's vectors by themselves."""
    if not encoders:
        where = f"{_text(repository)}, weight_name={_text(file)}" if repository else _text(file)
        yield f"pipeline.load_textual_inversion({where}, token={_text(word)})"
        return
    where = f"hf_hub_download({_text(repository)}, {_text(file)})" if repository else _text(file)
    yield f"vectors = load_file({where})"
    yield "for key, encoder, tokenizer in ("
    yield '    ("clip_l", pipeline.text_encoder, pipeline.tokenizer),'
    yield '    ("clip_g", pipeline.text_encoder_2, pipeline.tokenizer_2),'
    yield "):"
    yield (
        f"    pipeline.load_textual_inversion({{{_text(word)}: vectors[key]}}, token={_text(word)}, "
        "text_encoder=encoder, tokenizer=tokenizer)"
    )


def _in_sdlora(facts: AdapterFacts, base: str, repository: str) -> Iterator[str]:
    yield "### sdlora"
    name, prompt = facts.path.name, shlex.quote(", ".join(facts.triggers) or "a photo")
    lines = []
    if repository:
        source, name = f"{repository}/{facts.path.name}", fetched_name(repository, name)
        lines = [f"sdlora adapter fetch {shlex.quote(source)}"]
    # As a way from here, so that no name is a flag.
    given = name if not name.startswith("-") else f"./{name}"
    lines.append(f"sdlora generate --base {base or 'BASE'} --adapter {shlex.quote(given)} --prompt {prompt}")
    yield f"{_FENCE}\n" + "\n".join(lines) + f"\n{_FENCE}"


def _training(facts: AdapterFacts) -> Iterator[tuple[str, str]]:
    report = facts.report
    for name, title in _COMPONENTS.items():
        if count := report.modules.get(name, 0):
            yield f"layers of the {title}", f"{count}"
    if report.rank is not None:
        yield "rank", numbers(report.rank)
    if report.alpha is not None:
        yield "alpha", numbers(report.alpha)
    if facts.pictures:
        yield "pictures", f"{facts.pictures}"
    if facts.concepts > 1:
        yield "concepts", f"{facts.concepts}"
    for title, value in facts.settings.items():
        yield title, code(value)
    if facts.seconds:
        yield "time", f"{timedelta(seconds=round(facts.seconds))}"
    if report.format in (kohya.NAME, diffusers.NAME):
        yield "format", "kohya" if report.format == kohya.NAME else "diffusers"


def _hashes(facts: AdapterFacts) -> Iterator[tuple[str, str]]:
    yield "SHA-256", code(facts.report.sha256)
    yield "AutoV2", code(facts.report.sha256[:10])
    if facts.report.autov3:
        yield "AutoV3", code(facts.report.autov3)


def _table(rows: dict[str, str]) -> str:
    lines = (f"| {title} | {_in_cell(value)} |" for title, value in rows.items())
    return "\n".join(["| | |", "|---|---|", *lines])


def _in_cell(value: str) -> str:
    return value.replace("|", "\\|")


def _text(value: str) -> str:
    return json.dumps(value, ensure_ascii=False)
