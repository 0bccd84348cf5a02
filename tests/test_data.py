"""The built-in tasks (data.py): scenes, their splits, the oracle's demonstrations, and the tiny model."""
import collections
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import refused

import data
import env
import sft

SMALL = dict(n_sft=2, n_train=3, n_test=8)
EVERY_TASK = []
for name, task in data.TASKS.items():
    slow = [pytest.mark.slow] if task.label else []      # a large scene has 17 million pixels
    EVERY_TASK.append(pytest.param(name, marks=slow))


def files(folder):
    """The bytes of the rows and images of a folder."""
    found = {}
    for path in Path(folder).rglob("*"):
        if path.suffix in (".jsonl", ".png"):
            found[str(path.relative_to(folder))] = path.read_bytes()
    return found


def even(counts):
    """Are counts of independent draws within four standard deviations of an even distribution?"""
    mean = np.mean(counts)
    return np.abs(np.array(counts) - mean).max() < 4 * mean ** 0.5


def test_rows(scenes):
    """Rows are in the published schema; doc_ids name scene and question; splits share no image."""
    ids = set()
    for split, n in (("sft", 40 * 2 * 3), ("train", 24), ("test", 8)):
        rows = data.load_rows(f"{scenes}/{split}.jsonl")
        assert len(rows) == n
        for row in rows:
            assert {"images", "doc_id", "problem", "solution", "data_source"} <= set(row)
            assert row["difficulty"] >= 2 and len(row["boxes"]) == 1 and ("turns" in row) == (split == "sft")
            ids.add(row["doc_id"])
    assert len(ids) == 80 + 24 + 8
    images = [content for name, content in files(scenes).items() if name.endswith("png")]
    assert len(set(images)) == len(images) == 40 + 24 + 8


def test_held_out_scenes_never_change(scenes, tmp_path):
    """Another seed makes other scenes to learn from, and the same bytes to be tested on."""
    data.main(data.Config(seed=1, out=str(tmp_path), **SMALL))
    before = files(scenes)
    for name, content in files(tmp_path).items():
        assert (content == before[name]) == name.startswith("test"), name


def test_the_same_command_again(tmp_path):
    """Killed before sft.jsonl, which is written last, it makes the same files. It never writes over other rows."""
    cfg = data.Config(out=str(tmp_path / "rows"), **SMALL)
    data.main(cfg)
    before = files(cfg.out)
    (tmp_path / "rows/train.jsonl").write_text("{")
    (tmp_path / "rows/sft.jsonl").unlink()
    data.main(cfg)
    assert files(cfg.out) == before
    refused("n_test: 8 -> 9", data.main, data.Config(out=cfg.out, **{**SMALL, "n_test": 9}))
    (tmp_path / "train.jsonl").write_text("{}")
    words = "holds rows that this command did not make; give another --out"
    refused(words, data.main, data.Config(out=str(tmp_path), **SMALL))
    assert files(cfg.out) == before and (tmp_path / "train.jsonl").read_text() == "{}"


def test_answers_and_targets_are_unbiased():
    """Neither what is right, nor the target's cell, nor its place in reading order can be guessed: counts of
    800 questions are within four standard deviations of even."""
    answers, cells, places = collections.Counter(), np.zeros(data.GRID ** 2), collections.Counter()
    for i in range(400):
        for question in data.make_scene(np.random.default_rng([0, i]), data.TASKS["tiny"])[1]:
            tiles = list(question["tiles"])
            [target] = [cell for cell in tiles if question["tiles"][cell] == question["evidence"]]
            answers[question["answer"]] += 1
            cells[target] += 1
            places[len(tiles), tiles.index(target)] += 1
    assert even(list(answers.values())) and even(cells)
    for n in range(2, 7):
        assert places[n, 0] > 5
        assert even([places[n, place] for place in range(n)])


