"""eval.py, file 5 of 5 (read env.py first): measure a policy by the rollout it was trained with.

    torchrun eval.py --model=runs/rppo --data=data/scenes-0        # a run folder, a checkpoint or a hub id
    torchrun eval.py --model=runs/rppo --data=data/scenes-0 --k=8  # Avg@8 at temperature 1
    torchrun eval.py --model=... --bench=vstar:vstar_bench,hrbench4k:hr_bench_4k.tsv      # published benchmarks, greedy
    torchrun eval.py --model=... --bench=visualprobe:VisualProbe --k=8 --temperature=1    # Avg@8
    torchrun eval.py --model=... --bench=vstar:vstar_bench --tool=off                     # without the tool
    python eval.py --model=... --image=photo.jpg --question="What does the sign say?"

Prints one table and writes <out>/eval.json. Of the scenes: the metrics of env.metrics at temperature 1 (k samples a row) and
greedy, n, seed, and accuracy and crops by the number of candidates (`difficulty` of a row). Of each benchmark: the metrics
overall and by category; and where both were run in one <out>, what the tool repaired and what it broke. Every question is
recorded in <out>/records.<rank>.jsonl when it is done; the same command goes on from there. Also draws <out>/trajectory.png.
"""
import base64
import csv
import glob
import hashlib
import io
import json
import os
import re
import sys
import textwrap
import time
import zlib
from dataclasses import asdict, dataclass, fields, replace
from itertools import takewhile

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

import data
import env

COLUMNS = {"accuracy": "acc", "crops_right": "crop+", "crops_wrong": "crop-", "redundancy_wrong": "redun-", "overlap_wrong": "over-",
           "repeat_rate": "repeat", "invalid_call_rate": "inval", "unanswered_rate": "unansw", "guess_rate": "guess",
           "evidence_coverage": "cover"}  # metric -> heading; + over right answers, - over wrong ones


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


