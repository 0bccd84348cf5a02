"""Questions about photographs (data.py --images): the whole command against a scripted endpoint, killed and
started again, and on images and answers that are no good."""
import base64
import io
import json
import os
import re
import time
from collections import Counter
from dataclasses import replace
from email.utils import formatdate
from pathlib import Path
from threading import Event

import numpy as np
import pytest
from conftest import crop, refused, serving
from PIL import Image

import data
import env

EVIDENCE = (560, 280, 640, 320)     # where ZOOMS ends, in pixels of a photograph of 1000 x 500
ZOOMS = [crop(400, 400, 800, 800), crop(250, 250, 750, 750, img_idx=1), crop(300, 300, 700, 700, img_idx=2)]
FINDS = [crop(400, 400, 800, 800), crop(350, 350, 650, 650, img_idx=1)]    # the evidence, by another way
RECOVERS = [crop(0, 0, 300, 300), crop(500, 500, 700, 700)]     # after a look elsewhere
BAD = "<tool_call>zoom!</tool_call>"
MOVED = {"Location": "http://127.0.0.1:9/v1"}
ARGUMENTS = {"bbox_2d": [1, 2, 3, 4], "img_idx": 0}
CALL = {"function": {"name": "image_zoom_in_tool", "arguments": json.dumps(ARGUMENTS)}}
OBJECT = {"function": {"name": "image_zoom_in_tool", "arguments": ARGUMENTS}}
WORDS = [{"type": "text", "text": "<answer>red"}, {"type": "text", "text": "</answer>"}]
CUT = 200, {}, ['{"choices": [{"mess']
OTHER_NAME = 400, {}, ["Unsupported parameter: 'max_tokens' is not supported. Use 'max_completion_tokens' instead."]
# What becomes of the photographs 0 to 13: all but the first three are dropped.
FATES = ["kept", "kept", "kept", "propose: too few zooms", "read_question: malformed",
         "verify: given away by its text", "verify: answered without zooming", "verify: answer not confirmed",
         "grade: solved too often", "grade: never solved", "grade: solved with one crop or none",
         "propose: no question", "propose: the last view is too large",
         "propose: a zoom leaves the crop before it, or is hardly finer"]
# Which of the conversations of a stage are right, by stage or by stage and photograph.
RIGHT = {"propose": (0,), "blind": (0,), "whole": (), "evidence": (0, 2), "grade": (0,), "collect": (0, 1, 2),
         ("blind", 5): (0, 1), ("whole", 6): (1, 2), ("evidence", 7): (0,),
         ("grade", 8): (0, 1), ("grade", 9): ()}
# Their calls, likewise. Photograph 2 gets no faultless trajectory.
CALLS = {"propose": [ZOOMS], ("propose", 3): [ZOOMS[:1]], ("propose", 11): [[BAD] * 9],
         ("propose", 12): [ZOOMS[:2]], ("propose", 13): [[crop(100, 100, 900, 900), *ZOOMS[1:]]],
         "grade": [FINDS, FINDS], ("grade", 10): [FINDS[:1], []],
         "collect": [FINDS, RECOVERS, [BAD, *FINDS]], ("collect", 2): [[], [BAD, *FINDS], RECOVERS[:1]]}


