"""How long one evaluation takes in the page of `report`, in WebAssembly and in plain JavaScript, and in torch.

    python benchmarks/page.py --checkpoint outputs/mnist/model_final.pt

The page's scripts run in node, which has the engine of Chromium.  All three take one image and one thread, and take
turns, so that what else the machine does weighs on all of them.  Printed are the fastest evaluations and their ratio.
"""

import argparse
import base64
import json
import subprocess
import time

import torch

from tiny_diffusion.page.model import model_of
from tiny_diffusion.page.scripts import METHOD, NETWORK, kernel, script
from tiny_diffusion.runs.checkpoint import load_checkpoint, load_model

IN_NODE = """
const { about, bytes } = JSON.parse(require("fs").readFileSync(0, "utf8"));
const { channels, height, width } = about.network.shape;
const x = new Stream(0, "image").normals(channels * height * width);
const fastest = (kernel) => {
  const { network } = new Model(about, kernel);
  const times = Array.from({ length: 40 }, () => {
    const started = performance.now();
    network.evaluate(x, 500, null);
    return performance.now() - started;
  });
  return Math.min(...times);
};
console.log(JSON.stringify([fastest(bytesOf(bytes)), fastest(null)]));
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", required=True)
    parser.add_argument("--rounds", type=int, default=5)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    checkpoint = load_checkpoint(asked.checkpoint)
    model, x = load_model(checkpoint), torch.randn(1, *checkpoint.shape)
    given = json.dumps({"about": model_of(checkpoint), "bytes": base64.b64encode(kernel()).decode()})
    source = script((*METHOD, *NETWORK)) + IN_NODE
    rounds = [[in_torch(model, x), *in_node(source, given)] for _ in range(asked.rounds)]
    of_torch, in_wasm, in_plain = map(min, zip(*rounds, strict=True))
    print(f"torch, one thread  {of_torch:6.1f} ms")
    print(f"WebAssembly        {in_wasm:6.1f} ms, {in_wasm / of_torch:.2f} times torch's")
    print(f"plain JavaScript   {in_plain:6.1f} ms, {in_plain / of_torch:.2f} times torch's")


def in_torch(model: torch.nn.Module, x: torch.Tensor) -> float:
    """Milliseconds of the fastest of 40 evaluations."""
    times = []
    with torch.no_grad():
        for _ in range(40):
            started = time.perf_counter()
            model(x, torch.tensor([500.0]))
            times.append(time.perf_counter() - started)
    return 1e3 * min(times)


def in_node(source: str, given: str) -> list[float]:
    """Milliseconds of the fastest of 40 evaluations, with WebAssembly and without."""
    done = subprocess.run(["node", "-e", source], input=given, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


if __name__ == "__main__":
    main()
