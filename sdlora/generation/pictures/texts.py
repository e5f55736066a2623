"""The texts that picture files carry beside their pixels, whoever wrote them and wherever the format keeps them."""

from __future__ import annotations

import html
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from sdlora.errors import PICTURE_DAMAGE, FormatError, first_line

INFOTEXT = "parameters"
"""The key of the infotext: of PNG's text chunk, and of what EXIF's UserComment says."""
RECIPE = "sdlora"
SAVED_AS = "sdlora:saved"
"""How the pixels were compressed, where that changed them."""
EXIF_IFD, USER_COMMENT = 0x8769, 0x9286
_NAMED_TAGS = (0x010E, 0x010F, 0x0110)
"""ImageDescription, Make and Model, where ComfyUI's nodes write "prompt:{...}" and "workflow:{...}" in WebP."""
_LONGEST = 16 << 20
"""Characters of a text; workflows of ComfyUI have some hundred thousand."""
_NAMESPACE = "urn:sdlora:picture:1:"
_XMP = (
    '<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>'
    '<x:xmpmeta xmlns:x="adobe:ns:meta/">'
    '<rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
    '<rdf:Description rdf:about="" xmlns:sdlora="{namespace}">{properties}</rdf:Description>'
    '</rdf:RDF></x:xmpmeta><?xpacket end="w"?>'
)


@dataclass(frozen=True)
class PictureTexts:
    """What a picture carries."""

    texts: Mapping[str, str]
    """By PNG's keywords; INFOTEXT, RECIPE and SAVED_AS in all formats."""
    width: int
    height: int
    format: str
    """As Pillow calls it: "PNG", "JPEG", "WEBP"."""


def read_texts(path: Path) -> PictureTexts:
    """Return what a picture carries; its pixels are not decoded. Raises FormatError for what is no picture."""
    try:
        with warnings.catch_warnings(action="ignore"), Image.open(path) as picture:
            texts = {str(key): value for key, value in picture.info.items() if isinstance(value, str)}
            texts = _from_xmp(picture.info.get("xmp")) | _from_exif(picture) | texts
            size, kind = picture.size, picture.format or ""
    except (*PICTURE_DAMAGE, Image.DecompressionBombError) as error:
        raise FormatError(f"{path}: cannot be read as a picture ({first_line(error)})") from error
    return PictureTexts({key: text for key, text in texts.items() if len(text) <= _LONGEST}, *size, kind)


# --- EXIF --------------------------------------------------------------------------------------------


def exif_with(text: str) -> Image.Exif:
    """Return EXIF of which UserComment is the text, in the encoding that AUTOMATIC1111's library reads and writes."""
    exif = Image.Exif()
    exif.get_ifd(EXIF_IFD)[USER_COMMENT] = b"UNICODE\0" + text.encode("utf-16-be", "replace")
    return exif


def _from_exif(picture: Image.Image) -> dict[str, str]:
    exif = picture.getexif()
    texts = {}
    for tag in _NAMED_TAGS:
        name, colon, text = str(exif.get(tag, "")).partition(":")
        if colon and name.lower() in ("prompt", "workflow"):
            texts[name.lower()] = text
    comment = exif.get_ifd(EXIF_IFD).get(USER_COMMENT)
    if comment:
        texts[INFOTEXT] = comment if isinstance(comment, str) else _decoded(bytes(comment))
    return texts


def _decoded(comment: bytes) -> str:
    """Return the text of a UserComment: its first eight bytes name the encoding, but not the order of bytes."""
    code, text = comment[:8], comment[8:]
    if code == b"UNICODE\0":
        if text[:2] in (b"\xff\xfe", b"\xfe\xff"):
            return text.decode("utf-16", "replace")
        # What most texts have most of, characters below 256, is zero in the first of two bytes, or in the second.
        little = text[1::2].count(0) > text[::2].count(0)
        return text.decode("utf-16-le" if little else "utf-16-be", "replace")
    if code in (b"ASCII\0\0\0", b"JIS\0\0\0\0\0", b"\0" * 8):
        comment = text
    return comment.decode("utf-8", "replace").strip("\0")


# --- XMP ---------------------------------------------------------------------------------------------


def xmp_with(texts: Mapping[str, str]) -> bytes:
    """Return an XMP packet of the texts, which must be ASCII; keys beyond "sdlora" are their names in it."""
    properties = "".join(
        f"<{_property(key)}>{html.escape(text, quote=False)}</{_property(key)}>" for key, text in texts.items()
    )
    return _XMP.format(namespace=_NAMESPACE, properties=properties).encode()


def _property(key: str) -> str:
    return "sdlora:recipe" if key == RECIPE else key


def _from_xmp(packet: object) -> dict[str, str]:
    """Return our texts of an XMP packet, where they stand as elements or, as some programs rewrite them, as attributes."""
    if not isinstance(packet, bytes) or _NAMESPACE.encode() not in packet:
        return {}
    text, found = packet.decode("utf-8", "replace"), {}
    for key in (RECIPE, SAVED_AS):
        name = _property(key)
        match = re.search(rf"<{name}>([^<]*)</{name}>", text) or re.search(rf'\s{name}\s*=\s*"([^"]*)"', text)
        if match:
            found[key] = html.unescape(match[1])
    return found
