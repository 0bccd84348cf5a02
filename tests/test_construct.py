"""Questions about photographs (data.py --images): the whole command against a scripted endpoint, killed and
started again, and on images and answers that are no good."""
import base64
import hashlib
import http.server
import io
import json
import threading
from collections import Counter
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image

import data
import env

SIZE = (2000, 1000)
EVIDENCE = (1120, 560, 1280, 640)   # where ZOOMS ends, in pixels
ZOOMS = [([400, 400, 800, 800], 0), ([250, 250, 750, 750], 1), ([300, 300, 700, 700], 2)]
FINDS = [([400, 400, 800, 800], 0), ([350, 350, 650, 650], 1)]    # covers the evidence by another way
RECOVERS = [([0, 0, 300, 300], 0), ([500, 500, 700, 700], 0)]     # after a look elsewhere
ELSEWHERE = [([0, 0, 300, 300], 0), ([600, 0, 900, 300], 0)]
EMPTY = ([900, 900, 900, 1000], 0)
LEAVES = "a zoom leaves the crop before it, or is hardly finer"
LONG = "empty, too long or unprintable"
GOOD = {0: "green", 1: "heron", 10: "12", 17: "7", 18: "EXIT"}      # the answers of those that pass grade
ANSWERS = {**GOOD, 16: "green " * 19}
# What becomes of the other photographs: the step that drops them, and why.
FATE = {2: "propose: too few zooms", 3: "ask: malformed", 4: "verify: given away by its text",
        5: "verify: answered without zooming", 6: "verify: answer not confirmed",
        7: "grade: solved too often", 8: "grade: never solved", 9: "grade: solved with one crop or none",
        11: "propose: no question", 12: "propose: " + LEAVES, 13: "propose: " + LEAVES,
        14: "propose: the last view is too large", 15: "propose: no question", 16: "ask: " + LONG}
# Which of the four conversations of a stage are right, by stage or by stage and photograph.
RIGHT = {"propose": (0,), "blind": (0,), "whole": (), "evidence": (0, 2, 3), "grade": (0, 2),
         "collect": (0, 1, 3), ("blind", 4): (0, 1), ("whole", 5): (1, 3), ("evidence", 6): (0, 1),
         ("grade", 7): (0, 1, 2, 3), ("grade", 8): (), ("grade", 9): (0,), ("collect", 10): (1, 2, 3)}
# The calls of a proposal, and of the four conversations of the others.
PROPOSED = {2: ZOOMS[:1], 15: [*ZOOMS, *ZOOMS], 11: ["zoom!"] * 9, 14: ZOOMS[:2],
            12: [([100, 100, 900, 900], 0), *ZOOMS[1:]],
            13: [*ZOOMS[:2], ([300, 300, 340, 340], 0)]}
CALLS = {"grade": [FINDS, FINDS, RECOVERS + FINDS, [EMPTY] * 9],
         "collect": [FINDS, RECOVERS, FINDS, ["zoom!", *FINDS]],
         ("grade", 7): [FINDS] * 4, ("grade", 9): [FINDS[:1]] * 4,
         ("collect", 10): [["zoom!"], [EMPTY, *FINDS], RECOVERS[1:] * 3, ELSEWHERE]}


