"""Damage inside a zip file."""

import struct
import zipfile


def break_deflated(path, member):
    """Give the first block of a deflated member a type that does not exist."""
    with zipfile.ZipFile(path) as archive:
        start = archive.getinfo(member).header_offset
    content = bytearray(path.read_bytes())
    start += 30 + sum(struct.unpack_from("<2H", content, start + 26))
    content[start] |= 0b110
    path.write_bytes(content)
