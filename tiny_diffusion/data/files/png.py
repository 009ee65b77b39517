"""PNG files without what Pillow stumbles over: texts, profiles of more than a megabyte, metadata after the pixels.

Pillow refuses a file if a text inflates to more than 1 MB, as those of image generators do, or if the checksum of a
text is wrong.  None of that changes a pixel.
"""

import io
import struct
import zlib
from typing import TYPE_CHECKING, BinaryIO

if TYPE_CHECKING:
    from PIL.Image import Image

SIGNATURE = b"\x89PNG\r\n\x1a\n"
MAX_METADATA = 1 << 20  # bytes of a colour profile or of EXIF data, which Pillow refuses beyond


def without_metadata(file: BinaryIO, pixels: bool) -> BinaryIO:
    """A PNG of the chunks that decide its pixels, with EXIF data and colour profile before them.

    pixels False: without the pixels, which are not even read.
    """
    first, metadata, others, start_of_pixels = [SIGNATURE], [], [], b""
    file.seek(len(SIGNATURE))
    while len(header := file.read(8)) == 8:
        length, name = struct.unpack(">I4s", header)
        if name in (b"eXIf", b"iCCP"):
            chunk = header + file.read(length + 4)
            metadata += [chunk] if _is_usable(name, chunk) else []
        elif name in (b"IDAT", b"IEND") and not pixels:
            start_of_pixels = header if name == b"IDAT" else start_of_pixels  # at which Pillow stops to read a header
            file.seek(length + 4, io.SEEK_CUR)
        elif name[0] & 32 and name != b"tRNS":  # lower case: ancillary
            file.seek(length + 4, io.SEEK_CUR)
        else:
            (first if name == b"IHDR" else others).append(header + file.read(length + 4))
    return io.BytesIO(b"".join([*first, *metadata, *others, start_of_pixels]))


def _is_usable(name: bytes, chunk: bytes) -> bool:
    """Whether the checksum is right and the content is not too long."""
    content, checksum = chunk[8:-4], chunk[-4:]
    if len(content) > MAX_METADATA or struct.pack(">I", zlib.crc32(chunk[4:-4])) != checksum:
        return False
    if name == b"eXIf":
        return True
    try:  # iCCP: a name, a zero, the method of compression, the compressed profile
        inflater = zlib.decompressobj()
        inflater.decompress(content[content.index(b"\0") + 2 :], MAX_METADATA)
        return inflater.eof
    except (ValueError, zlib.error):
        return False


def scale_transparency(image: "Image") -> None:
    """Scales the transparent grey or colour of a PNG to 8 bits, as Pillow does with the pixels but not with it.

    Of 16-bit colours Pillow keeps the upper byte, so all colours that share it become transparent.
    """
    hidden, raw = image.info.get("transparency"), image.tile[0][3] if image.tile else None
    if raw in ("L;2", "L;4") and isinstance(hidden, int):
        image.info["transparency"] = hidden * {"L;2": 85, "L;4": 17}[raw]
    elif raw == "RGB;16B" and isinstance(hidden, tuple):
        image.info["transparency"] = tuple(value >> 8 for value in hidden)
