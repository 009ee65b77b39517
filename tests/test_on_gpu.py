"""benchmarks/on_gpu.py, reduced and on the CPU: every piece writes its JSON, and none of them fails."""

import json
import runpy
import sys
from pathlib import Path

import pytest
from cli_helpers import call

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
PIECES = ("agreement", "runs", "speed", "mnist", "cifar10_2", "cifar10_5")


def measure_in_one_process(output):
    """benchmarks/on_gpu.py in this process, a fork with torch loaded, and in it the ten commands that it starts."""
    sys.path.insert(0, str(BENCHMARKS))
    import time_to_quality

    def run(arguments, environment):
        script, *words = map(str, arguments)
        words = words[1:] if script == "-m" else [Path(script).stem, *words]
        code = call(*words)
        return time_to_quality.Done(1.0, None if code == 0 else f"exit code {code}")

    time_to_quality.run = run
    sys.argv = ["on_gpu.py", "--reduced", "--device", "cpu", "--output", output]
    runpy.run_path(str(BENCHMARKS / "on_gpu.py"), run_name="__main__")


@pytest.mark.slow
def test_every_piece_of_the_measurements_on_a_gpu_runs_on_a_cpu(warm, tmp_path):
    running = warm.start_function(measure_in_one_process, str(tmp_path))
    assert warm.wait(running) == 0, running.said()
    found = {path.stem: json.loads(path.read_text()) for path in tmp_path.glob("*.json")}
    assert set(found) == set(PIECES)
    assert not any("failed" in piece for piece in found.values()), running.said()
    assert all(piece["rows"] and piece["machine"]["torch"] for piece in found.values())
    assert {row["agrees"] for row in found["agreement"]["rows"]} == {"yes"}
    assert {row["equal"] for row in found["runs"]["rows"]} == {"yes"}
    for row in found["speed"]["rows"]:
        assert row["images/s"] > 0 and 0 < row["share of the bf16 matrix rate"]
    assert found["mnist"]["rows"][0]["relative FD"] > 0
    assert (tmp_path / "cifar10_2.png").stat().st_size and (tmp_path / "cifar10_5.png").stat().st_size
    assert all(f"\n{name}: " in running.said() for name in PIECES)
