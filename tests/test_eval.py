"""Evaluating (eval.py): metrics, results files that the same command continues, judge, ranks."""
import http.server
import json
import threading

import numpy as np
import pytest
import torch
from PIL import Image

import data
import env
import eval as evaluation
import sft

CALL = '<tool_call>{"name": "image_zoom_in_tool", "arguments": {"bbox_2d": [%s]}}</tool_call>'


def episode(row, texts, cfg):
    """The trajectory of these turns, without tokens."""
    traj = env.begin(row, cfg)
    for text in texts:
        if traj.status == "open":
            env.step(traj, text, cfg)
    return traj


@pytest.fixture
def asked(monkeypatch):
    """Makes every rollout a random but fixed conversation; lists the number of rows of each."""
    numbers = []

    def rollout(policy, rows, cfg, samples=1, seed=(0, 0), prompt_ids=None, greedy=False):
        numbers.append(len(rows))
        trajs = []
        for row, prompt in zip(rows, prompt_ids or range(len(rows))):
            for sample in range(samples):
                rng = np.random.default_rng((prompt, sample, greedy, cfg.max_crops))
                texts = [CALL % "0, 0, 500, 500"] * rng.integers(4)
                texts += ["<tool_call>bad</tool_call>"] * rng.integers(2)
                said = rng.choice(["<answer>red</answer>", "<answer>green</answer>", "junk"])
                trajs.append(episode(row, texts + [str(said)] * 9, cfg))
        return trajs
    monkeypatch.setattr(evaluation, "rollout", rollout)
    monkeypatch.setattr(evaluation, "show", lambda traj, proc: "shown")
    policy = torch.nn.Linear(3, 3)
    policy.proc = None
    monkeypatch.setattr(sft, "load_policy", lambda path, device: policy)
    return numbers


@pytest.fixture
def folder(tmp_path, asked):
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    lines = []
    for i in range(10):
        lines.append(json.dumps(dict(images=["a.png"], problem=f"q{i}", solution=["red", "green"][i % 2],
                                     doc_id=f"t{i}", difficulty=i % 2 + 1, boxes=[[0, 0, 20, 20]])))
    (tmp_path / "test.jsonl").write_text("\n".join(lines))
    return tmp_path


def run(folder, **fields):
    given = dict(model="m", data=str(folder), out=str(folder / "runs/eval"), in_flight=4)
    return evaluation.main(evaluation.Config(**{**given, **fields}))


def bench(folder, **fields):
    return run(folder, bench=f"rows:{folder}/test.jsonl", **fields)


def traj_of(answer, crops, boxes=((10, 10, 20, 20),), errors=()):
    """A finished trajectory on a 100 x 100 image. errors: (text, key of ERRORS) of its refused turns."""
    image = Image.new("RGB", (100, 100))
    shown = [env.Shown(image, (0, 0, 100, 100), 1, 1)]
    for box in crops:
        shown.append(env.Shown(image, box, 1, 1, tool="crop"))
    turns = [env.Turn(text, None, error) for text, error in errors]
    row = {"solution": "red", "boxes": list(boxes)}
    return env.Trajectory(row, shown, turns, answer=answer, status="answered" if answer else "over_turns")


def metrics_of(*trajs):
    return evaluation.metrics([evaluation.measure(traj, 0.3) for traj in trajs])


def test_metrics():
    """Every metric of eight hand-made trajectories, worked out by hand."""
    same = (60, 60, 100, 100)
    errors = [("<tool_call>{}</tool_call>", "malformed"), (CALL % "5, 5, 5, 5", "empty"), ("hm", "none"),
              (f"<think>{CALL}</think>", "none")]                # a thought is no call
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
        "redundancy_wrong": (0.7 / 4 + (45 / 55 - 0.3) / 9 + 0.2 / 4) / 3, "overlap_wrong": 3 / 5,
        "unanswered_rate": 2 / 8, "guess_rate": 3 / 7, "evidence_coverage": 3 / 7, "repeat_rate": 2 / 10,
        "invalid_call_rate": 2 / 12, "judge_failed_rate": None})
    assert len(evaluation.line(got)) == len(evaluation.HEADER) <= 58
    assert metrics_of(traj_of("red", [(0, 0, 10, 10), (0, 0, 7, 10)]))["repeat_rate"] == 0.5
    assert "-" in evaluation.line(metrics_of(traj_of("blue", [])))


def test_rows(folder, asked, capsys):
    result = run(folder, k=2)
    assert result["n"] == 20 and result["greedy"]["n"] == 10 and set(result["categories"]) == {"1", "2"}
    assert result["accuracy_greedy"] == result["greedy"]["accuracy"]
    records = evaluation.read_records(f"{folder}/runs/eval/results-sampled-tool_on.jsonl")
    assert len(records) == 20 and records[3, 1]["doc_id"] == "t3"
    assert result["accuracy"] == np.mean([entry["right"] for entry in records.values()])
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines()[:-1])) <= 110 and "runs/report.html" in printed
    assert (folder / "runs/report.html").exists()
    again = run(folder, k=2)                     # other rows than a benchmark's are answered anew
    assert {**again, "seconds": 0} == {**result, "seconds": 0} and sum(asked) == 40
    assert json.loads((folder / "runs/eval/eval.json").read_text())["accuracy"] == result["accuracy"]


