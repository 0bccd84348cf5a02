"""data.py, file 3 of 5 (after env.py and sft.py): how rows of questions are made and read.

    python data.py                              # built-in scenes: data/scenes-0/{sft,train,test}.jsonl
    python data.py --task=large --n_train=2000 --out=data/large    # true scale: 4096 pixels, two zooms
    python data.py --images=photos --annotator=https://host/v1 --annotator_name=NAME --out=data/mine \\
                   --policy=http://localhost:8000/v1 --policy_name=NAME    # questions about photographs

A row is one JSON object a line, in the published schema of DRIM-VisualReasonHard and of Mini-o3's RL data,
with a few optional fields:

    {"images": ["test/0.png"], "doc_id": "test-0-0", "problem": "...", "solution": "green",
     "data_source": "tiny", "boxes": [[117, 84, 133, 100]], "difficulty": 3}

Image paths are relative to the file. `boxes` (the evidence) are pixels of the original. A cold-start row also
has `turns`, the assistant's texts; what it saw is replayed through the tool.

    write_scenes, make_tiny    the built-in tasks, and the small random model for them
    construct                  questions about photographs
    read_benches               published benchmarks as rows, for eval.py
    chat, image_part           other models over HTTP, here and in eval.py

Writes to --out: {sft,train,test}.jsonl, config.json; for scenes their images and tiny/ (the random model);
for photographs answers.jsonl (all conversations, so that the same command goes on where it was stopped and
pays for nothing twice) and data_card.json (what each step dropped and why). Rows that another command made
are never overwritten.
"""
import ast
import base64
import csv
import hashlib
import io
import json
import os
import re
import threading
import time
import urllib.request
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

import env
import sft
from env import UserError


@dataclass
class ScenesConfig:
    """Built-in scenes."""
    task: str = "tiny"               # FORK: a key of TASKS
    n_sft: int = 3360                # scenes; each asks two questions (a scene for RL or testing asks one)
    n_train: int = 1800
    n_test: int = 768


@dataclass
class PhotosConfig:
    """Questions about photographs."""
    images: str = ""                 # folder of the photographs
    annotator: str = ""              # address of an OpenAI-compatible endpoint (its key: OPENAI_API_KEY)
    annotator_name: str = ""         # the model's name there
    policy: str = ""                 # the model that is to learn, likewise (vLLM serves our checkpoints)
    policy_name: str = ""
    max_pixels: int = 2_000_000      # of the shrunken image
    min_megapixels: float = 2.0      # smaller photographs are left out
    per_image: int = 2               # proposals per photograph
    evidence_share: float = 0.01     # largest share of the photograph that the evidence may cover
    votes: int = 4                   # answers each from the text, the shrunken image and the evidence:
    blind: int = 1                   # at most so many may be right from text or shrunken image,
    agree: int = 3                   # at least so many from the evidence
    samples: int = 8                 # trajectories of the policy per question
    max_rate: float = 0.75           # largest share of them that may be right
    attempts: int = 4                # trajectories of the annotator per question
    share_sft: float = 0.4           # of the photographs; the rest is for train
    share_test: float = 0.1
    parallel: int = 8                # photographs, and so requests, at a time


@dataclass
class Config(ScenesConfig, PhotosConfig):
    """All rows."""
    seed: int = 0                    # of the sft and train scenes (not of test), and of what models sample
    out: str = "data/scenes-{seed}"  # where rows and images go
    per_question: int = 3            # cold-start trajectories per question


# ----------------------------------------------------------------------------------------------------------
# The built-in scenes: coloured boxes on a 4 x 4 grid, whose evidence can be seen in crops alone.
#
# In every box of the asked colour a mark is printed in dots. In one of them, the target, it is what is asked
# for; in the others, its look-alikes, it says nothing. Between the dots the box is shifted the other way, so
# that the mean stays the box's own colour: when the whole is shrunk, the dots are gone. So: list the boxes,
# zoom into one, and if it is not the target go on to the next. tests/probe.py shows that the whole view does
# not tell.

GRID = 4
# All channels are 12 more than a multiple of 24: what a dot adds, the pixels around it give back without
# rounding.
COLOURS = {"red": (204, 36, 36), "green": (36, 180, 60), "blue": (36, 84, 204),
           "yellow": (204, 204, 36), "purple": (156, 36, 204), "cyan": (36, 204, 204)}
BLACK, GROUND, PALE = 36, 156, 180
CODES = ["".join(letters) for letters in product("ACEFHKLMNPRTUVWXY3479", repeat=3)]
# What is asked for -> the question, what the look-alikes bear, the possible answers.
KINDS = {
    "colour": ("One {} box bears coloured dots, the others black ones. Which colour?",
               "black", list(COLOURS)),
    "shape": ("One {} box bears a dotted sign, the others a dash. Which sign?",
              "dash", ["cross", "plus", "ring"]),
    "count": ("One {} box bears several dotted bars, the others one. How many?", "1", list("2345")),
    "text": ("One {} box bears a dotted code, the others a dash. What is the code?", "dash", CODES)}
