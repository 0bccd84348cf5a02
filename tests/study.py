"""The study: what does the penalty do, and what do its relatives? One command, hours on two cores:

    python tests/study.py                        # started again, it goes on; results: tests/assets/study.json
    python tests/study.py --only="GRPO;RPPO"     # some arms

The plan, written before the runs.
Starts:    "default", the built-in cold start; "relook", one that after an empty crop looks at the same place
           again with probability 0.75 and guesses with probability 0.1.
Arms:      see ARMS. Every arm of a start and seed has the same cold start, prompts and random streams.
Seeds:     5 where the claim is made (CLAIM), 3 elsewhere. One CPU thread each.
Measures:  accuracy on 512 test scenes, 2 samples each, and its paired difference to GRPO with a 95 % interval
           (Student's t over the seeds); area under the held-out curve; overlap_wrong and repeat_rate at equal
           numbers of crops (the mean over strata that all arms of a start have); crops_wrong; guess_rate;
           share of flat groups.
Gain:      an arm gains if the interval of its difference to GRPO excludes zero. Of so many comparisons one
           may do so by chance: only the arms of CLAIM count, the others are leads.
Mechanism: trajectories of the cold start, cut at every decision after an empty crop. What was done there is
           "next" (a new place), "again" (IoU of 0.5 or more with an earlier crop) or "answer". With
           p_t(turn) under the policy after t steps, the mean of 1{class} p_t / p_0 over all decisions
           estimates the probability that the policy now gives to a class.
"""
import json
import math
import os
import subprocess
import sys
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), ".."))
import env  # noqa: E402, before torch: see there
import numpy as np  # noqa: E402
import torch  # noqa: E402

import data
import eval as evaluation
import rppo
import sft


FREE = "work", "out", "only", "workers", "claim_seeds", "other_seeds", "job"     # may differ from run to run


@dataclass
class Config:
    """The study."""
    work: str = "runs/study"         # runs; may be deleted afterwards
    out: str = "tests/assets"        # study.json, study.md and study.svg
    only: str = ""                   # arms, separated by semicolons; empty: all
    workers: int = 2
    claim_seeds: int = 5
    other_seeds: int = 3
    sft_steps: int = 450
    n_sft: int = 2000
    n_train: int = 1200
    eval_rows: int = 128
    steps: int = 40
    every: int = 10                  # steps between held-out evaluations and measured decisions
    n_test: int = 512
    k: int = 2
    job: str = ""                    # START/SEED/ARM: do only this, as a process of its own


# --- Arms: settings of RewardConfig, or forks of env.rewards ----------------------------------------------
def evidence_overlap(group, cfg):
    """The best crop's share of the evidence is worth up to 0.5 (ViRL and GRiP reward overlap, too)."""
    scored = plain_rewards(group, cfg)
    for traj, parts in zip(group, scored):
        [evidence] = traj.row["boxes"]
        shares = [env.intersection(crop, evidence) / env.area(evidence) for crop in traj.crops]
        parts["overlap"] = 0.5 * max(shares, default=0)
        parts["total"] += parts["overlap"]
    return scored


def curiosity(group, cfg):
    """Pixel-Reasoner's, as in its code: 0.05 off for each crop after the first; while under 30 % of the
    group crop, a bonus for it that falls with that share. (Here nearly all crop.)"""
    scored = plain_rewards(group, cfg)
    share = sum(bool(traj.crops) for traj in group) / len(group)
    for traj, parts in zip(group, scored):
        parts["curiosity"] = 0.0
        if traj.crops:
            parts["curiosity"] = max(0.3 - share, 0) / 2 / share * 0.25 - 0.05 * (len(traj.crops) - 1)
        parts["total"] += parts["curiosity"]
    return scored


def exploration(group, cfg):
    """Ours, not the paper's: a wrong answer loses 1 for what it has left unexplored, the share of max_crops
    that did not go to a new place. Giving up early costs as much as looking twice."""
    scored = plain_rewards(group, cfg)
    for traj, parts in zip(group, scored):
        parts["exploration"] = 0.0
        if not env.is_right(traj):
            parts["exploration"] = new_places(traj.crops) / cfg.max_crops - 1
        parts["total"] += parts["exploration"]
    return scored


def new_places(crops):
    """Number of crops that overlap no earlier one by an IoU of 0.5 or more."""
    return sum(all(env.iou(box, earlier) < 0.5 for earlier in crops[:i]) for i, box in enumerate(crops))


