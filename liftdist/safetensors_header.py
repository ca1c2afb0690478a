"""The header of a safetensors file: read and checked. Imports no torch.

8 bytes length | JSON: name -> {dtype, shape, data_offsets} | data, from which data_offsets count
"""

from __future__ import annotations

import json
import math
import re
import struct
from pathlib import Path
from typing import Any, BinaryIO

_GIT_LFS = b"version https://git-lfs"  # begins the file that stands in for one that git-lfs has not fetched


def data_begin(file: BinaryIO) -> int:
    """Offset of the tensor data: behind eight bytes with the length of the header, and the header."""
    return 8 + int(struct.unpack("<Q", file.read(8))[0])


def header(path: Path) -> dict[str, Any]:
    """The header of a safetensors file, whose size and offsets are checked.

    Raises:
        ValueError: the file is empty, cut, or something else; the message begins with its name.
        OSError: it cannot be read.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        if file.read(len(_GIT_LFS)) == _GIT_LFS:
            raise ValueError(f"{path.name} is a git-lfs pointer, not the file itself, which git lfs pull fetches")
        if size < 8:
            raise ValueError(f"{path.name} is empty or truncated: it has {size} bytes")
        file.seek(0)
        begin = data_begin(file)
        if begin > size:
            raise ValueError(f"{path.name} is not a complete safetensors file")
        text = file.read(begin - 8)
    try:
        entries = json.loads(text)
        end = _end({name: entry for name, entry in entries.items() if name != "__metadata__"})
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path.name} has a damaged header: {error}") from None
    if size != begin + end:
        raise ValueError(f"{path.name} has {size} bytes, its header describes {begin + end}")
    return entries


def _end(entries: dict[str, Any]) -> int:
    """Where the data ends. Raises ``ValueError`` if tensors overlap, leave a gap, or do not fit their shapes."""
    position = 0
    for name, entry in sorted(entries.items(), key=lambda item: item[1]["data_offsets"]):
        begin, end = entry["data_offsets"]
        bits = re.search(r"\d+", "8" if entry["dtype"] == "BOOL" else entry["dtype"])  # F32, F8_E4M3
        if bits is None:
            raise ValueError(f"{name} has the dtype {entry['dtype']}")
        if begin != position or (end - begin) * 8 != math.prod(entry["shape"]) * int(bits[0]):
            raise ValueError(f"the bytes of {name} are not where its shape and its neighbours put them")
        position = end
    return position
