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

EVIDENCE = (560, 280, 640, 320)     # where ZOOMS ends, in pixels of a photograph of 1000 x 500
ZOOMS = [([400, 400, 800, 800], 0), ([250, 250, 750, 750], 1), ([300, 300, 700, 700], 2)]
FINDS = [([400, 400, 800, 800], 0), ([350, 350, 650, 650], 1)]    # covers the evidence by another way
RECOVERS = [([0, 0, 300, 300], 0), ([500, 500, 700, 700], 0)]     # after a look elsewhere
EMPTY = ([900, 900, 900, 1000], 0)
# What becomes of the photographs 0 to 13: all but the first three are dropped.
FATES = ["kept", "kept", "kept", "propose: too few zooms", "ask: malformed",
         "verify: given away by its text", "verify: answered without zooming", "verify: answer not confirmed",
         "grade: solved too often", "grade: never solved", "grade: solved with one crop or none",
         "propose: no question", "propose: the last view is too large",
         "propose: a zoom leaves the crop before it, or is hardly finer"]
# Which of the conversations of a stage are right, by stage or by stage and photograph.
RIGHT = {"propose": (0,), "blind": (0,), "whole": (), "evidence": (0, 2), "grade": (0,), "collect": (0, 1, 2),
         ("blind", 5): (0, 1), ("whole", 6): (1, 2), ("evidence", 7): (0,),
         ("grade", 8): (0, 1), ("grade", 9): ()}
# The calls of the conversations of a stage, likewise. Photograph 2 gets no faultless one.
CALLS = {"propose": [ZOOMS], ("propose", 3): [ZOOMS[:1]], ("propose", 11): [["zoom!"] * 9],
         ("propose", 12): [ZOOMS[:2]], ("propose", 13): [[([100, 100, 900, 900], 0), *ZOOMS[1:]]],
         "grade": [FINDS, [EMPTY]], ("grade", 10): [FINDS[:1], []],
         "collect": [FINDS, RECOVERS, ["zoom!", *FINDS]],
         ("collect", 2): [["zoom!"], [EMPTY, *FINDS], RECOVERS[:1]]}


def call(what):
    if isinstance(what, str):
        return f"<tool_call>{what}</tool_call>"
    arguments = {"bbox_2d": what[0], "img_idx": what[1]}
    return f"<tool_call>\n{json.dumps({'name': 'image_zoom_in_tool', 'arguments': arguments})}\n</tool_call>"


class Script:
    """What the endpoint says. A photograph tells its number by its colour, a question by its text, and a
    conversation by the number that its first turn thinks of: it counts equal requests."""

    def __init__(self, faults=False, broken=()):
        self.faults = faults              # the first try of every request fails
        self.broken = dict(broken)        # stage -> HTTP status
        self.seen = Counter()
        self.stages = []                  # of the answered requests
        self.lock = threading.Lock()

    def read(self, body):
        """(stage, photograph, turns so far) of a request, which shows what env.step's tokens show."""
        system, user, *rest = body["messages"]
        image, text = user["content"][0]["image_url"]["url"], user["content"][1]["text"]
        image = Image.open(io.BytesIO(base64.b64decode(image.partition("base64,")[2])))
        turns = [message["content"] for message in rest[::2]]
        for answer, observation in zip(turns, rest[1::2]):
            error = env.ERRORS["malformed"] if "zoom!" in answer else None
            if "1000]" in answer:
                error = env.ERRORS["empty"]
            assert observation["content"][1].get("text") == error
        assert image.width * image.height <= 100_000
        if "eyesight" in text:
            return "propose", round(image.getpixel((2, 2))[0] / 12), turns
        i = int(text.split("house ")[1].split("?")[0])
        if system["content"] == env.SYSTEM:
            return "grade" if body["model"] == "policy" else "collect", i, turns
        assert system["content"] == env.SYSTEM_NO_TOOL
        if text.startswith(data.BLIND):
            return "blind", i, turns
        return "whole" if image.width > 300 else "evidence", i, turns

    def __call__(self, body):
        stage, i, turns = self.read(body)
        key = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
        with self.lock:
            if stage in self.broken:
                return self.broken[stage]
            if self.faults and not self.seen[key, "fault"]:
                self.seen[key, "fault"] = 1
                return (429, 500, "drop", "no json", "cut")[int(key[:4], 16) % 5]
            nth = int(turns[0].split("try ")[1][0]) if turns else self.seen[key]
            self.seen[key] += 1
            self.stages.append(stage)
        right = nth in RIGHT.get((stage, i), RIGHT[stage])
        answer = f"sign {i}" if right else "violet"
        if stage == "propose":
            made = {"question": f"What is on the sign of house {i}?", "answer": answer}
            answer = "a sign" if i == 4 else f"```json\n{json.dumps(made)}\n```"
        calls = CALLS.get((stage, i)) or CALLS.get(stage)
        calls = calls[nth] if calls else []
        said = call(calls[len(turns)]) if len(turns) < len(calls) else f"<answer>{answer}</answer>"
        return f"<think>try {nth}</think>\n{said}"


@contextmanager
def serving(script):
    """Yields the address of an endpoint that says script(body): a text, an HTTP status or a fault."""
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            reply = script(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
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


@pytest.fixture(scope="module", autouse=True)
def no_waiting():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data.time, "sleep", lambda seconds: None)
        patch.setenv("OPENAI_API_KEY", "sk-not-to-be-written")
        yield


def photographs(folder, numbers):
    """Those that the script knows by these numbers, with an evidence that stands out."""
    folder.mkdir()
    for i in numbers:
        image = Image.new("RGB", (1000, 500), (12 * i, 120, 90))
        image.paste((250, 250, 250), EVIDENCE)
        image.save(folder / f"{i:02}.png", compress_level=1)
    return folder


