"""What the text of a header tells about a person or a machine. Headers of other trainers hold much; ours should none."""

from __future__ import annotations

import base64
import io
import json
import re
import warnings
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from PIL import Image
from PIL.ImageFile import ImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile

from sdlora.adapters.formats.dotted import METADATA
from sdlora.adapters.formats.embedding_keys import WORD, WORDS
from sdlora.adapters.formats.ordered import EMBED
from sdlora.errors import PICTURE_DAMAGE

TAGS, FOLDERS, PRIOR_FOLDERS = "ss_tag_frequency", "ss_dataset_dirs", "ss_reg_dataset_dirs"
_NAMES = ("ss_output_name", "modelspec.title")
_TRIGGER, _THUMBNAIL = "modelspec.trigger_phrase", "modelspec.thumbnail"
FUNCTIONAL = frozenset(
    {WORD, WORDS, METADATA, "format", "sshs_model_hash", "sshs_legacy_hash", "modelspec.hash_sha256"}
)
"""Entries without which a file is not read, or not recognised, as what it is."""
_KNOWN = FUNCTIONAL | {
    "ss_network_module", "ss_network_dim", "ss_network_alpha", "ss_network_args", "ss_network_dropout",
    "ss_scale_weight_norms", "ss_base_model_version", "ss_v2", "ss_output_name", "ss_sd_model_name",
    "ss_sd_model_hash", "ss_new_sd_model_hash", "ss_tag_frequency", "ss_dataset_dirs", "ss_reg_dataset_dirs",
    "ss_num_train_images", "ss_num_reg_images", "ss_resolution", "ss_enable_bucket", "ss_steps", "ss_max_train_steps",
    "ss_num_epochs", "ss_epoch", "ss_total_batch_size", "ss_batch_size_per_device", "ss_num_batches_per_epoch",
    "ss_gradient_accumulation_steps", "ss_seed", "ss_unet_lr", "ss_text_encoder_lr", "sdlora_tokens_lr",
    "ss_learning_rate", "ss_optimizer", "ss_lr_scheduler", "ss_lr_warmup_steps", "ss_mixed_precision", "ss_full_fp16",
    "ss_loss_type", "ss_huber_c", "ss_huber_schedule", "ss_huber_scale", "ss_min_snr_gamma", "ss_debiased_estimation",
    "ss_noise_offset", "ss_noise_offset_random_strength", "ss_adaptive_noise_scale", "ss_multires_noise_discount",
    "ss_multires_noise_iterations", "ss_ip_noise_gamma", "ss_ip_noise_gamma_random_strength", "ss_zero_terminal_snr",
    "ss_training_started_at", "ss_training_finished_at", "ss_clip_skip", "ss_max_token_length", "ss_cache_latents",
    "ss_gradient_checkpointing", "ss_lowram", "ss_max_grad_norm", "ss_caption_dropout_rate",
    "ss_caption_dropout_every_n_epochs", "ss_caption_tag_dropout_rate", "ss_face_crop_aug_range",
    "ss_prior_loss_weight", "ss_color_aug", "ss_flip_aug", "ss_random_crop", "ss_shuffle_caption", "ss_keep_tokens",
    "ss_bucket_no_upscale", "ss_min_bucket_reso", "ss_max_bucket_reso", "ss_bucket_info", "ss_vae_name", "ss_vae_hash",
    "ss_new_vae_hash", "ss_sd_scripts_commit_hash", "modelspec.sai_model_spec", "modelspec.architecture",
    "modelspec.implementation", "modelspec.title", "modelspec.description", "modelspec.license",
    "modelspec.usage_hint", "modelspec.trigger_phrase", "modelspec.resolution", "modelspec.date",
    "modelspec.prediction_type", "modelspec.timestep_range", "modelspec.encoder_layer", "modelspec.tags",
    "modelspec.thumbnail", "modelspec.merged_from", "modelspec.preprocessor", "modelspec.is_negative_embedding",
    "modelspec.unet_dtype", "modelspec.vae_dtype", "ssmd_rating", "ssmd_tags", "ssmd_keywords", "ssmd_display_name",
    "ssmd_description", "ssmd_version", "ssmd_source",
}  # fmt: skip
"""What is written here (docs/formats.md), and harmless entries of kohya's trainer, ModelSpec and AUTOMATIC1111's extensions."""
_TELLING = {
    "ss_training_comment": "a comment on the training",
    "ss_session_id": "which session trained it",
    "ss_datasets": "folders and captions of the pictures",
    "modelspec.author": "the author",
    "ssmd_author": "the author",
    "ssmd_cover_images": "pictures, with what their own text says",
}
_ORDERED = re.compile(r"(unet|text_encoder)(:\d{1,4}:rank)?")
"""Entries of cloneofsimo's trainer."""
_PATTERNS = ("target_modules", "exclude_modules", "modules_to_save", "layers_pattern")
"""Settings of PEFT that may be regular expressions, whose backslashes are no path's."""
_IGNORED = re.compile(
    r"""https?://[^\s,;|'"<>)\]}]+
    | data:[\w./+-]+;base64,[\w+/=]*
    | (?<![\w+/=]) (?:/9j/|(?!/)) [A-Za-z0-9+/]{200,} ={0,2} (?![\w+/=.])  # base64 as of a JPEG, not /long/ways
    """,
    re.VERBOSE,
)
"""Addresses on the web and pictures, whose slashes are no path's."""
_PATH = re.compile(
    r"""file:/                                      # URLs of files
    | (?<![^\s"'=(,;:\[{|])/[\w.~@+-]               # /home/me
    | (?<!\w)~[\w.-]{0,64}[/\\]                     # ~/pictures
    | (?<![\w.])\.{1,2}[/\\]                        # ../pictures
    | (?<![A-Za-z])[A-Za-z]:(\\|/(?!/))             # C:\Users
    | \\\\[^\\\s]                                   # \\server
    | \w\\\w                                        # pictures\cats
    | %\w{1,64}%[/\\] | \$(HOME|USER|\{\w)          # %USERPROFILE%, $HOME
    """,
    re.VERBOSE | re.IGNORECASE,
)
_FILE = re.compile(
    r"(?<![\w.-])[\w.-]{1,255}/[\w. -]{1,255}\.(safetensors|ckpt|pth?|bin|png|jpe?g|webp|txt|caption|toml|json|ya?ml)\b",
    re.IGNORECASE,
)
_EMAIL = re.compile(r"(?<![\w.+-])[\w.+-]{1,64}@[\w-]{1,63}(\.[\w-]{1,63}){1,8}")
_TOLD = {("a path", "a file in a folder"): (_PATH, _FILE), ("an e-mail address",): (_EMAIL,)}
"""What patterns find, the first of each that finds something."""
_LONGEST = 100_000
_PLAIN_PICTURES = ("JPEG", "PNG", "WEBP")
_ABOUT_PIXELS = frozenset(
    {
        "adobe", "adobe_transform", "aspect", "background", "blend", "chromaticity", "disposal", "dpi", "duration", "gamma",
        "interlace", "jfif", "jfif_density", "jfif_unit", "jfif_version", "loop", "progression", "progressive", "srgb",
        "timestamp", "transparency",
    }
)  # fmt: skip
"""What Pillow tells of a picture beside its pixels that is numbers. A colour profile names a screen, as its owner called it."""
_JPEG_HEADERS, _LONGEST_JPEG_HEADER = ("APP0", "APP14"), 14
"""Segments of a JPEG that are needed to show it, JFIF's and Adobe's, without the small picture that the former may hold."""
_MOST_PIXELS = 4096 * 4096


