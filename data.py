"""data.py, file 2 of 5 (read env.py first): rows of questions, the built-in scenes, and questions from photographs.

    python data.py                          # data/scenes-0/{sft,train,test}.jsonl and images, level 0 (the tiny task)
    python data.py --level=3 --n_train=2000 # 4096 x 4096 scenes with two scales and small text, for real models
    python data.py --images=photos --annotator=https://host/v1 --annotator_name=NAME --policy=runs/sft --out=data/mine

A row, one JSON object a line, is the published schema of DRIM-VisualReasonHard and of Mini-o3's RL data plus three
optional fields:

    {"images": ["test/0.png"], "doc_id": "test-0", "problem": "...", "solution": "green", "data_source": "scenes-0",
     "boxes": [[117, 84, 120, 87]], "choices": null, "difficulty": 3}

Image paths are relative to the file or to --image_root; boxes (the evidence) are pixels of the original. A cold-start row
also has "turns", the assistant's texts; what it saw is replayed through the tool.

The scenes: coloured boxes on a grid. One box of the asked colour bears the evidence, which can hardly be read in the
shrunken whole image: so list its look-alikes, zoom into one, and if it is empty go to the next. At levels 2 and 3 the crop
shows only where a label is, and a second zoom reads it. The cold start is imperfect on purpose, for RL to improve.

Photographs: an annotator zooms in on a detail and asks about it; a question is kept if the detail answers it and the
shrunken whole does not, and if the policy solves it sometimes. Rows have three more fields: `chain` (boxes from coarse
to fine, the last is the evidence), `difficulty` (fewest crops of a right trajectory) and `solve_rate`.
"""
import hashlib
import json
import os
import re
import textwrap
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from functools import cache, partial
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps
from tqdm import tqdm

import env
from env import UserError

COLOURS = {"red": (220, 40, 40), "green": (40, 170, 60), "blue": (50, 80, 230), "yellow": (235, 215, 40),
           "purple": (160, 50, 190), "cyan": (40, 200, 215)}
SHAPES = ("triangle", "square", "cross")
# size: pixels per side; grid: cells per side; mark: pixels; scales: zooms needed; kinds: what is asked
LEVELS = {0: dict(size=256, grid=4, mark=14, scales=1, kinds=("colour",)),
          1: dict(size=1024, grid=4, mark=14, scales=1, kinds=("colour", "shape", "count")),
          2: dict(size=2048, grid=6, mark=12, scales=2, kinds=("colour", "shape", "count")),
          3: dict(size=4096, grid=8, mark=16, scales=2, kinds=("colour", "shape", "count", "text"))}
QUESTIONS = {"colour": "One of the {} boxes bears a coloured dot, the others a black one. Which colour is it?",
             "shape": "One of the {} boxes bears a black shape, the others a black dot. Which shape is it?",
             "count": "One of the {} boxes bears several black dots, the others one. How many are they?",
             "text": "One of the {} boxes bears a code, the others a dash. What is the code?"}
FLAWS = 0.2, 0.4  # of the cold start: after an empty crop guess at once, or look at the same place again (probabilities)
CLEAN = 0.7       # share of the cold start, at its beginning, in which only a tenth have these flaws


@dataclass
class Config:
    seed: int = 0                     # of the sft and train scenes (the test scenes never change), or of the photographs
    out: str = "data/scenes-{seed}"   # where the rows and images go
    level: int = 0                    # 0 (256 px, the tiny task) to 3 (4096 px, two scales, small text)
    n_sft: int = 3360                 # scenes; each asks two questions (a scene for RL or testing asks one)
    n_train: int = 1800
    n_test: int = 768
    per_question: int = 3             # cold-start trajectories per question
    # Photographs instead of scenes (of the above, only seed, out and per_question count).
    images: str = ""                  # their folder
    annotator: str = ""               # a local model, or the address of an OpenAI-compatible endpoint (key: OPENAI_API_KEY)
    annotator_name: str = ""          # the model's name at that address
    policy: str = ""                  # the model that is to learn, likewise
    policy_name: str = ""
    max_pixels: int = 0               # the shrunken whole image; 0: as the policy was trained, or 2,000,000
    min_megapixels: float = 2.0       # smaller images are left out
    per_image: int = 2                # proposals per image
    area: float = 0.01                # largest share of the image that a proposal may end at
    votes: int = 4                    # answers asked for from the text, from the whole image and from the evidence each:
    blind: int = 1                    # at most so many may be right from text or whole image,
    agree: int = 3                    # at least so many from the evidence
    samples: int = 8                  # trajectories of the policy per question
    max_rate: float = 0.75            # largest share of them that may be right
    attempts: int = 4                 # trajectories of the annotator per question
    share_sft: float = 0.4            # of the images, the rest is for train
    share_test: float = 0.1
    parallel: int = 8                 # images, and so requests, at a time
    preview: int = 0                  # rows of a contact sheet, preview.png


def cell_name(cell, grid):
    """Columns A, B, ... and rows 1, 2, ...: cell 6 of a 4x4 grid is C2."""
    return f"{chr(65 + cell % grid)}{cell // grid + 1}"


