"""eval.py, file 5 of 5 (read env.py first): measure a policy by the rollout it was trained with.

    torchrun eval.py --model=runs/rppo --data=data/scenes-0        # a run folder, a checkpoint or a hub id
    torchrun eval.py --model=runs/rppo --data=data/scenes-0 --k=8  # Avg@8 at temperature 1
    torchrun eval.py --model=... --bench=vstar:vstar_bench,hrbench4k:hr_bench_4k.tsv      # published benchmarks, greedy
    torchrun eval.py --model=... --bench=visualprobe:VisualProbe --k=8 --temperature=1    # Avg@8
    torchrun eval.py --model=... --bench=vstar:vstar_bench --tool=off                     # without the tool
    python eval.py --model=... --image=photo.jpg --question="What does the sign say?"

Prints one table, writes <out>/eval.json and draws <out>/trajectory.png. Of the scenes: the metrics at temperature 1 (k samples
a row) and greedy, and by the number of candidates (`difficulty` of a row). Of each benchmark: the metrics overall and by
category; and where both were run in one <out>, what the tool repaired and what it broke. Every question of a benchmark is
recorded in <out>/records.<rank>.jsonl when it is done; the same command goes on from there.
"""
import base64
import csv
import glob
import hashlib
import io
import json
import math
import os
import re
import sys
import textwrap
import time
import zlib
from collections import defaultdict
from dataclasses import asdict, dataclass, fields, replace
from itertools import groupby, takewhile
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps
from tqdm import tqdm

import data
import env

COLUMNS = {"accuracy": "acc", "crops_right": "crop+", "crops_wrong": "crop-", "redundancy_wrong": "redun-", "overlap_wrong": "over-",
           "repeat_rate": "repeat", "invalid_call_rate": "inval", "unanswered_rate": "unansw", "guess_rate": "guess",
           "evidence_coverage": "cover"}  # metric -> heading; + over right answers, - over wrong ones
HEADER = " ".join(f"{c:>6}" for c in COLUMNS.values())


@dataclass
class Config(env.World):
    seed: int = 0
    model: str = ""                  # a checkpoint, a run folder or a hub id
    data: str = "data/scenes-{seed}" # its test.jsonl is scored, unless there is a bench or an image
    image_root: str = ""             # where the images of rows lie; empty: relative to the file of the rows
    bench: str = ""                  # NAME:PATH,NAME:PATH; the names are the keys of BENCHES
    tool: str = "on"                 # off: as max_crops=0
    image: str = ""                  # a picture to ask the question about
    question: str = ""
    out: str = "runs/eval"
    limit: int = 0                   # rows scored, from the beginning; 0: all
    k: int = 1                       # samples per row; a benchmark is answered greedily with 1, at `temperature` with more


REAL = dict()


# ---------------------------------------------------------------------------------------------------------------
# What is counted of a trajectory, and the scores of rows.

AVERAGED = ("accuracy", "crops_right", "crops_wrong", "redundancy_wrong", "overlap_wrong", "unanswered_rate", "guess_rate",
            "evidence_coverage", "judge_failed_rate")
COUNTED = ("repeats", "crops", "invalid", "calls")
MEASURES = AVERAGED + COUNTED


def measure(traj, cfg):
    """One trajectory's share of every metric, in the order of MEASURES; NaN where it has none."""
    crops, nan, row = traj.crops, math.nan, traj.row
    right, answered = env.is_right(traj, row), traj.status == "answered"
    nearest = [max((env.iou(b, e) for e in crops[:i]), default=0.0) for i, b in enumerate(crops)]
    invalid = sum(error is not None and "<tool_call>" in env.without_thoughts(text) for text, _, error in traj.turns)
    seen = env.covers(traj, row) if row.get("boxes") else nan
    return [right, len(crops) if right else nan, nan if right else len(crops),
            nan if right or len(crops) < 2 else env.redundancy(crops, cfg.eps), nan if right else any(x >= 0.5 for x in nearest),
            not answered, nan if seen != seen else answered and not seen, seen,
            nan if traj.verdict is None else traj.verdict == "failed",
            sum(x >= 0.7 for x in nearest), len(crops), invalid, invalid + len(crops)]


