"""The built-in tasks (data.py): scenes, their splits, the oracle's demonstrations, and the tiny model."""
import collections
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

import data
import env
import sft

SMALL = dict(n_sft=2, n_train=3, n_test=8)
EVERY_TASK = []
for name, task in data.TASKS.items():
    slow = [pytest.mark.slow] if task.label else []      # a large scene has 17 million pixels
    EVERY_TASK.append(pytest.param(name, marks=slow))


def read(*path):
    with open(os.path.join(*path), "rb") as f:
        return f.read()


def load(folder, split):
    return env.load_rows(os.path.join(folder, f"{split}.jsonl"))


def times(folder):
    return {path: path.stat().st_mtime_ns for path in Path(folder).rglob("*")}


def questions_of(name, n, seed=0):
    """The questions of n scenes of a task, without their images."""
    found = []
    for i in range(n):
        found += data.make_scene(np.random.default_rng([seed, i]), data.TASKS[name])[1]
    return found


def even(counts):
    """Are counts of independent draws within four standard deviations of an even distribution?"""
    mean = np.mean(counts)
    return np.abs(np.array(counts) - mean).max() < 4 * mean ** 0.5


def test_rows(scenes):
    """Rows are in the published schema; doc_ids name scene and question; difficulty counts the candidates."""
    ids = set()
    for split, n in (("sft", 40 * 2 * 3), ("train", 24), ("test", 8)):
        rows = load(scenes, split)
        assert len(rows) == n
        for row in rows:
            assert {"images", "doc_id", "problem", "solution", "data_source"} <= set(row)
            assert row["difficulty"] >= 2 and len(row["boxes"]) == 1 and ("turns" in row) == (split == "sft")
            ids.add(row["doc_id"])
    assert len(ids) == 80 + 24 + 8


def test_splits_share_no_image(scenes):
    seen = collections.Counter()
    for split in ("sft", "train", "test"):
        for path in {row["images"][0] for row in load(scenes, split)}:
            seen[read(path)] += 1
    assert len(seen) == sum(seen.values()) == 40 + 24 + 8


def test_held_out_scenes_never_change(scenes, tmp_path):
    """Another seed makes other scenes to learn from, and the same bytes to be tested on."""
    data.main(data.Config(seed=1, out=str(tmp_path), **SMALL))
    for file in ("test.jsonl", *[f"test/{i}.png" for i in range(8)]):
        assert read(scenes, file) == read(tmp_path, file)
    for split in ("sft", "train"):
        for i in range(2):
            assert read(scenes, split, f"{i}.png") != read(tmp_path, split, f"{i}.png")


def test_the_same_command_makes_nothing_again(tmp_path):
    cfg = data.Config(out=str(tmp_path / "rows"), **SMALL)
    data.main(cfg)
    before = times(cfg.out)
    data.main(cfg)
    assert times(cfg.out) == before
    with pytest.raises(env.UserError, match="n_test: 8 -> 9"):
        data.main(data.Config(out=cfg.out, **{**SMALL, "n_test": 9}))
    assert times(cfg.out) == before


def test_a_killed_command_goes_on(tmp_path):
    """tiny/ is made last: without it the same command makes the same files."""
    cfg = data.Config(out=str(tmp_path), **SMALL)
    data.main(cfg)
    before = {path: read(path) for path in times(tmp_path) if path.suffix in (".jsonl", ".png")}
    shutil.rmtree(tmp_path / "tiny")
    (tmp_path / "sft.jsonl").write_text("{")
    data.main(cfg)
    assert before == {path: read(path) for path in before}


def test_rows_of_others_are_not_overwritten(tmp_path):
    (tmp_path / "train.jsonl").write_text("{}")
    with pytest.raises(env.UserError, match="holds rows that this command did not make; give another --out"):
        data.main(data.Config(out=str(tmp_path), **SMALL))
    assert (tmp_path / "train.jsonl").read_text() == "{}"


def test_an_unknown_task_is_a_line(tmp_path):
    with pytest.raises(env.UserError, match="--task=huge: the tasks are " + ", ".join(data.TASKS)):
        data.main(data.Config(task="huge", out=str(tmp_path / "rows"), **SMALL))
    assert not os.path.exists(tmp_path / "rows")


# --- Scenes ---------------------------------------------------------------------------------------------

def test_answers_and_targets_are_unbiased():
    """Neither what is right, nor the target's cell, nor its place in reading order can be guessed: counts of
    800 questions are within four standard deviations of even."""
    answers, cells, places = collections.Counter(), np.zeros(data.GRID ** 2), collections.Counter()
    for question in questions_of("tiny", 400):
        tiles = list(question["tiles"])
        target = [cell for cell in tiles if question["tiles"][cell] == question["evidence"]]
        assert len(target) == 1 and tiles == sorted(tiles)
        answers[question["answer"]] += 1
        cells[target[0]] += 1
        places[len(tiles), tiles.index(target[0])] += 1
    assert even(list(answers.values())) and even(cells)
    for n in range(2, 7):
        assert places[n, 0] > 5
        assert even([places[n, place] for place in range(n)])


def difference(image, blank, box, cfg):
    """Largest difference (0 to 255) of two images' views of a box, as a crop of the model."""
    views = []
    for frame in (image, blank):
        shown = env.Shown(frame, box, cfg.min_crop_pixels, cfg.max_crop_pixels)
        views.append(np.asarray(shown.resized(16)).astype(int))
    return np.abs(views[0] - views[1]).max()


