"""Assembles kernel.wat, the text of the page's WebAssembly kernel, into the bytes of kernel.wasm beside it.

``python -m tiny_diffusion.page.assemble`` writes the file again after a change of the text; it needs `pip install
wasmtime`, which using the package does not.  A test compares the bytes with the text.
"""

from pathlib import Path

FOLDER = Path(__file__).parent


def assembled(text: str) -> bytes:
    """The module of this text, without the names of its functions and variables."""
    import wasmtime

    return without_names(bytes(wasmtime.wat2wasm(text)))


def without_names(module: bytes) -> bytes:
    """A WebAssembly module without its custom sections, whose contents differ between assemblers."""
    kept, at = [module[:8]], 8
    while at < len(module):
        length, start, shift = 0, at + 1, 0
        while True:  # LEB128: seven bits a byte, the lowest first
            byte = module[start]
            length |= (byte & 0x7F) << shift
            start, shift = start + 1, shift + 7
            if not byte & 0x80:
                break
        if module[at]:
            kept.append(module[at : start + length])
        at = start + length
    return b"".join(kept)


if __name__ == "__main__":
    from tiny_diffusion.files import atomic_write

    with atomic_write(FOLDER / "kernel.wasm") as file:
        file.write(assembled((FOLDER / "kernel.wat").read_text("utf-8")))
