"""Questions from photographs (data.py --images): the whole command against a scripted endpoint on the loopback interface,
killed and started again, with a local model, and on images and answers that are no good."""
import base64
import contextlib
import copy
import hashlib
import http.server
import io
import json
import os
import random
import signal
import subprocess
import sys
import threading
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import data
import env
import rppo
import sft
from conftest import amplify
from test_rppo import acting

ROOT = Path(__file__).parent.parent
SIZE = (2000, 1000)
EVIDENCE = (1120, 560, 1280, 640)   # where ZOOMS ends, in pixels
ZOOMS = [([400, 400, 800, 800], 0), ([250, 250, 750, 750], 1), ([300, 300, 700, 700], 2)]
FINDS = [([400, 400, 800, 800], 0), ([350, 350, 650, 650], 1)]              # covers the evidence by another way
RECOVERS = [([0, 0, 300, 300], 0), ([500, 500, 700, 700], 0)]               # after a look elsewhere
ELSEWHERE = [([0, 0, 300, 300], 0), ([600, 0, 900, 300], 0)]
AGAIN = [([500, 500, 700, 700], 0)] * 3

# What becomes of photograph i: the step that drops it and the reason, as the script below arranges it.
FATE = {2: ("propose", "not 2 to 4 zooms"), 3: ("ask", "malformed or too long"), 4: ("verify", "given away by its text"),
        5: ("verify", "answered without zooming"), 6: ("verify", "answer not confirmed"), 7: ("grade", "solved too often"),
        8: ("grade", "never solved"), 9: ("grade", "solved with one crop or none"), 10: ("collect", "no faultless trajectory"),
        11: ("propose", "no question"), **dict.fromkeys((12, 13), ("propose", "a zoom leaves the crop before it, or is hardly finer")),
        14: ("propose", "the last view is too large"), 15: ("ask", "options unclear"), 16: ("ask", "malformed or too long")}
GOOD = [0, 1, 10, 17, 18]           # these pass grade
ANSWERS = {0: "green", 1: "a heron", 10: "12", 17: "7", 18: "EXIT"}
OPTIONS = ["a heron", "a crane", "a stork", "a goose"]


def call(box, idx=0):
    return data.look(box, idx)


def answered(text):
    return f"<think>I see.</think>\n<answer>{text}</answer>"