class Script:
    """What the endpoint says. A photograph tells its number by its colour, a question by its text, and a
    conversation by the number that its first turn thinks of: it counts equal requests."""

    def __init__(self):
        self.faults = True                # the first try of every request fails
        self.broken = {}                  # stage -> HTTP status
        self.seen = Counter()

    def read(self, body):
        """(stage, photograph, turns so far) of a request, which shows what env.step's tokens show."""
        system, user, *rest = body["messages"]
        image, text = user["content"][0]["image_url"]["url"], user["content"][1]["text"]
        image = Image.open(io.BytesIO(base64.b64decode(image.partition("base64,")[2])))
        factor = 28 if body["model"] == "policy" else 32
        assert image.width * image.height <= 100_000 and body["max_tokens"] == 99
        assert image.width % factor == image.height % factor == 0
        turns = [message["content"] for message in rest[::2]]
        for turn, observation in zip(turns, rest[1::2]):
            error = env.ERRORS["malformed"] if BAD in turn else None
            assert observation["content"][1].get("text") == error
        red = image.getpixel((2, 2))[0]
        if "eyesight" in text:
            return "propose", round(red / 12), turns
        if system["content"] == env.SYSTEM:
            stage = "grade" if body["model"] == "policy" else "collect"
        elif text.startswith(data.BLIND):
            stage = "blind"
        else:
            stage = "whole" if red < 200 else "evidence"
        return stage, int(text.split("house ")[1].split("?")[0]), turns

    def __call__(self, body):
        stage, i, turns = self.read(body)
        key = stage, json.dumps(body)
        if stage in self.broken:
            return self.broken[stage]
        if self.faults and not self.seen["fault", key]:
            self.seen["fault", key] = 1
            return (429, 500, CUT)[len(key[1]) % 3]
        nth = int(turns[0].split("try ")[1][0]) if turns else self.seen[key]
        self.seen[key] += 1
        calls = CALLS.get((stage, i)) or CALLS.get(stage, [[]] * 3)
        calls = calls[nth]
        if len(turns) < len(calls):
            return f"<think>try {nth}</think>\n{calls[len(turns)]}"
        answer = f"sign {i}" if nth in RIGHT.get((stage, i), RIGHT[stage]) else "violet"
        if stage == "propose" and i != 4:
            made = {"question": f"What is on the sign of house {i}?", "answer": answer}
            answer = f"```json\n{json.dumps(made)}\n```"
        return f"<think>try {nth}</think>\n<answer>{answer}</answer>"


@pytest.fixture
def talk(monkeypatch):
    """talk(*replies): a question to an endpoint that has answered before, or not, and now says these replies:
    the text or the error, the requests, the waits."""
    monkeypatch.setattr(data, "MOST_BYTES", 1000)
    monkeypatch.setattr(data, "answering", set())
    monkeypatch.setenv("OPENAI_API_KEY", "secret")

    def ask(*replies, answered=True):
        bodies, waits, replies = [], [], iter(replies)
        monkeypatch.setattr(data.time, "sleep", waits.append)
        with serving(lambda body: bodies.append(body) or next(replies)) as url:
            data.answering.update([(url, "m")] if answered else [])
            try:
                said = data.chat(url, "m", [], temperature=0.5, max_tokens=9)
            except env.UserError as e:
                said = e
        return said, bodies, waits
    return ask


@pytest.mark.parametrize("message, text", [
    ({"content": " a\n"}, "a"), ({"content": "a\ud83d"}, "a?"), ({"content": WORDS}, "<answer>red</answer>"),
    ({"content": "b", "reasoning_content": "\nlook\n"}, "<think>look</think>\nb"),
    ({"content": "", "tool_calls": [OBJECT]}, crop(1, 2, 3, 4)),
    ({"content": None, "reasoning": "c", "tool_calls": [CALL]}, "<think>c</think>\n" + crop(1, 2, 3, 4))])
def test_a_reply_becomes_a_turn(talk, message, text):
    """What a server takes out of the text is put back."""
    said, [body], _ = talk({"message": message, "finish_reason": "stop"}, answered=False)
    settings = dict(temperature=0.5, top_p=1, max_tokens=9)
    assert said == text and body == dict(model="m", messages=[], **settings) and data.answering


@pytest.mark.parametrize("replies, answered, error, words", [
    ([401], True, env.UserError, "OPENAI_API_KEY"), ([403], True, env.UserError, "403"),
    ([404], True, env.UserError, "404"), ([400], False, env.UserError, "400"), ([400], True, data.NoReply, "400"),
    ([413], True, data.NoReply, "413"), ([(422, {}, ["\x1b[31mlong"])], True, data.NoReply, r"\\x1b\[31mlong"),
    ([{"message": {"content": ""}}], True, data.NoReply, "empty"),
    ([{"message": {"content": "I am"}, "finish_reason": "length"}], True, data.NoReply, "cut at max_tokens"),
    ([{"message": {"content": "I"}, "finish_reason": "content_filter"}], True, data.NoReply, "filtered"),
    ([500] * 7, False, env.UserError, "500"), ([CUT] * 7, True, data.NoReply, "JSON"),
    ([(200, {}, ["x" * 2000])] * 7, True, data.NoReply, "does not end"),
    ([(200, {}, (Event().wait(0.02) or " " for _ in range(9))) for _ in range(7)], True, data.NoReply, "not end|timed"),
    ([(302, MOVED, [""])], True, data.NoReply, "302")])
