"""What a trajectory is worth (env.py): redundancy of its crops, named rewards, evidence that was seen."""
import pytest
from PIL import Image

import env
import eval as evaluation
import rppo
from env import Shown, Trajectory, parse_action

NESTED = [(0, 0, 1600, 1600), (400, 400, 1200, 1200), (600, 600, 1000, 1000), (700, 700, 900, 900)]
MOVED = [(0, 0, 800, 800), (80, 0, 880, 800), (160, 0, 960, 800), (240, 0, 1040, 800)]
APART = [(0, 0, 800, 800), (800, 0, 1600, 800), (0, 800, 800, 1600)]


@pytest.mark.parametrize("boxes, expected", [
    (NESTED, (0.056, 0, 0)), (MOVED, (0.270, 0.158, 0.083)), (NESTED[:1] * 4, (0.375, 0.263, 0.188)),
    (APART, (0, 0, 0)), (APART[:1], (0, 0, 0)), ([], (0, 0, 0))])
def test_redundancy(boxes, expected):
    """Worked out by hand for eps = 0, 0.3 and 0.5; independent of the order."""
    for eps, value in zip((0, 0.3, 0.5), expected):
        assert env.redundancy(boxes, eps) == pytest.approx(value, abs=5.1e-4)
        assert env.redundancy(boxes[::-1], eps) == pytest.approx(value, abs=5.1e-4)


# IoU of A and C: 1/3. W is a little more than a quarter of the image.
BOXES = dict(A=(0, 0, 100, 100), B=(200, 200, 300, 300), C=(50, 0, 150, 100), W=(0, 0, 201, 200))


def played(answer, crops, boxes=None):
    """A trajectory that ended with an answer (None: without) after the crops of BOXES that are named."""
    frame = Image.new("RGB", (400, 400))
    shown = [Shown(frame, (0, 0, 400, 400), 1024, 4096)]
    for name in crops.split()[0].strip("-"):
        shown.append(Shown(frame, BOXES[name], 1024, 4096, tool="crop"))
    turns = [env.Turn("", parse_action(""), error="empty" if "refused" in crops else None)]
    answer, status = (None, "over_turns") if answer == "None" else (answer, "answered")
    return Trajectory({"solution": "red", "boxes": boxes}, shown, turns, answer=answer, status=status)


# Answer, crops (refused: a turn was), settings -> the parts that are not 0.
REWARDS = """red, -, tool_bonus=0.2 format_weight=0.5 -> accuracy=1
red, A, tool_bonus=0.2 -> accuracy=1 tool=0.2
red, AAA, -> accuracy=1
blue, A, tool_bonus=0.2 ->
blue, AB, ->
blue, AA, -> redundancy=-0.175
blue, AC, -> redundancy=-0.00833333
blue, AAB, eps=0.4 -> redundancy=-0.0666667
blue, AA, lam=2 eps=0 -> redundancy=-0.5
blue, AA, lam=0 ->
None, AA, format_weight=0.5 -> redundancy=-0.175 format=-0.5
red, A refused, -> accuracy=1
red, A refused, format_weight=0.5 -> accuracy=1 format=-0.5""".splitlines()


def numbers(text):
    """{"a": 1.0} of the text a=1"""
    found = {}
    for pair in text.split():
        name, value = pair.split("=")
        found[name] = float(value)
    return found


@pytest.mark.parametrize("line", REWARDS)
def test_rewards(line):
    """Right or wrong, apart or overlapping, well formed or not: the named parts, any other 0, their total."""
    said, worth = line.split("->")
    answer, crops, cfg = said.split(", ")
    worth = numbers(worth)
    first, scored = env.rewards([played("red", "-"), played(answer, crops)], env.RewardConfig(**numbers(cfg)))
    assert first["total"] == 1 and scored.pop("total") == pytest.approx(sum(worth.values()), abs=1e-6)
    for name in {*scored, *worth}:
        assert scored[name] == pytest.approx(worth.get(name, 0), abs=1e-6), name


def test_a_reward_that_sees_the_group(policy, monkeypatch):
    """RL calls env.rewards group by group and takes `total`, wherever it stands: curiosity pays whoever crops
    more than the others of the group."""
    def curious(group, cfg):
        mean = sum(len(traj.crops) for traj in group) / len(group)
        scored = []
        for traj in group:
            scored.append({"total": len(traj.crops) - mean, "curiosity": mean})
        return scored

    sampled = [played("red", "-"), played("blue", "A"), played("red", "ABC"), played("red", "A")]
    monkeypatch.setattr(evaluation, "rollout", lambda *args, **more: sampled)
    monkeypatch.setattr(env, "rewards", curious)
    samples = rppo.collect(policy, [], [], 0, rppo.Config(samples=2))
    assert [sample.parts["curiosity"] for sample in samples] == [0.5, 0.5, 2, 2]
    assert [sample.advantage > 0 for sample in samples] == [False, True, True, False]


# Crops, evidence boxes: were they seen?
COVERED = """A, 64 0 104 40: True, as 90 % of it were
A, 65 0 105 40: False
A, 4 4 9 9, 210 210 220 220: False
AB, 4 4 9 9, 210 210 220 220: True, each in another crop
AC, 30 0 125 40: False, as no single crop holds it
W, 4 4 9 9: False, as it is more than a quarter of the image
-, 4 4 9 9: False""".splitlines()


@pytest.mark.parametrize("line", COVERED)
def test_covers(line):
    """Evidence is seen if one fine crop holds it; every evidence box is asked for."""
    given, expected = line.split(":")
    crops, *evidence = given.split(", ")
    boxes = [list(map(int, box.split())) for box in evidence]
    assert env.covers(played("red", crops, boxes)) == ("True" in expected)