plain_rewards = env.rewards
# arm -> settings, and the fork of the reward if there is one.
ARMS = {"GRPO": (dict(lam=0.0), None),
        "RPPO": (dict(lam=1.0), None),
        "RPPO, lam 4": (dict(lam=4.0), None),
        "exploration (ours)": (dict(lam=0.0), exploration),
        "RPPO, eps 0.1": (dict(lam=1.0, eps=0.1), None),
        "DeepEyes' bonus": (dict(lam=0.0, tool_bonus=1.5), None),        # it weighs them 1.2 and 0.8
        "Mini-o3's mask": (dict(lam=0.0, mask_over_turns=True), None),
        "evidence overlap": (dict(lam=0.0), evidence_overlap),
        "curiosity": (dict(lam=0.0), curiosity)}
CLAIM = list(ARMS)[:4]
STARTS = {"default": (0.3, 0.3),    # AGAIN, GIVE_UP: data.py's when the study ran
          "relook": (0.75, 0.1)}


# --- One job: a cold start, or one arm from it ------------------------------------------------------------
def run_job(cfg):
    """A cold start (START/SEED) or an arm (START/SEED/ARM): files under cfg.work."""
    start, seed, *arm = cfg.job.split("/")
    here = f"{cfg.work}/{start}/{seed}"
    common = dict(seed=int(seed), data=f"{here}/data")
    if not arm:
        data.AGAIN, data.GIVE_UP = STARTS[start]
        scenes = env.shared(cfg, data.ScenesConfig)
        data.main(data.Config(seed=int(seed), out=f"{here}/data", **scenes))
        sft.main(sft.Config(**common, out=f"{here}/sft", steps=cfg.sft_steps))
        return
    settings, fork = ARMS[arm[0]]
    env.rewards = fork or plain_rewards
    out = f"{here}/{arm[0]}/rppo"
    run = rppo.Config(**common, **settings, model=env.newest(f"{here}/sft"), out=out, steps=cfg.steps,
                      train_vision=True,         # as in all runs of study.json
                      eval_rows=cfg.eval_rows, eval_every=cfg.every, save_every=cfg.every, keep=cfg.steps,
                      n_score=0)
    rppo.main(run)
    env.write_text(f"{here}/{arm[0]}/result.json", json.dumps(measure_run(cfg, run, here)))


def measure_run(cfg, run, here):
    """What the study keeps of a run."""
    log = sft.read_log(run.out)
    rows = data.load_rows(f"{run.data}/test.jsonl")
    policy = sft.load_policy(env.newest(run.out), torch.device("cpu"))
    trajs = evaluation.rollout(policy, rows, run, cfg.k, (run.seed, evaluation.EVALUATION))
    final = evaluation.metrics([evaluation.measure(traj, run.eps) for traj in trajs])
    curve = [[e["step"] + 1, e["held_out"]["accuracy"], e["held_out"]["overlap_wrong"]]
             for e in log if "held_out" in e]
    paths = {0: run.model}
    paths.update({step: f"{run.out}/checkpoints/{step}" for step, *_ in curve})
    return dict(final=final, curve=curve, strata=strata(trajs), decisions=decisions(paths, rows, run),
                flat_groups=float(np.mean([e["flat_groups"] for e in log])),
                seconds=log[-1]["seconds"])


def strata(trajs):
    """Counts by number of crops. overlap: n -> [wrong trajectories with n crops that look twice, all such];
    repeat: i -> [i-th crops that repeat an earlier one, all i-th crops]."""
    overlap, repeat = defaultdict(lambda: [0, 0]), defaultdict(lambda: [0, 0])
    for traj in trajs:
        crops = traj.crops
        if not env.is_right(traj) and len(crops) > 1:
            overlap[len(crops)][0] += new_places(crops) < len(crops)
            overlap[len(crops)][1] += 1
        for i in range(1, len(crops)):
            repeat[i + 1][0] += max(env.iou(crops[i], earlier) for earlier in crops[:i]) >= 0.7
            repeat[i + 1][1] += 1
    return dict(overlap=overlap, repeat=repeat)


def decisions(paths, rows, run):
    """{step: [P(next), P(again), P(answer)]} at the cold start's decisions after an empty crop."""
    policy = sft.load_policy(paths[0], torch.device("cpu"))
    trajs = evaluation.rollout(policy, rows[:256], run, seed=(run.seed, evaluation.EVALUATION + 1))
    table = {}
    first = turn_log_probabilities(policy, trajs)
    for step, path in paths.items():
        policy = sft.load_policy(path, torch.device("cpu"))
        logp = turn_log_probabilities(policy, trajs)
        weights, n = defaultdict(float), 0
        for traj, now, before in zip(trajs, logp, first):
            for turn, kind in classify(traj).items():
                weights[kind] += math.exp(now[turn] - before[turn])
                n += 1
        table[step] = [weights[kind] / max(n, 1) for kind in ("next", "again", "answer")]
    return table