def test_no_usable_reply(talk, monkeypatch, replies, answered, error, words):
    """What would meet every request ends the job, what met one drops its sample. The key follows no redirect, and
    neither an endless nor a slow reply holds a call."""
    if "timed" in words:
        monkeypatch.setattr(data, "TIMEOUT", 0.1)
    said, bodies, _ = talk(*replies, answered=answered)
    assert type(said) is error and re.search(words, str(said)) and len(bodies) == len(replies)


def test_ask_again(talk):
    """Retry-After is obeyed, in seconds or as a date, up to a bound, and costs no try. The other name of
    max_tokens is learnt once."""
    limited = [(429, {"Retry-After": told}, [""]) for told in ("3", formatdate(time.time() + 50), "590", "soon", "nan")]
    said, _, waits = talk(*limited, 500, 503, "yes")
    assert said == "yes" and waits == [3, pytest.approx(50, abs=2), 1, 2, 4, 8, 16]
    said, bodies, waits = talk(OTHER_NAME, "yes")
    assert said == "yes" and not waits and bodies[1] == dict(model="m", messages=[], max_completion_tokens=9)


def files(cfg):
    """The rows and the card, but not the answers, which come in any order."""
    return {path.name: path.read_text() for path in Path(cfg.out).glob("[dst]*.json*")}


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """The whole command, against an endpoint whose first tries all fail: (script, settings)."""
    base = tmp_path_factory.mktemp("made")
    (base / "all/few").mkdir(parents=True)
    for i in range(len(FATES)):
        image = Image.new("RGB", (1000, 500), (12 * i, 120, 90))
        image.paste((250, 250, 250), EVIDENCE)
        image.save(base / ("all/few" if i < 2 else "all") / f"{i}.png", compress_level=1)
    for name in ("text.jpg", "photo.heic"):
        (base / "all/few" / name).write_text("no image")
    script = Script()
    with serving(script) as address, pytest.MonkeyPatch.context() as patch:
        patch.setattr(data.time, "sleep", lambda seconds: None)
        cfg = data.Config(images=f"{base}/all", annotator=address, annotator_name="teacher", policy=address,
                          policy_name="policy", out=f"{base}/out", per_image=1, votes=3, agree=2, samples=2,
                          attempts=3, parallel=4, max_pixels=100_000, share_sft=1.0, share_test=0.0,
                          policy_factor=28, max_tokens=99)
        data.main(cfg)
        script.faults = False
        yield script, cfg


def test_fates_and_rows(done, policy):
    """Every photograph goes as far as the script lets it, and the card says why. Every cold-start row replays
    to a right answer, without an error, to the evidence; one that recovered comes first."""
    _, cfg = done
    assert json.loads(files(cfg)["data_card.json"]) == {
        "proposals": Counter(FATES + ["open_photo: unreadable"]), "files left out": {".heic": 1}}
    rows = data.load_rows(f"{cfg.out}/sft.jsonl")
    for row in rows:
        traj = env.render(policy.proc, row, row["turns"], env.EpisodeConfig(max_tokens=4096))
        assert env.is_right(traj) and env.covers(traj) and not any(turn.error for turn in traj.turns)
    assert [row["turns"][0].split("try ")[1][0] for row in rows] == ["1", "0", "1", "0"]
    rows += data.load_rows(f"{cfg.out}/train.jsonl")
    for i, row in zip((0, 0, 1, 1, 2), rows, strict=True):
        assert row["solution"] == f"sign {i}" and f"house {i}?" in row["problem"]
        assert row["solve_rate"] == 0.5 and row["difficulty"] == 2
        assert row["boxes"] == [list(EVIDENCE)] == row["chain"][-1:] and len(row["chain"]) == 3