SIGNS = dict(zip("cross plus ring dash 1 2 3 4 5".split(), "X + O - I II III IIII IIIII".split()))
NUMBERS = (3, 4, 5, 6), (2, 3)       # boxes of a scene's two colours, drawn from these; only a cold start asks
                                     # about the second
NOISE = np.array([-12, -4, 4, 12], np.int16)
LIMITS = (1, 2, 3)                   # a demonstration looks at most so often (one of them), then it guesses
AGAIN = 0.25                         # probability that it looks at an empty box again, a little shifted


@dataclass(frozen=True)
class Task:
    """A built-in task. Lengths are pixels of the scene."""
    size: int                        # of the scene
    blotch: int                      # side of a blotch of the noise that covers all: at least a pixel of the view
    period: int                      # from dot to dot; there are two pixels between dots
    tile: int                        # side of the square that holds the mark
    label: bool                      # the square is pale: a first zoom finds it, a second one reads it
    kinds: tuple                     # what is asked for


# FORK: the built-in tasks. Another one needs a line here and, for a new kind of question, one in KINDS.
TASKS = {"tiny": Task(192, 6, 4, 24, False, ("colour",)),
         "large": Task(4096, 3, 3, 192, True, tuple(KINDS))}


def answers_of(kind, colour):
    """The possible answers about boxes of a colour."""
    return [a for a in KINDS[kind][2] if a != colour]


