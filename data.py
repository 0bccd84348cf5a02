"""data.py, file 2 of 5 (after env.py): rows of questions, to learn from and to be tested on.

Stage 1 of DRIM, the construction of data: hard questions with a short, verifiable answer, about details of
high-resolution images. As a command this file makes them in one of two ways: it draws scenes and writes
demonstrations without any model, or a strong model asks about photographs and what is hard for the policy is
kept. As a module it reads rows and published benchmarks, and talks to models over HTTP.

    python data.py                              # built-in scenes: data/scenes-0/{sft,train,test}.jsonl
    python data.py --task=large --n_train=2000 --out=data/large    # true scale: 4096 pixels, two zooms
    python data.py --images=photos --annotator=https://host/v1 --annotator_name=NAME --out=data/mine \\
                   --policy=http://localhost:8000/v1 --policy_name=NAME    # questions about photographs

A row is one JSON object a line, in the published schema of DRIM-VisualReasonHard and Mini-o3, with optional
fields: `boxes` (the evidence, in pixels of the original) and, in a cold-start row, `turns` (the assistant's
texts; what it saw is replayed through the tool). Image paths are relative to the file.

    {"images": ["test/0.png"], "doc_id": "test-0-0", "problem": "...", "solution": "green",
     "data_source": "tiny", "boxes": [[116, 84, 140, 108]], "difficulty": 3}

Writes <out>/{sft,train,test}.jsonl and config.json; of scenes the images; of photographs answers.jsonl (the
same command goes on, and pays for nothing twice) and data_card.json (what became of proposals and files).
"""
import ast
import base64
import csv
import functools
import hashlib
import io
import json
import os
import re
import string
import threading
import time
import urllib.request
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from email.utils import mktime_tz, parsedate_tz
from itertools import product
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

import env
from env import UserError


@dataclass
class ScenesConfig:
    """Built-in scenes."""
    task: str = "tiny"               # FORK: a key of TASKS
    n_sft: int = env.setting(2000, least=0)  # scenes of two questions (for RL and testing: of one)
    n_train: int = env.setting(1200, least=0)
    n_test: int = env.setting(512, least=0)
    max_crops: int = env.setting(5, least=0)  # what the demonstrations of scenes plan with


@dataclass
class PhotosConfig:
    """Questions about photographs."""
    images: str = ""                 # folder of the photographs
    annotator: str = ""              # address of an OpenAI-compatible endpoint (its key: OPENAI_API_KEY)
    annotator_name: str = ""         # the model's name there
    policy: str = ""                 # the model that is to learn, likewise (vLLM serves our checkpoints)
    policy_name: str = ""
    annotator_factor: int = 32       # pixels a side of an image token: Qwen2.5-VL 28, Qwen3-VL and Qwen3.5 32
    policy_factor: int = 32
    max_tokens: int = 1024           # of a reply with its thoughts, as turn_tokens; a cut one is not used
    max_pixels: int = 2_000_000      # of the shrunken image
    per_image: int = 2               # proposals per photograph
    evidence_share: float = 0.01     # largest share of the photograph that the evidence may cover
    votes: int = 4                   # answers each from the text, the shrunken image and the evidence:
    blind: int = env.setting(1, least=0)  # at most so many may be right from text or shrunken image,
    agree: int = env.setting(3, least=0)  # at least so many from the evidence
    samples: int = 8                 # trajectories of the policy per question
    max_rate: float = 0.75           # largest share of them that may be right
    attempts: int = 4                # trajectories of the annotator per question
    share_sft: float = 0.4           # of the photographs; the rest is for train
    share_test: float = 0.1
    parallel: int = 8                # photographs, and so requests, at a time


@dataclass
class Config(ScenesConfig, PhotosConfig):
    """All rows."""
    seed: int = env.setting(0, least=0)  # of the sft and train scenes (not test), and of samples
    out: str = env.setting("data/scenes-{seed}", free=True)  # where rows and images go
    per_question: int = 3            # cold-start trajectories per question


# --- Rows -----------------------------------------------------------------------------------------------
def split_path(folder, split):
    """The file of a folder's sft, train or test rows: <split>.jsonl or, in its place, <split>.json (DRIM's
    own train.json is read under its own name)."""
    path = f"{folder}/{split}.jsonl"
    published = f"{folder}/{split}.json"
    if os.path.exists(published) and not os.path.exists(path):
        return published
    return path


def read_lines(path):
    """The objects of a JSON list or of a JSON Lines file. Raises UserError.

    Parquet is turned into such a file once, with pandas, and of its columns those that are needed (of
    ZoomBench image, query, response, question_type, bbox):

        import os, pandas
        table = pandas.read_parquet("rows.parquet", columns=["image", "problem", "solution"])
        os.makedirs("images", exist_ok=True)
        for i, image in enumerate(table.pop("image")):
            open(f"images/{i}", "wb").write(image["bytes"])
        table["images"] = [[f"images/{i}"] for i in range(len(table))]
        table.to_json("rows.jsonl", orient="records", lines=True)

    Where `image` is text (HR-Bench) one line is enough: `pandas.read_parquet(FILE).to_csv("rows.tsv",
    sep="\t")`.
    """
    try:
        raw = Path(path).read_bytes()
        if raw.startswith(b"PAR1"):
            raise UserError(f"{path} is Parquet: make JSON Lines of it with pandas (README, Parquet)")

        text = raw.decode("utf-8-sig")
        if text.lstrip().startswith("["):
            return json.loads(text)
        return [json.loads(line) for line in text.split("\n") if line.strip()]
    except OSError as e:
        raise UserError(f"{path}: {e.strerror}; run `python data.py`, or give --data=FOLDER")
    except (ValueError, RecursionError) as e:
        raise UserError(f"{path}: not JSON or JSON Lines ({e})")


def find_image(root, path, where, confined):
    """The absolute path of an image. UserError if there is none or, confined, if the path leads out of root.
    Links may lead anywhere: the cache of the Hugging Face hub is made of them. where: file and row, for the
    message."""
    root = os.path.abspath(root)
    full = os.path.normpath(os.path.join(root, path))
    if confined and os.path.commonpath([root, full]) != root:
        raise UserError(f"{where}: image {path} lies outside {root}; mend the row or --image_root")

    if not os.path.exists(full):
        raise UserError(f"{where}: no image {full}; mend the row or --image_root")
    return full