def classify(traj):
    """{number of the turn: "next", "again" or "answer"} of the decisions after an empty crop."""
    kinds, seen = {}, []
    for i, turn in enumerate(traj.turns):
        crop = turn.shown.box if turn.shown else None
        if seen and (crop or turn.action.kind == "answer"):
            again = crop and any(env.iou(crop, earlier) >= 0.5 for earlier in seen)
            kinds[i] = "answer" if not crop else "again" if again else "next"
        if crop:
            seen.append(crop)
            if any(env.intersection(crop, box) >= 0.9 * env.area(box) for box in traj.row["boxes"]):
                break                            # the evidence has been seen: no more empty crops
    return kinds


@torch.no_grad()
def turn_log_probabilities(policy, trajs):
    """Of every trajectory the log-probability of each of its turns."""
    policy.eval()
    out = []
    for i in range(0, len(trajs), 64):
        part = trajs[i:i + 64]
        batch = sft.collate(part, policy.proc)
        logp, _ = policy(batch)
        at = 0
        for traj in part:
            turns = []
            for token, (before, now) in enumerate(zip([0, *traj.mask], traj.mask)):
                if now and not before:
                    turns.append(0.0)
                if now:
                    turns[-1] += logp[at].item()
                    at += 1
            out.append(turns)
    return out


# --- All jobs, on all cores -------------------------------------------------------------------------------
def run_all(cfg, arms):
    """Run what is not in study.json yet, first the cold starts. Returns {job: its results}."""
    settings = {key: value for key, value in vars(cfg).items() if key not in FREE}
    saved = env.read_json(f"{cfg.out}/study.json", dict(settings=settings, runs={}))
    if saved["settings"] != settings:
        raise env.UserError(f"{cfg.out}/study.json has other settings; give another --out")
    wanted = []
    for arm in arms:
        for seed in range(cfg.claim_seeds if arm in CLAIM else cfg.other_seeds):
            for start in STARTS:
                wanted.append(f"{start}/{seed}/{arm}")
    wanted.sort(key=lambda job: (job.split("/")[2] not in CLAIM, job.split("/")[1]))   # seed by seed
    wanted = [job for job in wanted if job not in saved["runs"]]
    cold_starts = list(dict.fromkeys(job.rpartition("/")[0] for job in wanted))
    with ThreadPoolExecutor(cfg.workers) as pool:
        list(pool.map(lambda job: start_job(cfg, job), cold_starts))
        for job, result in zip(wanted, pool.map(lambda job: start_job(cfg, job), wanted)):
            saved["runs"][job] = result
            env.write_text(f"{cfg.out}/study.json", json.dumps(saved))
            print(f"{job}: accuracy {result['final']['accuracy']:.3f}", flush=True)
    return saved["runs"]


def start_job(cfg, job):
    """Do a job in a process of its own with one thread, unless it is done. Returns its results."""
    folder = f"{cfg.work}/{job}"
    os.makedirs(folder, exist_ok=True)
    if not os.path.exists(f"{folder}/result.json"):
        flags = [f"--{name}={value}" for name, value in {**vars(cfg), "job": job}.items()]
        with open(f"{folder}/output.txt", "a") as f:
            subprocess.run([sys.executable, os.path.abspath(__file__), *flags], check=True, stdout=f,
                           stderr=f, env={**os.environ, "OMP_NUM_THREADS": "1"})
    return env.read_json(f"{folder}/result.json", None)


# --- Tables and figure ------------------------------------------------------------------------------------
def interval(values):
    """Mean and half width of its 95 % interval (Student's t) over at most five seeds."""
    t = [math.nan, math.nan, 12.71, 4.303, 3.182, 2.776][len(values)]
    return f"{np.mean(values):.3f} ± {t * np.std(values, ddof=len(values) > 1) / math.sqrt(len(values)):.3f}"


def at_equal_crops(runs, kind):
    """{arm: mean over numbers of crops of the share that repeats}, over those that every arm has 10 times."""
    pooled, common = {}, None
    for arm, seeds in runs.items():
        pooled[arm] = counts = defaultdict(lambda: np.zeros(2))
        for result in seeds.values():
            for n, count in result["strata"][kind].items():
                counts[n] += count
        often = {n for n, (_, total) in counts.items() if total >= 10}
        common = often if common is None else common & often
    return {arm: np.mean([np.divide(*pooled[arm][n]) for n in sorted(common)] or math.nan) for arm in runs}


