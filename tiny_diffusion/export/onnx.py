"""An ONNX file of the network, for any batch: output = network(x, time) or network(x, time, label).

x: (B, C, H, W) float32.   time: (B,) float32, as in training.   label: (B,) int64; the number of classes is the null
class.  The patches are inside.  The JSON of the checkpoint lies in the metadata, so that a program can build the
schedule from it.
"""

import json
import warnings
from pathlib import Path

import numpy as np
import torch

from tiny_diffusion.errors import FileError
from tiny_diffusion.export.model import ExportedModel, refuse_difference, require
from tiny_diffusion.files import atomic_path
from tiny_diffusion.runs.foreign import METADATA

OPSET = 24  # onnx 1.19, onnxruntime 1.23
BATCHES = (1, 3, 64)  # that are compared with torch
TOLERANCE = 1e-4


def export_onnx(model: ExportedModel, path: Path) -> float:
    """Writes the file, whole or not at all; returns the largest difference of outputs between onnxruntime and torch.

    Raises FileError if a library is missing, or if the outputs differ.
    """
    onnx = require("onnx", "onnx", "onnx")
    require("onnxscript", "onnx", "onnx")
    runtime = require("onnxruntime", "onnx", "onnx")
    with atomic_path(path) as partial:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the exporter, about itself
            program = _traced(model)
        proto = program.model_proto
        onnx.helper.set_model_props(proto, {METADATA: json.dumps(model.about)})
        onnx.checker.check_model(proto, full_check=True)
        onnx.save_model(proto, partial)
        return _check(model, partial, runtime)


def _traced(model: ExportedModel):
    """The network as torch.onnx sees it, with a batch of any size."""
    inputs = [each for each in model.inputs(2) if each is not None]
    names, batch = ("x", "time", "label")[: len(inputs)], torch.export.Dim("batch")
    return torch.onnx.export(
        model.network, tuple(inputs), input_names=names, output_names=("output",), dynamo=True, opset_version=OPSET,
        dynamic_shapes=tuple({0: batch} for _ in inputs), verbose=False,
    )  # fmt: skip


def _check(model: ExportedModel, path: Path, runtime) -> float:
    session, outputs = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"]), {}
    wanted = {node.name for node in session.get_inputs()}
    for batch in BATCHES:
        x, time, label = model.inputs(batch, seed=batch)
        given = {"x": x, "time": time, "label": label}
        if wanted != {name for name, value in given.items() if value is not None}:
            raise FileError(f"the exported network takes {', '.join(sorted(wanted))}; nothing was written.")
        (output,) = session.run(None, {name: np.asarray(given[name]) for name in wanted})
        with torch.no_grad():
            outputs[f"a batch of {batch}"] = model.network(x, time, label), torch.from_numpy(output)
    return refuse_difference("onnxruntime's output", outputs, TOLERANCE)
