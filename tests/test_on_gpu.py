"""benchmarks/on_gpu.py, reduced and on the CPU: every piece writes its JSON, and none of them fails."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from warm_process import ONE_THREAD

ROOT = Path(__file__).parent.parent
PIECES = ("agreement", "runs", "speed", "mnist", "cifar10_2", "cifar10_5")


@pytest.mark.slow
def test_every_piece_of_the_measurements_on_a_gpu_runs_on_a_cpu(tmp_path):
    command = [sys.executable, "benchmarks/on_gpu.py", "--reduced", "--device", "cpu", "--output", tmp_path]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, **ONE_THREAD}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = {path.stem: json.loads(path.read_text()) for path in tmp_path.glob("*.json")}
    assert set(found) == set(PIECES)
    assert not any("failed" in piece for piece in found.values()), done.stderr
    assert all(piece["rows"] and piece["machine"]["torch"] for piece in found.values())
    assert {row["agrees"] for row in found["agreement"]["rows"]} == {"yes"}
    assert {row["equal"] for row in found["runs"]["rows"]} == {"yes"}
    for row in found["speed"]["rows"]:
        assert row["images/s"] > 0 and 0 < row["share of the bf16 matrix rate"]
    assert found["mnist"]["rows"][0]["relative FD"] > 0
    assert (tmp_path / "cifar10_2.png").stat().st_size and (tmp_path / "cifar10_5.png").stat().st_size
    assert all(f"\n{name}: " in done.stdout for name in PIECES)