class Script:
    """What the endpoint says. A photograph tells its number by its colour, a question by its text, and a
    conversation by the number that its first turn thinks of: nth counts equal requests, modulo 4."""

    def __init__(self, faults=False):
        self.faults = faults
        self.broken = {}                  # stage -> HTTP status
        self.seen = Counter()
        self.log = []                     # (stage, photograph, is it right?) of the answered requests
        self.lock = threading.Lock()

    def read(self, body):
        """(stage, photograph, turns so far) of a request, which shows what env.step's tokens show."""
        system, user, *rest = body["messages"]
        image, text = user["content"][0]["image_url"]["url"], user["content"][1]["text"]
        image = Image.open(io.BytesIO(base64.b64decode(image.partition("base64,")[2])))
        turns = [m["content"] for m in rest[::2]]
        for answer, observation in zip(turns, rest[1::2]):
            before, seen, after = observation["content"]
            shown = env.ERRORS["malformed" if "zoom!" in answer else "empty"]
            assert seen.get("text", shown) == shown
            assert ("text" in seen) == ("zoom!" in answer or "1000]" in answer)
            assert (before["text"], after["text"]) == ("<tool_response>\n", "\n</tool_response>")
        assert 0 < image.width * image.height <= 400_000
        if "eyesight" in text:
            return "propose", round(image.getpixel((2, 2))[0] / 12), turns
        i = int(text.split("house ")[1].split("?")[0])
        if system["content"] == env.SYSTEM:
            return "grade" if body["model"] == "policy" else "collect", i, turns
        assert system["content"] == env.SYSTEM_NO_TOOL
        if text.startswith(data.BLIND):
            return "blind", i, turns
        return "whole" if image.width > 600 else "evidence", i, turns

    def __call__(self, body):
        stage, i, turns = self.read(body)
        key = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
        with self.lock:
            if stage in self.broken:
                return self.broken[stage]
            if self.faults and not self.seen[key, "fault"]:        # the first try of every request
                self.seen[key, "fault"] = 1
                return (429, 500, "drop", "no json", "cut")[int(key[:4], 16) % 5]
            nth = int(turns[0].split("try ")[1][0]) if turns else self.seen[key] % 4
            self.seen[key] += 1
            right = nth in RIGHT.get((stage, i), RIGHT.get(stage, ()))
            self.log.append((stage, i, right))
        calls = CALLS.get((stage, i)) or CALLS.get(stage) or [[]] * 4
        calls = PROPOSED.get(i, ZOOMS) if stage == "propose" else calls[nth]
        answer = ANSWERS.get(i, "green") if right else "violet"
        if stage == "propose":
            made = {"question": f"What is on the sign of house {i}?", "answer": answer}
            answer = "a sign, green" if i == 3 else f"```json\n{json.dumps(made)}\n```"
        said = call(calls[len(turns)]) if len(turns) < len(calls) else f"<answer>{answer}</answer>"
        return f"<think>try {nth}</think>\n{said}"

def call(what):
    if isinstance(what, str):
        return f"<tool_call>{what}</tool_call>"
    arguments = {"bbox_2d": what[0], "img_idx": what[1]}
    return f"<tool_call>\n{json.dumps({'name': 'image_zoom_in_tool', 'arguments': arguments})}\n</tool_call>"


@contextmanager
def serving(script):
    """Yields the address of an endpoint that answers by the script."""
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            reply = script(body)
            if reply == "drop":
                self.close_connection = True
                return
            self.send_response(reply if isinstance(reply, int) else 200)
            self.end_headers()
            text = json.dumps({"choices": [{"message": {"role": "assistant", "content": reply}}]})
            self.wfile.write({"cut": text[:20], "no json": "<html>"}.get(reply, text).encode())

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/v1"
    server.shutdown()
    server.server_close()


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    monkeypatch.setattr(data.time, "sleep", lambda seconds: None)


def photograph(folder, i, size=SIZE, name=None):
    """One that the script knows as i, with an evidence that stands out."""
    image = Image.new("RGB", size, (12 * i, 120, 90))
    image.paste((250, 250, 250), EVIDENCE)
    folder.mkdir(parents=True, exist_ok=True)
    image.save(folder / (name or f"{i:02}.png"), compress_level=1)


def settings(folder, address, out, **more):
    """Every photograph with trajectories goes to sft."""
    cfg = data.Config(images=str(folder), annotator=address, annotator_name="teacher", policy=address, seed=1,
                      policy_name="policy", out=str(out), per_image=1, samples=4, parallel=4,
                      max_pixels=400_000, share_sft=1.0, share_test=0.0)
    return replace(cfg, **more)


def files(out):
    return {path.name: path.read_bytes() for path in Path(out).glob("*.json*")}


def fates(out):
    """{fate: number of proposals}, without those that were kept."""
    counts = json.loads((Path(out) / "data_card.json").read_text())["proposals"]
    counts.pop("kept", None)
    return counts