class Script:
    """What the endpoint says. A photograph tells its number by its colour, a question by its text, and a sampled
    trajectory by the number that its first turn thinks of: nth counts equal requests, modulo 4."""

    def __init__(self, faults=False, delay=0.0):
        self.faults, self.delay, self.broken, self.seen, self.lock = faults, delay, set(), Counter(), threading.Lock()
        self.log, self.requests, self.keys = [], [], set()  # (stage, photograph, right?), the requests that were answered

    def read(self, body):
        """(stage, number of the photograph, turns so far, first image or None) of a request."""
        system, user, *rest = body["messages"]
        images = [p["image_url"]["url"] for p in user["content"] if p["type"] == "image_url"]
        image = Image.open(io.BytesIO(base64.b64decode(images[0].partition("base64,")[2]))) if images else None
        text, tool = user["content"][-1]["text"], system["content"] == env.SYSTEM
        assert tool or system["content"] == env.SYSTEM_NO_TOOL
        turns = [m["content"] for m in rest if m["role"] == "assistant"]
        if "eyesight" in text:
            return "propose", round(image.getpixel((2, 2))[0] / 12), turns, image
        i = int(text.split("house ")[1].split("?")[0])
        if tool:
            return ("grade" if body["model"] == "policy" else "collect"), i, turns, image
        return ("blind" if image is None else "whole" if image.width > 600 else "evidence"), i, turns, image

    def __call__(self, body):
        stage, i, turns, image = self.read(body)
        if stage in self.broken:
            return 500
        key = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
        with self.lock:
            self.keys.add(key)
            if self.faults and (key, "fault") not in self.seen and int(key[:4], 16) % 6 < 5:  # the first try of most requests
                self.seen[key, "fault"] += 1
                return (429, 500, "drop", "no json", "cut")[int(key[:4], 16) % 6]
            nth = self.seen[key] % 4
            self.seen[key] += 1
            self.requests.append(key)
        if self.delay:
            threading.Event().wait(self.delay * (int(key[4:8], 16) % 5))
        text = getattr(self, stage)(i, turns, nth)
        with self.lock:
            self.log.append((stage, i, f"<answer>{ANSWERS.get(i, 'green')}</answer>" in str(text)))
        return text

    def walk(self, zooms, turns, nth, answer):
        """The next turn of a trajectory that makes these calls and then answers."""
        return f"<think>try {nth}</think>\n" + (call(*zooms[len(turns)]) if len(turns) < len(zooms) else f"<answer>{answer}</answer>")

    def propose(self, i, turns, nth):
        zooms = {2: ZOOMS[:1], 12: [([100, 100, 900, 900], 0), *ZOOMS[1:]], 13: [*ZOOMS[:2], ([300, 300, 340, 340], 0)],
                 14: ZOOMS[:2]}.get(i, ZOOMS)
        if i == 11:
            return "I would rather not. " + "<answer>" * 3
        q = dict(question=f"What is on the sign of house {i}?", answer=ANSWERS.get(i, "green"), choices=None)
        q.update({1: dict(choices=OPTIONS), 15: dict(choices=["green", "Green.", "red"]), 16: dict(answer="green " * 9)}.get(i, {}))
        return self.walk(zooms, turns, nth, "a sign, green" if i == 3 else f"```json\n{json.dumps(q)}\n```")

    def vote(self, i, ok):
        return answered(ANSWERS.get(i, "green") if ok else "violet") if i != 17 or ok else "seven, or so"  # not in the format

    def blind(self, i, turns, nth):
        return self.vote(i, nth < (2 if i == 4 else 1))

    def whole(self, i, turns, nth):
        return self.vote(i, nth in ((1, 3) if i == 5 else ()))

    def evidence(self, i, turns, nth):
        return self.vote(i, nth in ((0, 1) if i == 6 else (0, 2, 3)))

    def grade(self, i, turns, nth):
        nth = int(turns[0].split("try ")[1].split("<")[0]) if turns else nth
        truth = ANSWERS.get(i, "green")
        if nth == 3 and i in GOOD:
            return f"<think>try {nth}</think>" + call([900, 900, 900, 1000])     # an empty box, for ever
        ok = {7: True, 8: False, 9: nth == 0}.get(i, nth in (0, 2))
        return self.walk(FINDS[:1] if i == 9 else FINDS if nth != 2 else RECOVERS + FINDS, turns, nth, truth if ok else "violet")

    def collect(self, i, turns, nth):
        nth = int(turns[0].split("try ")[1].split("<")[0]) if turns else nth
        truth = ANSWERS[i]
        if i == 10:
            return self.walk([FINDS, [([0, 0, 0, 0], 0), *FINDS], AGAIN, ELSEWHERE][nth], turns, nth, truth if nth else "violet")
        if nth == 3 and not turns:
            return f"<think>try {nth}</think><tool_call>zoom!</tool_call>"
        return self.walk([FINDS, RECOVERS, FINDS, FINDS][nth], turns, nth, "violet" if nth == 2 else truth)


@contextlib.contextmanager
def serving():
    """Yields serve(script) -> the address of an endpoint that answers by it."""
    servers = []

    def start(script):
        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                reply = script(body) if self.path == "/v1/chat/completions" else 404
                if self.headers.get("Authorization") == "Bearer wrong":
                    reply = 401
                if reply == "drop":
                    self.close_connection = True
                    return self.connection.shutdown(2)
                self.send_response(reply if isinstance(reply, int) else 200)
                self.end_headers()
                text = json.dumps({"choices": [{"message": {"role": "assistant", "content": reply}}]})
                self.wfile.write((text[:20] if reply == "cut" else "<html>" if reply == "no json" else text).encode())

            def log_message(self, *_):
                pass

        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_port}/v1"

    yield start
    for s in servers:
        s.shutdown()
        s.server_close()


