"""eval.py, file 5 of 5 (read env.py first): measure a policy by the rollout it was trained with.

    torchrun eval.py --model=runs/rppo --data=data/scenes-0        # a run folder, a checkpoint or a hub id
    torchrun eval.py --model=runs/rppo --data=data/scenes-0 --k=8  # Avg@8 at temperature 1

Prints one table and writes <out>/eval.json: the metrics of env.metrics at temperature 1 (k samples a row) and greedy,
n, seed, and accuracy and crops by the number of candidates (`difficulty` of a row). Also draws <out>/trajectory.png.
"""
import json
import os
import textwrap
import time
from dataclasses import asdict, dataclass

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
    data: str = "data/scenes-{seed}" # its test.jsonl is scored
    out: str = "runs/eval"
    limit: int = 0                   # rows scored, from the beginning; 0: all
    k: int = 1                       # samples per row at temperature 1


REAL = dict()


def evaluate(policy, rows, cfg, rank=0, world=1, k=1, greedy=False):
    """Score rows, shared out over the ranks. Returns (metrics, a long trajectory of this rank, {difficulty: [n, accuracy,
    crops]}, redundancy of wrong trajectories by their number of crops). All ranks must reach this."""
    mine, per, records, longest = list(range(rank, len(rows), world)), max(1, cfg.in_flight // k), [], None
    for i in tqdm(range(0, len(mine), per), desc="eval", disable=None if rank == 0 else True, leave=False):
        at = mine[i:i + per]  # a piece at a time: a trajectory holds its full-resolution image
        for t in env.rollout(policy, [rows[j] for j in at], cfg, k, seed=(cfg.seed, 2 ** 31), prompt_ids=at, greedy=greedy):
            level = t.row.get("difficulty")
            records.append(env.measure(t, cfg) + [level if isinstance(level, (int, float)) else 0])
            longest = t if longest is None or len(t.turns) > len(longest.turns) and len(records) < 64 else longest
    records = np.array(env.gather(records, world), float).reshape(-1, len(env.MEASURES) + 1)
    levels, crops = records[:, -1], records[:, env.MEASURES.index("crops")]
    by_level = {str(int(d)): dict(n=int((levels == d).sum()), accuracy=float(records[levels == d, 0].mean()),
                                  crops=float(crops[levels == d].mean())) for d in np.unique(levels)}
    wrong = lambda c: records[(crops == c) & (records[:, 0] == 0), env.MEASURES.index("redundancy_wrong")]
    by_crops = {str(int(c)): dict(n=len(wrong(c)), redundancy=float(wrong(c).mean())) for c in np.unique(crops) if c > 1 and len(wrong(c))}
    return env.metrics(records[:, :-1]), longest, by_level, by_crops


def score(policy, rows, cfg, rank=0, world=1):
    """The contents of eval.json: sampled metrics, greedy ones beside them."""
    sampled, longest, by_level, by_crops = evaluate(policy, rows, cfg, rank, world, k=cfg.k)
    greedy, *_ = evaluate(policy, rows, cfg, rank, world, greedy=True)
    return {**sampled, "accuracy_greedy": greedy["accuracy"], "greedy": greedy, "n": len(rows), "k": cfg.k, "seed": cfg.seed,
            "temperature": cfg.temperature, "accuracy_by_candidates": by_level, "redundancy_wrong_by_crops": by_crops}, longest


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
    question = textwrap.wrap(f"Question: {traj.row['problem']}", 62) + [f"Solution: {traj.row['solution']}   "
        f"Answer: {traj.answer}   ({'right' if traj.answer is not None and env.match(traj.answer, traj.row) else 'wrong'})"]
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


def main(cfg):
    rank, world, device = env.setup()
    if not cfg.model:
        raise env.UserError("eval.py needs --model=FOLDER, for example --model=runs/rppo (make it with `torchrun rppo.py`)")
    rows = data.load_rows(os.path.join(cfg.data, "test.jsonl"))[:cfg.limit or None]
    data.check_images(rows, rank, world)
    policy, t = env.load_policy(cfg.model, device), time.time()
    with env.memory("evaluation", cfg.max_tokens):
        result, longest = score(policy, rows, cfg, rank, world)
    result["seconds"] = round(time.time() - t, 1)
    if rank == 0:
        os.makedirs(cfg.out, exist_ok=True)
        env.write_text(os.path.join(cfg.out, "eval.json"), json.dumps({**result, "config": asdict(cfg)}, indent=1))
        draw(longest, os.path.join(cfg.out, "trajectory.png"))
        print(f"eval {cfg.model}: {len(rows)} rows, seed {cfg.seed}, {result['seconds']} s\n{'':8} {header()}\n"
              f"sampled  {line(result)}\ngreedy   {line(result['greedy'])}")
        for d, r in result["accuracy_by_candidates"].items():
            print(f"  {d} candidates: accuracy {r['accuracy']:.3f}, crops {r['crops']:.2f} (n={r['n']})")
    return result


if __name__ == "__main__":
    env.run(main, Config, REAL)
