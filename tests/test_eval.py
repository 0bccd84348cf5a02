"""Evaluating (eval.py): metrics, results files that the same command continues, judge."""
import json
import re
import shutil

import numpy as np
import pytest
import torch
from conftest import crop, refused, serving, traj_of
from PIL import Image

import data
import env
import eval as evaluation
import sft

ROW = """{"images": ["a.png"], "problem": "q%d", "solution": "%s", "doc_id": "t%d", "difficulty": %d,\
 "boxes": [[0, 0, 20, 20]], "data_source": "tiny"}"""


@pytest.fixture
def asked(monkeypatch):
    """Makes every rollout a random but fixed conversation; lists the number of rows of each."""
    numbers = []

    def rollout(policy, rows, cfg, samples=1, seed=(0, 0), streams=(0,), greedy=False):
        numbers.append(len(rows))
        trajs = []
        for i in range(len(rows) * samples):
            rng = np.random.default_rng((streams[i // samples], i % samples, greedy, cfg.max_crops))
            texts = [crop(0, 0, 500, 500)] * rng.integers(4)
            texts += [rng.choice(["<answer>red</answer>", "<answer>green</answer>", "junk"])] * 9
            traj = env.start_episode(rows[i // samples], cfg)
            while traj.status == "open":
                env.step(traj, str(texts.pop(0)), cfg)
            trajs.append(traj)
        return trajs

    monkeypatch.setattr(evaluation, "rollout", rollout)
    monkeypatch.setattr(evaluation, "show", lambda traj, proc: "shown")
    policy = torch.nn.Linear(3, 3)
    policy.proc = None
    policy.fingerprint = "f00d"
    monkeypatch.setattr(sft, "load_policy", lambda path, device: policy)
    monkeypatch.setattr(data, "check_rows", lambda *_: None)       # there is no processor
    return numbers


@pytest.fixture
def folder(tmp_path, asked):
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    lines = []
    for i in range(10):
        lines.append(ROW % (i, "green" if i % 2 else "red", i, i % 2 + 1))
    (tmp_path / "test.jsonl").write_text("\n".join(lines))
    return tmp_path


def run(folder, **fields):
    given = dict(model="m", data=str(folder), out=str(folder / "runs/eval"), in_flight=4)
    return evaluation.main(evaluation.Config(**{**given, **fields}))


def bench(folder, **fields):
    return run(folder, bench=f"rows:{folder}/test.jsonl", **fields)


def metrics_of(*trajs):
    return evaluation.metrics([evaluation.measure(traj, 0.3) for traj in trajs])


def test_metrics():
    """Every metric of eight hand-made trajectories, worked out by hand."""
    same = (60, 60, 100, 100)
    errors = [("<tool_call>{}</tool_call>", "malformed"),
              (crop(5, 5, 5, 5), "empty"),
              (f"<think>{crop(5, 5, 5, 5)}</think>", "none")]    # a thought is no call
    got = metrics_of(
        traj_of("red", [(0, 0, 50, 50)]),                            # right; the crop covers the evidence
        traj_of("red", []),                                          # right, but a guess
        traj_of("blue", [same, same]),                               # redundancy 0.7 / 4; a repeat
        traj_of(None, [(0, 0, 50, 50), (50, 0, 99, 50), (5, 0, 55, 50)], errors=errors),    # 45/55: a repeat
        traj_of("blue", [(0, 0, 60, 60)]),                           # more than a quarter: nothing is covered
        traj_of("blue", [(0, 0, 40, 40), (0, 0, 20, 40)]),           # IoU 0.5: redundancy 0.2 / 4; no repeat
        traj_of(None, []),                                           # gave up
        traj_of("red", [(0, 0, 5, 5)], boxes=()))                    # no evidence: counts for neither rate
    assert got == pytest.approx({
        "n": 8, "accuracy": 3 / 8, "crops_right": 2 / 3, "crops_wrong": 8 / 5,
        "redundancy_wrong": (0.7 / 4 + (45 / 55 - 0.3) / 9 + 0.2 / 4) / 3,
        "overlap_wrong": 3 / 5, "unanswered_rate": 2 / 8, "guess_rate": 3 / 7,
        "evidence_coverage": 3 / 7, "repeat_rate": 2 / 10, "invalid_call_rate": 2 / 12,
        "judge_failed_rate": None})
    assert len(evaluation.line(got)) == len(evaluation.HEADER) <= 58
    assert "-" in evaluation.line(metrics_of(traj_of("blue", [])))


def test_rows(folder, asked, capsys):
    """Sampled and greedy answers of a file of rows, by difficulty."""
    result = run(folder, k=2)
    assert result["n"] == 20 and result["greedy"]["n"] == 10 and set(result["categories"]) == {"1 boxes", "2 boxes"}
    records = evaluation.read_records(f"{folder}/runs/eval/results-sampled-tool_on.jsonl")
    assert len(records) == 20 and records[3, 1]["doc_id"] == "t3"
    assert result["accuracy"] == np.mean([entry["right"] for entry in records.values()])
    printed = capsys.readouterr().out
    assert "answers 10 questions, greedy" in printed and "max_pixels=1024" in printed      # what answers rest on
    assert (folder / "runs/eval/report.html").exists()
    assert json.loads((folder / "runs/eval/eval.json").read_text())["accuracy"] == result["accuracy"]


def test_what_a_benchmark_leaves_out(folder, asked, capsys):
    """A question whose image is missing is named and counted, here and in the results; the others are scored."""
    item = {"question": "q", "answer": "red", "image": "a.png"}
    (folder / "x.json").write_text(json.dumps([item, {**item, "image": "b.png"}, item]))
    result = run(folder, bench=f"x:{folder}/x.json")
    assert result["x"]["n"] == 2 and result["x"]["left_out"] == 1
    assert re.search("x: 1 questions are left out.*row 1: no image .*b.png", capsys.readouterr().out)


def test_the_same_command_continues(folder, asked):
    """It refuses other settings or weights, wherever they lie, and measures nothing that older answers lack."""
    first = bench(folder, k=2)
    path = folder / "runs/eval/results-rows-tool_on.jsonl"
    lines = path.read_text().splitlines()
    settings = json.loads(lines[0])["settings"]
    del settings["eps"]
    lines[0] = json.dumps({"settings": settings})
    path.write_text("\n".join(lines[:6]) + "\n" + lines[6][:50])   # killed in the midst of row 2
    asked.clear()
    again = bench(folder, k=2)
    assert sum(asked) == 8 and again["rows"] == first["rows"]
    asked.clear()
    assert bench(folder, k=2, in_flight=1, model="moved")["rows"] == first["rows"] and not asked
    for name in ("repeat_rate", "judge_failed_rate"):
        path.write_text(path.read_text().replace(f'"{name}": [', '"older": [', 1))
    again = bench(folder, k=2)["rows"]
    assert again["repeat_rate"] is again["older"] is None and again["accuracy"] == first["rows"]["accuracy"]
    for change in (dict(max_tokens=99), dict(limit=3), dict(k=3), dict(seed=1), dict(eps=0.2), dict(judge_url="x")):
        refused("results-rows-tool_on.jsonl: .*give another --out", bench, folder, **{"k": 2, **change})


@pytest.mark.parametrize("max_crops", [5, 0])
def test_other_weights_are_refused(folder, asked, max_crops):
    """Under the same path, and as the pair of answers without the tool."""
    bench(folder)
    sft.load_policy("m", "cpu").fingerprint = "beef"
    refused("tool_on.jsonl: .*weights f00d, not beef; give another --out", bench, folder, max_crops=max_crops)


@pytest.mark.parametrize("fields, words", [
    (dict(model=""), "no --model: .*--model=runs/rppo"),
    (dict(bench="config:README.md"), "--bench: the name config is taken"),
    (dict(image="a.png"), "--image and --question go together"),
    (dict(question="what?"), "--image and --question go together")])
def test_what_is_missing(folder, fields, words):
    refused(words, run, folder, **fields)


def test_loading_from_a_script(scenes, tmp_path):
    """A run folder's newest checkpoint, with its own preset and images of any mode."""
    shutil.copytree(f"{scenes}/tiny", tmp_path / "checkpoints/3")
    (tmp_path / "last").write_text("3")
    policy, cfg = evaluation.load(str(tmp_path), turn_tokens=4, max_crops=0)
    assert (cfg.model, cfg.turn_tokens, cfg.max_pixels) == (f"{tmp_path}/checkpoints/3", 4, 1024)
    row = {"images": [Image.new("LA", (64, 64))], "problem": "what?", "solution": ""}
    [traj] = evaluation.rollout(policy, [row], cfg, greedy=True)
    assert len(traj.turns) == 1 and policy.fingerprint
    assert env.SYSTEM_NO_TOOL in policy.proc.decode(traj.ids)
    (tmp_path / "checkpoints/3/training").mkdir()
    (tmp_path / "checkpoints/3/episode.json").unlink()
    refused("checkpoints/3/episode.json is missing.*copy another step's", evaluation.load, str(tmp_path))


def test_with_and_without_the_tool(folder, capsys):
    on = bench(folder)["rows"]
    off = bench(folder, max_crops=0)["rows"]
    for name, scores in ("eval", on), ("eval-tool_off", off):
        assert json.loads((folder / f"runs/eval/{name}.json").read_text())["rows"] == scores
    printed = capsys.readouterr().out
    assert "max_crops=0 " in printed and "repaired 0." in printed
    assert "repaired" not in on and off["repaired"] > 0
    assert off["repaired"] - off["broken"] == pytest.approx(on["accuracy"] - off["accuracy"])


def test_an_error_of_one_rank_is_that_of_all(folder, monkeypatch):
    """Answers and verdicts go through `together`."""
    reached = []
    monkeypatch.setattr(sft, "together", lambda function, *args: reached.append(function.__name__) or function(*args))
    bench(folder)
    assert "answer" in reached


def test_judge(folder, asked):
    """Its verdict counts, its failure is counted and asked about again."""
    plain = bench(folder)["rows"]
    for reply, failed in (("perhaps", 1), ("<think>no</think>\n**Yes**", 0), ("No, it is not.", 0)):
        with serving(lambda body: reply) as url:
            judged = bench(folder, out=f"{folder}/{reply}"[:-1], judge_url=url, judge_name="j")["rows"]
        expected = 1 - plain["unanswered_rate"] if "Yes" in reply else plain["accuracy"]
        assert judged["judge_failed_rate"] == failed and judged["accuracy"] == pytest.approx(expected)
    with serving(lambda body: 422) as url:       # which in another process is its first reply
        again = bench(folder, out=f"{folder}/perhap", judge_url=url, judge_name="j")["rows"]
    assert again["judge_failed_rate"] == 1
    asked.clear()
    with serving(lambda body: "yes") as url:
        again = bench(folder, out=f"{folder}/perhap", judge_url=url, judge_name="j")["rows"]
    assert again["judge_failed_rate"] == 0 and again["accuracy"] == 1 - plain["unanswered_rate"]
    assert 0 < sum(asked) < 10


@pytest.mark.parametrize("row, answer, verdict", [
    ({"solution": "70"}, "the limit of that sign", "right"), ({"solution": "70"}, "the limit", "failed"),
    ({"solution": "70"}, "70", None),
    ({"solution": "A", "choices": ["70", "71"]}, "the limit of that sign", "right"),
    ({"solution": "A", "choices": ["70", "71"]}, "B", None)])
def test_who_is_judged(row, answer, verdict):
    """Answers that the rules neither accept nor take for another option. A judge that refuses one has failed,
    one that has never answered ends the run."""
    traj = env.start_episode({"images": [Image.new("RGB", (64, 64))], "problem": "q", **row}, env.EpisodeConfig())
    env.step(traj, f"<answer>{answer}</answer>", env.EpisodeConfig())
    with serving(lambda body: 422 if verdict == "failed" else "yes") as url:
        cfg = evaluation.Config(judge_url=url, judge_name="j")
        if verdict == "failed":
            refused("422", evaluation.judge, [traj], cfg)
            data.answering.add((url, "j"))
        evaluation.judge([traj], cfg)
    assert traj.verdict == verdict


def test_a_question_about_an_image(folder, capsys):
    run(folder, image=f"{folder}/a.png", question="what?")
    assert "shown" in capsys.readouterr().out and "what?" in (folder / "runs/eval/question.html").read_text()
