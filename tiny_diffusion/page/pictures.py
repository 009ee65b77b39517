"""Images as the page carries them: bytes in base64, and files of pictures as data addresses, within a budget."""

import base64
import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np

QUALITY = 80  # of WebP, for pictures that are too large as they are


def base64_of(content: bytes) -> str:
    return base64.b64encode(content).decode()


def images_text(images) -> str:
    """Float images (N, C, H, W) in [-1, 1] as bytes in base64."""
    from tiny_diffusion.data.pixels import to_uint8

    return base64_of(to_uint8(images).numpy().tobytes())


def address_of(path: Path, max_bytes: int) -> str | None:
    """A picture as a data address, smaller and with loss if it has more than max_bytes; None if it is unreadable."""
    from PIL import Image

    try:
        content = path.read_bytes()
        if len(content) <= max_bytes:
            return f"data:image/png;base64,{base64_of(content)}"
        with Image.open(io.BytesIO(content)) as image:
            image = image.convert("RGB")
            while True:
                packed = io.BytesIO()
                image.save(packed, format="WEBP", quality=QUALITY)
                if packed.tell() <= max_bytes or min(image.size) < 200:
                    return f"data:image/webp;base64,{base64_of(packed.getvalue())}"
                image = image.resize([side * 3 // 4 for side in image.size])
    except (OSError, ValueError):
        return None


def evenly_chosen(items: Sequence, count: int) -> list:
    """At most `count` of the items, evenly spaced from the first to the last."""
    places = np.linspace(0, len(items) - 1, min(count, len(items))).round().astype(int)
    return [items[place] for place in places]