def rows_of(out, side):
    path = Path(out) / f"{side}.jsonl"
    return env.load_rows(str(path)) if path.read_text() else []


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Nineteen photographs, one for every fate; four of them also in the folder few beside it."""
    folder = tmp_path_factory.mktemp("photos") / "all"
    for i in range(19):
        photograph(folder / "deeper" if i == 18 else folder, i)
        if i in (0, 1, 7, 17):
            photograph(folder / "../few", i)
    return folder


@pytest.fixture(scope="module")
def few(folder):
    return folder.parent / "few"


@pytest.fixture(scope="module")
def done(folder, tmp_path_factory):
    """The whole command, against an endpoint whose first tries all fail: (out, script, config)."""
    out = tmp_path_factory.mktemp("made") / "mine"
    script = Script(faults=True)
    with pytest.MonkeyPatch.context() as patch, serving(script) as address:
        patch.setattr(data.time, "sleep", lambda seconds: None)
        patch.setenv("OPENAI_API_KEY", "sk-not-to-be-written")
        cfg = settings(folder, address, out)
        data.main(cfg)
        yield out, script, cfg


def test_fates(done):
    """Every photograph goes as far as the script lets it, and the card says why. The key is in no file."""
    out, script, _ = done
    assert fates(out) == Counter(FATE.values())
    assert not any(b"sk-not-to-be-written" in content for content in files(out).values())


def test_rows(done, policy):
    """Rows break none of the steps by the endpoint's account. Every cold-start row replays to a right answer,
    without an error, to the evidence; those that recovered come first."""
    out, script, _ = done
    rows = rows_of(out, "sft") + rows_of(out, "train")
    numbers = [int(Path(row["images"][0]).name[:2]) for row in rows]
    assert set(numbers) == set(GOOD) and not rows_of(out, "test")
    for i, row in zip(numbers, rows):
        right = Counter((stage, ok) for stage, j, ok in script.log if j == i)
        assert row["solution"] == ANSWERS[i] and f"house {i}?" in row["problem"]
        assert right["blind", True] <= 1 and right["whole", True] <= 1 and right["evidence", True] >= 3
        assert row["solve_rate"] == 0.5 and row["difficulty"] == 2
        assert row["boxes"] == [list(EVIDENCE)] == row["chain"][-1:] and len(row["chain"]) == 3
        if i != 10:
            traj = env.render(policy.proc, row, row["turns"], env.EpisodeConfig(max_tokens=4096))
            assert env.is_right(traj) and env.covers(traj) and not any(turn.error for turn in traj.turns)
            assert env.redundancy(traj.crops, 0.3) <= 0.1 and len(traj.turns) == len(row["turns"])
    assert [row["turns"][0].split("try ")[1][0] for row in rows[:8]] == ["1", "0"] * 4


def test_again(done):
    """A second run asks nothing and leaves every byte as it was; a bound is judged anew without asking."""
    out, script, cfg = done
    before, asked = files(out), len(script.log)
    data.main(cfg)
    assert files(out) == before and len(script.log) == asked
    data.main(replace(cfg, max_rate=0.25))
    assert len(script.log) == asked and not rows_of(out, "sft")
    data.main(cfg)
    assert files(out) == before


def test_killed_anywhere(few, tmp_path, monkeypatch):
    """Killed again and again, with half a line left behind, it asks nothing twice and ends with the
    files of a run that was never killed, which asked four photographs at a time."""
    whole, script = Script(), Script()
    with serving(whole) as address:
        data.main(settings(few, address, tmp_path / "whole"))
    ask, calls, runs = data.chat, [0], 0

    def dying(*args, **more):
        calls[0] += 1
        if calls[0] % 25 == 0:
            raise KeyboardInterrupt
        return ask(*args, **more)

    monkeypatch.setattr(data, "chat", dying)
    with serving(script) as address:
        cfg = settings(few, address, tmp_path / "killed", parallel=1)
        while not (tmp_path / "killed/data_card.json").exists():
            runs += 1
            try:
                data.main(cfg)
            except KeyboardInterrupt:
                with open(tmp_path / "killed/answers.jsonl", "a") as f:
                    f.write('\n["0123456789abcdef0123456789abcdef", "answ')
    assert runs > 5 and script.seen == whole.seen
    for name in ("sft.jsonl", "train.jsonl", "test.jsonl", "data_card.json"):
        assert files(tmp_path / "killed")[name] == files(tmp_path / "whole")[name]


def test_endpoint_fails_for_good(few, tmp_path):
    """A request that fails for good drops its question and is not recorded; mended, it is asked again.
    A refusal ends the run with one line, and the other photographs under way do not go on."""
    script = Script()
    script.broken = {"collect": 500}
    with serving(script) as address:
        cfg = settings(few, address, tmp_path / "out")
        data.main(cfg)
        assert fates(cfg.out)["collect: endpoint failed"] == 3 and not rows_of(cfg.out, "sft")
        asked, script.broken = len(script.log), {}
        data.main(cfg)
    assert {stage for stage, _, _ in script.log[asked:]} == {"collect"} and len(rows_of(cfg.out, "sft")) == 6
    script = Script()
    script.broken = {"evidence": 403}
    with serving(script) as address, pytest.raises(env.UserError, match="403"):
        data.main(settings(few, address, tmp_path / "refused", parallel=2))
    assert len(script.log) < 60 and not (tmp_path / "refused/train.jsonl").exists()


def test_images_that_are_no_good(tmp_path, capsys):
    """Each is used or left out for a reason that is counted, and a line names what could not be read."""
    folder = tmp_path / "photos"
    photograph(folder, 0)
    photograph(folder, 0, name="copy.png")
    (folder / "text.jpg").write_text("no image")
    (folder / "notes.txt").write_text("left out without a word")
    (folder / "cut.png").write_bytes((folder / "00.png").read_bytes()[:2000])
    with serving(Script()) as address:
        data.main(settings(folder, address, tmp_path / "out", parallel=1))
    assert fates(tmp_path / "out") == {"select: unreadable": 2}
    printed = str(capsys.readouterr())
    assert "text.jpg" in printed and "cut.png" in printed and "notes" not in printed
    names = Counter(Path(row["images"][0]).name for row in rows_of(tmp_path / "out", "sft"))
    assert names == {"00.png": 2, "copy.png": 2}


def test_nothing_to_use(few, scenes, tmp_path):
    """What cannot work is said in one line that names the cure; rows of others stay as they are."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs/train.jsonl").write_text("{}")
    for folder, more, words in ((tmp_path / "empty", {}, "a folder of photographs"),
                                (few, {"annotator": ""}, "an endpoint begins with"),
                                (few, {"out": str(tmp_path / "theirs")}, "did not make"),
                                (few, {"out": scenes}, "did not make")):
        cfg = settings(folder, "http://127.0.0.1:9/v1", tmp_path / "out")
        with pytest.raises(env.UserError, match=words) as e:
            data.main(replace(cfg, **more))
        assert "\n" not in str(e.value)
    assert (tmp_path / "theirs/train.jsonl").read_text() == "{}" and not data.foreign(scenes)