def metrics(records):
    """Averages over records (..., len(MEASURES)), as in every log line and eval.json (README: glossary); None where there
    is nothing to average. judge_failed_rate is there when the judge was asked."""
    table = np.asarray(records, float).reshape(-1, len(MEASURES))
    known = [x[~np.isnan(x)] for x in table.T]
    out = {k: float(x.mean()) if len(x) else None for k, x in zip(AVERAGED, known)}
    if out["judge_failed_rate"] is None:
        del out["judge_failed_rate"]
    repeats, crops, invalid, calls = table[:, len(AVERAGED):].sum(0)
    return {**out, "repeat_rate": repeats / crops if crops else None, "invalid_call_rate": invalid / calls if calls else None}


def evaluate(policy, rows, cfg, rank=0, world=1, k=1, greedy=False, done=None, record=None):
    """Answer rows, shared out over the ranks, k times each. Returns (samples (rows, k, measures), a long trajectory of this
    rank or None). done: {number of a row: its samples} of what was answered before; record(number, k trajectories, k measures)
    is called for every other row of this rank. What is sampled depends on a row's number alone. All ranks must reach this."""
    done = dict(done or {})
    mine = [i for i in range(len(rows)) if i not in done][rank::world]
    per, records, longest = max(1, cfg.in_flight // k), [], None  # a trajectory holds its full-resolution image
    with policy.gathered():                      # ranks may have different numbers of pieces
        for at in tqdm([mine[i:i + per] for i in range(0, len(mine), per)], desc="eval", disable=True if rank else None,
                       leave=False):
            trajs = env.rollout(policy, [rows[i] for i in at], cfg, k, seed=(cfg.seed, 2 ** 31), prompt_ids=at, greedy=greedy)
            env.judge(trajs, cfg)
            longest = max([longest or trajs[0], *trajs], key=lambda t: len(t.turns))
            for i, *same in zip(at, *(trajs[j::k] for j in range(k))):
                measures = [measure(t, cfg) for t in same]
                records.append([i, *sum(measures, [])])
                if record:
                    record(i, same, measures)
    for i, *x in env.gather(records, world):
        done[int(i)] = np.reshape(x, (k, -1)).astype(float)
    return np.array([done[i] for i in range(len(rows))]), longest


def score(policy, rows, cfg, rank=0, world=1):
    """The contents of eval.json, sampled metrics and greedy ones beside them, and a long trajectory of this rank."""
    samples, longest = evaluate(policy, rows, cfg, rank, world, k=cfg.k)
    greedy = metrics(evaluate(policy, rows, cfg, rank, world, greedy=True)[0])
    right, crops, redundancy = (samples[..., MEASURES.index(x)].flatten() for x in ("accuracy", "crops", "redundancy_wrong"))
    levels = [r.get("difficulty") for r in rows]
    levels = np.repeat([int(x) if isinstance(x, (int, float)) else 0 for x in levels], cfg.k)
    by_level = {str(d): dict(n=int((levels == d).sum()), accuracy=float(right[levels == d].mean()),
                             crops=float(crops[levels == d].mean())) for d in np.unique(levels)}
    wrong = ~np.isnan(redundancy)                # and of two crops or more
    by_crops = {str(int(c)): dict(n=int((crops[wrong] == c).sum()), redundancy=float(redundancy[wrong & (crops == c)].mean()))
                for c in np.unique(crops[wrong])}
    return {**metrics(samples), "accuracy_greedy": greedy["accuracy"], "greedy": greedy, "n": len(rows), "k": cfg.k,
            "seed": cfg.seed, "temperature": cfg.temperature, "accuracy_by_candidates": by_level,
            "redundancy_wrong_by_crops": by_crops}, longest


# ---------------------------------------------------------------------------------------------------------------
# Published benchmarks: readers, which return rows with a `category`.

def multiple_choice(image, question, options, letter, where, **more):
    """A row of a question with options, in the one wording that all benchmarks get. letter: of the right option."""
    if letter not in tuple("ABCDEFGH"[:len(options)]):
        raise env.UserError(f"{where}: the answer {letter!r} is none of its {len(options)} options")
    lettered = "".join(f"\n{chr(65 + i)}. {option}" for i, option in enumerate(options))
    return dict(images=[image], problem=f"{question}{lettered}\nAnswer with the letter of the right option.", solution=letter,
                choices=options, doc_id=where, **more)


def need(item, keys, where):
    """The values of keys, or a UserError that names the first that is missing."""
    if lacking := [k for k in keys if not item.get(k)]:
        raise env.UserError(f"{where}: no `{lacking[0]}`")
    return [item[k] for k in keys]


def unpack(text, folder, where):
    """The file, made once, of an image in base64: all images of a TSV together may be larger than memory."""
    file = os.path.join(folder, hashlib.sha1(text.encode()).hexdigest())
    if not os.path.exists(file):
        try:
            raw = base64.b64decode(text)
            Image.open(io.BytesIO(raw))
        except (OSError, ValueError) as e:
            raise env.UserError(f"{where}: its image cannot be read ({type(e).__name__})")
        os.makedirs(folder, exist_ok=True)
        unfinished = Path(f"{file}.{os.environ.get('RANK', 0)}.tmp")  # other ranks may be at the same image
        unfinished.write_bytes(raw)
        unfinished.replace(file)
    return file


def read_tsv(path, letters, *columns):
    """A TSV of VLMEvalKit as multiple-choice rows that carry `columns` too; the options stand in the columns `letters`. Its
    images, in base64 or as the index of the line that has it, are unpacked to <path>.images/."""
    csv.field_size_limit(sys.maxsize)
    rows, files = [], {}
    with open(path, newline="", encoding="utf-8-sig") as f:
        reader = csv.DictReader(f, delimiter="\t")
        found = list(reader.fieldnames or ())
        if lacking := [c for c in ("index", "image", "question", *letters, "answer", *columns) if c not in found]:
            raise env.UserError(f"{path}: no column `{lacking[0]}`; it has {', '.join(found)}")
        for i, x in enumerate(tqdm(reader, desc=os.path.basename(path), disable=None, leave=False)):
            image, question, answer, *more = need(x, ("image", "question", "answer", *columns), f"{path}: row {i}")
            if len(image) > 64:
                image = files[x["index"]] = unpack(image, path + ".images", f"{path}: row {i}")
            options = list(takewhile(bool, (x[c] for c in letters)))
            rows.append(multiple_choice(image, question, options, answer.strip(), f"{path}: row {i}", **dict(zip(columns, more))))
    return [{**r, "images": [files.get(r["images"][0], r["images"][0])]} for r in rows]


def vstar(path, image_root):
    """V*Bench: VLMEvalKit's TSV; or test_questions.jsonl, whose texts hold question and options; or the native folders of
    X.jpg and X.json, where the right option comes first, so that they are shuffled (with a seed of their own)."""
    if path.endswith(".tsv"):
        return read_tsv(path, "ABCD", "category")
    table, rows = os.path.join(path, "test_questions.jsonl") if os.path.isdir(path) else path, []
    for i, text in enumerate(open(table, encoding="utf-8") if os.path.exists(table) else ()):
        where = f"{table}: line {i}"
        name, text, letter, category = need(json.loads(text), ("image", "text", "label", "category"), where)
        question, *options = re.split(r"\s*\([A-H]\)\s*", text.partition("\nAnswer with the option")[0])
        image = os.path.join(image_root or os.path.dirname(table), name)
        rows.append(multiple_choice(image, question, options, letter, where, category=category))
    for file in sorted(glob.glob(os.path.join(glob.escape(path), "*", "*.json"))) if not rows else ():
        question, options, boxes = need(env.read_json(file, None), ("question", "options", "bbox"), file)
        order = np.random.default_rng(zlib.crc32(os.path.basename(file).encode())).permutation(len(options)).tolist()
        image = next((x for x in sorted(glob.glob(glob.escape(file[:-4]) + "*")) if x != file), file[:-4] + "jpg")
        rows.append(multiple_choice(image, question, [options[i] for i in order], chr(65 + order.index(0)), file,
                                    category=os.path.basename(os.path.dirname(file)),
                                    boxes=[[x, y, x + w, y + h] for x, y, w, h in boxes]))
    return rows


def hrbench(path, image_root):
    """HR-Bench: each question in four rotations of its options; FSP asks about one instance, FCP across instances."""
    rows = read_tsv(path, "ABCD", "category", "cycle_category")
    return [{**r, "category": {"single": "FSP", "cross": "FCP"}.get(r["category"], r["category"])} for r in rows]


def mmerealworld(path, image_root):
    """MME-RealWorld and Lite: the fifth option says that the image does not show it. Categories are "Perception/..."."""
    return read_tsv(path, "ABCDE", "category")


def rows_of(path, image_root):
    """Rows of a file, or of all .json and .jsonl files of a folder (VisualProbe)."""
    files = sorted(glob.glob(os.path.join(glob.escape(path), "*.json*"))) if os.path.isdir(path) else [path]
    return [{**r, "category": r.get("category") or r.get("data_source") or os.path.basename(file)}
            for file in files for r in data.load_rows(file, image_root)]


BENCHES = {"vstar": vstar, "hrbench4k": hrbench, "hrbench8k": hrbench, "mmerealworld": mmerealworld,
           "mmerealworld_lite": mmerealworld, "visualprobe": rows_of, "rows": rows_of}  # functions of (path, image_root)


def read_benches(cfg):
    """{name: rows} of --bench. UserError for an unknown name, a path or an image that does not exist, no questions."""
    parts, benches = [x.partition(":")[::2] for x in cfg.bench.split(",")], {}
    names = [name for name, _ in parts]
    if wrong := [n for n, path in parts if n not in BENCHES or names.count(n) > 1 or not os.path.exists(path)]:
        raise env.UserError(f"--bench={cfg.bench}: {wrong[0]} is not NAME:PATH of an existing file or folder, each name once; "
                            f"the names are {', '.join(BENCHES)}")
    for name, path in parts:
        benches[name] = BENCHES[name](path, cfg.image_root)[:cfg.limit or None]
        if not benches[name]:
            raise env.UserError(f"--bench={cfg.bench}: {path} holds no questions of {name}")
        if lost := [r for r in benches[name] if not os.path.exists(r["images"][0])]:
            raise env.UserError(f"{lost[0]['doc_id']}: image {lost[0]['images'][0]} does not exist ({len(lost)} such rows)")
    return benches


# ---------------------------------------------------------------------------------------------------------------
# Published benchmarks: records of questions, and the report.

def record_keys(policy, name, rows, cfg):
    """The name of the records of each row: the question and all that its answers depend on but max_crops, the weights included,
    so that what was recorded under other settings is never taken for this."""
    settings = {f.name: getattr(cfg, f.name) for f in fields(env.World) if f.name not in ("max_crops", "in_flight")}
    code = zlib.crc32(json.dumps([MEASURES, cfg.seed, cfg.k, settings]).encode())
    for p in policy.parameters():
        code = zlib.crc32(p.detach().flatten()[:1024].float().cpu().numpy().tobytes(), code)
    asked = [{**r, "images": os.path.basename(r["images"][0]), "doc_id": None} for r in rows]
    return [f"{name} {i} {zlib.crc32(json.dumps(r).encode(), code):08x}" for i, r in enumerate(asked)]


def read_records(out):
    """{key: {max_crops: samples (k, measures)}} of the questions that runs in this folder have answered."""
    done = defaultdict(dict)
    for file in glob.glob(os.path.join(glob.escape(out), "records.*.jsonl")):
        for text in open(file):
            try:
                record = json.loads(text)
            except ValueError:
                continue               # half a line of a killed run, or the line break behind it
            done[record["key"]][record["max_crops"]] = np.array(record["samples"], float)
    return done


def score_benches(policy, benches, cfg, rank=0, world=1):
    """Answer every question of benches ({name: rows}) that is not recorded yet. Returns the contents of eval.json and a long
    trajectory of this rank, or None. All ranks must reach this; they share cfg.out."""
    done, result, longest = read_records(cfg.out), {}, None
    if world > 1:
        env.dist.barrier()             # all have read before anyone writes
    os.makedirs(cfg.out, exist_ok=True)
    with open(os.path.join(cfg.out, f"records.{rank}.jsonl"), "a", buffering=1) as f:
        f.write("\n")

        def record(i, trajs, measures):
            if all(t.verdict != "failed" for t in trajs):  # or else the next run asks again
                samples = [[None if x != x else float(x) for x in m] for m in measures]
                f.write(json.dumps({"key": keys[i], "max_crops": cfg.max_crops, "doc_id": rows[i].get("doc_id"),
                                    "samples": samples, "answers": [t.answer for t in trajs]}) + "\n")
        for name, rows in benches.items():
            keys = record_keys(policy, name, rows, cfg)
            before = {i: done[x][cfg.max_crops] for i, x in enumerate(keys) if cfg.max_crops in done[x]}
            if rank == 0:
                print(f"{name}: {len(rows)} questions, {len(before)} of them recorded before", flush=True)
            samples, traj = evaluate(policy, rows, cfg, rank, world, cfg.k, cfg.k == 1, before, record)
            modes, longest = {cfg.max_crops: samples}, longest or traj
            complete = set.intersection(*(set(done[x]) for x in keys))       # what earlier runs answered all of
            if others := [n for n in complete if bool(n) != bool(cfg.max_crops)]:
                modes[max(others)] = np.array([done[x][max(others)] for x in keys])
            result[name] = report(rows, modes)
    return {"benches": result, "seed": cfg.seed, "k": cfg.k, "temperature": cfg.temperature if cfg.k > 1 else 0.0,
            **{k: getattr(cfg, k) for k in ("max_pixels", "min_crop_pixels", "max_crop_pixels")}}, longest


def summarise(rows, samples):
    """Metrics of samples (rows, k, measures), overall and by category. Accuracy is the mean over the rotations of the options,
    where a benchmark has them; a category "a/b" counts in "a" too."""
    rotation, groups, out = np.array([str(r.get("cycle_category")) for r in rows]), {}, {}
    for i, r in enumerate(rows):
        for c in {"", r["category"], r["category"].partition("/")[0]}:    # "": all rows
            groups.setdefault(c, []).append(i)
    for c in sorted(groups):
        part, turned = samples[groups[c]], rotation[groups[c]]
        accuracy = np.mean([part[turned == x, :, 0].mean() for x in np.unique(turned)])
        out[c] = {**metrics(part), "accuracy": float(accuracy), "n": len(part)}
    return {**out.pop(""), "categories": out}


def report(rows, modes):
    """Metrics of a benchmark with the tool and without it, from modes {max_crops: samples (rows, k, measures)}; where both
    are there, the difference of the accuracies, split into what the tool repaired and what it broke."""
    out = {"tool_on" if crops else "tool_off": summarise(rows, samples) for crops, samples in sorted(modes.items(), reverse=True)}
    if len(modes) == 2:
        off, on = (modes[crops][..., 0].mean(1) for crops in sorted(modes))  # (rows,) accuracy over the k samples
        gain = on - off
        out["tool"] = dict(difference=float(gain.mean()), repaired=float(gain.clip(0).mean()), broken=float((-gain).clip(0).mean()),
                           n_repaired=int((gain > 0).sum()), n_broken=int((gain < 0).sum()))
    return out


def show_benches(result):
    """The table of eval.json."""
    print(f"{'':34}{'n':>6} {HEADER}")
    for name, parts in result["benches"].items():
        for mode, m in [(x, parts[x]) for x in ("tool_on", "tool_off") if x in parts]:
            for label, x in ((f"{name} {mode}", m), *((f"  {c}", x) for c, x in m["categories"].items())):
                print(f"{label[:34]:34}{x['n']:6} {line(x)}")
            if failed := m.get("judge_failed_rate"):
                print(f"  the judge failed on {failed:.1%} of what it was asked: scored as wrong, tried again by the next run")
        if tool := parts.get("tool"):
            print(f"  the tool: {tool['difference']:+.3f} = {tool['repaired']:.3f} repaired ({tool['n_repaired']} questions) "
                  f"- {tool['broken']:.3f} broken ({tool['n_broken']})")


# ---------------------------------------------------------------------------------------------------------------
# What a person looks at.

def line(m):
    """Metrics in fixed columns, for log lines and tables."""
    return " ".join("     -" if m[c] is None else f"{m[c]:6.3f}" for c in COLUMNS)


def show(traj, proc):
    """One trajectory as text, what the policy sampled told apart from what it was given."""
    out = []
    for sampled, part in groupby(zip(traj.mask, traj.ids), key=lambda x: x[0]):
        ids = [i for _, i in part]
        text, n = "", ids.count(proc.image)
        if n:
            text, ids = proc.decode(ids[:ids.index(proc.image)]) + f"[{n} image tokens]", ids[ids.index(proc.image) + n:]
        text += proc.decode(ids)
        if not out:
            text = "... " + text[text.rfind("<|im_start|>user"):]  # the system prompt is always the same
        out += [f"  {'sampled' if sampled else 'given  '} | {x!r}" for x in text.strip("\n").split("\n")]
    return "\n".join(out)


def draw(traj, path):
    """A picture of one trajectory: the scene with its numbered boxes, beside it each turn's text and the crop it led to."""
    inks = ("#d62728", "#1f77b4", "#2ca02c", "#9467bd", "#ff7f0e", "#17becf", "#8c564b", "#e377c2")
    font, edge, side, thumb = ImageFont.load_default(15), 20, 520, 130
    scene, scale = ImageOps.contain(traj.image, (side, side)), side / max(traj.image.size)
    question = textwrap.wrap(f"Question: {traj.row['problem']}", 62) + [f"Answer: {traj.answer}"]
    if "solution" in traj.row:
        question[-1] += f"   Solution: {traj.row['solution']}   ({'right' if env.is_right(traj, traj.row) else 'wrong'})"
    numbers, turns = iter(range(1, len(traj.crops) + 1)), []
    for text, action, error in traj.turns:
        crop = next(numbers, 0) if action.kind == "crop" and error is None else 0
        lines = [y for x in text.split("\n") for y in textwrap.wrap(x, 84)]
        turns.append((lines, crop, max(thumb + 16 if crop else 0, 20 * len(lines) + 20)))
    height = 2 * edge + max(scene.height + 20 * len(question) + 14, sum(h for _, _, h in turns))
    sheet = Image.new("RGB", (side + 3 * edge + thumb + 700, height), "white")
    d = ImageDraw.Draw(sheet)

    def write(x, y, lines):
        for i, t in enumerate(lines):
            d.text((x, y + 20 * i), t.encode("ascii", "replace").decode(), fill="black", font=font)

    def frame(x0, y0, x1, y1, k, aside=0):
        d.rectangle((x0, y0, x1, y1), outline=inks[k % 8], width=3)
        d.rectangle((x0 + aside, y0, x0 + aside + 20, y0 + 20), fill=inks[k % 8])
        d.text((x0 + aside + 6, y0 + 1), str(k), fill="white", font=font)
    sheet.paste(scene, (edge, edge))
    write(edge, edge + scene.height + 14, question)
    for k, box in enumerate(traj.crops, 1):
        frame(*(edge + v * scale for v in box), k, 22 * (k - 1) % 88)  # numbers side by side where boxes share a corner
    x, y = side + 2 * edge, edge
    for lines, crop, h in turns:
        if crop:
            sheet.paste(ImageOps.contain(traj.image.crop(traj.boxes[crop]), (thumb, thumb)), (x, y))
            frame(x - 2, y - 2, x + thumb + 1, y + thumb + 1, crop)
        write(x + thumb + edge, y, lines)
        y += h
    sheet.save(path + ".tmp", "PNG")
    os.replace(path + ".tmp", path)


def ask(policy, cfg):
    """--image and --question: answer greedily, print the trajectory, draw it."""
    os.makedirs(cfg.out, exist_ok=True)
    traj, = env.rollout(policy, [{"images": [cfg.image], "problem": cfg.question}], cfg, greedy=True)
    print(show(traj, policy.proc))
    draw(traj, os.path.join(cfg.out, "trajectory.png"))
    print(f"answer: {traj.answer} ({traj.status}, {len(traj.crops)} crops) -> {cfg.out}/trajectory.png")
    return {"answer": traj.answer, "status": traj.status, "crops": traj.crops}


def main(cfg):
    rank, world, device = env.setup()
    if not cfg.model:
        raise env.UserError("eval.py needs --model=FOLDER, for example --model=runs/rppo (make it with `torchrun rppo.py`)")
    if cfg.tool not in ("on", "off") or bool(cfg.image) != bool(cfg.question):
        raise env.UserError("--tool is on or off, and --image and --question are given together")
    cfg = replace(cfg, max_crops=cfg.max_crops if cfg.tool == "on" else 0)
    if cfg.image:
        return ask(env.load_policy(cfg.model, device), cfg) if rank == 0 else None
    benches = read_benches(cfg) if cfg.bench else {}
    rows = sum(benches.values(), []) or data.load_rows(os.path.join(cfg.data, "test.jsonl"), cfg.image_root)[:cfg.limit or None]
    data.check_images(rows, rank, world)
    policy, t = env.load_policy(cfg.model, device), time.time()
    with env.memory("evaluation", cfg.max_tokens):
        result, longest = score_benches(policy, benches, cfg, rank, world) if benches else score(policy, rows, cfg, rank, world)
    result["seconds"] = round(time.time() - t, 1)
    if rank == 0:
        os.makedirs(cfg.out, exist_ok=True)
        env.write_text(os.path.join(cfg.out, "eval.json"), json.dumps({**result, "config": asdict(cfg)}, indent=1))
        if longest:
            draw(longest, os.path.join(cfg.out, "trajectory.png"))
        print(f"eval {cfg.model}: seed {cfg.seed}, k {cfg.k}, {result['seconds']} s -> {cfg.out}/eval.json")
    if rank == 0 and benches:
        show_benches(result)
    elif rank == 0:
        print(f"{'n ' + str(result['n']):8} {HEADER}\nsampled  {line(result)}\ngreedy   {line(result['greedy'])}")
        for d, r in result["accuracy_by_candidates"].items():
            print(f"  {d} candidates: accuracy {r['accuracy']:.3f}, crops {r['crops']:.2f} (n={r['n']})")
    return result


if __name__ == "__main__":
    env.run(main, Config, REAL)
