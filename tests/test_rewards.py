"""What a trajectory is worth (env.py): redundancy of its crops, named rewards, evidence that was seen. And
the study (study.py): its rewards, and what is done after an empty crop."""
import pytest
from conftest import traj_of

import env
import rppo
import study

MOVED = [(0, 0, 800, 800), (80, 0, 880, 800), (160, 0, 960, 800), (240, 0, 1040, 800)]
# IoU of A and C: 1/3. W is a little more than a quarter of the image.
BOXES = dict(A=(0, 0, 100, 100), B=(200, 200, 300, 300), C=(50, 0, 150, 100), W=(0, 0, 201, 200))


def test_redundancy():
    """Worked out by hand; independent of the order."""
    for eps, value in zip((0, 0.3, 0.5), (0.270, 0.158, 0.083)):
        assert env.redundancy(MOVED, eps) == pytest.approx(value, abs=5.1e-4)
        assert env.redundancy(MOVED[::-1], eps) == pytest.approx(value, abs=5.1e-4)
    assert env.redundancy([], 0) == 0


def played(answer, crops, boxes=()):
    """A trajectory that ended with an answer (None: without) after the crops of BOXES that are named, and (!)
    after a call that was refused."""
    answer = None if answer == "None" else answer
    errors = [("", "empty")] if "!" in crops else []
    return traj_of(answer, [BOXES[name] for name in crops.strip("-!")], boxes, errors, (400, 400))


@pytest.mark.parametrize("line", """red - 1 0.3 0.2 0.5 -> 1 0 0 0
red  AAA 1 0.3 0.2 0.5 -> 1 0 0.2 0
red  A!  1 0.3 0.0 0.5 -> 1 0 0 -0.5
blue A   1 0.3 0.2 0.5 -> 0 0 0 0
blue AA  1 0.3 0.0 0.0 -> 0 -0.175 0 0
blue AAB 1 0.4 0.0 0.0 -> 0 -0.0666667 0 0
blue AA  2 0.0 0.0 0.0 -> 0 -0.5 0 0
None AA  1 0.3 0.0 0.5 -> 0 -0.175 0 -0.5""".splitlines())
def test_rewards(line):
    """Answer, crops, lam, eps, tool_bonus, format_weight -> accuracy, redundancy, tool, format; total."""
    said, worth = line.split("->")
    answer, crops, *settings = said.split()
    worth = list(map(float, worth.split()))
    cfg = env.RewardConfig(*map(float, settings))
    first, scored = env.rewards([played("red", "-"), played(answer, crops)], cfg)
    assert list(scored) == ["accuracy", "redundancy", "tool", "format", "total"]
    assert first["total"] == 1
    assert list(scored.values()) == pytest.approx([*worth, sum(worth)], abs=1e-6)


def test_covers():
    """Evidence is seen if one fine crop holds 90 % of it; every evidence box is asked for."""
    spot, other = [4, 4, 9, 9], [210, 210, 220, 220]
    assert env.covers(played("red", "A", [[64, 0, 104, 40]]))
    assert not env.covers(played("red", "A", [[65, 0, 105, 40]]))
    assert not env.covers(played("red", "AC", [[30, 0, 125, 40]]))
    assert env.covers(played("red", "AB", [spot, other]))
    assert not env.covers(played("red", "A", [spot, other]))
    assert not env.covers(played("red", "W", [spot]))


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
    # A call that had no turn left, and an answer.
    traj.turns += [env.Turn("", env.Action("crop")), env.Turn("", env.Action("answer"))]
    assert study.classify(traj) == {1: "next", 2: "again", 3: "next"}
    traj.turns[3:4] = []
    assert study.classify(traj) == {1: "next", 2: "again", 4: "answer"}
