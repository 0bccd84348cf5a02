"""The study (study.py): its rewards on hand-made groups, and a small one from nothing."""
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import env
import rppo
import study
from test_rewards import BOXES, played

FLAGS = ("--sft_steps=2 --n_sft=20 --n_train=12 --eval_rows=4 --n_test=6 --steps=2 --every=1 --k=1 "
         "--claim_seeds=1 --other_seeds=1 --only=curiosity").split()


def test_forked_rewards():
    """Red is right. A and B are new places, a second A is not; A holds a fifth of the evidence."""
    box = [[98, 0, 108, 10]]
    group = [played("red", "A", box), played("blue", "AA", box), played("blue", "AB", box),
             played("blue", "-", box)]
    totals = {study.exploration: [1, -0.8, -0.6, -1], study.curiosity: [1, -0.05, -0.05, 0],
              study.evidence_overlap: [1.1, 0.1, 0.1, 0]}
    for fork, expected in totals.items():
        scored = fork(group, rppo.Config(lam=0.0))
        assert [parts["total"] for parts in scored] == pytest.approx(expected)
    one = study.curiosity(group[-1:] * 9 + group[:1], rppo.Config(lam=0.0))[-1]     # a tenth crops
    assert one["total"] == pytest.approx(1 + 0.2 / 2 / 0.1 * 0.25)


def test_decisions():
    """What is done after an empty crop, until the evidence (in B) has been seen."""
    traj = played("blue", "-", [[210, 210, 220, 220]])
    traj.turns = [env.Turn("", None, shown=env.Shown(None, BOXES[name], 1, 1)) for name in "ACAB"]
    traj.turns += [env.Turn("", env.Action("crop")), env.Turn("", env.Action("answer"))]    # one had no turn left
    assert study.classify(traj) == {1: "next", 2: "again", 3: "next"}
    traj.turns[3:4] = []
    assert study.classify(traj) == {1: "next", 2: "again", 4: "answer"}


@pytest.mark.slow
def test_smoke(tmp_path):
    """Every arm of both starts is in the file, tables and figure are there; a second run does nothing."""
    command = [sys.executable, str(Path(study.__file__)), f"--work={tmp_path}/jobs", f"--out={tmp_path}"]
    for _ in range(2):
        subprocess.run([*command, *FLAGS], check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        runs = json.loads((tmp_path / "study.json").read_text())["runs"]
    assert set(runs) == {f"{start}/0/{arm}" for start in study.STARTS for arm in ("GRPO", "curiosity")}
    assert list(runs["default/0/GRPO"]["decisions"]) == ["0", "1", "2"]
    assert (tmp_path / "study.md").read_text().count("| curiosity | 1 |") == 2
    assert "relook: P(look again)" in (tmp_path / "study.svg").read_text()
