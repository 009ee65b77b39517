"""An ONNX file gives torch's outputs in onnxruntime, for batches of any size, with classes and without."""

import json

import numpy as np
import pytest
import torch
from export_helpers import EXPRESSIBLE, random_model
from import_helpers import needs

from tiny_diffusion.export.onnx import BATCHES, OPSET, export_onnx


@needs("onnx", "onnxruntime", "onnxscript")
@pytest.mark.slow
@pytest.mark.parametrize("name", ["classes", "details"])
def test_onnxruntime_gives_torchs_outputs(name, tmp_path):
    import onnx
    import onnxruntime

    model, file = random_model(**EXPRESSIBLE[name]), tmp_path / "model.onnx"
    assert export_onnx(model, file) < 1e-4
    proto = onnx.load(file)
    assert [each.version for each in proto.opset_import if not each.domain] == [OPSET]
    assert json.loads(proto.metadata_props[0].value) == model.about
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    assert BATCHES == (1, 3, 64)
    for batch in (1, 3, 64, 7):
        given = dict(zip(("x", "time", "label"), model.inputs(batch, seed=9), strict=True))
        given = {name: np.asarray(value) for name, value in given.items() if value is not None}
        (output,) = session.run(None, given)
        expected = model.network(*(torch.from_numpy(value) for value in given.values()))
        torch.testing.assert_close(torch.from_numpy(output), expected, rtol=0, atol=1e-4)