def settings(folder, address, out, **more):
    """Every photograph with trajectories goes to sft."""
    cfg = data.Config(images=str(folder), annotator=address, annotator_name="teacher", policy=address, seed=1,
                      policy_name="policy", out=str(out), per_image=1, votes=3, agree=2, samples=2, attempts=3,
                      parallel=4, max_pixels=100_000, share_sft=1.0, share_test=0.0)
    return replace(cfg, **more)


def files(out):
    """The contents of what a run made, but for its answers, which come in any order, and its settings."""
    return {path.name: path.read_bytes() for path in Path(out).glob("[dst]*.json*")}


def fates(out):
    return json.loads((Path(out) / "data_card.json").read_text())["proposals"]


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """The whole command, against an endpoint whose first tries all fail: (config, script)."""
    base = tmp_path_factory.mktemp("made")
    folder = photographs(base / "photos", range(14))
    (folder / "text.jpg").write_text("no image")
    (folder / "notes.txt").write_text("left out without a word")
    (folder / "cut.png").write_bytes((folder / "00.png").read_bytes()[:2000])
    script = Script(faults=True)
    with serving(script) as address:
        cfg = settings(folder, address, base / "mine")
        data.main(cfg)
        yield cfg, script


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    return photographs(tmp_path_factory.mktemp("few") / "photos", (0, 1, 9))


def test_fates_and_rows(done, policy):
    """Every photograph goes as far as the script lets it, and the card says why. Every cold-start row replays
    to a right answer, without an error, to the evidence; one that recovered comes first."""
    cfg, _ = done
    assert fates(cfg.out) == Counter(FATES + ["select: unreadable"] * 2)
    for path in Path(cfg.out).iterdir():
        assert b"sk-not-to-be-written" not in path.read_bytes()
    rows = env.load_rows(f"{cfg.out}/sft.jsonl")
    for row in rows:
        traj = env.render(policy.proc, row, row["turns"], env.EpisodeConfig(max_tokens=4096))
        assert env.is_right(traj) and env.covers(traj) and not any(turn.error for turn in traj.turns)
    assert [row["turns"][0].split("try ")[1][0] for row in rows] == ["1", "0", "1", "0"]
    rows += env.load_rows(f"{cfg.out}/train.jsonl")
    for i, row in zip((0, 0, 1, 1, 2), rows, strict=True):
        assert row["solution"] == f"sign {i}" and f"house {i}?" in row["problem"]
        assert row["solve_rate"] == 0.5 and row["difficulty"] == 2
        assert row["boxes"] == [list(EVIDENCE)] == row["chain"][-1:] and len(row["chain"]) == 3


def test_again(done, capsys):
    """A second run asks nothing and leaves every byte as it was; a bound is judged anew without asking."""
    cfg, script = done
    before, asked = files(cfg.out), len(script.stages)
    data.main(cfg)
    printed = str(capsys.readouterr())
    assert "text.jpg" in printed and "cut.png" in printed and "notes" not in printed
    assert files(cfg.out) == before and len(before) == 4
    data.main(replace(cfg, max_rate=0.25))
    assert len(script.stages) == asked and not files(cfg.out)["sft.jsonl"]


def test_killed_anywhere(few, tmp_path, monkeypatch):
    """Killed again and again, with half a line left behind, it asks nothing twice and ends with the
    files of a run that was never killed, which asked four photographs at a time."""
    whole, script = Script(), Script()
    with serving(whole) as address:
        data.main(settings(few, address, tmp_path / "whole"))
    ask, calls, runs = data.chat, [], 0

    def dying(*args, **more):
        calls.append(1)
        if len(calls) % 15 == 0:
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
    assert runs > 3 and script.seen == whole.seen
    assert files(tmp_path / "killed") == files(tmp_path / "whole")


def test_endpoint_fails_for_good(few, tmp_path):
    """A request that fails for good drops its question and is not recorded; mended, it is asked again.
    A refusal ends the run with one line, and the other photographs under way do not go on."""
    script = Script(broken={"collect": 500})
    with serving(script) as address:
        cfg = settings(few, address, tmp_path / "out")
        data.main(cfg)
        assert fates(cfg.out)["collect: endpoint failed"] == 2 and not files(cfg.out)["sft.jsonl"]
        asked, script.broken = len(script.stages), {}
        data.main(cfg)
        assert set(script.stages[asked:]) == {"collect"} and fates(cfg.out)["kept"] == 2
        script.broken = {"evidence": 403}
        with pytest.raises(env.UserError, match="403"):
            data.main(settings(few, address, tmp_path / "refused", parallel=2))
    assert script.stages.count("grade") == 0 or not (tmp_path / "refused/train.jsonl").exists()


def test_nothing_to_use(few, scenes, tmp_path):
    """What cannot work is said in one line that names the cure; rows of others stay as they are."""
    (tmp_path / "empty").mkdir()
    for folder, more, words in ((tmp_path / "empty", {}, "a folder of photographs"),
                                (few, {"annotator": ""}, "an endpoint begins with"),
                                (few, {"out": scenes}, "did not make")):
        cfg = settings(folder, "http://127.0.0.1:9/v1", tmp_path / "out")
        with pytest.raises(env.UserError, match=words):
            data.main(replace(cfg, **more))


@pytest.mark.parametrize("text, reason", [
    ('so: {"question": "How many?", "answer": 3} done', None), ('{"question": "How many?"}', "malformed"),
    ('{"a":' * 9999 + "}" * 9999, "malformed"),
    ('{"question": "How\\ud800", "answer": "3"}', "empty, too long or unprintable")])
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