@pytest.mark.parametrize("text, reason", [
    ('so: {"question": "How many?", "answer": "3"} done', None), ("[1, 2]", "malformed"),
    ('{"question": "How many?", "answer": 3}', None), ('{"question": "How many?"}', "malformed"),
    ('{"question": 3, "answer": "3"}', "malformed"), ('{"a":' * 9999 + "}" * 9999, "malformed"),
    ('{"question": "How\\ud800", "answer": "3"}', LONG), ('{"question": "How?", "answer": " "}', LONG),
    ('{"question": "' + "why " * 101 + '", "answer": "3"}', LONG)])
def test_questions(text, reason):
    """What a question must be."""
    row = {"problem": text}
    assert data.ask(None, row) == reason
    assert ("solution" in row) == (reason is None)


def test_sides(monkeypatch, tmp_path):
    """In the shares asked for; a photograph without trajectories is not for sft."""
    def made(job, row):
        row.update(doc_id=hashlib.sha256(str(row["doc_id"]).encode()).hexdigest(), turns=job.turns)

    monkeypatch.setattr(data, "STEPS", [made])
    for turns, n_sft in (([["text"]], 800), ([], 0)):
        job = SimpleNamespace(cfg=data.Config(out=str(tmp_path)), turns=turns)
        counts = Counter(data.build(job, tmp_path, i)[1] for i in range(2000))
        assert abs(counts["test"] - 200) < 50 and abs(counts["sft"] - n_sft) <= n_sft / 10