@pytest.mark.parametrize("name", EVERY_TASK)
def test_a_scene(name, monkeypatch):
    """Its marks are inside their boxes' tiles and nowhere else, each in its own cell. The whole view is
    hardly another one without them, that of the evidence is. (Large ones need real budgets.)"""
    task, halftone = data.TASKS[name], data.halftone
    cfg = env.EpisodeConfig(**(env.REAL_EPISODE if task.label else {}))
    for i in range(1 if task.label else 4):
        image, questions = data.make_scene(np.random.default_rng(i), task)
        with monkeypatch.context() as patch:
            patch.setattr(data, "halftone", lambda *args: 0 * halftone(*args))
            blank, _ = data.make_scene(np.random.default_rng(i), task)
        changed = (np.asarray(image) != np.asarray(blank)).any(-1)
        for question in questions:
            assert question["evidence"] in question["tiles"].values()
            for cell, (x0, y0, x1, y1) in question["tiles"].items():
                place = x0 * data.GRID // task.size + data.GRID * (y0 * data.GRID // task.size)
                assert cell == place == (x1 - 1) * data.GRID // task.size + place // data.GRID * data.GRID
                assert changed[y0:y1, x0:x1].any()
                changed[y0:y1, x0:x1] = False
            assert difference(image, blank, question["evidence"], cfg) > 60
        assert not changed.any()
        assert difference(image, blank, (0, 0, *image.size), cfg) < 30


# --- The oracle -----------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", EVERY_TASK)
def test_demonstrations(name, policy, tmp_path):
    """Each replays without an error to an answer, within max_crops. It is right, and does not call that a
    guess, if and only if a crop has shown the evidence (a label: a second zoom)."""
    task = data.TASKS[name]
    n = 2 if task.label else 60
    data.main(data.Config(task=name, out=str(tmp_path), n_sft=n, n_train=1, n_test=1))
    rows = load(tmp_path, "sft")
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
        for text in row["turns"][1:-1]:
            assert f" {row['solution']}." not in text                  # not before it was seen
        right += env.is_right(traj)
        repeated += env.redundancy(traj.crops, 0.5) > 0
    if n == 60:                                                        # flaws for RL to mend
        assert 0.3 < right / len(rows) < 0.95 and 0.02 < repeated / len(rows) < 0.6


def test_demonstrations_name_the_boxes(scenes):
    """The first thought lists all boxes in reading order and numbers those of the asked colour."""
    for row in load(scenes, "sft")[:60]:
        thought = row["turns"][0].split("</think>")[0]
        boxes = re.findall(r"\b([A-D][1-4]) (\w+)( \d)?", thought)
        asked = row["problem"].split(" box")[0].split()[-1]
        numbered = [int(number) for _, _, number in boxes if number]
        assert numbered == list(range(1, row["difficulty"] + 1))
        assert all((colour == asked) == bool(number) for _, colour, number in boxes)
        cells = [data.GRID * (int(cell[1]) - 1) + ord(cell[0]) - 65 for cell, *_ in boxes]
        assert cells == sorted(set(cells))


def test_tiny_model(scenes):
    """It loads, knows the format in few tokens, and any text comes back as it was."""
    policy = sft.load_policy(f"{scenes}/tiny", "cpu")
    proc = policy.proc
    assert [proc.encode(token) for token in data.SPECIAL] == [[i] for i in range(8)]
    assert len(proc.encode(env.SYSTEM)) == 1 and sum(p.numel() for p in policy.parameters()) < 1e6
    for text in ("<think>A1 red.</think>\n" + data.look(np.arange(4)), "é漢\U0001f600\x00 <b>"):
        assert proc.decode(proc.encode_data(text, keep=env.TAGS)) == text
    row = load(scenes, "sft")[0]
    assert len(env.render(proc, row, row["turns"], env.EpisodeConfig()).ids) < env.EpisodeConfig.max_tokens


def test_tiny_model_of_a_seed(scenes):
    """A seed gives the same bits, another one other weights."""
    rows = load(scenes, "sft")
    saved = sft.load_policy(f"{scenes}/tiny", "cpu").vlm.state_dict()
    for seed in (0, 1):
        made = data.make_tiny(rows, seed).vlm.state_dict()
        assert torch.equal(made["lm_head.weight"], saved["lm_head.weight"]) == (seed == 0)


def test_the_whole_view_tells_nothing(monkeypatch):
    """Without any marks the whole view of a tiny scene, as the policy sees it, is the same bit for bit; a crop
    of the target's cell, as the policy makes it, is another one."""
    cfg, task, halftone = env.EpisodeConfig(), data.TASKS["tiny"], data.halftone

    def no_marks(*args):
        return 0 * halftone(*args)

    for i in range(100):
        views, crops = [], []
        for draw in (halftone, no_marks):
            monkeypatch.setattr(data, "halftone", draw)
            image, [question, _] = data.make_scene(np.random.default_rng(i), task)
            shown = env.begin({"images": [image]}, cfg).shown
            views.append(shown[0].resized(16).tobytes())
            tiles = question["tiles"]
            [cell] = [cell for cell in tiles if tiles[cell] == question["evidence"]]
            corner = data.corner_of(cell, 1000 // data.GRID)
            action = env.parse_action(data.look(np.append(corner, corner + 1000 // data.GRID)))
            crops.append(env.crop(action, shown, cfg).resized(16).tobytes())
        assert views[0] == views[1] and crops[0] != crops[1]
