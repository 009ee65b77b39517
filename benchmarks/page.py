"""How long the network takes in the page of `report`, in WebAssembly and in plain JavaScript, and in torch.

    python benchmarks/page.py --checkpoint outputs/mnist/model_final.pt

The page's scripts run in node, which has the engine of Chromium.  All three take one image and one thread, and take
turns, so that what else the machine does weighs on all of them.  Printed are the fastest and the median of one
evaluation and of one image sampled without guidance by ten evaluations, and their ratios to torch's.
"""

import argparse
import base64
import json
import statistics
import subprocess
import time
from collections.abc import Callable

import torch

from tiny_diffusion.diffusion.sampling import sample
from tiny_diffusion.models.build import make_diffusion
from tiny_diffusion.page.model import model_of
from tiny_diffusion.page.scripts import METHOD, NETWORK, kernel, script
from tiny_diffusion.runs.checkpoint import Checkpoint, load_checkpoint, load_model

EVALUATIONS, IMAGES, STEPS = 40, 5, 10  # in a round
KINDS = {"evaluation": "one evaluation", "image": f"an image of {STEPS} evaluations"}
IN_NODE = """
const { about, bytes, evaluations, images, steps } = JSON.parse(require("fs").readFileSync(0, "utf8"));
const { channels, height, width } = about.network.shape;
const x = new Stream(0, "image").normals(channels * height * width);
const times = (count, act) => Array.from({ length: count }, (_, number) => {
  const started = performance.now();
  act(number);
  return performance.now() - started;
});
const measured = (kernel) => {
  const model = new Model(about, kernel);
  const request = (index) => ({ seed: 0, index, sampler: "sa_solver", steps, label: null });
  return {
    evaluation: times(evaluations, () => model.network.evaluate(x, 500, null)),
    image: times(images, (index) => [...model.sample(request(index))]),
  };
};
console.log(JSON.stringify([measured(bytesOf(bytes)), measured(null)]));
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", required=True)
    parser.add_argument("--rounds", type=int, default=5)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    checkpoint = load_checkpoint(asked.checkpoint)
    counts = {"evaluations": EVALUATIONS, "images": IMAGES, "steps": STEPS}
    given = {"about": model_of(checkpoint), "bytes": base64.b64encode(kernel()).decode(), **counts}
    source = script((*METHOD, *NETWORK)) + IN_NODE
    rounds = [(in_torch(checkpoint), *in_node(source, json.dumps(given))) for _ in range(asked.rounds)]
    for kind, title in KINDS.items():
        print(f"{title:<26}{'fastest':>9}{'median':>10}   times torch's")
        of_torch = None
        for i, name in enumerate(("torch, one thread", "WebAssembly", "plain JavaScript")):
            times = [milliseconds for found in rounds for milliseconds in found[i][kind]]
            both = min(times), statistics.median(times)
            of_torch = of_torch or both
            ratios = [f"{mine / torchs:.2f}" for mine, torchs in zip(both, of_torch, strict=True)]
            print(f"  {name:<24}{both[0]:6.1f} ms {both[1]:6.1f} ms   {ratios[0]}, of the medians {ratios[1]}")


def in_torch(checkpoint: Checkpoint) -> dict[str, list[float]]:
    """The milliseconds of each measurement."""
    model, diffusion = load_model(checkpoint), make_diffusion(checkpoint.config)
    x = torch.randn(1, *checkpoint.shape)

    def sample_image(index: int) -> None:
        plain = {"classes": ()} if checkpoint.config.class_cond else {}
        request = checkpoint.request([index], sampler="sa_solver", steps=STEPS, guidance=1.0, **plain)
        sample(model, diffusion, request, checkpoint.shape)

    with torch.no_grad():
        evaluation = timed(EVALUATIONS, lambda _: model(x, torch.tensor([500.0])))
    return {"evaluation": evaluation, "image": timed(IMAGES, sample_image)}


def timed(count: int, act: Callable[[int], object]) -> list[float]:
    """The milliseconds of act(0), act(1) and so on."""
    times = []
    for number in range(count):
        started = time.perf_counter()
        act(number)
        times.append(1e3 * (time.perf_counter() - started))
    return times


def in_node(source: str, given: str) -> list[dict[str, list[float]]]:
    """The milliseconds of each measurement, with WebAssembly and without."""
    done = subprocess.run(["node", "-e", source], input=given, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


if __name__ == "__main__":
    main()