@pytest.mark.parametrize("name", data.TASKS)
def test_marks(name):
    """Each value of a kind has dots of its own, of mean 0, and a box with its mark stays in its cell."""
    task = data.TASKS[name]
    for kind in task.kinds:
        _, other, answers = data.KINDS[kind]
        values = [other, *answers[:9]]
        marks = [data.halftone(kind, value, data.GREY, task) for value in values]
        assert len({mark.tobytes() for mark in marks}) == len(values)
        assert all(mark.any() and abs(mark.mean()) < 0.1 for mark in marks)

    rng = np.random.default_rng(0)
    width = task.size // data.GRID
    for _ in range(60):
        pixels = np.zeros((task.size, task.size, 3), np.int16)
        x0, y0, x1, y1 = data.draw_box(rng, pixels, 6, "red", task.kinds[0], answers[0], task)
        assert 2 * width <= x0 < x1 <= 3 * width and width <= y0 < y1 <= 2 * width
        around = data.GREY if name == "large" else data.COLOURS["red"][0] // 32 * 24 + 36
        assert abs(pixels[y0:y1, x0:x1, 0].mean() - around) < 1
        pixels[width:2 * width, 2 * width:3 * width] = 0
        assert not pixels.any()
        if task.label:
            break                                # a large scene takes 0.1 s


@pytest.mark.parametrize("name", EVERY_TASK)
def test_demonstrations(name, policy, tmp_path):
    """Each replays without an error to an answer, within max_crops. It is right, and does not call that a
    guess, if and only if a crop has shown the evidence (a label: a second zoom)."""
    task = data.TASKS[name]
    n = 2 if task.label else 30
    data.main(data.Config(task=name, out=str(tmp_path), n_sft=n, n_train=1, n_test=1))
    rows = data.load_rows(f"{tmp_path}/sft.jsonl")
    right = repeated = 0
    for row in rows:
        traj = env.render(policy.proc, row, row["turns"], env.EpisodeConfig(max_tokens=4000))
        assert traj.status == "answered" and not any(turn.error for turn in traj.turns)
        assert 0 < len(traj.crops) <= env.EpisodeConfig.max_crops
        [evidence] = row["boxes"]
        seen = False
        for box in traj.crops:
            near = box[2] - box[0] < task.size / (8 if task.label else 2)
            seen = seen or near and env.intersection(box, evidence) == env.area(evidence)
        assert seen != ("Guess." in row["turns"][-1])
        assert not seen or env.is_right(traj) and env.covers(traj)
        places = [i for i, box in enumerate(traj.crops) if not any(env.iou(box, b) > 0.5 for b in traj.crops[:i])]
        assert task.label or len(places) <= data.MOST_BOXES            # RL has to find out that going on pays
        right += env.is_right(traj)
        repeated += env.redundancy(traj.crops, 0.5) > 0
    if not task.label:                                                        # flaws for RL to mend
        assert 0.3 < right / len(rows) < 0.95 and 0.02 < repeated / len(rows) < 0.6


def test_tiny_model(policy, rows):
    """It knows the format in few tokens; a seed gives the same bits, another one other weights."""
    assert len(policy.proc.encode(env.SYSTEM)) == 1 and sum(p.numel() for p in policy.parameters()) < 1e6
    for seed in (0, 1):
        made = sft.make_tiny(rows, seed).vlm
        assert torch.equal(made.lm_head.weight, policy.vlm.lm_head.weight) == (seed == 0)
        assert (sft.fingerprint(made.state_dict()) == policy.fingerprint) == (seed == 0)


def test_the_whole_view_tells_nothing(monkeypatch):
    """Without any marks the whole view of a tiny scene, as the policy sees it, is the same bit for bit; a
    crop of the target's cell, as the policy makes it, is another one."""
    cfg, task, halftone = env.EpisodeConfig(), data.TASKS["tiny"], data.halftone

    def no_marks(*args):
        return 0 * halftone(*args)

    for i in range(40):
        views, crops = [], []
        for draw in (halftone, no_marks):
            monkeypatch.setattr(data, "halftone", draw)
            image, [question, _] = data.make_scene(np.random.default_rng(i), task)
            shown = env.start_episode({"images": [image]}, cfg).shown
            views.append(shown[0].resized(16).tobytes())
            tiles = question["tiles"]
            [cell] = [cell for cell in tiles if tiles[cell] == question["evidence"]]
            corner = data.corner_of(cell, 1000 // data.GRID)
            action = env.parse_action(data.crop_call(np.append(corner, corner + 1000 // data.GRID)))
            crops.append(env.crop(action, shown, cfg).resized(16).tobytes())
        assert views[0] == views[1] and crops[0] != crops[1]