# Half a surrogate pair, which can be neither written nor tokenized. In a path: a byte that is not UTF-8.
HALF = re.compile("[\ud800-\udfff]")


def check_row(row, where):
    """Raise UserError unless a row has what every row needs, and nothing else that is wrong."""
    # 1. What it needs
    for key in ("images", "problem", "solution"):
        if not isinstance(row, dict) or row.get(key) in (None, "", [], [None], [""]):
            raise UserError(f"{where} has no `{key}`; a row needs images (a list), problem and solution; "
                            "conversations of other projects: `python tests/convert.py FILE`")
    if not isinstance(row["images"], list) or len(row["images"]) > 1:
        raise UserError(f"{where}: `images` is not a list of one image; several images are not supported")

    # 2. What it may have. A box in shares of the image is under a pixel wide.
    for key, kind, kinds in (("choices", str, "texts"), ("turns", str, "texts"), ("boxes", list, "boxes")):
        values = row.get(key) or []
        if not isinstance(values, list) or set(map(type, values)) - {kind}:
            raise UserError(f"{where}: `{key}` is not a list of {kinds}")
    for box in row.get("boxes") or []:
        if not env.is_box(box) or min(box[2] - box[0], box[3] - box[1]) < 1:
            raise UserError(f"{where}: {box!r:.40} in `boxes` is not [x0, y0, x1, y1] in pixels")

    # 3. Options hold the solution.
    for solution in env.solutions_of(row):
        if row.get("choices") and env.choice(solution, row["choices"]) is None:
            raise UserError(f"{where}: its solution {solution!r} is none of its choices {row['choices']}")

    if HALF.search(json.dumps(row, ensure_ascii=False)):
        raise UserError(f"{where} has half a character (of a surrogate pair); mend the row")


def check_letters(row, where):
    """Raise UserError if a solution is the letter of one choice and the text of another."""
    choices = row.get("choices") or []
    for solution in env.solutions_of(row):
        index = env.choice(solution, choices)
        if env.worded(solution, choices) not in (None, index):
            raise UserError(f"{where}: its solution {solution} is the letter of one choice and the text of "
                            f"another; for the letter write '{solution}. {choices[index]}'")


def load_row(row, where, root, confined):
    """A checked row with the absolute path of its image, and with a name. Raises UserError."""
    check_row(row, where)
    image = find_image(root, str(row["images"][0]), where, confined)
    problem = str(row["problem"]).replace("<image>", "").strip()     # the image always comes first
    return {"doc_id": os.path.basename(where), **row, "images": [image], "problem": problem}


def load_rows(path, image_root=""):
    """FORK: the data set. The rows of a file, with absolute image paths, relative to image_root or to the
    file. UserError names file and row if a field is missing, or if an image does not exist or lies outside
    image_root."""
    root = image_root or os.path.dirname(path)
    rows = []
    for i, row in enumerate(read_lines(path)):
        where = f"{path}: row {i}"
        row = load_row(row, where, root, confined=bool(image_root))
        check_letters(row, where)
        rows.append(row)

    if not rows:
        raise UserError(f"{path}: no rows")
    return rows


def check_rows(rows, rank, world_size, proc, cfg):
    """Before hours are spent: begin an episode of every question, shared out over the ranks. An image that is
    cut short shows only when it is decoded. UserError names the image or the row that cannot be used.

    proc: the policy's Processor; cfg: its EpisodeConfig.
    """
    questions = {(row["images"][0], row["problem"]): row for row in rows}
    mine = list(questions.values())[rank::world_size]

    def check(row):                              # no result: the episodes of all rows would fill the memory
        env.reset(proc, row, cfg)

    with ThreadPoolExecutor(8) as pool:
        checked = pool.map(check, mine)
        for _ in tqdm(checked, "questions", len(mine), leave=False, disable=rank > 0 or None):
            pass


# --- The built-in scenes: coloured boxes on a 4 x 4 grid, whose evidence can be seen in crops alone --------
# In every box of the asked colour a mark is printed in dots: the answer in the target, nothing of use in its
# look-alikes. Between the dots the box is shifted the other way, so that its mean stays: when the whole is
# shrunk, the dots are gone (tests/probe.py).

GRID = 4
# Every channel is 12 more than a multiple of 24: what a dot adds, the pixels around it give back unrounded.
COLOURS = {
    "red": (204, 36, 36),
    "green": (36, 180, 60),
    "blue": (36, 84, 204),
    "yellow": (204, 204, 36),
    "purple": (156, 36, 204),
    "cyan": (36, 204, 204)}
BLACK = 36
GREY = 156
CODES = ["".join(letters) for letters in product("ACEFHKLMNPRTUVWXY3479", repeat=3)]
# What is asked for -> the question ({}: the colour of the boxes), what the look-alikes bear, the possible
# answers.
KINDS = {
    "colour": ("One {} box bears coloured dots, the others black. Which colour?",
               "black", list(COLOURS)),
    "shape": ("One {} box bears a dotted sign, the others a dash. Which?",
              "dash", ["cross", "plus", "ring"]),
    "count": ("One {} box bears several dotted bars, the others one. How many?",
              "1", ["2", "3", "4", "5"]),
    "text": ("One {} box bears a dotted code, the others a dash. What is the code?",
             "dash", CODES)}
# How a mark is printed, unless it is a colour or a code.
SIGNS = {"cross": "X", "plus": "+", "ring": "O", "dash": "-",
         "1": "I", "2": "II", "3": "III", "4": "IIII", "5": "IIIII"}
N_BOXES = (3, 4, 5, 6), (2, 3)       # boxes of a scene's two colours; only a cold start asks about the second
# What the noise adds to a channel of a blotch. With it no pixel leaves 0 to 255.
NOISE = np.array([-12, -4, 4, 12], np.int16)
# The flaws of the cold start, for RL to mend.
MOST_BOXES = 3                       # no demonstration looks at more; a target beyond means a guess after two
GIVE_UP = 0.1                        # probability that it guesses after an empty box
AGAIN = 0.3                          # probability that it looks at an empty box again, a little shifted: with
                                     # an IoU of 0.67 for overlap_wrong, not for repeat_rate