@pytest.fixture
def serve():
    with serving() as start:
        yield start


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    monkeypatch.setattr(env.time, "sleep", lambda s: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def photograph(folder, i, size=SIZE, name=None):
    """One that the script knows as i, with an evidence that can be told from the rest."""
    image = Image.new("RGB", size, (12 * i, 120, 90))
    image.paste((250, 250, 250), EVIDENCE)
    os.makedirs(folder, exist_ok=True)
    image.save(os.path.join(folder, name or f"{i:02}.png"), compress_level=1)


def settings(folder, url, out, **more):
    return data.Config(**{**dict(images=str(folder), annotator=url, annotator_name="teacher", policy=url, policy_name="policy",
                                 out=str(out), per_image=1, samples=4, parallel=4, seed=1, max_pixels=400_000), **more})


def files(out):
    return {str(p.relative_to(out)): p.read_bytes() for p in Path(out).rglob("*") if p.is_file()}


def card(out):
    return json.loads((Path(out) / "data_card.json").read_text())


def rows_of(out, side):
    path = Path(out) / f"{side}.jsonl"
    return data.load_rows(str(path)) if path.read_text() else []


def check_sums(card, n_files, per_image):
    """Each step's counts add up, and what left one step entered the next."""
    steps = {s["step"]: s for s in card["funnel"]}
    assert list(steps) == ["select", "propose", "ask", "verify", "grade", "collect", "split"]
    for s in steps.values():
        assert s["entered"] == s["left"] + sum(s["dropped"].values()) and all(n > 0 for n in s["dropped"].values())
    left = [s["left"] for s in steps.values()]
    assert [s["entered"] for s in steps.values()] == [n_files, left[0] * per_image, *left[1:4], left[4], left[4]]
    shown = card["distributions"]
    for name in ("zooms", "evidence area", "answer"):
        assert sum(shown.get(name, {}).values()) == left[4]
    return steps


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Nineteen photographs, one for every fate."""
    folder = tmp_path_factory.mktemp("photos")
    for i in range(19):
        photograph(folder / "deeper" if i == 18 else folder, i)
    return folder


@pytest.fixture(scope="module")
def done(folder, tmp_path_factory):
    """The whole command, against an endpoint of which most first tries fail: (out, script, config)."""
    out = tmp_path_factory.mktemp("made") / "mine"
    with pytest.MonkeyPatch.context() as m, serving() as serve:
        m.setattr(env.time, "sleep", lambda s: None)
        m.setenv("OPENAI_API_KEY", "sk-not-to-be-written")
        script = Script(faults=True)
        cfg = settings(folder, serve(script), out, preview=3)
        data.main(cfg)
        yield str(out), script, cfg


# ---------------------------------------------------------------------------------------------------------------
# 1. The whole command.

def test_funnel(done):
    """Every photograph goes as far as the script lets it, with the reason; the counts add up; the page says the same."""
    out, script, cfg = done
    steps = check_sums(card(out), 19, 1)
    dropped = {(name, reason): n for name, s in steps.items() for reason, n in s["dropped"].items() if name != "split"}
    assert dropped == Counter(FATE.values())
    assert steps["grade"]["left"] == len(GOOD) and steps["collect"]["left"] == 4 and len(script.seen) > len(script.requests) > 100
    c = card(out)
    assert c["distributions"]["answer"] == {"choice": 1, "colour": 1, "number": 2, "word": 1}
    assert c["distributions"]["zooms"] == {"3": 5} and c["distributions"]["evidence area"] == {"0.6 %": 5}
    assert c["distributions"]["trajectories"] == {"direct": 4, "recovered": 4, "wrong": 5, "malformed or refused call": 5,
                                                  "redundant": 1, "evidence not covered": 1}
    assert c["recovered_share"] == 0.5 and c["settings"]["seed"] == 1 and c["settings"]["policy_name"] == "policy"
    page = (Path(out) / "data_card.md").read_text()
    assert "| grade | 8 | 5 | never solved: 1, solved too often: 1, solved with one crop or none: 1 |" in page
    assert "policy" in page and "Nothing survived" not in page


def test_rows(done):
    """Rows have the schema, name an image that exists, and break none of the steps, by the endpoint's own account."""
    out, script, _ = done
    sides = {side: rows_of(out, side) for side in ("sft", "train", "test")}
    assert all(sides.values())
    seen = {side: {r["images"][0] for r in rows} for side, rows in sides.items()}
    assert len(set.union(*seen.values())) == sum(map(len, seen.values())) == len(GOOD)          # no image on two sides
    assert {side: len(rows) for side, rows in sides.items()} == card(out)["distributions"]["rows"]
    for row in sum(sides.values(), []):
        i = int(os.path.basename(row["images"][0])[:2])
        votes = lambda stage: [ok for s, j, ok in script.log if s == stage and j == i]
        assert i in GOOD and row["solution"] == ANSWERS[i] and f"house {i}?" in row["problem"]
        assert len(votes("blind")) == len(votes("whole")) == len(votes("evidence")) == 4
        assert sum(votes("blind")) <= 1 and sum(votes("whole")) <= 1 and sum(votes("evidence")) >= 3
        assert sum(votes("grade")) == 2 and row["solve_rate"] == 0.5 and row["difficulty"] == 2
        assert row["boxes"] == [list(EVIDENCE)] and [list(b) for b in row["chain"]][-1:] == row["boxes"] and len(row["chain"]) == 3
        if i == 1:
            assert sorted(row["choices"]) == sorted(OPTIONS) and row["choices"] != OPTIONS
            assert row["problem"].endswith("".join(f"\n{c}. {o}" for c, o in zip("ABCD", row["choices"])))
        else:
            assert row["choices"] is None


def test_trajectories(done, policy):
    """Every cold-start row replays to a right answer without an error, covers the evidence, and repeats itself little."""
    out, _, cfg = done
    rows = rows_of(out, "sft")
    recovered = 0
    for row in rows:
        traj = env.render(policy.proc, row, row["turns"], env.World(max_tokens=4096))
        assert traj.status == "answered" and env.match(traj.answer, row) and len(traj.turns) == len(row["turns"])
        assert all(error is None for _, _, error in traj.turns) and env.covers(traj, row)
        assert env.redundancy(traj.crops, 0.3) <= data.MAX_REDUNDANCY
        recovered += traj.crops[0] == (0, 0, 600, 300)
    assert len(rows) == 4 and recovered == 2 and "try 1" in rows[0]["turns"][0]      # those that recovered come first


def test_stages_take_the_rows(done, tmp_path):
    """sft.py and rppo.py make a step on them."""
    out, _, _ = done
    tiny = dict(max_tokens=2048, turn_tokens=6, max_crops=2, steps=1, save_every=1)
    sft.main(sft.Config(**tiny, data=out, out=f"{tmp_path}/sft", batch=4, micro_batch=2))
    rppo.main(rppo.Config(**tiny, data=out, out=f"{tmp_path}/rppo", model=env.newest(f"{tmp_path}/sft"), prompts=2, samples=2,
                          eval_rows=0, n_score=0))


def test_requests(done):
    """The endpoint saw what env.py's tokens would show: the same system prompts, the whole view within the budget, crops
    from the original pixels, errors as fixed texts. The key is in no file."""
    out, script, cfg = done
    assert not [name for name, text in files(out).items() if b"sk-not-to-be-written" in text]
    assert set(files(out)) == {"sft.jsonl", "train.jsonl", "test.jsonl", "config.json", "data_card.json", "data_card.md", "preview.png",
                               *(f"answers/{p.name}" for p in Path(out, "answers").iterdir())}
    world = env.World(**env.REAL_WORLD)
    image = env.open_image(os.path.join(cfg.images, "00.png"))
    photo, _ = data.select(cfg, "00.png")
    traj = env.Trajectory({}, image, boxes=[photo.box])
    for text in (call(*ZOOMS[0]), call([5, 5, 5, 9]), call([300, 300, 700, 700], 1)):
        traj.turns.append((text, env.parse_action(text), None))
        box, _ = env.act(traj, world)
        traj.boxes += [box] if box else []
    sent = data.messages(photo, traj, "Why?", world)
    assert [m["role"] for m in sent] == ["system", "user"] + ["assistant", "user"] * 3 and sent[0]["content"] == env.SYSTEM
    shown = [Image.open(io.BytesIO(base64.b64decode(p["image_url"]["url"].partition("base64,")[2])))
             for m in sent if m["role"] == "user" for p in m["content"] if p["type"] == "image_url"]
    assert len(shown) == 3 and sent[5]["content"][1]["text"] == env.ERRORS["empty"]
    assert shown[0].width * shown[0].height <= world.max_pixels and abs(shown[0].width / shown[0].height - 2) < 0.1
    for view, box in zip(shown[1:], traj.crops):
        assert world.min_crop_pixels <= view.width * view.height <= world.max_crop_pixels
        cut = np.asarray(image.crop(box).resize(view.size, Image.BICUBIC)).astype(int)
        assert np.abs(np.asarray(view).astype(int) - cut).mean() < 2
    assert (np.asarray(shown[2])[view.height // 2, view.width // 2] > 230).all()             # the evidence, not its surroundings


def test_preview(done):
    """The contact sheet has a row for each: the photograph with red boxes, the bright crop, text."""
    with Image.open(os.path.join(done[0], "preview.png")) as im:
        pixels = np.asarray(im.convert("RGB")).astype(int)
    assert pixels.shape == (3 * 410 + 10, 1240, 3)
    for y in (10, 420, 830):
        row = pixels[y:y + 400]
        assert (row[:, 10:410] == (255, 0, 0)).all(-1).sum() > 200
        assert (row[100:250, 430:800] > 230).all(-1).mean() > 0.5 and (row[:, 830:] < 100).all(-1).sum() > 200


# ---------------------------------------------------------------------------------------------------------------
# 2. Again, killed, in another order.

def test_again(done):
    """A second run asks nothing, and leaves every byte as it was; so does one with other numbers of what was asked for."""
    out, script, cfg = done
    before, asked = files(out), len(script.requests)
    data.main(cfg)
    assert files(out) == before and len(script.requests) == asked
    data.main(data.Config(**{**asdict(cfg), "max_rate": 0.25, "preview": 0}))     # a bound: judged anew, nothing asked
    assert len(script.requests) == asked and card(out)["distributions"].get("rows", {}).get("train", 0) == 0
    data.main(cfg)
    assert files(out) == before


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    folder = tmp_path_factory.mktemp("few")
    for i in (0, 1, 7, 17):
        photograph(folder, i)
    return folder


def test_order_of_threads(few, serve, tmp_path):
    """One request at a time or four, fast or slow: the same bytes."""
    made = []
    for parallel, delay in ((1, 0), (4, 0.004)):
        out = tmp_path / str(parallel)
        data.main(settings(few, serve(Script(delay=delay)), out, parallel=parallel))
        made.append({k: v for k, v in files(out).items() if k.endswith(".jsonl")})
        assert rows_of(out, "train")
    assert made[0] == made[1]


class Killed(BaseException):
    pass


def test_killed_anywhere(serve, tmp_path, monkeypatch):
    """Killed before every eleventh request, each time with half a line left behind, a run asks nothing twice and ends with the
    same files as one that was never killed."""
    few = tmp_path / "photos"
    for i in (0, 7):
        photograph(few, i)
    data.main(settings(few, serve(whole := Script()), tmp_path / "whole", parallel=1))
    script, chat, left = Script(), env.chat, [0]
    cfg = settings(few, serve(script), tmp_path / "killed", parallel=1)

    def dying(*args, **kw):
        if left[0] == 0:
            raise Killed
        left[0] -= 1
        return chat(*args, **kw)

    monkeypatch.setattr(env, "chat", dying)
    for runs in range(200):
        left[0] = 11
        try:
            data.main(cfg)
            break
        except Killed:
            newest = max(Path(cfg.out, "answers").iterdir(), key=lambda p: p.stat().st_mtime_ns, default=None)
            if newest:
                newest.write_text(newest.read_text() + '{"key": "0123456789abcdef0123456789abcdef", "answ')
    assert runs > 5 and script.requests and Counter(script.requests) == Counter(whole.requests)
    ours, theirs = files(cfg.out), files(tmp_path / "whole")
    assert set(ours) == set(theirs)
    assert all(ours[k] == theirs[k] for k in ours if k.endswith((".jsonl", ".png")))
    assert card(cfg.out)["funnel"] == card(tmp_path / "whole")["funnel"]


@pytest.mark.slow
def test_sigkill(few, serve, tmp_path):
    """The process itself, killed at random moments by SIGKILL with requests under way: what was recorded is not asked again,
    and two runs from the same records leave the same files."""
    script, rng = Script(delay=0.02), random.Random(0)
    cfg = settings(few, serve(script), tmp_path / "out", parallel=2)
    argv = [sys.executable, str(ROOT / "data.py"), *(f"--{k}={v}" for k, v in asdict(cfg).items() if v != "")]
    recorded = lambda: sum(p.read_text().count("\n") for p in Path(cfg.out).glob("answers/*.jsonl"))
    kills = 0
    for _ in range(5):
        goal, child = recorded() + rng.randrange(5, 30), subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while child.poll() is None and recorded() < goal:
            threading.Event().wait(0.01)
        kills += child.poll() is None
        child.send_signal(signal.SIGKILL)
        child.wait()
    assert kills >= 3
    known, asked = recorded(), len(script.requests)
    assert asked - known <= 2 * kills                       # at most what was under way when it was killed
    data.main(cfg)
    assert len(script.requests) - asked == recorded() - known
    before = files(cfg.out)
    data.main(cfg)
    assert files(cfg.out) == before and sum(s["left"] for s in card(cfg.out)["funnel"]) > 0


def test_endpoint_fails_for_good(few, serve, tmp_path):
    """A request that fails again and again drops its question, is counted and not recorded; when the endpoint is mended, the same
    command asks it again, and ends like a run without the failure."""
    script = Script()
    cfg = settings(few, serve(script), tmp_path / "out")
    script.broken = {"evidence", "collect"}
    data.main(cfg)
    steps = check_sums(card(cfg.out), 4, 1)
    assert steps["verify"]["dropped"] == {"endpoint failed": 4} and "**Nothing survived.**" in (tmp_path / "out/data_card.md").read_text()
    script.broken = {"collect"}
    data.main(cfg)
    steps = check_sums(card(cfg.out), 4, 1)
    assert steps["grade"]["left"] == 3 and steps["collect"]["dropped"] == {"endpoint failed": 3} and not rows_of(cfg.out, "sft")
    asked, script.broken = len(script.requests), set()
    data.main(cfg)
    assert {s for s, _, _ in script.log[asked:]} == {"collect"} and card(cfg.out)["funnel"][-1]["left"] == 3
    other = settings(few, serve(Script()), tmp_path / "other")
    data.main(other)
    assert all(files(cfg.out)[k] == files(other.out)[k] for k in files(other.out) if k.endswith(".jsonl") and "answers" not in k)


def test_refused(few, serve, tmp_path, monkeypatch):
    """A wrong key ends the run with one line; so does a refusal later on, and the other photographs under way do not go on."""
    script = Script(delay=0.02)
    cfg = settings(few, serve(script), tmp_path / "out", parallel=2)
    refused = iter([403])
    script.evidence = lambda *_: next(refused, answered("green"))        # the first of all
    with pytest.raises(env.UserError, match="refused with 403"):
        data.main(cfg)
    assert len(script.requests) < 100 and not os.path.exists(tmp_path / "out/train.jsonl")
    monkeypatch.setenv("OPENAI_API_KEY", "wrong")
    with pytest.raises(env.UserError, match="refused with 401"):
        data.main(cfg)


# ---------------------------------------------------------------------------------------------------------------
# 3. A local model.

@pytest.fixture(scope="module")
def tiny(policy, tmp_path_factory):
    """A checkpoint of the tiny policy, untrained."""
    folder = str(tmp_path_factory.mktemp("tiny"))
    sft.save_checkpoint(folder, 1, policy, sft.Config(turn_tokens=12, max_crops=2), "tiny", [])
    return folder


def test_local_model(tiny, tmp_path, monkeypatch):
    """The untrained tiny model as annotator and policy: nothing survives, the card says so and the files are there. Again: no
    rollout, the same bytes."""
    photograph(tmp_path / "photos", 0)
    photograph(tmp_path / "photos", 1)
    cfg = settings(tmp_path / "photos", tiny, tmp_path / "photos/out", annotator_name="", policy_name="", per_image=2)
    data.main(cfg)
    steps = check_sums(card(cfg.out), 2, 2)
    assert steps["propose"]["entered"] == 4 and steps["split"]["left"] == 0
    assert "**Nothing survived.**" in (tmp_path / "photos/out/data_card.md").read_text()
    assert card(cfg.out)["world"]["turn_tokens"] == 12 and not rows_of(cfg.out, "train")
    before = files(cfg.out)      # which lies among the photographs, and is no input
    monkeypatch.setattr(env, "rollout", lambda *_: pytest.fail("a recorded rollout was repeated"))
    data.main(cfg)
    assert files(cfg.out) == before


def test_local_conversation(few, policy, tmp_path, monkeypatch):
    """A local conversation is env.rollout's, turn by turn and box by box, on the whole and on a part of the photograph, and comes
    back from the record; a question that is too long is answered by nobody."""
    learner = copy.deepcopy(policy)
    amplify(learner.vlm, 3.0)
    monkeypatch.setattr(env, "parse_action", acting)
    cfg, name = settings(few, "", tmp_path), "00.png"
    os.makedirs(tmp_path / "answers")
    photo, _ = data.select(cfg, name)
    world = env.World(max_crops=3, turn_tokens=6)
    job = data.SimpleNamespace(cfg=cfg, world=world, stopped=False)
    model = data.SimpleNamespace(name="m", url="", policy=learner)
    kept, rollout = [], env.rollout
    monkeypatch.setattr(env, "rollout", lambda *a: kept.append(rollout(*a)) or kept[-1])
    for box, world in ((photo.box, world), (EVIDENCE, replace(world, max_crops=0))):
        made = data.converse(data.Question(job, photo, 0), model, "Which colour?", world, 4, box)
        true = kept.pop()
        assert [t.turns for t in made] == [t.turns for t in true] and [t.crops for t in made] == [t.crops for t in true]
        assert [t.answer for t in made] == [t.answer for t in true] and len({str(t.turns) for t in made}) > 1
        assert made[0].boxes[0] == box and true[0].image.size == (box[2] - box[0], box[3] - box[1])
        assert any(t.crops for t in made) == (world.max_crops > 0)
        again = data.converse(data.Question(job, data.select(cfg, name)[0], 0), model, "Which colour?", world, 4, box)
        assert not kept and [t.turns for t in again] == [t.turns for t in true]
    made = data.converse(data.Question(job, photo, 0), model, "Which? " * 600, world, 2, photo.box)
    assert [t.turns for t in made] == [[], []] and not any(env.is_right(t, dict(solution="x")) for t in made)



# ---------------------------------------------------------------------------------------------------------------
# 4. Input that is no good.

def test_images_that_are_no_good(serve, tmp_path, monkeypatch, capsys):
    """Each is used or left out for a reason that is counted, and a line names what could not be read; the good one is used."""
    folder = tmp_path / "photos"
    photograph(folder, 0)
    photograph(folder, 0, name="copy.png")                               # of the same side
    photograph(folder, 1, size=(1400, 1400), name="small.png")
    (folder / "text.jpg").write_text("no image")
    (folder / "empty.png").write_bytes(b"")
    (folder / ".hidden").write_text("left out without a word")
    whole = (folder / "00.png").read_bytes()
    (folder / "cut.png").write_bytes(whole[:len(whole) // 2])
    Image.new("RGB", (3000, 1500), (0, 120, 90)).convert("CMYK").save(folder / "cmyk.jpg")
    Image.fromarray(np.full(SIZE[::-1], 30000, np.uint16)).save(folder / "deep.png")
    frames = [Image.new("RGB", SIZE, c) for c in ("red", "blue")]
    frames[0].save(folder / "moving.gif", save_all=True, append_images=frames[1:])
    frames[0].save(folder / "phone.jpg", "MPO", save_all=True, append_images=frames[1:])   # as phones write them
    Image.new("1", (4000, 2000)).save(folder / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 3_900_000)            # an error above twice this
    monkeypatch.setattr("warnings.warn", lambda *a, **k: None)
    script = Script()
    cfg = settings(folder, serve(script), tmp_path / "out", parallel=1)
    data.main(cfg)
    steps = check_sums(card(cfg.out), 11, 1)
    assert steps["select"]["dropped"] == {"animated": 1, "too large to decode": 1, "too small": 1, "unreadable": 3}
    assert steps["select"]["left"] == 5 and card(cfg.out)["distributions"]["image mode"] == {"CMYK": 1, "I;16": 1, "RGB": 3}
    printed = capsys.readouterr()
    assert all(x in printed.err + printed.out for x in ("text.jpg", "empty.png", "cut.png", "bomb.png")) and "hidden" not in str(printed)
    sides = [side for side in ("sft", "train", "test") for r in rows_of(cfg.out, side) if r["images"][0].endswith(("00.png", "copy.png"))]
    assert len(set(sides)) == 1


def test_nothing_to_use(few, serve, tmp_path):
    """What cannot work is said in one line that names the cure."""
    url = serve(Script())
    (tmp_path / "none").mkdir()
    for folder, more, words in ((tmp_path / "none", {}, ["none", "photographs"]), (tmp_path / "absent", {}, ["absent", "photographs"]),
                                (few, dict(min_megapixels=50.0), ["none of 4 files", "data_card.md"]),
                                (few, dict(annotator=""), ["--annotator=FOLDER"]), (few, dict(policy_name=""), ["--policy_name"]),
                                (few, dict(policy=str(tmp_path)), [str(tmp_path), "no checkpoint"])):
        with pytest.raises(env.UserError) as e:
            data.main(settings(folder, url, tmp_path / "out", **more))
        assert "\n" not in str(e.value) and all(w in str(e.value) for w in words)
    assert card(tmp_path / "out")["funnel"][0]["dropped"] == {"too small": 4}
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs/train.jsonl").write_text("{}")
    with pytest.raises(env.UserError, match="did not make"):
        data.main(settings(few, url, tmp_path / "theirs"))
    assert (tmp_path / "theirs/train.jsonl").read_text() == "{}"


@pytest.mark.parametrize("text, reason", [
    ('{"question": "How many?", "answer": 3}', None), ('so: {"question": "How many?", "answer": "3", "choices": []} done', None),
    ('{"question": "How many?"}', "malformed or too long"), ('{"question": "How many?", "answer": ["3"]}', "malformed or too long"), ('{"question": 3, "answer": "3"}', "malformed or too long"), ("[1, 2]", "malformed or too long"), ("", "malformed or too long"),
    ('{"question": "How many?", "answer": "?!"}', "malformed or too long"), ('{"question": "How\\ud800", "answer": "3"}', "malformed or too long"),
    ('{"question": "How many?", "answer": "3", "choices": 3}', "malformed or too long"), ('{"a":' * 9999 + "}" * 9999, "malformed or too long"),
    ('{"question": "How many?", "answer": "3", "choices": ["3", 4, "5"]}', "malformed or too long"),
    ('{"question": "How many?", "answer": "3", "choices": "345"}', "malformed or too long"),
    ('{"question": "How many?", "answer": "3", "choices": {"3": "a", "4": "b", "5": "c"}}', "malformed or too long"),
    ('{"question": "How many?", "answer": "3", "choices": ["2", "4", "5"]}', "options unclear"),
    ('{"question": "How many?", "answer": "b", "choices": ["a", "b", "c"]}', "options unclear"),      # letters or words?
    ('{"question": "How many?", "answer": "x", "choices": ["x", "y"]}', "options unclear"),
    ('{"question": "' + "why " * 101 + '", "answer": "3"}', "malformed or too long")])
def test_questions(few, tmp_path, text, reason):
    """What a question must be."""
    photo, _ = data.select(settings(few, "", tmp_path), "00.png")
    q = data.Question(data.SimpleNamespace(cfg=settings(few, "", tmp_path)), photo, 0, text=text, chain=[EVIDENCE])
    assert data.ask(q) == reason
    assert (q.row is None) == (reason is not None) and (reason or env.match(q.row["solution"], q.row))


@pytest.mark.parametrize("n", [1, 2, 3, 10, 100])
def test_split(n):
    """Every photograph is on one side, in the shares asked for; sft has only those with trajectories."""
    found = [dict(digest=i, row=dict(photo=i, n=k), turns=[["a"], ["b"]] if i % 3 != 1 and k else []) for i in range(n) for k in (0, 1)]
    sides = data.split(data.Config(share_sft=0.4, share_test=0.1), found)
    photos = {side: {r["photo"] for r in rows} for side, rows in sides.items()}
    count = {side: len(p) for side, p in photos.items()}
    assert set.union(*photos.values()) == set(range(n)) and sum(count.values()) == n
    assert [len(sides[side]) for side in sides] == [2 * count["sft"], 2 * count["train"], 2 * count["test"]]
    assert all("turns" in r and r["n"] == 1 for r in sides["sft"]) and not any("turns" in r for r in sides["train"] + sides["test"])
    if n >= 10:
        assert count["test"] == n // 10 and count["sft"] == 4 * n // 10
    elif n == 3:
        assert all(count.values())