def draw_mark(draw, kind, value, x, y, m, colour):
    """One mark of m pixels with its corner at (x, y). Returns its box."""
    if kind == "text":
        font = ImageFont.load_default(m)
        draw.text((x, y), value, fill=colour, font=font)
        return [int(v) for v in draw.textbbox((x, y), value, font=font)]
    if kind == "count":  # dots of half the size in a row
        n, m = int(value), m // 2
        for i in range(n):
            draw.ellipse((x + 2 * m * i, y, x + 2 * m * i + m - 1, y + m - 1), fill=colour)
        return [x, y, x + (2 * n - 1) * m, y + m]
    if value == "triangle":
        draw.polygon([(x, y + m - 1), (x + m - 1, y + m - 1), (x + m // 2, y)], fill=colour)
    elif value == "cross":
        for a, b in ((y + 2, y + m - 3), (y + m - 3, y + 2)):  # two pixels in: the ends of a thick line stand out
            draw.line((x + 2, a, x + m - 3, b), fill=colour, width=max(1, m // 5))
    else:
        (draw.ellipse if m > 4 and value != "square" else draw.rectangle)((x, y, x + m - 1, y + m - 1), fill=colour)
    return [x, y, x + m, y + m]


def make_scene(rng, level):
    """One image and its two questions. Returns (image, [question]); a question is a dict with colour, kind, cells
    (of the candidates, in reading order), target (cell), answer, evidence box, labels (cell -> box, two-scale levels)."""
    spec = LEVELS[level]
    S, g, m = spec["size"], spec["grid"], spec["mark"]
    c = S // g
    # blotches as large as a pixel of the whole view, so that shrinking does not average them away
    blotch = S // 64
    noise = rng.integers(-30, 31, (64, 64, 3)).repeat(blotch, 0).repeat(blotch, 1)
    image = Image.new("RGB", (S, S), (150, 150, 150))
    draw = ImageDraw.Draw(image)
    names = list(rng.permutation(list(COLOURS)))
    sizes = [int(rng.integers(2, 7)), int(rng.integers(2, 4)), *[1] * int(rng.integers(0, 2))]
    cells = iter(rng.permutation(g * g))
    questions, marks, scene = [], [], {}
    for name, k in zip(names, sizes):
        mine = sorted(int(next(cells)) for _ in range(k))
        kind = spec["kinds"][rng.integers(len(spec["kinds"]))]
        target = mine[rng.integers(k)]
        answer = {"colour": lambda: str(rng.choice([n for n in names if n != name])), "shape": lambda: str(rng.choice(SHAPES)),
                  "count": lambda: str(rng.integers(2, 6)), "text": lambda: "".join(rng.choice(list("ACEFHKLMNPRTUVWXY3479"), 4))}[kind]()
        labels = {}
        scene.update(dict.fromkeys(mine, str(name)))
        for cell in mine:
            x, y = cell % g * c, cell // g * c
            side = int(c * rng.uniform(0.66, 0.8))
            x, y = x + int(rng.integers(0, c - side + 1)), y + int(rng.integers(0, c - side + 1))
            draw.rectangle((x, y, x + side - 1, y + side - 1), fill=tuple(int(0.75 * v + 50) for v in COLOURS[name]))
            if spec["scales"] == 2:  # a pale label, a quarter of the box wide, holds the mark
                w = side // 4
                x, y = x + int(rng.integers(0, side - w)), y + int(rng.integers(0, side - w))
                draw.rectangle((x, y, x + w - 1, y + w - 1), fill=(225, 225, 215))
                labels[cell], side = (x, y, x + w, y + w), w
            width = m // 2 * (2 * int(answer) - 1) if kind == "count" else m * (3 if kind == "text" else 1)
            at = [int(p + rng.integers(1, max(2, side - extent - 1))) for p, extent in ((x, width), (y, m))]
            if cell == target:
                marks.append((kind, answer, *at, m, COLOURS[answer] if kind == "colour" else (0, 0, 0)))
                where = len(marks) - 1
            else:  # a look-alike's: black dot, one dot, or a dash
                marks.append((kind, {"count": "1", "text": "--"}.get(kind, "dot"), *at, m, (0, 0, 0)))
        questions.append(dict(colour=name, kind=kind, cells=mine, target=target, answer=answer, labels=labels, mark=where))
    image = Image.fromarray(np.clip(np.asarray(image).astype(int) + noise, 0, 255).astype(np.uint8))
    draw = ImageDraw.Draw(image)
    boxes = [draw_mark(draw, *mark) for mark in marks]
    for q in questions:
        q.update(evidence=boxes[q["mark"]], scene=sorted(scene.items()))
    return image, [q for q in questions if len(q["cells"]) > 1]


def look(box, img_idx=0):
    """The text of a call."""
    call = {"name": env.TOOL["function"]["name"], "arguments": {"bbox_2d": [int(v) for v in box], "img_idx": img_idx}}
    return f"<tool_call>\n{json.dumps(call)}\n</tool_call>"


def oracle(q, rng, level, max_crops, p_guess=0.0, p_again=0.0):
    """The assistant's turns (texts) for one question: list the boxes in reading order and number the look-alikes, visit
    them in that order, read, answer.

    After each empty look: with p_guess answer at random, with p_again look again at a box shifted by a fifth of its
    width, else go on with the next look-alike. When crops or look-alikes are used up it guesses. Thoughts state only
    what can be seen at that point, and each decision needs only a short look back: that is what makes it learnable.
    """
    spec = LEVELS[level]
    g, S = spec["grid"], spec["size"]
    answers = {"colour": [n for n in COLOURS if n != q["colour"]], "shape": SHAPES, "count": list("2345"), "text": ["????"]}
    plain = {"colour": "black", "shape": "dot", "count": "1", "text": "dash"}[q["kind"]]
    number = {c: i + 1 for i, c in enumerate(q["cells"])}
    listing = " ".join(f"{cell_name(c, g)} {name}" + (f" {number[c]}" if c in number else "") for c, name in q["scene"])
    turns, crops, at, again = [], 0, 0, False
    thought = f"Boxes {listing}. Look 1"
    while True:
        cell = q["cells"][at]
        name = cell_name(cell, g)
        box = np.array([cell % g, cell // g, cell % g + 1, cell // g + 1]) * (1000 // g)
        if again:
            shift = np.array([[1, 0, 1, 0], [0, 1, 0, 1]])[rng.integers(2)] * (200 // g) * rng.choice([-1, 1])
            box = box + (shift if 0 <= (box + shift).min() and (box + shift).max() <= 1000 else -shift)
        turns.append(f"<think>{thought} {name}.</think>\n{look(box)}")
        crops += 1
        readable = spec["scales"] == 1 or crops < max_crops
        if spec["scales"] == 2 and readable:  # zoom into the crop, at the label with a margin
            frame, label = box / 1000 * S, np.array(q["labels"][cell], float)
            w = (label[2] - label[0]) / 4
            inner = (label + [-w, -w, w, w] - frame[[0, 1, 0, 1]]) / (frame[2:] - frame[:2])[[0, 1, 0, 1]] * 1000
            turns.append(f"<think>At {name} a label. Look closer.</think>\n{look(inner.clip(0, 1000), crops)}")
            crops += 1
        if cell == q["target"] and readable:
            return turns + [f"<think>At {name} {q['answer']}.</think>\n<answer>{q['answer']}</answer>"]
        luck = rng.random()
        again = p_guess <= luck < p_guess + p_again
        if crops >= max_crops or luck < p_guess or not again and at + 1 == len(q["cells"]):
            return turns + [f"<think>At {name} {plain if readable else 'a label'}. Guess.</think>\n<answer>{rng.choice(answers[q['kind']])}</answer>"]
        at += not again
        thought = f"At {name} {plain}. Look " + ("again" if again else str(at + 1))


def write_rows(cfg, split, n, seed):
    """Draw n scenes of a split, save images and rows. Returns the number of rows."""
    folder = os.path.join(cfg.out, split)
    os.makedirs(folder, exist_ok=True)
    asked, cold = [], split == "sft"
    for i in tqdm(range(n), desc=f"scenes/{split}", disable=None):
        rng = np.random.default_rng([seed, {"sft": 0, "train": 1, "test": 2}[split], cfg.level, i])
        image, questions = make_scene(rng, cfg.level)
        image.save(os.path.join(folder, f"{i}.png"), compress_level=1)
        for j, q in enumerate(questions if cold else questions[:1]):
            row = dict(images=[f"{split}/{i}.png"], doc_id=f"{split}-{i}-{j}", problem=QUESTIONS[q["kind"]].format(q["colour"]),
                       solution=q["answer"], data_source=f"scenes-{cfg.level}", boxes=[q["evidence"]], difficulty=len(q["cells"]))
            asked += [(row, q)] * (cfg.per_question if cold else 1)
    rows = [row for row, _ in asked]
    if cold:  # in random order; nearly all of the first CLEAN share is free of flaws, the rest has them
        rng = np.random.default_rng([seed, 3])
        for at, k in enumerate(rng.permutation(len(asked))):
            flaws = FLAWS if at >= CLEAN * len(rows) or rng.random() < 0.1 else ()
            rows[at] = {**asked[k][0], "turns": oracle(asked[k][1], rng, cfg.level, env.World.max_crops, *flaws)}
    env.write_text(os.path.join(cfg.out, f"{split}.jsonl"), "".join(json.dumps(r) + "\n" for r in rows))
    return len(rows)


# ---------------------------------------------------------------------------------------------------------------
# Questions from photographs: `construct` takes them all, `build` takes one through the steps, each step is a function.

# FORK: the prompts. Where the tool is used, env.SYSTEM explains it; graded and collected conversations see the question alone.
PROPOSE = (
    "Write one question about a small detail of this photograph, for a test of eyesight. First find the detail: {kind}, too "
    "small to be made out in the whole photograph. Zoom in on it with the tool in 2 to 4 steps, each into the crop before it "
    "(img_idx is its number) and at most half as wide and half as high, until the detail fills the crop with little margin. "
    "Then write the question. It tells which object is meant, so that only one in the whole photograph fits; it does not give "
    "its answer away; it mentions no crop and no zooming. The answer is a few words at most, and beyond doubt. End with\n"
    '<answer>{{"question": "...", "answer": "...", "choices": {choices}}}</answer>')
KINDS = (("things to be counted, or a printed number", "null"), ("the colour of a thing", "null"), ("a printed word", "null"),
         ("what a thing is, does, or what state it is in", '["the answer", "plausible but wrong", "...", "..."]'))
BLIND = "The picture is withheld. Give the answer that seems most likely from the question alone.\n"
ZOOMS, FINER = (2, 4), 1.5  # zooms of a proposal, and how much finer each must be (ratio of lengths)
MAX_REDUNDANCY = 0.1        # of a cold-start trajectory (env.redundancy)
COLOUR_WORDS = "black white grey gray silver red orange yellow gold green turquoise cyan blue purple violet pink brown beige".split()
STEPS = ("select", "propose", "ask", "verify", "grade", "collect", "split")


class Photo:
    """A photograph, and every answer that was given about it: lines [key, answer] of a file that is only appended to."""

    def __init__(self, image, path, name, out):
        self.image, self.path, self.name, self.views = image, path, name, {}
        self.box = (0, 0, *image.size)
        self.digest = hashlib.sha256(Path(path).read_bytes()).hexdigest()
        self.log = Path(out, "answers", hashlib.sha256(os.fsencode(name)).hexdigest()[:16] + ".jsonl")
        text = self.log.read_text() if self.log.exists() else ""
        whole = text[:text.rfind("\n") + 1]
        if whole != text:  # a killed run may leave half a line
            env.write_text(str(self.log), whole)
        self.answers = dict(map(json.loads, whole.splitlines()))

    def recall(self, request, reply):
        """The recorded answer to a request (anything JSON), or else reply(its key), which is recorded."""
        key = hashlib.sha256(json.dumps([self.digest, request]).encode()).hexdigest()[:32]
        if key not in self.answers:
            answer = reply(key)
            with open(self.log, "a") as f:
                f.write(json.dumps([key, answer]) + "\n")
            self.answers[key] = answer
        return self.answers[key]

    def view(self, box, least, most):
        """The part of a chat message that shows box within a pixel budget, as a Qwen3-VL sees it."""
        if (box, most) not in self.views:
            view = env.Processor.view(SimpleNamespace(patch=16, merge=2), self.image, box, least, most)
            self.views[box, most] = env.data_url(Image.fromarray(view.numpy()))
        return self.views[box, most]


@dataclass
class Question:
    """The n-th proposal of a photograph on its way through the steps; they fill in what has a default."""
    job: SimpleNamespace  # cfg, world (of the policy's training), annotator, policy
    photo: Photo
    n: int
    text: str = ""        # as the annotator wrote it: JSON
    chain: list = ()      # boxes of the proposal, coarse to fine; the last one is the evidence
    row: dict | None = None
    turns: list = field(default_factory=list)  # of each kept trajectory
    fates: list = field(default_factory=list)  # of every sampled trajectory


BUSY = threading.Lock()  # one rollout at a time, of whichever local model: a process captures one CUDA graph at a time


def load_model(address, name, device):
    """What answers: a local policy, or the model `name` at an OpenAI-compatible endpoint (its policy is None)."""
    url = address.startswith(("http://", "https://"))
    if not address or url and not name:
        raise UserError("--images needs --annotator=FOLDER (or a hub id, or the address of an OpenAI-compatible endpoint with "
                        "--annotator_name=NAME), and --policy (--policy_name) likewise")
    path = env.newest(address)
    return SimpleNamespace(name=name if url else path, url=address, policy=None if url else env.load_policy(path, device))


def messages(photo, traj, problem, world):
    """A conversation so far for a chat endpoint: the system prompt, views and observations of env.py."""
    text = lambda x: {"type": "text", "text": x}
    first = [photo.view(traj.boxes[0], min(world.min_crop_pixels, world.max_pixels), world.max_pixels)] if traj.boxes[0] else []
    out = [dict(role="system", content=env.SYSTEM if world.max_crops else env.SYSTEM_NO_TOOL),
           dict(role="user", content=[*first, text(problem)])]
    crops = iter(traj.crops)
    for said, _, error in traj.turns:
        seen = text(env.ERRORS[error]) if error else photo.view(next(crops), world.min_crop_pixels, world.max_crop_pixels)
        out += [dict(role="assistant", content=said),
                dict(role="user", content=[text("<tool_response>\n"), seen, text("\n</tool_response>")])]
    return out


def converse(q, model, problem, world, k, box):
    """k conversations that begin with the view of box: the whole photograph, or without the tool a part or nothing (None).
    Returns env.Trajectory without tokens: turns, boxes, answer. Raises ConnectionError when the endpoint fails."""
    photo, seed = q.photo, q.job.cfg.seed
    start = [model.name, seed, q.n, env.SYSTEM, env.SYSTEM_NO_TOOL, problem, box, asdict(world)]

    def sample(key):  # in env.py a conversation begins with an image: a blank one where there is none to see
        image = photo.image.crop(box) if box else Image.new("RGB", (64, 64), "grey")
        try:
            with BUSY:
                trajs = env.rollout(model.policy, [dict(images=[image], problem=problem)], world, k, (seed, 0), [int(key[:8], 16)])
        except UserError:  # the question does not fit into max_tokens, so nobody can answer it
            return [[]] * k
        return [[text for text, _, _ in t.turns] for t in trajs]

    def reply(traj, key):
        text = env.chat(model.url, model.name, messages(photo, traj, problem, world), world.temperature)
        return text.strip().encode(errors="replace").decode()

    said = photo.recall([*start, k], sample) if model.policy else None
    trajs = [env.Trajectory({}, photo.image, boxes=[box]) for _ in range(k)]
    for i, t in enumerate(trajs):
        while t.status == "open" and not (said and len(t.turns) == len(said[i])):
            if q.job.stopped:
                raise ConnectionError("stopped")
            text = said[i][len(t.turns)] if said else photo.recall([*start, i, [x for x, _, _ in t.turns]], partial(reply, t))
            t.turns.append((text, env.parse_action(text), None))
            crop, _ = env.act(t, world)
            t.boxes += [crop] if crop else []
    return trajs


def area(box):
    return (box[2] - box[0]) * (box[3] - box[1])


def select(cfg, name):
    """1. Photographs that can be read and are large enough. Returns (Photo, mode of the file) or (None, the reason)."""
    path = os.path.join(cfg.images, name)
    try:
        with Image.open(path) as im:
            if im.width * im.height < cfg.min_megapixels * 1e6:
                return None, "too small"
            if getattr(im, "is_animated", False) and im.format != "MPO":  # a phone's JPEG may hold a second picture
                return None, "animated"
        return Photo(env.open_image(path), path, name, cfg.out), im.mode
    except (Exception, UserError) as e:  # a damaged file can make a decoder raise anything
        tqdm.write(f"left out: {e if isinstance(e, UserError) else f'{path}: {e}'}")
        return None, "too large to decode" if isinstance(e, Image.DecompressionBombError) else "unreadable"


# The steps of a question: each returns the reason why it drops it, or None.

def propose(q):
    """2. The annotator zooms in on a detail, step by step (and ends with a question about it)."""
    cfg, world = q.job.cfg, q.job.world
    kind, choices = KINDS[(int(q.photo.digest, 16) + cfg.seed + q.n) % len(KINDS)]
    room = replace(world, max_crops=ZOOMS[1] + 1, max_tokens=world.max_tokens + 4096)  # the prompt is long
    [traj] = converse(q, q.job.annotator, PROPOSE.format(kind=kind, choices=choices), room, 1, q.photo.box)
    q.text, q.chain = traj.answer, traj.crops
    if q.text is None:
        return "no question"
    if not ZOOMS[0] <= len(q.chain) <= ZOOMS[1]:
        return f"not {ZOOMS[0]} to {ZOOMS[1]} zooms"
    for (a, b, c, d), (x0, y0, x1, y1) in zip(traj.boxes, q.chain):
        if not (a <= x0 and b <= y0 and x1 <= c and y1 <= d) or (x1 - x0) * (y1 - y0) * FINER ** 2 > (c - a) * (d - b):
            return "a zoom leaves the crop before it, or is hardly finer"
    if area(q.chain[-1]) > cfg.area * area(q.photo.box):
        return "the last view is too large"


def ask(q):
    """3. Read the question: it needs a short answer that can be judged. Options go into the text, in random order."""
    cfg, photo = q.job.cfg, q.photo
    try:
        made = json.loads(q.text[q.text.find("{"):q.text.rfind("}") + 1])  # often in a code fence
        answer = str(made["answer"]) if type(made["answer"]) in (int, float) else made["answer"]
        problem, choices = made["question"].strip(), made.get("choices") or None
        texts = [problem, answer, *(choices or [])]
        fine = isinstance(choices, list | None) and all(isinstance(x, str) and x.isprintable() and env.normalise(x) for x in texts)
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        fine = False
    if not fine or len(problem) > 400 or any(len(x) > 60 or len(x.split()) > 6 for x in texts[1:]):
        return "malformed or too long"
    if choices:
        choices = list(np.random.default_rng([cfg.seed, int(photo.digest[:8], 16), q.n]).permutation(choices))
        named = [env.match(c, dict(solution=chr(65 + i), choices=choices)) for i, c in enumerate(choices)]
        if not 3 <= len(choices) <= 8 or not all(named) or not env.match(answer, dict(solution=answer, choices=choices)):
            return "options unclear"
        problem += "".join(f"\n{chr(65 + i)}. {c}" for i, c in enumerate(choices))
    q.row = dict(images=[os.path.relpath(photo.path, cfg.out)], doc_id=f"{photo.name}-{q.n}", problem=problem, solution=answer.strip(),
                 data_source=os.path.basename(os.path.abspath(cfg.images)), boxes=q.chain[-1:], choices=choices, chain=q.chain)


def verify(q):
    """4. Hard and true: hardly ever answered from the text alone or the shrunken whole, nearly always from the evidence."""
    cfg, plain = q.job.cfg, replace(q.job.world, max_crops=0)
    votes = lambda problem, box: sum(env.is_right(t, q.row) for t in converse(q, q.job.annotator, problem, plain, cfg.votes, box))
    if votes(BLIND + q.row["problem"], None) > cfg.blind:
        return "given away by its text"
    if votes(q.row["problem"], q.photo.box) > cfg.blind:
        return "answered without zooming"
    if votes(q.row["problem"], q.chain[-1]) < cfg.agree:
        return "answer not confirmed"


def grade(q):
    """5. The policy, with the tool, solves it sometimes, not always, and never with fewer than two crops."""
    cfg = q.job.cfg
    trajs = converse(q, q.job.policy, q.row["problem"], q.job.world, cfg.samples, q.photo.box)
    solved = [len(t.crops) for t in trajs if env.is_right(t, q.row)]
    if not solved:
        return "never solved"
    if len(solved) > cfg.max_rate * len(trajs):
        return "solved too often"
    if min(solved) < 2:
        return "solved with one crop or none"
    q.row.update(difficulty=min(solved), solve_rate=len(solved) / len(trajs))


def collect(q):
    """6. Cold-start trajectories of the annotator: per_question of the faultless ones, first those that recovered (looked
    where nothing of the evidence is, and then where it is)."""
    kept, cfg, world, policy = {"recovered": [], "direct": []}, q.job.cfg, q.job.world, q.job.policy.policy
    for t in converse(q, q.job.annotator, q.row["problem"], world, cfg.attempts, q.photo.box):
        turns = [text for text, _, _ in t.turns]
        fate = ("wrong" if not env.is_right(t, q.row) else "malformed or refused call" if any(error for _, _, error in t.turns) else
                "redundant" if env.redundancy(t.crops, world.eps) > MAX_REDUNDANCY else
                "evidence not covered" if not env.covers(t, q.row) else
                "too long" if policy and env.render(policy.proc, q.row, turns, world, q.photo.image).status != "answered" else
                "recovered" if any(env.iou(c, q.chain[-1]) == 0 for c in t.crops) else "direct")
        q.fates.append(fate)
        kept.get(fate, []).append(turns)
    q.turns = (kept["recovered"] + kept["direct"])[:cfg.per_question]
    return None if q.turns else "no faultless trajectory"


def split(cfg, found):
    """7. By photograph, into {side: rows}; copies of a photograph have one digest. Each side gets one if there are three;
    those of sft have trajectories, and their questions without one are left out."""
    able = {}
    for q in found:  # in random order, see construct
        able[q["digest"]] = able.get(q["digest"], False) or bool(q["turns"])
    most = lambda share: max(round(share * len(able)), len(able) > 2)
    test = set(list(able)[:most(cfg.share_test)])
    sft = set([d for d in able if able[d] and d not in test][:most(cfg.share_sft)])
    return {"sft": [{**q["row"], "turns": turns} for q in found if q["digest"] in sft for turns in q["turns"]],
            "train": [q["row"] for q in found if q["digest"] not in sft | test],
            "test": [q["row"] for q in found if q["digest"] in test]}


def build(job, name):
    """All that one photograph leads to: counts {(step or distribution, reason or label): n}, and its questions."""
    photo, note = select(job.cfg, name)
    counts, found = Counter([("select", "kept"), ("image mode", note)] if photo else [("select", note)]), []
    for n in range(job.cfg.per_image if photo else 0):
        q = Question(job, photo, n)
        for step in (propose, ask, verify, grade, collect):
            try:
                reason = step(q)
            except ConnectionError as e:
                tqdm.write(f"{name}: {e}; not recorded, so the same command asks again")
                reason = "endpoint failed"
            counts[step.__name__, reason or "kept"] += 1
            if reason:
                break
        if step is collect:  # it drops no question: one without a trajectory is for train or test
            word, percent = env.normalise(q.row["solution"]), 100 * area(q.chain[-1]) / area(photo.box)
            kind = "choice" if q.row["choices"] else "number" if word[0].isdigit() else "colour" if word in COLOUR_WORDS else "word"
            counts.update([("zooms", str(len(q.chain))), ("evidence area", f"{percent:.1f} %"), ("answer", kind),
                           *(("trajectories", fate) for fate in q.fates)])
            found.append(dict(digest=photo.digest, row=q.row, turns=q.turns))
    return counts, found


def write_card(cfg, world, counts):
    """data_card.json and data_card.md: the funnel, the distributions, and all settings."""
    table, funnel = {}, []
    for (name, label), n in sorted(counts.items()):
        table.setdefault(name, {})[label] = n
    for step in STEPS:
        dropped = table.pop(step, {})
        left = dropped.pop("kept", 0)
        funnel.append(dict(step=step, entered=left + sum(dropped.values()), left=left, dropped=dropped))
    good = counts["trajectories", "recovered"] + counts["trajectories", "direct"]
    share = counts["trajectories", "recovered"] / good if good else None
    card = dict(funnel=funnel, distributions=table, recovered_share=share, settings=asdict(cfg), world=asdict(world))
    env.write_text(os.path.join(cfg.out, "data_card.json"), json.dumps(card, indent=1))
    listed = lambda d: ", ".join(f"{label}: {n}" for label, n in d.items())
    page = [f"# Questions from {cfg.images}\n", "" if counts["split", "kept"] else "**Nothing survived.**\n",
            f"Seed {cfg.seed}; annotator {cfg.annotator} {cfg.annotator_name}; policy {cfg.policy} {cfg.policy_name}. Select counts "
            f"images, the others questions, {cfg.per_image} per image. One that collect drops can still be for train or test.\n",
            "| step | entered | left | dropped |\n|---|---|---|---|",
            *(f"| {s['step']} | {s['entered']} | {s['left']} | {listed(s['dropped'])} |" for s in funnel), "",
            *(f"- {name}: {listed(d)}" for name, d in table.items()), f"- recovered share of the faultless trajectories: {share}\n"]
    env.write_text(os.path.join(cfg.out, "data_card.md"), "\n".join(page))


def preview(questions, cfg):
    """A contact sheet: the photograph with its chain of boxes, the last crop, question and answer."""
    side, font = 400, ImageFont.load_default(15)
    sheet = Image.new("RGB", (3 * side + 40, (side + 10) * len(questions) + 10), "white")
    draw = ImageDraw.Draw(sheet)
    for i, q in enumerate(questions):
        row, y = q["row"], 10 + i * (side + 10)
        image = env.open_image(os.path.join(cfg.out, row["images"][0]))
        sheet.paste(ImageOps.contain(image, (side, side)), (10, y))
        for box in row["chain"]:
            x0, y0, x1, y1 = (v * side / max(image.size) for v in box)
            draw.rectangle((10 + x0, y + y0, 10 + x1, y + y1), outline="red", width=2)
        sheet.paste(ImageOps.contain(image.crop(row["boxes"][0]), (side, side)), (side + 20, y))
        texts = [row["doc_id"], *row["problem"].split("\n"), f"Answer: {row['solution']}"]
        draw.text((2 * side + 30, y), "\n".join(textwrap.fill(text, 50) for text in texts), fill="black", font=font)
    sheet.save(os.path.join(cfg.out, "preview.png"))


def construct(cfg, device):
    """Rows and cold-start trajectories from the photographs of cfg.images. Started again, it repeats no recorded request."""
    at = partial(os.path.join, cfg.out)
    names = [str(p.relative_to(cfg.images)) for p in Path(cfg.images).rglob("[!.]*")
             if p.is_file() and Path(cfg.out).resolve() not in p.resolve().parents]
    if not names:
        raise UserError(f"--images={cfg.images}: no files there; give a folder of photographs")
    names.sort(key=lambda n: hashlib.sha256(f"{cfg.seed}".encode() + os.fsencode(n)).digest())  # random order
    load = cache(partial(load_model, device=device))  # one model may be both
    job = SimpleNamespace(cfg=cfg, stopped=False, annotator=load(cfg.annotator, cfg.annotator_name), policy=load(cfg.policy, cfg.policy_name))
    job.world = env.configure(env.World, {}, [], model=cfg.policy, **(dict(max_pixels=cfg.max_pixels) if cfg.max_pixels else {}))
    os.makedirs(at("answers"), exist_ok=True)
    counts, found = Counter(), []  # rows stay in memory, photographs do not
    with ThreadPoolExecutor(cfg.parallel) as pool:
        try:  # results come in the order of names, whatever the order in which they are finished
            for part, questions in tqdm(pool.map(partial(build, job), names), total=len(names), desc="photographs", disable=None):
                counts.update(part)
                found += questions
        finally:  # after an error the photographs under way stop before their next request
            job.stopped = True
            pool.shutdown(cancel_futures=True)
    sides = split(cfg, found)
    for side, rows in sides.items():
        env.write_text(at(f"{side}.jsonl"), "".join(json.dumps(r) + "\n" for r in rows))
        counts["rows", side] = len(rows)
        counts["split", "kept"] += len({r["doc_id"] for r in rows})
    counts["split", "no trajectory, beside one that has"] = len(found) - counts["split", "kept"]
    if found and cfg.preview:
        preview(found[:cfg.preview], cfg)
    write_card(cfg, job.world, +counts)  # without zeros
    env.write_text(at("config.json"), json.dumps(asdict(cfg), indent=1))
    if not counts["select", "kept"]:
        raise UserError(f"--images={cfg.images}: none of {len(names)} files is a photograph that can be used; see {at('data_card.md')}")
    print(f"{cfg.out}: " + ", ".join(f"{len(rows)} {side} rows" for side, rows in sides.items()) + f"; see {at('data_card.md')}")


# ---------------------------------------------------------------------------------------------------------------
# Rows from files: our own schema, and the conversations of other projects.

CONVERSATIONS = ("conversations", "messages", "message_list")  # LLaMA-Factory's sharegpt; ms-swift; Pixel-Reasoner
# FORK: the neighbours' tools. Dialect -> unit of the box (None: pixels), number of the image it refers to (0: the original),
# margins that the tool may have added to the box on each side, as shares of (the box's own sides, the image's sides).
DIALECTS = {
    "image_zoom_in_tool": (None, lambda call: 0, ((0, 0), (0.25, 0))),                        # DeepEyes; Chain-of-Focus
    "img_idx": (1000, lambda call: call["img_idx"], ((0, 0),)),                               # the same as Qwen3-VL and we have it
    "crop_image_normalized": (1, lambda call: call["target_image"] - 1, ((0, 0), (0, 0.1))),  # Pixel-Reasoner
    "source": (1, lambda call: int(call["source"].replace("original_image", "observation_0")[12:]), ((0, 0),)),  # Mini-o3
}
# Pixels are those of the original (DeepEyes cuts there) or of the image as the model saw it: sides in steps of 28, at most so
# many pixels (the limits of DeepEyes and of Chain-of-Focus, which cuts there). Up to the limits only the rounding differs.
SEEN_PIXELS = (16384 * 28 ** 2, 3840 ** 2)
ACTIONS = re.compile(r"<(tool_call|grounding|answer)>(.*?)</\1>|\\boxed\{(.*)\}", re.DOTALL)
ASIDES = re.compile(r"\s*(Think first, call|Think in the mind first|Guidelines:).*", re.DOTALL)  # their own instructions


class Unusable(Exception):
    """Why a foreign conversation is left out."""


def messages_of(row):
    """A foreign conversation as [(is the assistant's, text)], neighbours of one side joined, and its image paths."""
    source, out, paths = next(row[k] for k in CONVERSATIONS if k in row), [], list(row.get("images") or [])
    for m in json.loads(source) if isinstance(source, str) else source:
        role, text = m.get("from", m.get("role")), m.get("value", m.get("content"))
        if role == "system":  # it describes another tool; ours stands in its place
            continue
        if isinstance(text, list):  # Qwen's parts
            paths += [part["image"] for part in text if "image" in part]
            text = "".join("<image>" if part["type"] == "image" else part["text"] for part in text)
        if role in ("function_call", "tool_call"):
            text = f"<tool_call>\n{text}\n</tool_call>"
        mine = role in ("gpt", "assistant", "function_call", "tool_call")
        out.append((mine, out.pop()[1] + "\n" + text if out and out[-1][0] == mine else text))
    return out, paths


def difference(image, box, seen):
    """How far a crop file is from the region that it should show; 1 is the limit. Shapes and 12 x 12 thumbnails are compared,
    as a file may have been resized, rounded to the model's patches and compressed."""
    stretch = abs(np.log(seen.width / seen.height * (box[3] - box[1]) / (box[2] - box[0])))
    a, b = (np.asarray(im.convert("L").resize((12, 12), Image.BOX), float) for im in (image.crop(box), seen))
    return max(stretch / 0.4, np.abs(a - b).mean() / (6 + 0.3 * b.std()))


def replay(body, boxes, image, seen):
    """A foreign call (JSON) as the text of our call, and its box on the original. boxes: the original and the crops so far;
    seen: the crop file (None: not known), which decides where the call can mean several boxes; else the likeliest is taken."""
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize
    call = json.loads(body)
    arguments = call.get("arguments", call)
    unit, number, margins = DIALECTS[next((k for k in ("source", "img_idx") if k in arguments), call.get("name"))]
    k, box = number(arguments), np.array(arguments["bbox_2d"], float)
    w, h = boxes[k][2] - boxes[k][0], boxes[k][3] - boxes[k][1]
    frames = [(unit, unit)]
    if unit is None or unit == 1 and box.max() > 2:  # Pixel-Reasoner takes shares and pixels
        frames = [(w, h)] + [smart_resize(h, w, 28, 4 * 28 ** 2, most)[::-1] for most in SEEN_PIXELS]
    off, best = np.inf, None
    for frame, (own, whole) in product(frames, margins):
        shares = box.reshape(2, 2) / frame  # corners
        if shares.min() < 0 or shares.max() > 1.02:
            continue
        grow = own * (shares[1] - shares[0]) + whole
        ours = look((1000 * (shares + [-grow, grow]).clip(0, 1)).round().ravel(), k)
        cut, error = env.resolve_box(env.parse_action(ours), boxes, env.REAL_WORLD["min_crop_side"])
        far = np.inf if error else 0 if seen is None else difference(image, cut, seen)
        if far < off:
            off, best = far, (ours, cut)
    if off > 1:
        raise Unusable("a call does not show what its crop file shows" if best else "a box is not on its image")
    return best


def translate(row, find):
    """A foreign conversation as our row with `turns`; find(path) gives an absolute path. Raises Unusable(reason)."""
    messages, paths = messages_of(row)
    tags = [text.count("<image>") for _, text in messages]
    if not messages or messages[0][0] or tags[0] > 1 or not paths or len(paths) not in (1, sum(tags)):
        raise Unusable("its images are not one original in the first message and then the crops")
    image, turns, answer = env.open_image(find(paths[0])), [], None
    boxes = [(0, 0, *image.size)]
    for i in range(1, len(messages), 2):
        text = messages[i][1]
        actions = list(ACTIONS.finditer(text))
        if len(actions) != 1 or answer:
            raise Unusable("a turn is not one call or one answer")
        thought = re.sub("</?think>", "", text[:actions[0].start()]).strip()
        tag, body = actions[0][1], (actions[0][2] or actions[0][3] or "").strip()
        if tag in ("tool_call", "grounding"):
            if i + 1 == len(messages) or tags[i + 1] != 1:
                raise Unusable("a call was not followed by one crop")
            seen = env.open_image(find(paths[len(boxes)])) if len(paths) > 1 else None
            ours, box = replay(body, boxes, image, seen)
            boxes.append(box)
        else:
            ours, answer = f"<answer>{body}</answer>", body
        turns.append(f"<think>{thought}</think>\n{ours}")
    if not answer:
        raise Unusable("it does not end with an answer")
    question = ASIDES.sub("", messages[0][1].replace("<image>", "")).strip().removeprefix("Question:").strip()
    return {**{k: row[k] for k in ("doc_id", "data_source") if k in row}, "images": [paths[0]], "problem": question,
            "solution": row.get("solution", answer), "turns": turns}


def translated(path, rows, find):
    """Rows with the conversations among them translated. Prints how many were left out, and why."""
    def one(row):
        try:
            return (translate(row, find) if isinstance(row, dict) and "problem" not in row else row), None
        except Unusable as e:
            return None, str(e)
        except UserError:
            return None, "an image is missing, broken or outside of --image_root"
        except (ValueError, TypeError, LookupError, AttributeError):
            return None, "its messages or a call could not be read"
    with ThreadPoolExecutor() as pool:  # most of the time is spent decoding images
        out, why = zip(*tqdm(pool.map(one, rows), desc="conversations", total=len(rows), disable=None, leave=False))
    report = f"{path}: {why.count(None)} of {len(rows)} conversations are used" + "".join(
        f"; {n} left out, the first is row {why.index(reason)}: {reason}" for reason, n in Counter(why).most_common() if reason)
    if None not in why:
        raise UserError(report)
    if os.environ.get("RANK", "0") == "0":
        print(report, flush=True)
    return [row for row, reason in zip(out, why) if not reason]


def load_rows(path, image_root=""):
    """FORK: the data set. Rows of a JSON list or JSONL file, with absolute image paths. path may lie "in" a file
    (--data=cold.json): then that is read. Conversations are translated; what cannot be replayed is left out and counted.
    Raises UserError naming file and row when a field is missing, or an image does not exist or lies outside of image_root.
    """
    path = os.path.dirname(path) if os.path.isfile(os.path.dirname(path)) else path
    if path.endswith(".parquet"):
        raise UserError(f"{path}: Parquet is not read; write its images to files and its rows to JSONL (Mini-o3: its "
                        "preprocess_coldstart.py; else pandas.read_parquet and to_json(orient='records', lines=True))")
    try:
        with open(path, encoding="utf-8-sig") as f:
            text = f.read()
        rows = json.loads(text) if text.lstrip().startswith("[") else [json.loads(x) for x in text.split("\n") if x.strip()]
    except OSError as e:
        raise UserError(f"{path}: {e.strerror}; make the built-in scenes with `python data.py` or give --data=FOLDER")
    except (ValueError, RecursionError) as e:
        raise UserError(f"{path}: not JSON or JSONL ({e})")
    if not rows:
        raise UserError(f"{path}: no rows")
    root = os.path.abspath(image_root or os.path.dirname(path))

    def find(name, i=None):
        full = env.inside(root, name, i) if image_root else os.path.join(root, name)
        if not os.path.exists(full):
            raise UserError(f"{path}: row {i}: image {full} does not exist; paths are relative to the file or to --image_root")
        return full
    if any(isinstance(r, dict) and any(k in r for k in CONVERSATIONS) for r in rows):
        rows = translated(path, rows, find)
    for i, row in enumerate(rows):
        for key in ("images", "problem", "solution"):
            if not isinstance(row, dict) or row.get(key) in (None, "", []) or not isinstance(row["images"], list):
                raise UserError(f"{path}: row {i} has no `{key}`; every row needs images (a list of paths), problem and solution")
        row["images"] = [find(str(p), i) for p in row["images"]]
        row["problem"] = str(row["problem"]).replace("<image>", "").strip()  # the image always comes first
        if row.get("choices") and not env.match(np.ravel(row["solution"])[0], row):
            raise UserError(f"{path}: row {i}: its solution {row['solution']!r} is none of its choices {row['choices']}")
    return rows


def check_images(rows, rank, world):
    """Read the header of every image, shared out over the ranks, before hours are spent: raises env.open_image's UserError.
    (An image that is cut short shows only when it is decoded.)"""
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(partial(env.open_image, decode=False), sorted({r["images"][0] for r in rows})[rank::world]))


def main(cfg):
    """Make the scenes of cfg.out unless they are there, or rows from the photographs of cfg.images."""
    rank, world, device = env.setup()
    here = lambda name: os.path.exists(os.path.join(cfg.out, name))
    if rank == 0 and here("train.jsonl") and not here("answers" if cfg.images else "config.json"):
        raise UserError(f"{cfg.out} holds rows that this command did not make; give another --out (rppo.py: --data)")
    if cfg.images:
        return construct(cfg, device)
    if cfg.level not in LEVELS:
        raise UserError(f"--level={cfg.level}: the levels are {', '.join(map(str, LEVELS))}")
    if rank == 0 and not (env.same_settings(cfg.out, cfg) and here("train.jsonl")):
        os.makedirs(cfg.out, exist_ok=True)
        env.write_text(os.path.join(cfg.out, "config.json"), json.dumps(asdict(cfg), indent=1))   # first: by it we know our own rows
        splits = dict(sft=(cfg.n_sft, cfg.seed), test=(cfg.n_test, 2 ** 32), train=(cfg.n_train, cfg.seed))
        counts = {split: write_rows(cfg, split, n, seed) for split, (n, seed) in splits.items()}  # train.jsonl last: it means complete
        print(f"{cfg.out}: " + ", ".join(f"{n} {split} rows" for split, n in counts.items()))
    if world > 1:
        env.dist.barrier()


if __name__ == "__main__":
    env.run(main, Config, {})