@dataclass(frozen=True, eq=False)
class Task:
    """A built-in task. Lengths are pixels of the scene."""
    size: int                        # of the scene
    blotch: int                      # side of a blotch of the noise on it: a pixel of the whole view or more
    dot: np.ndarray                  # one period of the dots, (n, n): shares of the ink, of mean 0
    tile: int                        # side of the square that holds the mark
    label: bool                      # the square is grey: a first zoom finds it, a second one reads it
    kinds: tuple                     # what is asked for


# tiny: shrinking by 6 begins with means of 2 x 2 pixels, and in those the dots are gone. large: a dot is a
# second difference in both directions; shrinking by about 3 leaves next to nothing of it, even at edges.
SQUARE = np.pad(np.ones((2, 2)) * 4 / 3, 1) - 1 / 3
POINT = np.outer((-0.5, 1, -0.5), (-0.5, 1, -0.5))
# FORK: the built-in tasks. Another one is an entry here and, with a new kind of question, one in KINDS.
TASKS = {
    "tiny": Task(size=192, blotch=6, dot=SQUARE, tile=24, label=False,
                 kinds=("colour",)),
    "large": Task(size=4096, blotch=3, dot=POINT, tile=192, label=True,
                  kinds=("shape", "count", "text"))}


def corner_of(cell, side):
    """Upper left corner (x, y) of a cell, when cells are `side` wide."""
    return np.array([cell % GRID, cell // GRID]) * side


def cell_name(cell):
    """Columns A to D and rows 1 to 4: cell 6 is C2."""
    return f"{chr(65 + cell % GRID)}{cell // GRID + 1}"


@functools.lru_cache
def halftone(kind, value, base, task):
    """A mark in dots: int16 (tile, tile, 3 or 1), to be added to a square of colour `base`. It has mean 0."""
    # 1. Where there are dots: everywhere, or in the form of a text.
    n = task.tile // len(task.dot)
    mark = Image.new("1", (n, n), kind == "colour")
    if kind != "colour":
        text = SIGNS.get(value, value)
        font = ImageFont.load_default(n // 3)
        ImageDraw.Draw(mark).text((n // 2, n // 2), text, fill=1, font=font, anchor="mm")

    # 2. What each pixel of a dot gets of the ink.
    ink = np.subtract(COLOURS.get(value, BLACK), base)
    shares = np.kron(mark, task.dot)[..., None]
    return np.rint(shares * ink).astype(np.int16)


def square(pixels, corner, side):
    """The part of an image array at corner (x, y), to be written into."""
    x, y = corner
    return pixels[y:y + side, x:x + side]


def draw_box(rng, pixels, cell, colour, kind, value, task):
    """Draw a box of a colour, with its mark, anywhere in a cell. Returns the box (pixels) of the mark."""
    # 1. The coloured box, of middle brightness: no dot is clipped.
    width = task.size // GRID
    side = width * 3 // 4
    corner = corner_of(cell, width) + rng.integers(0, width - side + 1, 2)
    base = tuple(channel // 32 * 24 + 36 for channel in COLOURS[colour])
    square(pixels, corner, side)[:] = base

    # 2. The mark anywhere in it, its dots in line with the scene.
    corner += rng.integers(len(task.dot), side - task.tile + 1, 2)
    corner -= corner % len(task.dot)
    tile = square(pixels, corner, task.tile)
    if task.label:
        base = GREY
        tile[:] = GREY
    tile += halftone(kind, value, base, task)
    return np.append(corner, corner + task.tile).tolist()


def make_scene(rng, task):
    """One image and its two questions, dicts: problem, answer, answers (the possible ones), scene (cell ->
    colour, of all boxes), marks (cell -> what its box bears, of those of the asked colour in reading order),
    tiles (cell -> box of that mark), evidence (the one with the answer)."""
    pixels = np.full((task.size, task.size, 3), GREY, np.int16)
    colours = rng.permutation(list(COLOURS)).tolist()
    free = rng.permutation(GRID * GRID).tolist()
    questions = []
    scene = {}
    for colour, numbers in zip(colours, N_BOXES):
        # 1. What is asked about this colour.
        kind = rng.choice(task.kinds)
        problem, plain, answers = KINDS[kind]
        answers = [answer for answer in answers if answer != colour]

        # 2. Its boxes: all bear the plain mark, but one the answer.
        n = rng.choice(numbers)
        marks = dict.fromkeys(sorted(free[:n]), plain)
        free = free[n:]
        target = rng.choice(list(marks))
        answer = marks[target] = str(rng.choice(answers))

        # 3. Draw them.
        tiles = {}
        for cell, mark in marks.items():
            scene[cell] = colour
            tiles[cell] = draw_box(rng, pixels, cell, colour, kind, mark, task)
        questions.append(dict(
            problem=problem.format(colour),
            answer=answer,
            answers=answers,
            scene=scene,
            marks=marks,
            tiles=tiles,
            evidence=tiles[target]))

    # 4. Noise over all.
    n = task.size // task.blotch + 1
    noise = rng.choice(NOISE, (n, n, 3))
    noise = noise.repeat(task.blotch, axis=0)
    noise = noise.repeat(task.blotch, axis=1)
    pixels += noise[:task.size, :task.size]
    return Image.fromarray(pixels.astype(np.uint8)), questions


def crop_call(box):
    """The text of a call that looks at a box of the original, an array in 0..1000."""
    return env.call_text({"bbox_2d": box.astype(int).tolist(), "img_idx": 0})


def listing(question):
    """All boxes of a scene, those of the asked colour numbered: A1 red 1 B1 green D2 red 2"""
    words = []
    marks = list(question["marks"])
    for cell, colour in sorted(question["scene"].items()):
        words += [cell_name(cell), colour]
        if cell in marks:
            words.append(str(marks.index(cell) + 1))
    return " ".join(words)


def oracle(question, rng, task, max_crops):
    """The assistant's turns: list the boxes, look at those of the asked colour in turn from any one on, read,
    answer; with the flaws above. A thought states what can be seen by then, and needs a short look back."""
    marks = question["marks"]
    answer = question["answer"]
    boxes = list(enumerate(marks, 1))                    # (number, cell)
    first = rng.integers(len(boxes))
    boxes = boxes[-first:] + boxes[:-first]
    beyond = answer not in [marks[cell] for _, cell in boxes[:MOST_BOXES]]     # then it gives up after two
    thought = f"Boxes {listing(question)}."
    verb = "Look"
    turns = []
    at = 0
    while len(turns) < max_crops:
        # 1. Look at the cell of a box; again: a fifth of its width nearer to the middle of the image.
        number, cell = boxes[at]
        name = f"{number} {cell_name(cell)}"
        side = 1000 // GRID
        corner = corner_of(cell, side)
        if verb == "Again":
            axis = rng.integers(2)
            corner[axis] += side // 5 if corner[axis] < 500 else -side // 5
        call = crop_call(np.append(corner, corner + side))
        turns.append(f"<think>{thought} {verb} {name}.</think>\n{call}")

        # 2. Look closer at its label, unless no crop is left.
        seen = marks[cell]
        if task.label and len(turns) == max_crops:
            seen = "too small"
        elif task.label:
            margin = task.tile // 10
            label = np.add(question["tiles"][cell], [-margin, -margin, margin, margin])
            call = crop_call((label * 1000 / task.size).clip(0, 1000))
            turns.append(f"<think>{name} bears a label. Look closer.</think>\n{call}")

        # 3. Read the mark. The search ends with the answer; else look again, go on, or give up.
        thought = f"{name} {seen}."
        if seen == answer:
            return [*turns, f"<think>{thought}</think>\n<answer>{answer}</answer>"]
        if rng.random() < AGAIN:
            verb = "Again"
            continue
        verb = "Look"
        at += 1
        if (beyond and at == MOST_BOXES - 1) or rng.random() < GIVE_UP:
            break

    guess = rng.choice(question["answers"])
    return [*turns, f"<think>{thought} Guess.</think>\n<answer>{guess}</answer>"]


def write_rows(out, split, rows):
    env.write_text(f"{out}/{split}.jsonl", "".join(json.dumps(row) + "\n" for row in rows))


def write_scenes(cfg):
    """Draw the scenes of all splits, save images and rows."""
    task = TASKS[cfg.task]
    for number, split in enumerate(("test", "train", "sft")):
        os.makedirs(f"{cfg.out}/{split}", exist_ok=True)
        seed = 0 if split == "test" else cfg.seed        # what is tested on never changes
        rows = []
        for i in tqdm(range(getattr(cfg, "n_" + split)), desc=f"{cfg.task}/{split}", disable=None):
            rng = np.random.default_rng([seed, number, i])
            image, questions = make_scene(rng, task)
            path = f"{split}/{i}.png"
            image.save(f"{cfg.out}/{path}", compress_level=1)

            # For imitation both questions; for RL and testing the first, which has more look-alikes.
            for j, q in enumerate(questions):
                row = {
                    "images": [path],
                    "doc_id": f"{split}-{i}-{j}",
                    "problem": q["problem"],
                    "solution": q["answer"],
                    "data_source": cfg.task,
                    "boxes": [q["evidence"]],
                    "difficulty": len(q["tiles"])}
                if split != "sft":
                    rows.append(row)
                    break
                for _ in range(cfg.per_question):
                    rows.append({**row, "turns": oracle(q, rng, task, cfg.max_crops)})

        if split == "sft":
            np.random.default_rng(cfg.seed).shuffle(rows)
        write_rows(cfg.out, split, rows)


# --- Other models over HTTP: annotator and policy here, the judge in eval.py -------------------------------
TIMEOUT = 120                        # seconds: of a silence, and of a whole reply
MOST_BYTES = 2 ** 24                 # of a reply
PATIENCE = 600                       # seconds that one request waits, in all, because it is told to
CUT = ("length", "content_filter", "abort")  # finish_reason of a reply that is not whole
answering = set()                    # (url, name) of the models that have given a usable reply
thinking = set()                     # (url, name) of those that want max_completion_tokens


class NoReply(UserError):
    """One request got no usable reply from a model that answers others."""


class AsItIs(urllib.request.HTTPErrorProcessor):
    """Hands over a reply of any status. So no redirect is followed: the key would go along, to any host."""

    def http_response(self, request, response):
        return response

    https_response = http_response


def post(url, body):
    """Send JSON. Returns status, headers and text of the reply; raises whatever a network can raise."""
    key = os.environ.get("OPENAI_API_KEY", "none").strip()
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {key}"}
    request = urllib.request.Request(url, json.dumps(body).encode(), headers)
    deadline = time.monotonic() + TIMEOUT
    content = b""
    with urllib.request.build_opener(AsItIs).open(request, timeout=TIMEOUT) as reply:
        for piece in iter(reply.read1, b""):         # what is there, be it one byte
            content += piece
            if len(content) > MOST_BYTES or time.monotonic() > deadline:
                raise TimeoutError("the reply does not end")
        return reply.status, reply.headers, content.decode(errors="replace")


def seconds_told(headers):
    """The wait that Retry-After asks for, as a number or a date; 0 without one."""
    told = headers.get("Retry-After", "0")
    date = parsedate_tz(told)
    return mktime_tz(date) - time.time() if date else float(told)


def turn_of(message):
    """A message as one text in the form of env.py: thoughts and calls that a server took out are put back."""
    pieces = []
    thought = message.get("reasoning_content") or message.get("reasoning")
    if thought:
        pieces.append(f"<think>{thought.strip()}</think>")

    content = message.get("content") or ""
    if isinstance(content, list):
        content = "".join(part.get("text", "") for part in content)
    if content.strip():
        pieces.append(content.strip())

    for call in message.get("tool_calls") or []:
        name = call["function"]["name"]
        arguments = call["function"]["arguments"]
        if not isinstance(arguments, str):       # of some servers an object
            arguments = json.dumps(arguments)
        pieces.append(f'<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>')
    return "\n".join(pieces).encode(errors="replace").decode()       # no half surrogate pair


def ask(url, body):
    """One request: (HTTP status, text of the reply or what is wrong, seconds to wait before another one). A
    failure that may pass has status 500."""
    try:
        status, headers, said = post(url, body)
        if status != 200:
            return status, f"HTTP {status}: {said[:300]}", seconds_told(headers)

        choice = json.loads(said)["choices"][0]
        text = turn_of(choice["message"])
        if not text or choice.get("finish_reason") in CUT:
            return 422, "the reply is empty, filtered, or cut at max_tokens", 0
        return 200, text, 0
    except Exception as e:                   # besides errors of the network, whatever a reply can cause
        return 500, f"{type(e).__name__}: {e}", 0


def chat(url, name, messages, temperature=0.0, max_tokens=2048):
    """The reply (text) of a model behind an OpenAI-compatible endpoint; url ends before /chat/completions.
    The key, if one is needed, is OPENAI_API_KEY. What may pass (429, 5xx, a timeout, a reply that is no JSON)
    is tried seven times, with waits of a minute in all, and again after each wait that Retry-After asks for.

    UserError for what would meet every request: 401, 403, 404, and any failure before the model has given its
    first usable reply. After that NoReply for one that was refused, failed, is empty or cut at max_tokens.
    """
    if not url.startswith("http"):
        raise UserError(f"{url!r}: not an address; that of an endpoint begins with http:// or https://")
    model = url, name
    waits = [1, 2, 4, 8, 16, 32]
    patience = PATIENCE
    while True:
        # 1. One request. OpenAI's models that think refuse max_tokens, temperature and top_p.
        body = dict(model=name, messages=messages)
        if model in thinking:
            body.update(max_completion_tokens=max_tokens)
        else:
            body.update(max_tokens=max_tokens, temperature=temperature, top_p=1)
        status, said, told = ask(url.rstrip("/") + "/chat/completions", body)
        if status == 200:
            answering.add(model)
            return said

        # 2. Ask again: by the other name; after the wait that it asks for; or after one of our own.
        if "Use 'max_completion_tokens'" in said and "max_tokens" in body:
            thinking.add(model)
        elif status != 429 and status < 500:
            break
        elif 0 < told <= patience:
            patience -= told
            time.sleep(told)
        elif waits:
            time.sleep(waits.pop(0))
        else:
            break

    if status in (401, 403, 404) or model not in answering:
        raise UserError(f"{url}, {name}: {said}; check address, name of the model, OPENAI_API_KEY")
    raise NoReply(f"{url}, {name}: {said}")


# --- Questions about photographs ---------------------------------------------------------------------------
# An annotator zooms in on a detail and asks about it. A question is kept if the detail answers it and the
# shrunken image does not, and if the policy solves it sometimes. Its row has three more fields: `chain`
# (boxes from coarse to fine, the last one is the evidence), `difficulty` (fewest crops of a right trajectory)
# and `solve_rate`. `construct` takes all proposals, `build` takes one through the steps; each is a function.

# FORK: the prompts. env.SYSTEM explains the tool, and these are the user's words. In the conversations that
# are graded and collected (steps 5 and 6) the user says the question alone.
PROPOSE = (
    "Write one question about a small detail of this photograph, for a test of eyesight. First find the "
    "detail: DETAIL, too small to be made out in the whole photograph. Zoom in on it with the tool in 2 to 4 "
    "steps, each into the crop before it (img_idx is its number) and at most half as wide and half as high, "
    "until the detail fills the crop with little margin. Then write the question. It tells which object is "
    "meant, so that only one in the whole photograph fits; it does not give its answer away; it mentions no "
    "crop and no zooming. The answer is a few words at most, and beyond doubt. End with\n"
    '<answer>{"question": "...", "answer": "..."}</answer>')
DETAILS = ("things to be counted, or a printed number", "the colour of a thing", "a printed word or name",
           "a thing whose kind or state has a name of one or two words")
BLIND = "The picture is withheld. Give the answer that seems most likely from the question alone.\n"
MIN_ZOOMS, MAX_ZOOMS = 2, 4          # of a proposal, as PROPOSE says
FINER = 1.5                          # how much finer each zoom must be (ratio of lengths)
MAX_REDUNDANCY = 0.1                 # of a cold-start trajectory (env.redundancy)


class Job:
    """What all photographs share: settings, and the answers so far, which stay as they were paid for."""

    def __init__(self, cfg):
        self.cfg = cfg
        self.episode = replace(env.EpisodeConfig(**env.REAL_EPISODE), max_pixels=cfg.max_pixels)
        self.models = {                      # address, name there, pixels a side of an image token
            "annotator": (cfg.annotator, cfg.annotator_name, cfg.annotator_factor),
            "policy": (cfg.policy, cfg.policy_name, cfg.policy_factor)}
        self.stopped = False                 # after an error: ask nothing more

        self.lock = threading.Lock()
        self.answers = {}                    # key of a turn -> its text
        self.log = open(f"{cfg.out}/answers.jsonl", "a+", buffering=1)
        self.log.seek(0)
        for line in self.log:
            try:
                self.answers.setdefault(*json.loads(line))
            except ValueError:               # empty, or the half line that a killed run leaves
                pass

        if self.answers:                     # the settings are right: what is refused now is one request
            print(f"{cfg.out}: {len(self.answers)} recorded replies are used again; for another model under "
                  "the same name give another --out")
            answering.update(model[:2] for model in self.models.values())


def image_url(image):
    """An RGB image as a data URL: a JPEG that keeps small coloured things (no subsampling of colours)."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=95, subsampling=0)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def messages_of(traj, episode, factor):
    """A conversation so far as an endpoint reads it: it is shown what the tokens of env.step show."""
    def part(seen):
        if isinstance(seen, str):
            return {"type": "text", "text": seen}
        return {"type": "image_url", "image_url": {"url": image_url(seen.resized(factor))}}

    system = env.SYSTEM if episode.max_crops else env.SYSTEM_NO_TOOL
    question = [part(traj.shown[0]), part(traj.row["problem"])]
    messages = [
        dict(role="system", content=system),
        dict(role="user", content=question)]
    for turn in traj.turns:
        seen = turn.shown or env.ERRORS[turn.error]
        response = [part(env.RESPONSE_BEFORE), part(seen), part(env.RESPONSE_AFTER)]
        messages.append(dict(role="assistant", content=turn.text))
        messages.append(dict(role="user", content=response))
    return messages


def next_turn(job, who, episode, traj, sample):
    """The assistant's next turn (text) in a conversation, the `sample`-th of its kind, recorded or new."""
    row = traj.row
    address, name, factor = job.models[who]

    # What decides the answer, and no more: a new setting must not make those that were paid for worthless.
    request = [who, name, factor, job.cfg.seed, env.SYSTEM, episode.max_crops, episode.max_pixels,
               row["doc_id"], row["images"][0].size, row["problem"], sample, len(traj.turns)]
    key = hashlib.sha256(json.dumps(request).encode()).hexdigest()

    if key not in job.answers:
        if job.stopped:
            raise NoReply("stopped")

        messages = messages_of(traj, episode, factor)
        text = chat(address, name, messages, temperature=1.0, max_tokens=job.cfg.max_tokens)
        with job.lock:                       # newline first: the line before may be cut
            job.log.write("\n" + json.dumps([key, text]))
            job.answers.setdefault(key, text)              # a copy of the photograph may have been faster
    return job.answers[key]


def converse(job, row, who, k, **change):
    """k conversations of the "annotator" or the "policy" about a row: env.Trajectory without tokens. change:
    what is different in the episode. Raises NoReply, also when the job has stopped."""
    episode = replace(job.episode, **change)
    start = env.start_episode(row, episode)
    trajs = []
    for sample in range(k):
        traj = start.fork()
        while traj.status == "open":
            env.step(traj, next_turn(job, who, episode, traj, sample), episode)
        trajs.append(traj)
    return trajs


@functools.cache
def digest(path):
    """A short name (hex) of what a file holds."""
    return hashlib.sha256(path.read_bytes()).hexdigest()[:12]


# The steps of a proposal, in order. Each gets the job and the row, whose image is in memory after the first,
# and adds to the row; or it returns why the proposal is dropped.

def open_photo(job, row):
    """1. Photographs that can be read."""
    path = row["images"][0]
    try:
        image = env.open_image(path)
    except UserError as e:
        tqdm.write(f"left out: {e}")
        return "unreadable"

    row.update(images=[image], doc_id=f"{digest(path)}-{row['doc_id']}")


def propose(job, row):
    """2. The annotator zooms in on a detail, step by step, and ends with a question about it."""
    any_number = sum(row["doc_id"].encode())     # the next run has the same, and finds its answers
    kind = DETAILS[any_number % len(DETAILS)]
    asked = {**row, "problem": PROPOSE.replace("DETAIL", kind)}
    [traj] = converse(job, asked, "annotator", 1, max_crops=MAX_ZOOMS)
    if traj.answer is None:
        return "no question"
    if len(traj.crops) < MIN_ZOOMS:
        return "too few zooms"

    outer = traj.shown[0].box
    limit = job.cfg.evidence_share * env.area(outer)
    for box in traj.crops:
        leaves = env.intersection(box, outer) < env.area(box)
        finer = env.area(box) * FINER ** 2 <= env.area(outer)
        if leaves or not finer:
            return "a zoom leaves the crop before it, or is hardly finer"
        outer = box
    if env.area(outer) > limit:
        return "the last view is too large"
    row.update(problem=traj.answer, boxes=[outer], chain=traj.crops)     # the question is in the answer


def read_question(job, row):
    """3. Read the question: it needs a short answer that can be judged."""
    said = row["problem"]
    try:
        made = json.loads(said[said.find("{"):said.rfind("}") + 1])       # it is often in a code fence
        problem = made["question"].strip()
        answer = str(made["answer"]).strip()
    except Exception:                        # a model can write anything
        return "malformed"

    printable = (problem + answer).isprintable()
    if not printable or not 0 < len(answer) <= 60 or not 0 < len(problem) <= 400:
        return "empty, too long or unprintable"
    row.update(problem=problem, solution=answer)


def verify(job, row):
    """4. Hard and true: hardly ever answered from text or shrunken image, nearly always from the evidence."""
    cfg = job.cfg
    [image] = row["images"]

    def n_right(seen, hint=""):
        asked = {**row, "images": [seen], "problem": hint + row["problem"]}
        trajs = converse(job, asked, "annotator", cfg.votes, max_crops=0)
        return sum(map(env.is_right, trajs))

    if n_right(Image.new("RGB", (64, 64), "grey"), BLIND) > cfg.blind:
        return "given away by its text"
    if n_right(image) > cfg.blind:
        return "answered without zooming"
    if n_right(image.crop(row["boxes"][0])) < cfg.agree:
        return "answer not confirmed"


def grade(job, row):
    """5. The policy, with the tool, solves it sometimes, not always, and never with fewer than two crops."""
    trajs = converse(job, row, "policy", job.cfg.samples)
    crops = [len(traj.crops) for traj in trajs if env.is_right(traj)]
    rate = len(crops) / len(trajs)
    if not crops:
        return "never solved"
    if rate > job.cfg.max_rate:
        return "solved too often"
    if min(crops) < 2:
        return "solved with one crop or none"
    row.update(difficulty=min(crops), solve_rate=rate)


def side_of(job, row):
    """Where a question goes, "sft", "train" or "test". The hash of the photograph decides, so that copies are
    on one side and a new photograph moves no other."""
    place = int(row["doc_id"][:8], 16) / 2 ** 32
    if place < job.cfg.share_test:
        return "test"
    return "sft" if place < job.cfg.share_test + job.cfg.share_sft else "train"


def demonstrate(job, row):
    """6. Of an sft question cold-start trajectories of the annotator (lists of texts): of the faultless ones
    first those that recovered (looked where nothing of the evidence is, and then where it is). There may be
    none."""
    if side_of(job, row) != "sft":
        return

    recovered, others = [], []
    for traj in converse(job, row, "annotator", job.cfg.attempts):
        refused = any(turn.error for turn in traj.turns)
        repeats = env.redundancy(traj.crops, env.RewardConfig.eps) > MAX_REDUNDANCY
        if refused or repeats or not env.is_right(traj) or not env.covers(traj):
            continue

        overlaps = [env.intersection(box, row["boxes"][0]) for box in traj.crops]
        kind = others if min(overlaps) else recovered
        kind.append([turn.text for turn in traj.turns])
    row["turns"] = (recovered + others)[:job.cfg.per_question]


PROPOSAL_STEPS = (open_photo, propose, read_question, verify, grade, demonstrate)


def build(job, proposal):
    """What becomes of a proposal (path of a photograph, n), the n-th about it: "kept" or what dropped it, its
    side ("sft", "train" or "test"), its rows."""
    path, n = proposal
    row = {"images": [path], "doc_id": n, "data_source": "photographs"}
    for step in PROPOSAL_STEPS:
        try:
            reason = step(job, row)
        except NoReply as e:
            tqdm.write(f"{str(path)!r}: {e}; not recorded, so the same command asks again")
            reason = "no usable reply"
        if reason:
            return f"{step.__name__}: {reason}", "train", []

    # 7. A question without a trajectory cannot be sft.
    row["images"] = [os.path.relpath(path, job.cfg.out)]
    found = row.pop("turns", [])
    if found:
        return "kept", "sft", [{**row, "turns": turns} for turns in found]
    return "kept", "test" if side_of(job, row) == "test" else "train", [row]


def find_photos(folder):
    """The paths of the photographs under a folder, and of the other files the number of each kind. Of copies
    the first one counts: in train and held-out rows they would be on both sides."""
    formats = Image.registered_extensions()
    photos, others = {}, Counter()
    for path in sorted(Path(folder).rglob("*")):
        suffix = path.suffix.lower()
        if HALF.search(str(path)):
            others["name that is not UTF-8"] += 1
        elif path.is_dir():
            continue
        elif formats.get(suffix) not in env.IMAGE_FORMATS:
            others[suffix or "without a suffix"] += 1
        elif not os.access(path, os.R_OK):           # a link to nowhere, too
            others["unreadable"] += 1
        elif photos.setdefault(digest(path), path) != path:
            others["copy of another"] += 1
    return list(photos.values()), others


def construct(cfg):
    """Rows and cold-start trajectories from the photographs of cfg.images."""
    paths, others = find_photos(cfg.images)
    print(f"{cfg.images}: {len(paths)} photographs; other files, left out: {dict(others)}")
    if not paths:
        raise UserError(f"--images={cfg.images}: no images there; give a folder of photographs")

    proposals = list(product(paths, range(cfg.per_image)))
    job = Job(cfg)
    fates = Counter()
    sides = {"sft": [], "train": [], "test": []}
    with ThreadPoolExecutor(cfg.parallel) as pool:
        try:                                 # results come in the order of the proposals
            results = pool.map(functools.partial(build, job), proposals)
            for fate, side, rows in tqdm(results, total=len(proposals), desc="proposals", disable=None):
                fates[fate] += 1
                sides[side] += rows
        finally:                             # after an error those under way stop before their next request
            job.stopped = True

    for side, rows in sides.items():
        write_rows(cfg.out, side, rows)
    card = {"proposals": fates, "files left out": others}
    env.write_text(f"{cfg.out}/data_card.json", json.dumps(card, indent=1))
    print(f"{cfg.out}: {fates['kept']} questions of {len(proposals)} proposals; see data_card.json")


# --- Published benchmarks ----------------------------------------------------------------------------------
# Rows as load_rows returns them, with `category`. Layouts: open-compass/VLMEvalKit, penghao-wu/vstar,
# inclusionAI/ZoomBench, agents-x-project/TIR-Bench.

# FORK: what a row needs -> the columns that benchmarks have it in; the first that is not empty counts.
COLUMNS = {
    "problem": ("question", "query", "prompt", "text"),
    "solution": ("answer", "response", "label"),
    "images": ("image", "images", "image_path", "image_1"),
    "boxes": ("target_instances", "bbox"),       # [x0, y0, x1, y1] in pixels, or a list of such
    "category": ("category", "task", "question_type")}


def values(cell):
    """The values of a cell: none, one, or those of a list, which a TSV has as its text."""
    if isinstance(cell, str) and cell.startswith("["):
        cell = ast.literal_eval(cell)
    if isinstance(cell, list):
        return cell
    return [cell] if cell else []


def bench_row(item, where):
    """The row of a line of a benchmark, {column: cell}; its images are as they stand there. Raises
    UserError."""
    # 1. Its columns under our names
    row = {}
    for key, columns in COLUMNS.items():
        cells = [item[column] for column in columns if item.get(column) not in (None, "")]
        row[key] = cells[0] if cells else ""
    if not isinstance(row["solution"], list):            # of accepted answers
        row["solution"] = str(row["solution"]).strip()
    row["images"] = values(row["images"]) + values(item.get("image_2"))

    boxes = values(row["boxes"])
    row["boxes"] = [boxes] if env.is_box(boxes) else boxes
    part = item.get("l2-category")
    if part and part != row["category"]:
        row["category"] += "/" + part.lower()

    # 2. Its options: a list, columns A to Z, a list with letters, or lines of the question. A letter keeps
    # its place: one whose cell is empty, as pandas writes the options "None" and "N/A", must not go to the
    # next option.
    listed = values(item.get("options") or item.get("choices"))
    item = {**dict(zip(string.ascii_uppercase, listed)), **item}
    lines = []
    for letter in string.ascii_uppercase:
        if item.get(letter):
            lines.append(f"{letter}. {item[letter]}".replace("\n", " "))
    lines = lines or values(item.get("multi-choice options"))
    problem = row["problem"].partition("\nAnswer with the option")[0].rstrip()
    row["choices"] = env.options_of({"problem": "\n".join(lines) or problem})

    is_letter = re.fullmatch("[A-Z]", str(row["solution"]))
    lettered = lines or is_letter and ("A" in item or re.search(r"\bA[.):]", problem))
    if lettered and not row["choices"]:
        raise UserError(f"{where}: its options are not A, B and so on, each with a text, but "
                        f"{lines or problem}")

    # 3. The wording that all benchmarks get
    problem = "\n".join([problem, *lines])
    if item.get("hint"):
        problem = f"Hint: {item['hint']}\n{problem}"
    if row["choices"]:
        problem += "\nAnswer with the letter of the right option."
    return {**row, "problem": problem}


def unpack(text, folder):
    """Write an image in base64 to a file named by its content, unless it is there. Returns its path."""
    file = Path(folder, hashlib.sha1(text.encode()).hexdigest())
    if not file.exists():
        file.parent.mkdir(exist_ok=True)
        part = file.with_suffix(f".{os.getpid()}")             # other ranks may be writing the same image
        part.write_bytes(base64.b64decode(text))
        part.replace(file)
    return str(file.resolve())


def read_tsv(path):
    """The lines of a TSV of VLMEvalKit as dicts.

    The column `image` holds base64, unpacked once to <path>.images/, or the index of the line that has it. A
    _local.tsv, which VLMEvalKit writes for a file above 1 GB, has the column `image_path` in its place.
    """
    csv.field_size_limit(2 ** 31 - 1)
    items = []
    files = {}                               # index of a line -> its image, unpacked
    with open(path, newline="", encoding="utf-8-sig") as f:
        lines = csv.DictReader(f, delimiter="\t")
        for item in tqdm(lines, desc=path, disable=None):
            image = item.get("image") or ""
            if len(image) > 64 and not image.startswith("["):
                image = item["image"] = unpack(image, path + ".images")
                files[item.get("index")] = image
            items.append(item)

    for item in items:                       # the line that has the image may come later
        item["image"] = files.get(item.get("image"), item.get("image"))
    return items


def read_vstar(folder):
    """The lines of V*Bench, 191 questions, as its published folder: test_questions.jsonl has question and
    options in one text; X.json beside X.jpg has the evidence boxes as [x, y, w, h]."""
    items = []
    for item in read_lines(f"{folder}/test_questions.jsonl"):
        if item["category"] not in ("direct_attributes", "relative_position"):
            continue                         # the folders OCR and GPT4V-hard are not part of it

        beside = Path(folder, item["image"]).with_suffix(".json")
        boxes = env.read_json(beside, {}).get("bbox", [])
        item["bbox"] = [[x, y, x + w, y + h] for x, y, w, h in boxes]
        items.append(item)
    return items


def read_bench(path, root):
    """(rows, a line about each row left out) of a TSV, V*Bench's folder, or JSON with our fields or the
    columns above. Left out is what cannot be asked: no image, several images, an empty option. root: where
    the images lie, and those of our rows have to; empty: beside the file."""
    folder = root or os.path.dirname(path)
    if os.path.isdir(path):
        items = read_vstar(path)
        folder = root or path
    elif path.endswith(".tsv"):
        items = read_tsv(path)
    else:
        items = read_lines(path)

    rows, left_out = [], []
    for i, item in enumerate(items):
        where = f"{path}: row {i}"
        ours = "problem" in item
        try:
            row = item if ours else bench_row(item, where)
            rows.append(load_row(row, where, folder, confined=ours and bool(root)))
        except UserError as e:
            left_out.append(str(e))
    return rows, left_out


def read_benches(spec, image_root, limit):
    """FORK: the benchmarks of spec, "NAME:PATH,NAME:PATH". Returns {name: rows} and {name: lines, one about
    each row left out}.

    A path is what `read_bench` takes, or the folder of VisualProbe, whose levels each get their own name,
    or of one level. Of each there are at most `limit` rows (0: all). UserError for a path that does not
    exist, another layout, and where no row remains.
    """
    # 1. Which files, and where their images are
    entries = []
    for entry in spec.split(","):
        name, _, path = entry.partition(":")
        if not re.fullmatch(r"[\w.-]+", name) or not os.path.exists(path):
            raise UserError(f"--bench: {entry!r} is not NAME:PATH, a word and a file or folder that exists")
        levels = sorted(Path(os.path.abspath(path)).rglob("val.json"))
        for level in levels:                 # of VisualProbe, relative to the folder of its levels
            folder = level.parent
            entries.append((folder.name.lower(), str(level), str(folder.parent)))
        if not levels:
            entries.append((name, path, image_root))

    # 2. Their rows
    benches, left_out = {}, {}
    for name, path, root in entries:
        # A name becomes a key of eval.json, beside these.
        if name in benches or name in ("config", "weights", "sampled", "greedy"):
            raise UserError(f"--bench: the name {name} is taken; give another")

        try:
            rows, left_out[name] = read_bench(path, root)
        except (Exception, UserError) as e:  # whatever a damaged file makes a parser raise
            raise UserError(f"{path}: damaged or not as {name} is published ({type(e).__name__}: {e})")
        if not rows:
            raise UserError(f"{path}: no questions that can be asked; {left_out[name][:1]}")
        benches[name] = rows[:limit or None]
    return benches, left_out


# --- The command -------------------------------------------------------------------------------------------
def has_other_rows(folder, images=""):
    """Does a folder hold rows that are not of these photographs (default: not of the built-in scenes)?"""
    made = env.read_json(f"{folder}/config.json", {})
    rows = [*Path(folder).glob("*.jsonl"), *Path(folder).glob("train.json")]
    return bool(rows) and made.get("images") != images


def main(cfg):
    """Make the rows of cfg.out, unless they are there: scenes, or questions about photographs."""
    if has_other_rows(cfg.out, cfg.images):
        raise UserError(f"{cfg.out} holds rows that this command did not make; give another --out")
    if cfg.task not in TASKS:
        raise UserError(f"--task={cfg.task}: the tasks are {', '.join(TASKS)}")
    if cfg.agree > cfg.votes:
        raise UserError(f"--agree={cfg.agree} of --votes={cfg.votes}: no question would be kept; lower it")
    if not cfg.images:
        env.same_settings(cfg.out, cfg)
        if os.path.exists(f"{cfg.out}/sft.jsonl"):      # it is written last
            return
    env.lock(cfg.out)
    env.write_text(f"{cfg.out}/config.json", json.dumps(asdict(cfg), indent=1))
    if cfg.images:
        construct(cfg)
    else:
        write_scenes(cfg)


if __name__ == "__main__":
    env.command(main, Config, {})