def pieces(policy, rows, at, cfg, k, greedy, quiet):
    """Yields (numbers of rows, k trajectories of each), a piece of the rows `at` at a time: a trajectory holds its
    full-resolution image. What is sampled depends on a row's number, not on its piece or rank."""
    per = max(1, cfg.in_flight // k)
    with policy.gathered():            # ranks may have different numbers of pieces
        for i in tqdm(range(0, len(at), per), desc="eval", disable=True if quiet else None, leave=False):
            mine = at[i:i + per]
            trajs = env.rollout(policy, [rows[j] for j in mine], cfg, k, seed=(cfg.seed, 2 ** 31), prompt_ids=mine, greedy=greedy)
            env.judge(trajs, cfg)
            yield mine, trajs


def evaluate(policy, rows, cfg, rank=0, world=1, k=1, greedy=False):
    """Score rows, shared out over the ranks. Returns (metrics, a long trajectory of this rank, {difficulty: [n, accuracy,
    crops]}, redundancy of wrong trajectories by their number of crops). All ranks must reach this."""
    records, longest = [], None
    for _, trajs in pieces(policy, rows, list(range(rank, len(rows), world)), cfg, k, greedy, rank > 0):
        for t in trajs:
            level = t.row.get("difficulty")
            records.append(env.measure(t, cfg) + [level if isinstance(level, (int, float)) else 0])
            longest = t if longest is None or len(t.turns) > len(longest.turns) and len(records) < 64 else longest
    records = np.array(env.gather(records, world), float).reshape(-1, len(env.MEASURES) + 1)
    levels, crops = records[:, -1], records[:, env.MEASURES.index("crops")]
    by_level = {str(int(d)): dict(n=int((levels == d).sum()), accuracy=float(records[levels == d, 0].mean()),
                                  crops=float(crops[levels == d].mean())) for d in np.unique(levels)}
    wrong = lambda c: records[(crops == c) & (records[:, 0] == 0), env.MEASURES.index("redundancy_wrong")]
    by_crops = {str(int(c)): dict(n=len(wrong(c)), redundancy=float(wrong(c).mean()))
                for c in np.unique(crops) if c > 1 and len(wrong(c))}
    return env.metrics(records[:, :-1]), longest, by_level, by_crops


def score(policy, rows, cfg, rank=0, world=1):
    """The contents of eval.json: sampled metrics, greedy ones beside them."""
    sampled, longest, by_level, by_crops = evaluate(policy, rows, cfg, rank, world, k=cfg.k)
    greedy, *_ = evaluate(policy, rows, cfg, rank, world, greedy=True)
    return {**sampled, "accuracy_greedy": greedy["accuracy"], "greedy": greedy, "n": len(rows), "k": cfg.k, "seed": cfg.seed,
            "temperature": cfg.temperature, "accuracy_by_candidates": by_level, "redundancy_wrong_by_crops": by_crops}, longest


# ---------------------------------------------------------------------------------------------------------------
# Published benchmarks: readers, which return rows with a `category`; then records of questions, and the report from them.

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
        with open(file + ".tmp", "wb") as f:
            f.write(raw)
        os.replace(file + ".tmp", file)
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
            more = dict(zip(columns, more))
            rows.append(multiple_choice(image, question, options, answer.strip(), f"{path}: row {i}", **more))
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


def read_benches(cfg, rank=0, world=1):
    """{name: rows} of --bench. Rank 0 reads first: it unpacks the images. All ranks must reach this."""
    parts, benches = [x.partition(":")[::2] for x in cfg.bench.split(",")], {}
    names = [name for name, _ in parts]
    if wrong := [n for n, path in parts if n not in BENCHES or names.count(n) > 1 or not os.path.exists(path)]:
        raise env.UserError(f"--bench={cfg.bench}: {wrong[0]} is not NAME:PATH of an existing file or folder, each name once; "
                            f"the names are {', '.join(BENCHES)}")
    if rank:
        wait(world)
    for name, path in parts:
        benches[name] = BENCHES[name](path, cfg.image_root)[:cfg.limit or None]
        if not benches[name]:
            raise env.UserError(f"--bench={cfg.bench}: {path} holds no questions of {name}")
        if lost := [r for r in benches[name] if not os.path.exists(r["images"][0])]:
            raise env.UserError(f"{lost[0]['doc_id']}: image {lost[0]['images'][0]} does not exist ({len(lost)} such rows)")
    if not rank:
        wait(world)
    return benches


def wait(world):
    if world > 1:
        env.dist.barrier()


def record_key(policy, benches, cfg):
    """A function (name, max_crops, number of a row) -> the name of a record: the question and all that its answers depend on,
    the weights included, so that what was recorded under other settings is never taken for this."""
    weights = 0
    for p in policy.parameters():
        weights = zlib.crc32(p.detach().flatten()[:1024].float().cpu().numpy().tobytes(), weights)
    world = {f.name: getattr(cfg, f.name) for f in fields(env.World) if f.name not in ("max_crops", "in_flight")}

    def key(name, crops, i):
        row = {**benches[name][i], "images": os.path.basename(benches[name][i]["images"][0]), "doc_id": None}
        return f"{name} {crops} {i} {zlib.crc32(json.dumps([weights, cfg.seed, cfg.k, world, row]).encode()):08x}"
    return key


def summarise(rows, samples):
    """Metrics of a benchmark, overall and by category. samples: k records of env.measure for each row. Accuracy is the mean
    over the rotations of the options, where a benchmark has them; a category "a/b" counts in "a" too."""
    table, groups = np.array(samples, float), {}                                # (rows, k, measures)
    rotation = np.array([str(r.get("cycle_category")) for r in rows])

    def summary(at):
        part, turned = table[at], rotation[at]
        accuracy = np.mean([part[turned == x, :, 0].mean() for x in np.unique(turned)])
        return {**env.metrics(part.reshape(-1, table.shape[-1])), "accuracy": float(accuracy), "n": len(at)}
    for i, r in enumerate(rows):
        for c in {r["category"], r["category"].partition("/")[0]}:
            groups.setdefault(c, []).append(i)
    return {**summary(list(range(len(rows)))), "categories": {c: summary(groups[c]) for c in sorted(groups)}}


def read_records(out):
    """{key: k records of env.measure} of the questions that runs in this folder have answered."""
    done = {}
    for file in sorted(glob.glob(os.path.join(glob.escape(out), "records.*.jsonl"))):
        for text in open(file):
            try:
                record = json.loads(text)
            except ValueError:
                continue               # half a line of a killed run, or the line break behind it
            if not any(m[-1] for m in record["samples"]) or record["key"] not in done:
                done[record["key"]] = record["samples"]
    return done


def score_benches(policy, benches, cfg, rank=0, world=1):
    """Answer every question of benches ({name: rows}) that is not recorded yet, or on which the judge failed. Returns the
    contents of eval.json and a long trajectory of this rank, or None. All ranks must reach this; they share cfg.out."""
    key, done, longest = record_key(policy, benches, cfg), read_records(cfg.out), None
    wait(world)                        # all have read before anyone writes
    os.makedirs(cfg.out, exist_ok=True)
    with open(os.path.join(cfg.out, f"records.{rank}.jsonl"), "a") as f:
        f.write("\n")
        for name, rows in benches.items():
            keys = [key(name, cfg.max_crops, i) for i in range(len(rows))]
            todo = [i for i, x in enumerate(keys) if any(m[-1] for m in done.get(x, [[True]]))]
            if rank == 0:
                print(f"{name}: {len(rows)} questions, {len(rows) - len(todo)} of them recorded before", flush=True)
            for at, trajs in pieces(policy, rows, todo[rank::world], cfg, cfg.k, cfg.k == 1, rank > 0):
                for j, i in enumerate(at):
                    same = trajs[j * cfg.k:(j + 1) * cfg.k]
                    samples = [[None if x != x else float(x) for x in env.measure(t, cfg)] for t in same]
                    f.write(json.dumps({"key": keys[i], "doc_id": rows[i].get("doc_id"), "samples": samples,
                                        "answers": [t.answer for t in same]}) + "\n")
                    longest = max([longest or same[0], *same], key=lambda t: len(t.turns))
                f.flush()
    wait(world)
    return report(benches, read_records(cfg.out), key, cfg), longest


def report(benches, done, key, cfg):
    """What eval.json holds: for each benchmark the metrics of the questions that were answered with the tool and without it;
    where both were, the difference of the accuracies, split into what the tool repaired and what it broke."""
    result = {}
    for name, rows in benches.items():
        crops = cfg.max_crops or max(int(k.split()[1]) for k in done if k.split()[0] == name)
        modes = {"tool_on": crops, "tool_off": 0} if crops else {"tool_off": 0}
        samples = {mode: [done.get(key(name, n, i)) for i in range(len(rows))] for mode, n in modes.items()}
        complete = {mode: x for mode, x in samples.items() if None not in x}
        result[name] = {mode: summarise(rows, x) for mode, x in complete.items()}
        if len(complete) == 2:
            on, off = (np.array(x, float)[..., 0].mean(1) for x in complete.values())  # (rows,) accuracy over the k samples
            gain = on - off
            result[name]["tool"] = dict(difference=float(gain.mean()), repaired=float(gain.clip(0).mean()),
                                        broken=float((-gain).clip(0).mean()), n_repaired=int((gain > 0).sum()),
                                        n_broken=int((gain < 0).sum()))
    return {"benches": result, "seed": cfg.seed, "k": cfg.k, "temperature": cfg.temperature if cfg.k > 1 else 0.0,
            **{k: getattr(cfg, k) for k in ("max_pixels", "min_crop_pixels", "max_crop_pixels")}}


def show_benches(result):
    """The table of eval.json."""
    print(f"{'':34}{'n':>6} {header()}")
    for name, parts in result["benches"].items():
        for mode in ("tool_on", "tool_off"):
            if mode in parts:
                print(f"{name + ' ' + mode:34}{parts[mode]['n']:6} {line(parts[mode])}")
                for c, m in parts[mode]["categories"].items():
                    print(f"  {c[:32]:32}{m['n']:6} {line(m)}")
                if failed := parts[mode].get("judge_failed_rate"):
                    print(f"  the judge failed on {failed:.1%} of what it was asked: scored as wrong, tried again by the next run")
        if t := parts.get("tool"):
            print(f"  the tool: {t['difference']:+.3f} = {t['repaired']:.3f} repaired ({t['n_repaired']} questions) "
                  f"- {t['broken']:.3f} broken ({t['n_broken']})")


# ---------------------------------------------------------------------------------------------------------------
# What a person looks at.

def line(m):
    """Metrics in fixed columns, for log lines and tables."""
    return " ".join("     -" if m[c] is None else f"{m[c]:6.3f}" for c in COLUMNS)


def header():
    return " ".join(f"{c:>6}" for c in COLUMNS.values())


def show(traj, proc):
    """One trajectory as text, what the policy sampled told apart from what it was given."""
    out, at = [], 0
    while at < len(traj.ids):
        end = next((i for i in range(at, len(traj.ids)) if traj.mask[i] != traj.mask[at]), len(traj.ids))
        ids = traj.ids[at:end]
        pads = [i for i, x in enumerate(ids) if x == proc.image]
        text = proc.decode([x for x in ids if x != proc.image]) if not pads else \
            proc.decode(ids[:pads[0]]) + f"[{len(pads)} image tokens]" + proc.decode(ids[pads[-1] + 1:])
        name = "sampled" if traj.mask[at] else "given  "
        if at == 0:
            text = "... " + text[text.rfind("<|im_start|>user"):]  # the system prompt is always the same
        out += [f"  {name} | {x!r}" for x in text.strip("\n").split("\n")]
        at = end
    return "\n".join(out)


def draw(traj, path):
    """A picture of one trajectory: the scene with its numbered boxes, beside it each turn's text and the crop it led to."""
    inks = ("#d62728", "#1f77b4", "#2ca02c", "#9467bd", "#ff7f0e", "#17becf", "#8c564b", "#e377c2")
    font, side, thumb, left = ImageFont.load_default(15), 520, 130, 20
    scale = side / max(traj.image.size)
    scene = traj.image.resize((round(traj.image.width * scale), round(traj.image.height * scale)), Image.BICUBIC)
    crops, blocks = 0, []
    for text, action, error in traj.turns:
        if action.kind == "crop" and error is None and crops < len(traj.crops):
            crops += 1
            blocks.append((text, crops))
        else:
            blocks.append((text, None))
    lines = [[y for x in text.split("\n") for y in textwrap.wrap(x, 84)] for text, _ in blocks]
    heights = [max(thumb + 16 if crop else 0, 20 * len(wrapped) + 20) for wrapped, (_, crop) in zip(lines, blocks)]
    question = textwrap.wrap(f"Question: {traj.row['problem']}", 62) + [f"Answer: {traj.answer}"]
    if "solution" in traj.row:
        question[-1] += f"   Solution: {traj.row['solution']}   ({'right' if env.is_right(traj, traj.row) else 'wrong'})"
    height = max(left * 2 + scene.height + 24 * len(question) + 20, left * 2 + sum(heights))
    sheet = Image.new("RGB", (side + 3 * left + thumb + 700, height), "white")
    d = ImageDraw.Draw(sheet)
    sheet.paste(scene, (left, left))
    def tag(x, y, k):
        d.rectangle((x, y, x + 20, y + 20), fill=inks[k % 8])
        d.text((x + 6, y + 1), str(k), fill="white", font=font)

    for k, box in enumerate(traj.crops, 1):
        x0, y0, x1, y1 = (left + v * scale for v in box)
        d.rectangle((x0, y0, x1 - 1, y1 - 1), outline=inks[k % 8], width=3)
        tag(x0 + 22 * (k - 1) % 88, y0, k)  # side by side where boxes share a corner
    for i, q in enumerate(question):
        d.text((left, left + scene.height + 14 + 24 * i), q, fill="black", font=font)
    y = left
    for wrapped, (_, crop), h in zip(lines, blocks, heights):
        x = side + 2 * left
        if crop:
            im = traj.image.crop(traj.boxes[crop])
            s = thumb / max(im.size)
            sheet.paste(im.resize((max(1, round(im.width * s)), max(1, round(im.height * s))), Image.BICUBIC), (x, y))
            d.rectangle((x - 2, y - 2, x + thumb + 1, y + thumb + 1), outline=inks[crop % 8], width=3)
            tag(x, y, crop)
        for i, t in enumerate(wrapped):
            d.text((x + thumb + left, y + 20 * i), t.encode("ascii", "replace").decode(), fill="black", font=font)
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
    if cfg.bench:
        rows = read_benches(cfg, rank, world)
    else:
        rows = data.load_rows(os.path.join(cfg.data, "test.jsonl"), cfg.image_root)[:cfg.limit or None]
    data.check_images(sum(rows.values(), []) if cfg.bench else rows, rank, world)
    policy, t = env.load_policy(cfg.model, device), time.time()
    with env.memory("evaluation", cfg.max_tokens):
        result, longest = (score_benches if cfg.bench else score)(policy, rows, cfg, rank, world)
    result["seconds"] = round(time.time() - t, 1)
    if rank == 0:
        os.makedirs(cfg.out, exist_ok=True)
        env.write_text(os.path.join(cfg.out, "eval.json"), json.dumps({**result, "config": asdict(cfg)}, indent=1))
        if longest:
            draw(longest, os.path.join(cfg.out, "trajectory.png"))
        print(f"eval {cfg.model}: seed {cfg.seed}, k {cfg.k}, {result['seconds']} s -> {cfg.out}/eval.json")
    if rank == 0 and cfg.bench:
        show_benches(result)
    elif rank == 0:
        print(f"{'n ' + str(result['n']):8} {header()}\nsampled  {line(result)}\ngreedy   {line(result['greedy'])}")
        for d, r in result["accuracy_by_candidates"].items():
            print(f"  {d} candidates: accuracy {r['accuracy']:.3f}, crops {r['crops']:.2f} (n={r['n']})")
    return result


if __name__ == "__main__":
    env.run(main, Config, REAL)