class Finding(NamedTuple):
    """What an entry tells, and what of it may stay."""

    tells: str
    rest: str | None


def private_entries(metadata: Mapping[str, str]) -> dict[str, str]:
    """Return {key: what it tells} of entries that may tell about a person, a machine or the pictures, or are unknown."""
    return {key: found.tells for key, found in _findings(metadata)}


def public_text(metadata: Mapping[str, str]) -> dict[str, str]:
    """Return the text without what `private_entries` finds; of tags the trigger words stay, of folders the counts."""
    rest = {key: found.rest for key, found in _findings(metadata)}
    return {key: text for key in metadata if (text := rest.get(key, metadata[key])) is not None}


def is_functional(key: str, text: str) -> bool:
    """Return whether the file is not read, or not recognised, as what it is without this entry."""
    return key in FUNCTIONAL or text == EMBED or _ORDERED.fullmatch(key) is not None


def public_settings(settings: dict[str, Any]) -> dict[str, Any]:
    """Return PEFT's configuration with null for what tells paths or addresses, such as that of the base model."""

    told = {key for key, value in _read_settings(settings) if telling(json.dumps([value]))}
    return {key: None if key in told else value for key, value in settings.items()}


def _findings(metadata: Mapping[str, str]) -> Iterator[tuple[str, Finding]]:
    """Yield (key, what is found) of every entry that does not stay as it is."""
    for key, text in metadata.items():
        if found := _finding(key, text, metadata):
            yield key, found


