"""One .safetensors file: the weights under their names, and the JSON of the checkpoint in its metadata.

runs/foreign.py reads it back as a checkpoint.
"""

import json
from pathlib import Path

import torch

from tiny_diffusion.errors import FileError
from tiny_diffusion.export.model import ExportedModel
from tiny_diffusion.files import atomic_path
from tiny_diffusion.runs.checkpoint import digest
from tiny_diffusion.runs.foreign import METADATA, read_safetensors


def export_safetensors(model: ExportedModel, path: Path) -> None:
    """Writes the file, whole or not at all, and checks that it is read back with bitwise the same weights."""
    from safetensors.torch import save

    state = model.state()
    about = {**model.about, "sha256": digest(model.about, state)}
    with atomic_path(path) as partial:
        partial.write_bytes(save(state, metadata={"format": "pt", METADATA: json.dumps(about)}))
        read_about, read = read_safetensors(partial)
        if read_about != about or not all(torch.equal(read[f"model/{name}"], state[name]) for name in state):
            raise FileError(f"{path} is not read back as it was written; nothing is kept.")