def test_files_left_out(tmp_path):
    """What is no image by its name, has a name that cannot be written down or is a copy is counted by kind."""
    for i, name in enumerate(("A.JPG", "b.heic", "c.pdf", "d", os.fsdecode(b"\xff.png"), "e.png")):
        (tmp_path / name).write_text(f"content {i}")
    (tmp_path / "f.png").write_text("content 0")
    (tmp_path / "g.png").symlink_to("nowhere")
    others = {".heic": 1, ".pdf": 1, "without a suffix": 1, "name that is not UTF-8": 1, "copy of another": 1,
              "unreadable": 1}
    assert data.find_photos(tmp_path) == ([tmp_path / "A.JPG", tmp_path / "e.png"], others)


def test_images_keep_their_colours():
    """Purple dots on red are purple in what endpoints and the page are given."""
    pixels = np.full((64, 64, 3), (204, 36, 36), np.uint8)
    for x, y in np.ndindex(2, 2):
        pixels[y::8, x::8] = (156, 36, 204)
    sent = base64.b64decode(data.image_url(Image.fromarray(pixels)).partition("base64,")[2])
    assert np.abs(np.array(Image.open(io.BytesIO(sent))) - pixels.astype(int)).max() < 16     # else 72


def test_again(done, capsys):
    """A second run asks nothing and leaves every byte as it was; other bounds and shares ask nothing."""
    script, cfg = done
    before, asked = files(cfg), script.seen.total()
    data.main(cfg)
    said = str(capsys.readouterr())
    assert "text.jpg" in said and ".heic" in said and files(cfg) == before and len(before) == 4
    data.main(replace(cfg, max_rate=0.25))
    assert '"grade: solved too often": 5' in files(cfg)["data_card.json"]
    data.main(replace(cfg, share_test=1.0))
    assert len(files(cfg)["test.jsonl"].splitlines()) == 3 and script.seen.total() == asked


def test_endpoint_fails_and_run_is_killed(done, tmp_path, monkeypatch):
    """A refusal of the key ends the run with one line. A request that is refused drops its question and is not
    recorded, also when it is the first one of a run; mended, it is asked again. Killed again and again, with half
    a line left behind, a run asks nothing twice and ends with the same files."""
    script, cfg = done
    cfg = replace(cfg, images=f"{cfg.images}/few", out=f"{tmp_path}/whole")
    script.seen.clear()
    script.broken = {"evidence": 403}
    refused("403", data.main, cfg)
    script.broken = {"evidence": 400}
    data.answering.clear()
    data.main(cfg)
    assert '"verify: no usable reply": 2' in files(cfg)["data_card.json"] and not files(cfg)["sft.jsonl"]
    script.broken = {}
    data.main(cfg)
    assert '"kept": 2' in files(cfg)["data_card.json"]

    whole, script.seen = script.seen, Counter()
    killed = replace(cfg, out=f"{tmp_path}/killed", parallel=1)
    ask, calls = data.chat, []

    def dying(*args, **more):
        calls.append(args)
        if len(calls) % 15 == 0:
            raise KeyboardInterrupt
        return ask(*args, **more)

    monkeypatch.setattr(data, "chat", dying)
    while not files(killed):
        try:
            data.main(killed)
        except KeyboardInterrupt:
            with open(f"{killed.out}/answers.jsonl", "a") as f:
                f.write('\n["0123456789abcdef0123456789abcdef", "answ')
    assert len(calls) > 45 and script.seen == whole and files(killed) == files(cfg)


def test_nothing_to_use(done, scenes, tmp_path):
    """What cannot work is said in one line that names the cure; rows of others stay as they are."""
    cfg = replace(done[1], out=f"{tmp_path}/out")
    for change, words in (({"images": str(tmp_path)}, "a folder of photographs"),
                          ({"annotator": ""}, "an endpoint begins with"), ({"out": scenes}, "did not make"),
                          ({"agree": 5}, "--agree=5 of --votes=3")):
        refused(words, data.main, replace(cfg, **change))