def corner_of(cell, side):
    """Upper left corner (x, y) of a cell, when cells are `side` wide."""
    return np.array([cell % GRID, cell // GRID]) * side


def cell_name(cell):
    """Columns A to D and rows 1 to 4: cell 6 is C2."""
    return f"{chr(65 + cell % GRID)}{cell // GRID + 1}"


def halftone(kind, value, base, task):
    """A mark in dots, as what it adds to a square of colour `base`: int16 (tile, tile, 3 or 1). Its mean over
    every period of dots is 0."""
    n = task.tile // task.period
    mark = Image.new("1", (n, n), kind == "colour")
    if kind != "colour":
        font = ImageFont.load_default(n // 3)
        ImageDraw.Draw(mark).text((n / 2, n / 2), SIGNS.get(value, value), 1, font, anchor="mm")
    side = task.period - 2
    dot = np.pad(np.ones((side, side)), 1)
    dot = (dot - dot.mean()) / (1 - dot.mean())
    ink = np.subtract(COLOURS.get(value, BLACK), base)
    return np.rint(np.kron(mark, dot)[..., None] * ink).astype(np.int16)


def square(pixels, corner, side):
    """The part of an image array at corner (x, y), to be written into."""
    x, y = corner
    return pixels[y:y + side, x:x + side]


def draw_box(rng, pixels, cell, colour, kind, value, task):
    """Draw a box of a colour, with its mark, anywhere in a cell. Returns the box (pixels) of the mark."""
    width = task.size // GRID
    side = int(width * rng.uniform(0.66, 0.8))
    corner = corner_of(cell, width) + rng.integers(0, width - side + 1, 2)
    base = np.array(COLOURS[colour]) // 32 * 24 + 36     # of middle brightness: nothing is clipped
    square(pixels, corner, side)[:] = base
    corner += rng.integers(0, side - task.tile - task.period + 1, 2)
    corner += -corner % task.period                      # in line with the cell
    tile = square(pixels, corner, task.tile)
    if task.label:
        base = PALE
        tile[:] = base
    tile += halftone(kind, value, base, task)
    return [*corner.tolist(), *(corner + task.tile).tolist()]


def make_scene(rng, task):
    """One image and its two questions. A question is a dict: colour, kind, answer, scene (cell -> colour, of
    all boxes), marks (cell -> what its box bears, of the boxes of the asked colour in reading order), tiles
    (cell -> box of that mark), evidence (the one with the answer)."""
    pixels = np.full((task.size, task.size, 3), GROUND, np.int16)
    colours = rng.permutation(list(COLOURS)).tolist()
    cells = rng.permutation(GRID * GRID).tolist()
    questions, scene = [], {}
    for colour, numbers in zip(colours, NUMBERS):
        mine = sorted(cells.pop() for _ in range(rng.choice(numbers)))
        scene.update(dict.fromkeys(mine, colour))
        kind = str(rng.choice(task.kinds))
        marks = dict.fromkeys(mine, KINDS[kind][1])
        target = mine[rng.integers(len(mine))]
        answer = marks[target] = str(rng.choice(answers_of(kind, colour)))
        tiles = {}
        for cell in mine:
            tiles[cell] = draw_box(rng, pixels, cell, colour, kind, marks[cell], task)
        questions.append(dict(colour=colour, kind=kind, answer=answer, scene=scene, marks=marks, tiles=tiles,
                              evidence=tiles[target]))
    n = task.size // task.blotch + 1
    noise = rng.choice(NOISE, (n, n, 3))
    noise = noise.repeat(task.blotch, 0).repeat(task.blotch, 1)
    pixels += noise[:task.size, :task.size]
    return Image.fromarray(pixels.astype(np.uint8)), questions


def look(box):
    """The text of a call that looks at a box of the original."""
    arguments = {"bbox_2d": box.astype(int).tolist(), "img_idx": 0}
    call = {"name": env.CROP_SCHEMA["function"]["name"], "arguments": arguments}
    return f"<tool_call>\n{json.dumps(call)}\n</tool_call>"


def shifted(box, rng):
    """A cell (0 to 1000) moved by a fifth of its width, left, right, up or down; never out of the image."""
    step = 200 // GRID
    move = np.roll([step, 0, step, 0], rng.integers(2)) * rng.choice([-1, 1])
    if abs(box + move - 500).max() > 500:
        return box - move
    return box + move


def listing(question):
    """All boxes of a scene, those of the asked colour numbered: A1 red 1 B1 green D2 red 2"""
    words = []
    number = 0
    for cell, colour in sorted(question["scene"].items()):
        words += [cell_name(cell), colour]
        if colour == question["colour"]:
            number += 1
            words.append(str(number))
    return " ".join(words)


def oracle(question, rng, task):
    """The assistant's turns (texts) for a question: list the boxes in reading order and number those of the
    asked colour; look at one after the other, or with probability AGAIN once more at the last one; read,
    answer. After one of LIMITS looks it guesses.

    A thought states only what can be seen by then, and needs only a short look back: that makes it learnable.
    """
    thought = f"Boxes {listing(question)}."
    turns = []
    at, again = 0, False
    for _ in range(rng.choice(LIMITS)):
        cell = list(question["tiles"])[at]
        name = cell_name(cell)
        box = np.tile(corner_of(cell, 1000 // GRID), 2)
        box[2:] += 1000 // GRID
        if again:
            box = shifted(box, rng)
        turns.append(f"<think>{thought} {'Again' if again else 'Look'} {name}.</think>\n{look(box)}")
        seen = question["marks"][cell]
        if task.label and len(turns) == env.EpisodeConfig.max_crops:
            seen = "too small"
        elif task.label:
            margin = task.tile // 10
            closer = np.add(question["tiles"][cell], [-margin, -margin, margin, margin])
            closer = (closer * 1000 / task.size).round().clip(0, 1000)
            turns.append(f"<think>{name} bears a label. Look closer.</think>\n{look(closer)}")
        thought = f"{name} {seen}."
        if seen == question["answer"]:
            return turns + [f"<think>{thought}</think>\n<answer>{seen}</answer>"]
        again = rng.random() < AGAIN
        at += not again
    guess = rng.choice(answers_of(question["kind"], question["colour"]))
    return turns + [f"<think>{thought} Guess.</think>\n<answer>{guess}</answer>"]


def write_rows(out, split, rows):
    lines = [json.dumps(row) + "\n" for row in rows]
    sft.write_text(os.path.join(out, f"{split}.jsonl"), "".join(lines))


def write_scenes(cfg):
    """Draw the scenes of all splits, save images and rows."""
    task = TASKS[cfg.task]
    for number, (split, n) in enumerate((("test", cfg.n_test), ("train", cfg.n_train), ("sft", cfg.n_sft))):
        os.makedirs(os.path.join(cfg.out, split), exist_ok=True)
        seed = cfg.seed if number else 0     # the test scenes never change
        rows = []
        for i in tqdm(range(n), desc=f"{cfg.task}/{split}", disable=None):
            rng = np.random.default_rng([seed, number, i])
            image, questions = make_scene(rng, task)
            path = f"{split}/{i}.png"
            image.save(os.path.join(cfg.out, path), compress_level=1)
            for j, q in enumerate(questions):
                row = {"images": [path], "doc_id": f"{split}-{i}-{j}",
                       "problem": KINDS[q["kind"]][0].format(q["colour"]), "solution": q["answer"],
                       "data_source": cfg.task, "boxes": [q["evidence"]], "difficulty": len(q["tiles"])}
                if split != "sft":
                    rows.append(row)
                    break                    # the first question has more look-alikes
                for _ in range(cfg.per_question):
                    rows.append({**row, "turns": oracle(q, rng, task)})
        if split == "sft":
            rng.shuffle(rows)
        write_rows(cfg.out, split, rows)


# ----------------------------------------------------------------------------------------------------------
# The tiny model.

SPECIAL = ("<|endoftext|> <|im_start|> <|im_end|> <|vision_start|> <|vision_end|> <|vision_pad|> <|image_pad|> "
           "<|video_pad|>").split()      # their ids are 0 to 7


def make_tokenizer(rows):
    """A tokenizer trained on the texts of cold-start rows, with the special tokens of Qwen3-VL. A word is a
    token, and so are the system prompt and the constant pieces of a call."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast
    _, call, _ = re.split("</?tool_call>", look(np.zeros(4)))
    frames = [piece for piece in call.split("0") if len(piece) > 2]
    whole = [*env.TAGS, env.SYSTEM, *frames]
    texts = [*env.ERRORS.values(), env.SYSTEM_NO_TOOL, "user\n", "assistant\n", "system\n", "\n"] * 50
    for row in rows:
        texts += [row["problem"], *row.get("turns", [])]
    pieces = []
    for text in texts:
        pieces += re.split("|".join(map(re.escape, whole)), text)
    tokenizer = Tokenizer(models.BPE())
    words = pre_tokenizers.Split(Regex(r"\s*</?\w+>|,? ?\w+|[^\w<]+|<"), "isolated")
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, to_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=1200, min_frequency=20, show_progress=False,
                                  special_tokens=SPECIAL,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(pieces, trainer)
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in whole])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>",
                                   pad_token="<|endoftext|>")


def make_tiny(rows, seed):
    """A randomly initialised Qwen3-VL of 0.6 M parameters as a Policy on the CPU, for the format of the given
    cold-start rows. A patch is 8 x 8 pixels, an image token 16 x 16."""
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration
    tokenizer = make_tokenizer(rows)
    rope = dict(rope_type="default", rope_theta=10000.0, mrope_section=[6, 5, 5], mrope_interleaved=True)
    text = dict(vocab_size=len(tokenizer), hidden_size=96, intermediate_size=256, num_hidden_layers=3,
                num_attention_heads=3, num_key_value_heads=3, head_dim=32, max_position_embeddings=4096,
                tie_word_embeddings=True, eos_token_id=tokenizer.eos_token_id, rope_parameters=rope)
    vision = dict(depth=2, hidden_size=64, intermediate_size=192, num_heads=2, patch_size=8,
                  spatial_merge_size=2, temporal_patch_size=2, out_hidden_size=96,
                  num_position_embeddings=64, deepstack_visual_indexes=[0])
    torch.manual_seed(seed)
    vlm = Qwen3VLForConditionalGeneration(
        Qwen3VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=True, image_token_id=6,
                      video_token_id=7, vision_start_token_id=3, vision_end_token_id=4))
    # At transformers' 0.02 an image token hardly says where it is; finding the boxes takes three times as
    # long to learn.
    torch.nn.init.normal_(vlm.model.visual.pos_embed.weight, std=0.5)
    return sft.make_policy(vlm, tokenizer)


def save_tiny(folder, seed):
    """Write <folder>/tiny, a random model for the texts of <folder>/sft.jsonl: what sft.py starts from
    without --model. Complete or absent. Raises UserError."""
    policy = make_tiny(env.read_lines(os.path.join(folder, "sft.jsonl")), seed)
    tiny = os.path.join(folder, "tiny")
    sft.save_model(tiny + ".tmp", policy, policy.vlm.state_dict(), env.EpisodeConfig(), "tiny")
    os.replace(tiny + ".tmp", tiny)


# ----------------------------------------------------------------------------------------------------------
# Other models over HTTP: annotator and policy here, the judge in eval.py.

def chat(url, name, messages, temperature=0.0):
    """The reply (text) of an OpenAI-compatible endpoint; url ends before /chat/completions. The key, if one
    is needed, is OPENAI_API_KEY. What may pass (429, 5xx, a timeout, a reply that is no JSON) is tried five
    times, then it raises ConnectionError; what will not (a wrong key, name or address) raises UserError."""
    if not url.startswith("http"):
        raise UserError(f"{url!r}: not an address; that of an endpoint begins with http:// or https://")
    body = dict(model=name, messages=messages, temperature=temperature, max_tokens=1024)
    key = os.environ.get("OPENAI_API_KEY", "none")
    headers = {"Content-Type": "application/json", "Authorization": "Bearer " + key}
    address = url.rstrip("/") + "/chat/completions"
    request = urllib.request.Request(address, json.dumps(body).encode(), headers)
    for seconds in (1, 2, 4, 8, 0):
        try:
            with urllib.request.urlopen(request, timeout=120) as reply:
                return str(json.load(reply)["choices"][0]["message"]["content"] or "")
        except Exception as e:               # besides errors of the network, whatever a reply can cause
            error = e
        code = getattr(error, "code", 500)   # of HTTP
        if code < 500 and code != 429:
            raise UserError(f"{url}: refused ({error}); check address, name of the model, OPENAI_API_KEY")
        time.sleep(seconds)
    raise ConnectionError(f"{url}: {type(error).__name__}: {error}")


def image_part(image):
    """An RGB image as a part of a chat message (JPEG, quality 95)."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=95)
    encoded = base64.b64encode(buffer.getvalue()).decode()
    return {"type": "image_url", "image_url": {"url": "data:image/jpeg;base64," + encoded}}


# ----------------------------------------------------------------------------------------------------------
# Questions about photographs. An annotator zooms in on a detail and asks about it. A question is kept if the
# detail answers it and the shrunken image does not, and if the policy solves it sometimes. Its row has three
# more fields: `chain` (boxes from coarse to fine, the last one is the evidence), `difficulty` (fewest crops
# of a right trajectory) and `solve_rate`. `construct` takes all photographs, `build` takes one through the
# steps; each is a function.

# FORK: the prompts. env.SYSTEM explains the tool; graded and collected conversations see the question alone.
PROPOSE = (
    "Write one question about a small detail of this photograph, for a test of eyesight. First find the "
    "detail: {kind}, too small to be made out in the whole photograph. Zoom in on it with the tool in 2 to 4 "
    "steps, each into the crop before it (img_idx is its number) and at most half as wide and half as high, "
    "until the detail fills the crop with little margin. Then write the question. It tells which object is "
    "meant, so that only one in the whole photograph fits; it does not give its answer away; it mentions no "
    "crop and no zooming. The answer is a few words at most, and beyond doubt. End with\n"
    '<answer>{{"question": "...", "answer": "...", "choices": {choices}}}</answer>')
DETAILS = (
    ("things to be counted, or a printed number", "null"), ("the colour of a thing", "null"),
    ("a printed word", "null"),
    ("what a thing is, does, or what state it is in", '["the answer", "plausible but wrong", "...", "..."]'))
BLIND = "The picture is withheld. Give the answer that seems most likely from the question alone.\n"
MIN_ZOOMS, MAX_ZOOMS = 2, 4          # of a proposal
FINER = 1.5                          # how much finer each zoom must be (ratio of lengths)
MAX_REDUNDANCY = 0.1                 # of a cold-start trajectory (env.redundancy)
FACTOR = 32                          # sides of an endpoint's images are multiples of it, as Qwen3-VL wants


class Job:
    """What all photographs share: settings, and all conversations so far."""

    def __init__(self, cfg):
        self.cfg = cfg
        self.episode = env.EpisodeConfig(**{**env.REAL_EPISODE, "max_pixels": cfg.max_pixels})
        self.stopped = False                 # after an error: ask nothing more
        self.lock = threading.Lock()
        self.answers = {}                    # key of a conversation -> the assistant's texts
        self.log = open(os.path.join(cfg.out, "answers.jsonl"), "a+", buffering=1)
        self.log.seek(0)
        for line in self.log:
            try:
                self.answers.setdefault(*json.loads(line))
            except ValueError:               # empty, or the half line that a killed run leaves
                pass


def part(seen):
    """A part of a chat message: a text, or an image (env.Shown)."""
    if isinstance(seen, str):
        return {"type": "text", "text": seen}
    return image_part(seen.resized(FACTOR))


def ask_model(job, who, traj, episode):
    """Hold a new conversation with an endpoint, which is shown what the tokens of env.step show. Returns the
    assistant's texts. Raises ConnectionError when the endpoint fails or the job has stopped."""
    system = env.SYSTEM if episode.max_crops else env.SYSTEM_NO_TOOL
    question = [part(traj.shown[0]), part(traj.row["problem"])]
    messages = [dict(role="system", content=system), dict(role="user", content=question)]
    address, name = getattr(job.cfg, who), getattr(job.cfg, who + "_name")
    while traj.status == "open":
        if job.stopped:
            raise ConnectionError("stopped")
        text = chat(address, name, messages, temperature=1.0)
        text = text.strip().encode(errors="replace").decode()  # half a surrogate pair cannot be tokenised
        env.step(traj, text, episode)
        turn = traj.turns[-1]
        seen = part(turn.shown or env.ERRORS.get(turn.error, ""))
        seen = [part("<tool_response>\n"), seen, part("\n</tool_response>")]
        messages += [dict(role="assistant", content=text), dict(role="user", content=seen)]
    return [turn.text for turn in traj.turns]


def converse(job, row, who, episode, k):
    """k conversations of the "annotator" or the "policy" about a row: env.Trajectory without tokens. Recorded
    ones are not held again."""
    start = env.begin(row, episode)
    # What decides the answers, and no more: a new setting must not make those that were paid for worthless.
    request = [row["doc_id"], row["images"][0].size, row["problem"], getattr(job.cfg, who + "_name"),
               job.cfg.seed, env.SYSTEM, episode.max_crops, episode.max_pixels]
    trajs = []
    for i in range(k):
        key = hashlib.sha256(json.dumps([*request, i]).encode()).hexdigest()
        if key not in job.answers:
            texts = ask_model(job, who, start.fork(), episode)
            with job.lock:                   # newline first: the line before may be cut
                job.log.write("\n" + json.dumps([key, texts]))
                job.answers.setdefault(key, texts)     # a copy of the photograph may have been faster
        traj = start.fork()
        for text in job.answers[key]:
            env.step(traj, text, episode)
        trajs.append(traj)
    return trajs


# The steps of a proposal, on its row, whose image is still in memory: each adds to the row, or returns the
# reason why it drops it.

def select(job, row):
    """1. Photographs that can be read and are large enough."""
    path = row["images"][0]
    try:
        image = env.open_image(path)
    except UserError as e:
        tqdm.write(f"left out: {e}")
        return "unreadable"
    if image.width * image.height < job.cfg.min_megapixels * 1e6:
        return "too small"
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    row.update(images=[image], doc_id=f"{digest[:12]}-{row['doc_id']}")


def propose(job, row):
    """2. The annotator zooms in on a detail, step by step, and ends with a question about it."""
    kind, choices = DETAILS[sum(row["doc_id"].encode()) % len(DETAILS)]
    asked = {**row, "problem": PROPOSE.format(kind=kind, choices=choices)}
    [traj] = converse(job, asked, "annotator", replace(job.episode, max_crops=MAX_ZOOMS), 1)
    if traj.answer is None:
        return "no question"
    if len(traj.crops) < MIN_ZOOMS:
        return "too few zooms"
    whole = outer = traj.shown[0].box
    for box in traj.crops:
        if env.intersection(box, outer) < env.area(box) or env.area(box) * FINER ** 2 > env.area(outer):
            return "a zoom leaves the crop before it, or is hardly finer"
        outer = box
    if env.area(outer) > job.cfg.evidence_share * env.area(whole):
        return "the last view is too large"
    row.update(problem=traj.answer, boxes=[outer], chain=traj.crops)      # `ask` finds the question in it


def ask(job, row):
    """3. Read the question: it needs a short answer that can be judged. Options go into its text."""
    said = row["problem"]
    try:
        made = json.loads(said[said.find("{"):said.rfind("}") + 1])       # it is often in a code fence
        texts = [made["question"], str(made["answer"]), *(made.get("choices") or [])]
        printable = "".join(texts).isprintable() and all(map(str.strip, texts))
    except Exception:                        # a model can write anything
        return "malformed"
    problem, answer, *choices = texts
    if not printable or len(problem) > 400 or max(map(len, texts[1:])) > 60:
        return "unprintable or too long"
    if choices and (answer not in choices or not 3 <= len(choices) <= 8):
        return "options unclear"
    choices.sort()                           # their order must not tell the answer
    for letter, choice in zip("ABCDEFGH", choices):
        problem += f"\n{letter}. {choice}"
    row.update(problem=problem, solution=answer, choices=choices or None)


def verify(job, row):
    """4. Hard and true: hardly ever answered from text or shrunken image, nearly always from the evidence."""
    cfg = job.cfg
    [image] = row["images"]
    grey = Image.new("RGB", (64, 64), "grey")
    evidence = image.crop(row["boxes"][0])
    for seen, hint, least, most, reason in (
            (grey, BLIND, 0, cfg.blind, "given away by its text"),
            (image, "", 0, cfg.blind, "answered without zooming"),
            (evidence, "", cfg.agree, cfg.votes, "answer not confirmed")):
        asked = {**row, "images": [seen], "problem": hint + row["problem"]}
        trajs = converse(job, asked, "annotator", replace(job.episode, max_crops=0), cfg.votes)
        if not least <= sum(map(env.is_right, trajs)) <= most:
            return reason


def grade(job, row):
    """5. The policy, with the tool, solves it sometimes, not always, and never with fewer than two crops."""
    trajs = converse(job, row, "policy", job.episode, job.cfg.samples)
    crops = [len(traj.crops) for traj in trajs if env.is_right(traj)]
    rate = len(crops) / len(trajs)
    if not crops:
        return "never solved"
    if rate > job.cfg.max_rate:
        return "solved too often"
    if min(crops) < 2:
        return "solved with one crop or none"
    row.update(difficulty=min(crops), solve_rate=rate)


def collect(job, row):
    """6. Cold-start trajectories of the annotator (lists of texts): per_question of the faultless ones, first
    those that recovered (looked where nothing of the evidence is, and then where it is). May be none."""
    found = []
    for traj in converse(job, row, "annotator", job.episode, job.cfg.attempts):
        refused = any(turn.error for turn in traj.turns)
        repeats = env.redundancy(traj.crops, env.RewardConfig.eps) > MAX_REDUNDANCY
        if not refused and not repeats and env.is_right(traj) and env.covers(traj):
            overlaps = [env.intersection(box, row["boxes"][0]) for box in traj.crops]
            found.insert(len(found) if min(overlaps) else 0, [turn.text for turn in traj.turns])
    row["turns"] = found[:job.cfg.per_question]


STEPS = (select, propose, ask, verify, grade, collect)


def build(job, proposal):
    """What a proposal (path of a photograph, number) leads to: "kept", or the step that dropped it and why,
    then its side and its rows."""
    path, n = proposal
    row = {"images": [path], "doc_id": n, "data_source": "photographs"}
    for step in STEPS:
        try:
            reason = step(job, row)
        except ConnectionError as e:
            tqdm.write(f"{str(path)!r}: {e}; not recorded, so the same command asks again")
            reason = "endpoint failed"
        if reason:
            return f"{step.__name__}: {reason}", "train", []
    # 7. The photograph decides where a question goes, so that copies are on one side and a new photograph
    # moves no other; without a trajectory it cannot be sft.
    place = int(row["doc_id"][:8], 16) / 2 ** 32 - job.cfg.share_test
    row["images"] = [os.path.relpath(path, job.cfg.out)]
    found = row.pop("turns")
    if found and 0 <= place < job.cfg.share_sft:
        return "kept", "sft", [{**row, "turns": turns} for turns in found]
    return "kept", "test" if place < 0 else "train", [row]


def construct(cfg):
    """Rows and cold-start trajectories from the photographs of cfg.images."""
    known = Image.registered_extensions()
    paths = sorted(path for path in Path(cfg.images).rglob("*") if path.suffix.lower() in known)
    if not paths:
        raise UserError(f"--images={cfg.images}: no images there; give a folder of photographs")
    proposals = list(product(paths, range(cfg.per_image)))
    job = Job(cfg)
    fates, sides = Counter(), {"sft": [], "train": [], "test": []}
    with ThreadPoolExecutor(cfg.parallel) as pool:
        try:                                 # results come in the order of the proposals
            results = pool.map(partial(build, job), proposals)
            for fate, side, rows in tqdm(results, total=len(proposals), desc="proposals", disable=None):
                fates[fate] += 1
                sides[side] += rows
        finally:                             # after an error those under way stop before their next request
            job.stopped = True
    for side, rows in sides.items():
        write_rows(cfg.out, side, rows)
    sft.write_text(os.path.join(cfg.out, "data_card.json"), json.dumps({"proposals": fates}, indent=1))
    print(f"{cfg.out}: {fates['kept']} questions of {len(proposals)} proposals; data_card.json says why others "
          f"were dropped. To look at them: python eval.py --report={cfg.out}")


# ----------------------------------------------------------------------------------------------------------
# Published benchmarks. A reader is a function of (path, image_root) and returns rows as env.load_rows does,
# with `category`. Layouts: open-compass/VLMEvalKit (TSV), penghao-wu/vstar, Mini-o3/Mini-o3 (VisualProbe).

def multiple_choice(where, image, question, options, letter, category):
    """A row of a question with options, in the wording that all benchmarks get; letter is the right one's."""
    letters = "ABCDE"[:len(options)]
    if letter not in tuple(letters):
        raise UserError(f"{where}: the answer {letter!r} is none of its {len(options)} options")
    problem = question
    for option_letter, option in zip(letters, options):
        problem += f"\n{option_letter}. {option}"
    problem += "\nAnswer with the letter of the right option."
    return {"images": [image], "problem": problem, "solution": letter, "choices": options,
            "doc_id": os.path.basename(where), "category": category}


def unpack(text, folder):
    """Write an image in base64 to a file named by its content, unless it is there. Returns its path."""
    file = os.path.join(folder, hashlib.sha1(text.encode()).hexdigest())
    if not os.path.exists(file):
        os.makedirs(folder, exist_ok=True)
        with open(f"{file}.{os.getpid()}", "wb") as f:         # other ranks may be writing the same image
            f.write(base64.b64decode(text))
        os.replace(f.name, file)
    return file


def read_options(item):
    """The options of a line: columns A, B, ... up to the first empty one; or one list of "(A) red" (Lite)."""
    options = []
    if "A" not in item:
        for option in ast.literal_eval(item["multi-choice options"]):
            options.append(option[len("(A) "):])
        return options
    for letter in "ABCDE":
        if not item.get(letter):
            break
        options.append(item[letter])
    return options


def read_tsv(path, image_root, *columns):
    """Rows of a TSV of VLMEvalKit; they carry `columns` too.

    The column `image` holds base64, unpacked once to <path>.images/, or the index of the line that has it. A
    _local.tsv, which VLMEvalKit writes for a file above 1 GB, has the column `image_path` in its place.
    """
    csv.field_size_limit(2 ** 31 - 1)
    rows, files = [], {}
    with open(path, newline="", encoding="utf-8-sig") as f:
        for i, item in enumerate(csv.DictReader(f, delimiter="\t")):
            image = item.get("image") or ""
            if len(image) > 64:
                image = files[item["index"]] = unpack(image, path + ".images")
            elif not image:
                image = os.path.join(image_root or os.path.dirname(path), item["image_path"])
            row = multiple_choice(f"{path}: row {i}", image, item["question"], read_options(item),
                                  item["answer"].strip(), item["category"])
            for column in columns:
                row[column] = item[column]
            rows.append(row)
    for row in rows:
        image = row["images"][0]
        row["images"] = [files.get(image, image)]
    return rows


def vstar(path, image_root):
    """V*Bench, 191 questions: the TSV of VLMEvalKit or the published folder. Its test_questions.jsonl has
    question and options in one text; X.json beside X.jpg has the evidence boxes as [x, y, w, h]."""
    if path.endswith(".tsv"):
        return read_tsv(path, image_root)
    rows = []
    table = os.path.join(path, "test_questions.jsonl")
    for i, item in enumerate(env.read_lines(table)):
        if item["category"] not in ("direct_attributes", "relative_position"):
            continue                         # the folders OCR and GPT4V-hard are not part of it
        question = item["text"].partition("\nAnswer with the option")[0]
        question, *options = re.split(r"\s*\([A-E]\)\s*", question)
        image = os.path.join(path, item["image"])
        where = f"{table}: row {i}"
        row = multiple_choice(where, image, question, options, item["label"], item["category"])
        for x, y, w, h in sft.read_json(os.path.splitext(image)[0] + ".json", {}).get("bbox", []):
            row.setdefault("boxes", []).append([x, y, x + w, y + h])
        rows.append(row)
    return rows


def hrbench(path, image_root):
    """HR-Bench: each question in four rotations of its options; FSP is on one instance, FCP on several."""
    rows = read_tsv(path, image_root, "cycle_category")
    for row in rows:
        row["category"] = {"single": "FSP", "cross": "FCP"}.get(row["category"], row["category"])
    return rows


def mmerealworld(path, image_root):
    """MME-RealWorld and its Lite split: categories like "Perception/Monitoring/person/attribute/color"."""
    rows = read_tsv(path, image_root, "l2-category")
    for row in rows:
        row["category"] += "/" + row.pop("l2-category").lower()
    return rows


def visualprobe(path, image_root):
    """The three levels of VisualProbe, each a benchmark of its own. Image paths are relative to `path`."""
    rows = []
    for level in ("Easy", "Medium", "Hard"):
        file = os.path.join(path, f"VisualProbe_{level}", "val.json")
        for row in env.load_rows(file, image_root or path):
            rows.append({**row, "bench": f"visualprobe_{level.lower()}"})
    return rows


def row_files(path, image_root):
    """Rows of a file, or of all .json and .jsonl files of a folder."""
    files = sorted(Path(path).glob("*.json*")) if os.path.isdir(path) else [path]
    rows = []
    for file in files:
        for row in env.load_rows(str(file), image_root):
            rows.append({"category": row.get("data_source"), **row})
    return rows


# FORK: the benchmarks.
BENCHES = {"vstar": vstar, "hrbench4k": hrbench, "hrbench8k": hrbench, "mmerealworld": mmerealworld,
           "mmerealworld_lite": mmerealworld, "visualprobe": visualprobe, "rows": row_files}


def read_benches(spec, image_root, limit):
    """{name: rows} of spec, "NAME:PATH,NAME:PATH"; of each at most limit rows (0: all).

    Raises UserError for an unknown name, a path or an image that does not exist, another layout, no
    questions.
    """
    benches = {}
    for entry in spec.split(","):
        name, _, path = entry.partition(":")
        if name not in BENCHES or name in benches or not os.path.exists(path):
            raise UserError(f"--bench: {entry!r} is not NAME:PATH of a file or folder, each name once; "
                            f"the names are {', '.join(BENCHES)}")
        try:
            rows = BENCHES[name](path, image_root)
        except Exception as e:               # whatever a damaged file makes a parser raise
            raise UserError(f"{path}: damaged or not as {name} is published ({type(e).__name__}: {e})")
        if not rows:
            raise UserError(f"{path}: no questions of {name}; give the file or folder as it is published")
        for row in rows:
            row["images"] = [env.find_image("", os.path.abspath(row["images"][0]), row["doc_id"], False)]
            benches.setdefault(row.pop("bench", name), []).append(row)
    return {name: rows[:limit or None] for name, rows in benches.items()}


# ----------------------------------------------------------------------------------------------------------

def foreign(folder, images=""):
    """Does a folder hold rows that are not of these photographs (default: not of the built-in scenes)?"""
    made = sft.read_json(os.path.join(folder, "config.json"), {})
    return made.get("images") != images and any(Path(folder).glob("*.jsonl"))


def make(cfg):
    """The rows of cfg.out, unless they are there."""
    if foreign(cfg.out, cfg.images):
        raise UserError(f"{cfg.out} holds rows that this command did not make; give another --out")
    if cfg.task not in TASKS:
        raise UserError(f"--task={cfg.task}: the tasks are {', '.join(TASKS)}")
    if not cfg.images:
        sft.same_settings(cfg.out, cfg)
        if os.path.exists(os.path.join(cfg.out, "tiny")):      # it is made last
            return
    os.makedirs(cfg.out, exist_ok=True)
    sft.lock(cfg.out)
    sft.write_text(os.path.join(cfg.out, "config.json"), json.dumps(asdict(cfg), indent=1))
    if cfg.images:
        construct(cfg)
        return
    write_scenes(cfg)
    save_tiny(cfg.out, cfg.seed)


def main(cfg):
    """Make the rows of cfg.out: scenes, or questions about photographs. All ranks must reach this."""
    rank, _, device = sft.setup()
    if rank == 0:
        make(cfg)
    sft.all_sum([0], device)                 # the others wait


if __name__ == "__main__":
    sft.cli(main, Config, {})