def table(runs, cfg):
    """A Markdown table of the arms of one start: {arm: {seed: result}}."""
    overlap, repeat = at_equal_crops(runs, "overlap"), at_equal_crops(runs, "repeat")
    lines = ["| arm | seeds | accuracy | less GRPO's | area | overlap_wrong* | repeat_rate* | crops_wrong | "
             "guess_rate | flat_groups | next, again, answer |", "|---" * 11 + "|"]
    for arm, seeds in runs.items():
        final = [result["final"] for result in seeds.values()]
        means = [np.mean([f[name] for f in final]) for name in ("crops_wrong", "guess_rate")]
        flat = np.mean([result["flat_groups"] for result in seeds.values()])
        area = np.mean([[accuracy for _, accuracy, _ in result["curve"]] for result in seeds.values()])
        gains = [result["final"]["accuracy"] - runs["GRPO"][seed]["final"]["accuracy"]
                 for seed, result in seeds.items()]
        last = np.mean([result["decisions"][str(cfg.steps)] for result in seeds.values()], 0)
        lines.append(f"| {arm} | {len(seeds)} | {np.mean([f['accuracy'] for f in final]):.3f} | "
                     f"{interval(gains) if arm != 'GRPO' else ''} | {area:.3f} | {overlap[arm]:.3f} | "
                     f"{repeat[arm]:.3f} | {means[0]:.2f} | {means[1]:.3f} | {flat:.3f} | "
                     f"{', '.join(f'{p:.2f}' for p in last)} |")
    return "\n".join(lines)


COLOURS = "#2f7ed8", "#e4572e", "#a05bd0", "#2a9d4a"
PANELS = "held-out accuracy", "P(look again)", "P(answer)"


LEGEND = """Means over the first seeds; where an arm has fewer, compare not these but the differences, which are
paired by seed. Intervals of 95 % (Student's t). area: under the held-out curve. *: at equal numbers of crops.
next, again, answer: what the cold start's decisions after an empty crop have become, estimated with importance
weights (they need not sum to 1).
"""


def series(result, panel):
    """(steps, values) of a run for one of PANELS."""
    if panel == 0:
        points = [point[:2] for point in result["curve"]]
    else:
        points = [(int(step), shares[panel]) for step, shares in result["decisions"].items()]
    return np.array(points, float).T


def figure(starts, cfg):
    """The figure as SVG: for each start the PANELS; of the CLAIM arms mean (line) and range (band)."""
    parts = ""
    for row, (start, runs) in enumerate(starts.items()):
        for panel, title in enumerate(PANELS):
            x, y = 50 + 300 * panel, 40 + 220 * row
            parts += f'<text x="{x}" y="{y - 10}" font-weight="bold">{start}: {title}</text>'
            for share in (0, 0.25, 0.5, 0.75, 1):
                height = y + 160 * (1 - share)
                parts += (f'<path d="M{x} {height}h240" stroke="#ccc"/><text x="{x - 6}" y="{height + 4}" '
                          f'text-anchor="end">{share:g}</text>')
            parts += f'<text x="{x + 240}" y="{y + 175}" text-anchor="end">step {cfg.steps}</text>'
            for arm, colour in zip(CLAIM, COLOURS):
                curves = [series(result, panel) for result in runs.get(arm, {}).values()]
                if curves:
                    steps = x + curves[0][0] * 240 / cfg.steps
                    values = y + 160 * (1 - np.stack([values for _, values in curves]))
                    parts += band(steps, values, colour)
    for i, (arm, colour) in enumerate(zip(CLAIM, COLOURS)):
        parts += f'<text x="{50 + 200 * i}" y="490" fill="{colour}" font-weight="bold">{arm}</text>'
    return (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 930 500" font-family="sans-serif" '
            f'font-size="12"><rect width="930" height="500" fill="#fff"/>{parts}</svg>\n')


def band(x, values, colour):
    """A line through the means of values (seeds, n) over x (n,), and their range as a band."""
    outline = np.concatenate([np.stack([x, values.min(0)], 1), np.stack([x, values.max(0)], 1)[::-1]])
    mean = np.stack([x, values.mean(0)], 1)
    outline, mean = [" ".join(f"{a:.1f},{b:.1f}" for a, b in points) for points in (outline, mean)]
    return (f'<path d="M{outline}z" fill="{colour}" opacity=".12"/>'
            f'<path d="M{mean}" fill="none" stroke="{colour}" stroke-width="2"/>')


def main(cfg):
    if cfg.job:
        return run_job(cfg)
    arms = list(dict.fromkeys(["GRPO", *cfg.only.split(";")])) if cfg.only else list(ARMS)
    runs = run_all(cfg, arms)
    starts, text = defaultdict(lambda: defaultdict(dict)), ""
    for arm in ARMS:
        for job, result in runs.items():
            start, seed, name = job.split("/")
            if name == arm:
                starts[start][arm][seed] = result
    for start, arms_of in starts.items():
        text += f"**Start: {start}.**\n\n{table(arms_of, cfg)}\n\n"
    text += LEGEND
    env.write_text(f"{cfg.out}/study.md", text)
    env.write_text(f"{cfg.out}/study.svg", figure(starts, cfg))
    print(text)


if __name__ == "__main__":
    main(Config(**vars(env.make_parser(Config, {}).parse_args())))