def _finding(key: str, text: str, metadata: Mapping[str, str]) -> Finding | None:
    if key == METADATA:
        return _finding_in_settings(text)
    if is_functional(key, text):
        return None
    if key in _TELLING:
        return Finding(_TELLING[key], None)
    if key not in _KNOWN:
        return Finding("something of unknown meaning", None)
    if key == _THUMBNAIL:
        return _finding_in_picture(text)
    if key == TAGS:
        return _finding_in_tags(text, metadata)
    if key in (FOLDERS, PRIOR_FOLDERS):
        return _finding_in_folders(text, _name(metadata) + ("-prior" if key == PRIOR_FOLDERS else ""))
    if len(text) > _LONGEST:
        return Finding(f"something of {len(text)} characters", None)
    return Finding(told, None) if (told := telling(text)) else None


def tellings(value: str, key: str = "") -> Iterator[tuple[str, str]]:
    """Yield (what it tells, the text from there on) of what is nobody's business in an entry's value, JSON or not.

    The time it takes grows with the length of the value, not faster.
    """
    if key == METADATA and isinstance(settings := _json(value), dict):
        value = json.dumps([found for _, found in _read_settings(settings)])
    for text in _texts(value):
        plain = _IGNORED.sub(" ", text)
        for what, patterns in _TOLD.items():
            if match := next(filter(None, (pattern.search(plain) for pattern in patterns)), None):
                yield what[patterns.index(match.re)], plain[match.start() :]


def _read_settings(settings: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield the settings of PEFT that are searched."""
    return ((key, value) for key, value in settings.items() if key.rpartition(".")[2] not in _PATTERNS)


def telling(value: str) -> str:
    """Return what a value tells that is nobody's business, "" where it is harmless."""
    return next((what for what, _ in tellings(value)), "")


def _texts(value: str) -> Iterator[str]:
    """Yield the texts in a value that is JSON, where backslashes are double, else itself."""
    table = _json(value)
    if not isinstance(table, dict | list):
        yield value
        return
    waiting = [table]
    while waiting:
        found = waiting.pop()
        if isinstance(found, dict):
            waiting += [*found, *found.values()]
        elif isinstance(found, list):
            waiting += found
        elif isinstance(found, str):
            yield found


def _json(text: str) -> Any:
    """Return what a text says as JSON, None where it is none."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _finding_in_settings(text: str) -> Finding | None:
    settings = _json(text)
    if not isinstance(settings, dict):
        return None  # reading the file refuses it
    public = public_settings(settings)
    changed = [key for key in settings if public[key] != settings[key]]
    return Finding(f"a path in {changed[0]}", json.dumps(public, sort_keys=True)) if changed else None


def _finding_in_picture(text: str) -> Finding | None:
    try:
        data = base64.b64decode(text.partition(",")[2], validate=True)
    except ValueError:
        data = b""
    if not text.startswith("data:image/") or not data:
        return Finding("a picture elsewhere", None)
    return Finding(told, None) if (told := _told_by_picture(data)) else None


def _told_by_picture(data: bytes) -> str:
    """Return what a picture's file holds beside pixels, "" for a JPEG, PNG or WebP that holds nothing."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)  # of damage
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(data), formats=_PLAIN_PICTURES) as picture:
                if picture.width * picture.height > _MOST_PIXELS:
                    return "a picture too large to look into"
                picture.load()  # text may lie behind the pixels
                return "text inside a picture" if _has_text(picture) else ""
    except (*PICTURE_DAMAGE, Warning, Image.DecompressionBombError):
        return "a picture that is no plain JPEG, PNG or WebP"


