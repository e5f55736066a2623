"""Picture files and colour profiles written byte by byte, so that no library decides what is in them."""

import struct
import zlib

import numpy as np

D50 = (0.9642, 1.0, 0.8249)
SRGB_PRIMARIES = ((0.43607, 0.22249, 0.01392), (0.38515, 0.71687, 0.09708), (0.14307, 0.06061, 0.71410))
"""XYZ of red, green and blue under D50, as in ICC profiles."""
ADOBE_RGB_PRIMARIES = ((0.60974, 0.31111, 0.01947), (0.20528, 0.62567, 0.06087), (0.14919, 0.06322, 0.74457))
ADOBE_RGB_GAMMA = 563 / 256


def png(width: int, height: int, bits: int, colour_type: int, rows: bytes, before=(), after=()) -> bytes:
    """Return a PNG of unfiltered rows; `before` and `after` are (name, data) of chunks around its pixels."""
    row = len(rows) // height
    pixels = b"".join(b"\0" + rows[row * y : row * (y + 1)] for y in range(height))
    header = struct.pack(">IIBBBBB", width, height, bits, colour_type, 0, 0, 0)
    chunks = [(b"IHDR", header), *before, (b"IDAT", zlib.compress(pixels)), *after, (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(png_chunk(name, data) for name, data in chunks)


def png_chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def tiff(width: int, height: int, bits: tuple[int, ...], photometric: int, pixels: bytes, order="<", extra=()) -> bytes:
    """Return an uncompressed TIFF in one strip; `extra` holds (tag, type letter of struct, values)."""
    codes = {"B": 1, "H": 3, "I": 4}
    entries = [
        (256, "I", (width,)),
        (257, "I", (height,)),
        (258, "H", bits),
        (259, "H", (1,)),
        (262, "H", (photometric,)),
        (273, "I", (8,)),
        (277, "H", (len(bits),)),
        (278, "I", (height,)),
        (279, "I", (len(pixels),)),
        *extra,
    ]
    start = 8 + len(pixels) + len(pixels) % 2
    behind = start + 2 + 12 * len(entries) + 4
    table, values_behind = struct.pack(f"{order}H", len(entries)), b""
    for tag, letter, values in sorted(entries):
        packed = struct.pack(f"{order}{len(values)}{letter}", *values)
        table += struct.pack(f"{order}HHI", tag, codes[letter], len(values))
        if len(packed) <= 4:
            table += packed.ljust(4, b"\0")
        else:
            table += struct.pack(f"{order}I", behind + len(values_behind))
            values_behind += packed + b"\0" * (len(packed) % 2)
    magic = b"II*\0" if order == "<" else b"MM\0*"
    padding = b"\0" * (len(pixels) % 2)
    return magic + struct.pack(f"{order}I", start) + pixels + padding + table + bytes(4) + values_behind


def exif(orientation: int, order="<") -> bytes:
    """Return EXIF data, without the mark that a JPEG puts before them, of a camera's name and an orientation."""
    magic = b"II*\0" if order == "<" else b"MM\0*"
    maker = struct.pack(f"{order}HHI", 0x010F, 2, 4) + b"Me\0\0"
    turn = struct.pack(f"{order}HHIHH", 0x0112, 3, 1, orientation, 0)
    return magic + struct.pack(f"{order}IH", 8, 2) + maker + turn + bytes(4)


def flat_jpeg(width: int, height: int) -> bytes:
    """Return a baseline JPEG of one grey, 128, sides multiples of 16, at 3 bytes for each four blocks of 8x8."""
    segments = b"\xff\xd8" + b"\xff\xdb\0\x43\0" + b"\x01" * 64
    segments += b"\xff\xc0\0\x0b\x08" + struct.pack(">HH", height, width) + b"\x01\x01\x11\0"
    # Huffman tables of one code each: "0" is no change of the mean, and "0" is the end of the block.
    segments += b"\xff\xc4\0\x14\x00\x01" + bytes(15) + b"\0" + b"\xff\xc4\0\x14\x10\x01" + bytes(15) + b"\0"
    segments += b"\xff\xda\0\x08\x01\x01\0\0\x3f\0"
    return segments + bytes(width * height // 64 * 2 // 8) + b"\xff\xd9"


def matrix_profile(primaries, curve: bytes, title="test", space=b"RGB ") -> bytes:
    """Return an ICC profile of RGB with these primaries, or of grey, each channel under one curve."""
    tags = [(b"desc", _description(title)), (b"wtpt", _xyz(D50))]
    if space == b"GRAY":
        tags.append((b"kTRC", curve))
    else:
        tags += [(name + b"XYZ", _xyz(value)) for name, value in zip((b"r", b"g", b"b"), primaries, strict=True)]
        tags += [(name + b"TRC", curve) for name in (b"r", b"g", b"b")]
    return _profile(b"mntr", space, b"XYZ ", tags)


def gamma_curve(gamma: float) -> bytes:
    return b"curv" + bytes(4) + struct.pack(">IH", 1, round(gamma * 256)) + b"\0\0"


def table_curve(values: np.ndarray) -> bytes:
    """Return a curve through values of 0 to 1 at even distances."""
    return b"curv" + bytes(4) + struct.pack(">I", len(values)) + np.round(values * 65535).astype(">u2").tobytes()


def ink_profile(lab_of_inks, title="test ink", paper=D50) -> bytes:
    """Return an ICC profile of CMYK; `lab_of_inks` gives L*, a*, b* of each combination of no and full inks.

    They count from the paper's white, for colorimetric intents; for the perceptual one all is one grey.
    """
    colorimetric, perceptual = _ink_table(lab_of_inks), _ink_table(lambda *_: (40, 0, 0))
    tags = [(b"desc", _description(title)), (b"wtpt", _xyz(paper)), (b"A2B0", perceptual), (b"A2B1", colorimetric)]
    return _profile(b"scnr", b"CMYK", b"Lab ", tags)


def _ink_table(lab_of_inks) -> bytes:
    straight = bytes(range(256))
    nodes = b""
    for number in range(16):
        lightness, a, b = lab_of_inks(*(number >> shift & 1 for shift in (3, 2, 1, 0)))
        nodes += bytes((round(lightness * 2.55), round(a + 128), round(b + 128)))
    header = b"mft1" + bytes(4) + bytes((4, 3, 2, 0))
    header += struct.pack(">9i", *(65536 if place % 4 == 0 else 0 for place in range(9)))
    return header + straight * 4 + nodes + straight * 3


def to_linear(srgb: np.ndarray) -> np.ndarray:
    """Return linear light of sRGB values, both 0 to 1 (IEC 61966-2-1)."""
    return np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)


def from_linear(light: np.ndarray) -> np.ndarray:
    """Return sRGB values of linear light, both 0 to 1; what sRGB cannot show is clipped."""
    light = np.clip(light, 0, 1)
    return np.where(light <= 0.0031308, light * 12.92, 1.055 * light ** (1 / 2.4) - 0.055)


def _profile(kind: bytes, space: bytes, connection: bytes, tags: list[tuple[bytes, bytes]]) -> bytes:
    place, table, data = 128 + 4 + 12 * len(tags), b"", b""
    for name, value in tags:
        value += bytes(-len(value) % 4)
        table += name + struct.pack(">II", place + len(data), len(value))
        data += value
    size = place + len(data)
    header = struct.pack(">I4sI", size, b"test", 0x02400000) + kind + space + connection + bytes(12) + b"acsp"
    header += bytes(28) + struct.pack(">3i", *(round(value * 65536) for value in D50))
    return header.ljust(128, b"\0") + struct.pack(">I", len(tags)) + table + data


def _xyz(values) -> bytes:
    return b"XYZ " + bytes(4) + struct.pack(">3i", *(round(value * 65536) for value in values))


def _description(text: str) -> bytes:
    name = text.encode() + b"\0"
    return b"desc" + bytes(4) + struct.pack(">I", len(name)) + name + bytes(4 + 4 + 2 + 1 + 67)
