"""The script for a card (tests/gpu.py), shrunk, on the CPU. Its group `bench` is in test_bench.py."""
import json
import subprocess
import sys

import gpu


def test_gpu(tmp_path):
    out = tmp_path / "gpu.json"
    groups = ",".join(name for name in gpu.GROUPS if name != "bench")
    command = [sys.executable, gpu.__file__, "--size=tiny", f"--only={groups}", f"--out={out}"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    numbers = json.loads(out.read_text())
    assert {entry["group"] for entry in numbers} == set(groups.split(","))
    assert all(entry["verdict"] in ("", "ok") for entry in numbers), done.stdout + done.stderr
    assert "0 failed" in done.stdout
