"""Safetensors files byte by byte, sound or not."""

from __future__ import annotations

import json
import struct


def with_header(header: object, data: bytes = b"") -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw)) + raw + data
