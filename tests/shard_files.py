"""Writes small data sets of every kind of shard; a picture is a few bytes that tell its name."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterable, Mapping
from pathlib import Path

import pyarrow as pa

PICTURE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def data(name: object) -> bytes:
    """Return what stands for a picture file; nothing here decodes one."""
    return f"<{name}>".encode() * 40


def rows(names: Iterable[object], **columns: list) -> pa.Table:
    """Return a table with a picture for each name, and by default a caption."""
    names = list(names)
    pictures = pa.array([{"bytes": data(name), "path": f"{name}.png"} for name in names], PICTURE)
    return pa.table({"image": pictures, **(columns or {"text": [f"a {name}" for name in names]})})


def write_arrow(file: Path, table: pa.Table, stream: bool = True, size: int | None = None) -> None:
    writer = (pa.ipc.new_stream if stream else pa.ipc.new_file)(str(file), table.schema)
    with writer:
        writer.write_table(table, max_chunksize=size)


def write_tar(file: Path, members: Mapping[str, bytes | str]) -> None:
    with tarfile.open(file, "w") as archive:
        for name, content in members.items():
            content = content.encode() if isinstance(content, str) else content
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