def test_the_same_command_continues(folder, asked):
    first = bench(folder, k=2)
    path = folder / "runs/eval/results-rows-tool_on.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join(lines[:6]) + "\n" + lines[6][:50])   # killed in the midst of row 2
    asked.clear()
    again = bench(folder, k=2)
    assert sum(asked) == 8 and again["rows"] == first["rows"]
    asked.clear()
    assert bench(folder, k=2)["rows"] == first["rows"] and not asked
    bench(folder, k=2, in_flight=1)              # changes no answer
    for change in (dict(max_tokens=99), dict(limit=3), dict(judge_name="x"), dict(k=3), dict(seed=1)):
        with pytest.raises(env.UserError, match="give another --out"):
            bench(folder, **{"k": 2, **change})


def test_a_setting_that_is_missing_counts_as_its_default(folder):
    bench(folder)
    path = folder / "runs/eval/results-rows-tool_on.jsonl"
    first, _, rest = path.read_text().partition("\n")
    settings = json.loads(first)["settings"]
    del settings["eps"]
    path.write_text(json.dumps({"settings": settings}) + "\n" + rest)
    bench(folder)
    with pytest.raises(env.UserError, match="its eps is 0.3, not 0.2"):
        bench(folder, eps=0.2)


def test_with_and_without_the_tool(folder):
    on = bench(folder)["rows"]
    off = bench(folder, max_crops=0)["rows"]
    assert "repaired" not in on and off["repaired"] > 0
    assert off["repaired"] - off["broken"] == pytest.approx(on["accuracy"] - off["accuracy"])


@pytest.fixture
def endpoint(monkeypatch):
    """An OpenAI-compatible server that says endpoint.reply (a text, or a status)."""
    class Judge(http.server.BaseHTTPRequestHandler):
        reply = "Yes."

        def do_POST(self):
            self.rfile.read(int(self.headers["Content-Length"]))
            body = json.dumps({"choices": [{"message": {"content": Judge.reply}}]}).encode()
            self.send_response(Judge.reply if isinstance(Judge.reply, int) else 200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Judge)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(data.time, "sleep", lambda seconds: None)
    Judge.url = f"http://127.0.0.1:{server.server_port}/v1"
    yield Judge
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("reply, failed, accuracy", [
    ("perhaps", 1, None), ("<think>no</think>\n**Yes**", 0, 1), ("No, it is not.", 0, None)])
def test_judge(folder, endpoint, reply, failed, accuracy):
    plain = bench(folder, out=f"{folder}/plain")["rows"]
    endpoint.reply = reply
    judged = bench(folder, judge_url=endpoint.url, judge_name="j")["rows"]
    assert judged["judge_failed_rate"] == failed
    if accuracy:                                 # everything that was answered is right now
        accuracy = 1 - judged["unanswered_rate"]
    assert judged["accuracy"] == pytest.approx(accuracy or plain["accuracy"])
    endpoint.reply = 401                         # a judge that refuses ends the run
    with pytest.raises(env.UserError, match="401"):
        bench(folder, out=f"{folder}/refused", judge_url=endpoint.url, judge_name="j")


def test_a_question_about_an_image(folder, capsys):
    answer = run(folder, image=f"{folder}/a.png", question="what?")
    records = evaluation.read_records(f"{folder}/runs/eval/results-question.jsonl")
    assert answer["right"] is None and records[0, 0]["problem"] == "what?"
    assert "shown" in capsys.readouterr().out and "what?" in (folder / "runs/eval/report.html").read_text()


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_agree(folder, monkeypatch, world_size):
    rows = env.load_rows(f"{folder}/test.jsonl")
    cfg = evaluation.Config(in_flight=2)
    want = evaluation.evaluate(None, rows, cfg, 0, 1, 2)
    barrier, slots, got = threading.Barrier(world_size), {}, {}
    def gather_objects(obj):
        slots[threading.current_thread().name] = obj
        barrier.wait()
        gathered = [slots[str(rank)] for rank in range(world_size)]
        barrier.wait()
        return gathered

    def work(rank):
        got[rank] = evaluation.evaluate(None, rows, cfg, rank, world_size, 2)
    monkeypatch.setattr(sft, "gather_objects", gather_objects)
    threads = [threading.Thread(target=work, args=(r,), name=str(r)) for r in range(world_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(json.dumps(got[rank]) == json.dumps(want) for rank in range(world_size))