def _has_text(picture: ImageFile) -> bool:
    """Return whether the file of a picture, decoded, holds more than numbers about its pixels."""
    if isinstance(picture, PngImageFile) and (picture.text or picture.private_chunks):
        return True  # text may bear the name of a number, such as dpi
    parts = picture.applist if isinstance(picture, JpegImageFile) else ()
    if any(name not in _JPEG_HEADERS or len(part) > _LONGEST_JPEG_HEADER for name, part in parts):
        return True
    return bool(picture.info.keys() - _ABOUT_PIXELS)


def _finding_in_tags(text: str, metadata: Mapping[str, str]) -> Finding | None:
    """Return what remains of tags when only trigger words stay: the sum over all folders."""
    folders, name = _json(text), _name(metadata)
    triggers = _triggers(metadata)
    if not isinstance(folders, dict):
        return Finding("captions", None)
    kept: dict[str, int] = {}
    tags_of_all = [tag for tags in folders.values() for tag in (tags if isinstance(tags, dict) else [""])]
    others = {tag for tag in tags_of_all if tag.strip() not in triggers}
    for tags in folders.values():
        for tag, count in tags.items() if isinstance(tags, dict) else ():
            if tag not in others:
                kept[tag.strip()] = kept.get(tag.strip(), 0) + (count if type(count) is int else 1)
    foreign = [folder for folder in folders if not _is_own(folder, name)]
    if not others and not foreign:
        return None
    return Finding("captions" if others else "folder names", json.dumps({name: kept}) if kept else None)


def _finding_in_folders(text: str, name: str) -> Finding | None:
    folders = _json(text)
    if not isinstance(folders, dict):
        return Finding("folder names", None)
    if all(_is_own(folder, name) and _counts(found) == found for folder, found in folders.items()):
        return None
    names = [name] if len(folders) == 1 else [f"{name}-{number}" for number in range(1, len(folders) + 1)]
    return Finding(
        "folder names", json.dumps(dict(zip(names, (_counts(found) for found in folders.values()), strict=True)))
    )


def _counts(found: Any) -> dict[str, int]:
    """Return how often pictures are repeated, and how many there are, of what is said of a folder."""
    said = found if isinstance(found, dict) else {}
    return {key: said[key] for key in ("n_repeats", "img_count") if type(said.get(key)) is int}


def _triggers(metadata: Mapping[str, str]) -> set[str]:
    phrase = metadata.get(_TRIGGER, "")
    named = _json(metadata.get(WORDS, ""))
    words = [metadata.get(WORD, ""), *(named if isinstance(named, dict) else ())]
    return {word.strip() for word in (*phrase.split(","), phrase, *words) if word.strip() and not telling(word)}


def _name(metadata: Mapping[str, str]) -> str:
    """Return what the adapter is called, where that tells nothing."""
    return next((name for key in _NAMES if (name := metadata.get(key, "")) and not telling(name)), "adapter")


def _is_own(folder: str, name: str) -> bool:
    return folder == name or (folder.startswith(f"{name}-") and folder[len(name) + 1 :].isdecimal())
