"""rppo.py, file 4 of 5 (read env.py, data.py and sft.py first): redundancy-penalized policy optimization.

    torchrun rppo.py                                              # from nothing: scenes, tiny model, cold start, RPPO, scores
    torchrun rppo.py --lam=0 --out=runs/grpo/rppo                 # plain GRPO, for comparison
    torchrun --nproc-per-node=8 rppo.py --model=runs/sft --data=data/mine

For each of P prompts, G trajectories are sampled; trajectory i makes T_i crops with boxes b_1 .. b_T (DRIM, arXiv 2512.17306):

    gamma     = -lam / T^2 * sum_{t<t'} max(0, IoU(b_t, b_t') - eps)                    env.redundancy
    reward    = accuracy + 1{accuracy = 0 and T > 1} * gamma                            env.reward
    advantage = reward - mean_group(reward)        optionally / std_group(reward)       group_advantages
    ratio     = exp(logp - old_logp)                                                    policy_loss
    loss      = - sum_{i,t} mask * min(ratio * advantage, clip(ratio, 1 - clip_low, 1 + clip_high) * advantage) / n_tokens

mask is 1 on sampled tokens only; n_tokens is its sum over all trajectories of the step on all ranks. No KL term.
Neighbours are numbers of the same config: lam=0 is GRPO, tool_bonus is DeepEyes', mask_over_turns is Mini-o3's.
Reads <data>/train.jsonl; writes <out>/{config.json, log.jsonl, checkpoints/<step>/, last, best.json, trajectory.png}, and for
the main job ../eval/{sft,rppo}/eval.json and ../summary.json.
"""
import json
import math
import os
import time
from dataclasses import asdict, dataclass

import numpy as np
import torch

import data
import env
import eval as evaluation
import sft


@dataclass
class Config(env.World):
    seed: int = 0
    model: str = ""                  # the cold-started policy; empty: the tiny one of sft.py, made if missing
    data: str = "data/scenes-{seed}"
    image_root: str = ""             # where the images of the rows lie; empty: relative to the file of the rows
    out: str = "runs/rppo"
    steps: int = 100
    prompts: int = 16                # P per step, over all ranks
    samples: int = 8                 # G per prompt
    updates: int = 1                 # passes over each rollout; above 1 the ratio leaves 1 and clipping acts
    micro_batch: int = 32            # trajectories of mean length per forward pass (fewer long ones, more short ones)
    lr: float = 2.5e-4
    warmup: int = 5                  # steps to reach lr
    decay: float = 0.4               # last share of the steps: linear to zero (0: constant)
    weight_decay: float = 0.0
    clip_low: float = 0.2
    clip_high: float = 0.28          # a wider upper clip, as the neighbours have it
    clip_norm: float = 1.0
    norm_std: bool = False           # divide advantages by the group's std (measured: better without; logged)
    mask_over_turns: bool = False    # no loss on trajectories that ran out of turns or tokens (Mini-o3)
    eval_every: int = 25             # steps between held-out evaluations ...
    eval_rows: int = 128             # ... on the last rows of train.jsonl, which are never trained on
    show_every: int = 25             # steps between printed trajectories
    save_every: int = 50
    keep: int = 2                    # newest checkpoints kept (the best is kept too)
    resume: bool = True              # go on from the last checkpoint in out; false: put the old run aside
    n_score: int = 768               # test rows scored at the end; 0: leave scoring to eval.py
    max_skips: int = 5               # steps in a row without a finite gradient that end the run
    train_vision: bool = True        # the next four as in sft.py
    recompute: bool = False
    shard: bool = False
    bf16_moments: bool = False


REAL = dict(steps=200, prompts=32, samples=8, micro_batch=1, lr=1e-6, warmup=5, decay=0.0, eval_every=20, eval_rows=64, save_every=20,
            show_every=5, n_score=0, train_vision=False, recompute=True, shard=True)


def group_advantages(rewards, norm_std):
    """rewards (P, G) -> advantages (P, G): minus the group's mean, divided by its unbiased std if asked.

    Exactly 0 for a flat group and for G = 1 (a rounding residue divided by a tiny std would be noise of size 1).
    Computed in float64.
    """
    r = torch.as_tensor(rewards).double()
    centred = r - r.mean(1, keepdim=True)
    if norm_std and r.shape[1] > 1:
        centred = centred / r.std(1, keepdim=True).clamp_min(1e-12)
    flat = r.amax(1, keepdim=True) == r.amin(1, keepdim=True)
    return centred.masked_fill(flat, 0.0)


def policy_loss(logp, old_logp, advantages, mask, clip_low, clip_high, n_tokens=None):
    """The clipped loss. logp, old_logp, mask (B, T), advantages (B,) -> scalar; 0 for an empty mask.

    Summed over the mask and divided by n_tokens (default: the mask's sum; training passes the global count of the step,
    so that the loss does not depend on micro-batches or ranks).
    """
    log_ratio = torch.where(mask > 0, logp - old_logp, 0.0)
    ratio, a = log_ratio.exp(), advantages[:, None]
    surrogate = torch.minimum(ratio * a, ratio.clamp(1 - clip_low, 1 + clip_high) * a)
    n = mask.sum().clamp_min(1) if n_tokens is None else max(n_tokens, 1)
    return -(surrogate * mask).sum() / n


def prompts_of(step, cfg, n):
    """Row numbers of a step: consecutive pieces of a permutation that is drawn anew for each pass over the n rows."""
    at = np.arange(step * cfg.prompts, (step + 1) * cfg.prompts)
    return [int(np.random.default_rng([cfg.seed, 11, a // n]).permutation(n)[a % n]) for a in at]


def prepare(cfg):
    """What the run starts from: the given model, or the tiny cold start, made here if it is missing. Returns its folder
    and the seconds that making it took."""
    seconds, parent = {}, os.path.dirname(cfg.out.rstrip("/"))
    if cfg.model:
        return cfg.model, seconds
    scenes = data.Config(seed=cfg.seed, out=cfg.data)
    t = time.time()
    data.main(scenes)
    seconds["data"], t = time.time() - t, time.time()
    # what is not the reward's is the task, the same for both
    reward = ("temperature", "lam", "eps", "tool_bonus", "format_weight", "judge_url", "judge_name")
    task = {k: getattr(cfg, k) for k in vars(env.World()) if k not in reward}
    start = sft.Config(**task, seed=cfg.seed, data=cfg.data, out=os.path.join(parent, "sft"))
    sft.main(start)
    seconds["sft"] = time.time() - t
    return env.newest(start.out), seconds


def balanced(use, lengths, size):
    """The trajectories `use` in about n / size micro-batches. None has more tokens, padding included, than its share or than
    the longest trajectory alone; each holds neighbours in length, so that little of it is padding."""
    use, micro = sorted(use, key=lambda i: -lengths[i]), []
    room = max([size * sum(lengths[i] for i in use) / max(len(use), 1)] + [lengths[i] for i in use[:1]])
    for i in use:
        if not micro or (len(micro[-1]) + 1) * lengths[micro[-1][0]] > room:
            micro.append([])
        micro[-1].append(i)
    return micro


def update(policy, optimizer, trajs, advantages, cfg, world):
    """`updates` passes over one rollout. trajs: this rank's B trajectories; advantages (B,). Returns n_tokens, and for the log
    this rank's sums over its trained tokens, the norm, and the passes skipped because loss or norm was not finite.

    A trajectory whose advantage is 0 has no gradient and is not computed, but its tokens count in n_tokens.
    """
    device = policy.device
    masked = lambda t: cfg.mask_over_turns and t.status != "answered"
    use = [i for i in range(len(trajs)) if advantages[i] != 0 and not masked(trajs[i])]
    n_tokens, n_used = sft.total([sum(sum(t.mask) for t in trajs if not masked(t)), len(use)], world, device)
    micro = balanced(use, [len(t.ids) for t in trajs], cfg.micro_batch)
    busy = len(micro)
    if policy.sharded:  # all ranks must pass as often: one with less to do repeats its shortest trajectory with advantage 0
        shortest = min(range(len(trajs)), key=lambda i: len(trajs[i].ids))
        micro += [[shortest]] * (int(max(env.gather([[busy]], world))[0]) - busy)
    batches = [env.collate([trajs[i] for i in m], policy.proc) for m in micro]
    sampled = [torch.tensor([p for i in m for p, k in zip(trajs[i].logp, trajs[i].mask) if k], device=device) for m in micro]
    old, stats = [None] * len(micro), dict(trained=0, entropy=0.0, clipped=0, gap=0.0, gap_max=0.0, grad_norm=0.0, skipped=0)
    policy.train()
    if cfg.updates > 1:  # log-probabilities before any update, by the code that will compute them during the updates
        with torch.no_grad(), policy.autocast():
            old = [policy(b, cfg.temperature)[0] for b in batches]
    for k in range(cfg.updates):
        loss_sum = 0.0
        for j, (m, b) in enumerate(zip(micro, batches)):
            with policy.autocast():
                logp, entropy = policy(b, cfg.temperature)                    # (n,) the trained tokens of the micro-batch
            before = logp.detach() if old[j] is None else old[j]
            mask = b["mask"][:, 1:].to(device)                                # (b, T-1)
            wide = lambda x: torch.zeros_like(mask).masked_scatter(mask > 0, x)
            a = torch.tensor([advantages[i] if j < busy else 0.0 for i in m], dtype=torch.float32, device=device)
            loss = policy_loss(wide(logp), wide(before), a, mask, cfg.clip_low, cfg.clip_high, n_tokens)
            loss.backward()
            loss_sum += loss.item()
            if k == 0 and j < busy:
                gap = (logp.detach() - sampled[j]).abs()
                stats["trained"] += len(gap)
                stats["entropy"] += entropy.sum().item()
                stats["gap"] += gap.sum().item()
                stats["gap_max"] = max(stats["gap_max"], gap.max().item())
            if k == cfg.updates - 1 and j < busy:
                ratio = (logp.detach() - before).exp()
                stats["clipped"] += ((ratio < 1 - cfg.clip_low) | (ratio > 1 + cfg.clip_high)).sum().item()
        [loss_sum] = sft.sync_gradients(policy, world, [loss_sum])
        stats["grad_norm"] = sft.clip_gradients(policy, cfg)
        finite = math.isfinite(loss_sum + stats["grad_norm"])
        stats["skipped"] += not finite
        if n_used and finite:  # in a step of flat groups alone, the optimizer's momentum would still move the weights
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return n_tokens, stats


def summarise(trajs, parts, n_tokens, stats, asked, cfg, world):
    """What a step's log entry says of all ranks' trajectories, and whether a signal asked any rank to stop."""
    keys, sums = list(parts[0]), ("trained", "entropy", "clipped", "gap", "gap_max")
    table = np.array(env.gather([evaluation.measure(x, cfg) + [p[k] for k in keys] for x, p in zip(trajs, parts)], world), float)
    ranks = np.array(env.gather([[stats[k] for k in sums] + [len(asked)]], world), float)
    trained, entropy, clipped, gap, _, stop = ranks.sum(0).tolist()
    groups = table[:, -1].astype(np.float32).reshape(-1, cfg.samples)
    return dict(reward=float(table[:, -1].mean()), **evaluation.metrics(table[:, :len(evaluation.MEASURES)]),
                parts={k: float(v) for k, v in zip(keys, table[:, len(evaluation.MEASURES):].mean(0))},
                flat_groups=float((groups.max(1) == groups.min(1)).mean()), tokens=int(n_tokens),
                entropy=entropy / max(trained, 1), clip_share=clipped / max(trained, 1), log_ratio=gap / max(trained, 1),
                log_ratio_max=float(ranks[:, 4].max()), grad_norm=stats["grad_norm"], skipped=stats["skipped"]), stop


def report(cfg, entry, trajs, proc, eta):
    """Print a step; every show_every steps also one of its trajectories, as text and as a picture."""
    print(f"step {entry['step']:5d} {entry['reward']:6.3f}  {evaluation.line(entry)}  {entry['entropy']:6.3f} {entry['grad_norm']:6.3f} "
          f"{entry['tokens'] / (cfg.prompts * cfg.samples):6.1f} {entry['rollout_s']:6.2f} {entry['update_s']:6.2f} "
          f"{int(eta) // 60:3d}:{int(eta) % 60:02d}", flush=True)
    if "held_out" in entry:
        print(f"{'held-out':19}{evaluation.line(entry['held_out'])}", flush=True)
    if (entry["step"] + 1) % cfg.show_every == 0:
        shown = max(trajs, key=lambda x: len(x.turns))
        print(evaluation.show(shown, proc), flush=True)
        evaluation.draw(shown, os.path.join(cfg.out, "trajectory.png"))


def mark_best(out):
    """Write best.json: of the checkpoints that are there, the first with the highest held-out accuracy in the log."""
    scored = [dict(step=e["step"] + 1, accuracy=e["held_out"]["accuracy"]) for e in sft.read_log(out)
              if "held_out" in e and os.path.exists(os.path.join(out, "checkpoints", str(e["step"] + 1)))]
    best = max(scored, key=lambda x: x["accuracy"], default=dict(step=None, accuracy=None))
    env.write_text(os.path.join(out, "best.json"), json.dumps(best))
    return best["step"]


def train(policy, optimizer, rows, held_out, resumed, preset, cfg, rank, world):
    """The steps from `resumed` on."""
    t0 = time.time()
    with env.interruptible() as asked:
        for step in range(resumed, cfg.steps):
            # 1. rollout: this rank's prompts, G samples each
            t = time.time()
            mine = list(range(rank, cfg.prompts, world))
            chosen = [rows[i] for i in prompts_of(step, cfg, len(rows))]
            with env.memory("rollout", cfg.max_tokens):
                trajs = env.rollout(policy, [chosen[p] for p in mine], cfg, cfg.samples, seed=(cfg.seed, step), prompt_ids=mine)
            rollout_s = time.time() - t

            # 2. reward, as named parts
            env.judge(trajs, cfg)
            parts = [env.reward(x, x.row, cfg) for x in trajs]

            # 3. advantage, within each group
            rewards = torch.tensor([p["total"] for p in parts]).view(len(mine), cfg.samples)      # (P, G)
            advantages = group_advantages(rewards, cfg.norm_std).flatten().tolist()               # B = P*G

            # 4. update
            t = time.time()
            for g in optimizer.param_groups:
                g["lr"] = cfg.lr * sft.lr_scale(step, cfg)
            with env.memory("update", max(len(x.ids) for x in trajs)):
                n_tokens, stats = update(policy, optimizer, trajs, advantages, cfg, world)
            update_s = time.time() - t

            # 5. evaluate and log
            scored = {}
            if cfg.eval_rows and ((step + 1) % cfg.eval_every == 0 or step + 1 == cfg.steps):
                with env.memory("held-out evaluation", cfg.max_tokens):
                    scored = {"held_out": evaluation.metrics(evaluation.evaluate(policy, held_out, cfg, rank, world)[0])}
            entry, stop = summarise(trajs, parts, n_tokens, stats, asked, cfg, world)
            entry = dict(step=step, **entry, lr=optimizer.param_groups[0]["lr"], norm_std=cfg.norm_std, rollout_s=rollout_s,
                         update_s=update_s, **scored)
            if rank == 0:
                sft.append_log(cfg.out, entry)
                sft.check_skips(cfg, entry, chosen)
                report(cfg, entry, trajs, policy.proc, (time.time() - t0) / (step + 1 - resumed) * (cfg.steps - step - 1))

            # 6. save
            if (step + 1) % cfg.save_every == 0 or step + 1 == cfg.steps or scored or stop:
                sft.save_checkpoint(cfg.out, step + 1, policy, cfg, preset, [optimizer], rank)
                if rank == 0:
                    sft.prune(cfg.out, cfg.keep, mark_best(cfg.out))
            if stop:
                env.leave()


def main(cfg):
    started = time.time()
    rank, world, device = env.setup()
    if cfg.prompts % world:
        raise env.UserError(f"--prompts={cfg.prompts} is not a multiple of the {world} ranks; change --prompts or --nproc-per-node")
    start, seconds = prepare(cfg)
    rows = data.load_rows(os.path.join(cfg.data, "train.jsonl"), cfg.image_root)
    if len(rows) <= cfg.eval_rows:
        raise env.UserError(f"{cfg.data}/train.jsonl has {len(rows)} rows, {cfg.eval_rows} are held out; lower --eval_rows")
    data.check_images(rows, rank, world)
    rows, held_out = rows[:len(rows) - cfg.eval_rows], rows[len(rows) - cfg.eval_rows:]
    resumed = sft.begin(cfg, rank, world)              # the step to go on from, or 0
    policy = env.load_policy(env.newest(cfg.out) if resumed else start, device, train=True)
    sft.announce_memory(policy, cfg, device, rank, world)
    with env.memory("loading", 0):
        policy = env.make_trainable(policy, cfg, device)
    optimizer = sft.adamw([p for p in policy.parameters() if p.requires_grad], cfg, (0.9, 0.95))
    if resumed:
        sft.load_optimizer(env.newest(cfg.out), policy, [optimizer])
    preset = env.read_json(os.path.join(start, "world.json"), {"preset": "real"})["preset"]
    if rank == 0:
        mark_best(cfg.out)                             # after damage, the best one may be gone
        print(f"rppo: {cfg.prompts} prompts x {cfg.samples} samples on {world} ranks, {cfg.steps} steps from {start}\n"
              f"{'':10} reward  {evaluation.HEADER}  entrpy   norm tok/tr roll_s  upd_s    eta")
    t = time.time()
    train(policy, optimizer, rows, held_out, resumed, preset, cfg, rank, world)
    seconds["rppo"] = time.time() - t
    if cfg.n_score:
        compare(cfg, start, seconds, started, rank)
    return policy


def compare(cfg, start, seconds, started, rank):
    """Score the cold start and the final policy on the test rows; print the table, write summary.json."""
    parent, summary = os.path.dirname(cfg.out.rstrip("/")), {}
    for name, model in (("sft", start), ("rppo", cfg.out)):
        given = {k: v for k, v in asdict(cfg).items() if k in vars(env.World())}
        summary[name] = evaluation.main(evaluation.Config(**given, seed=cfg.seed, model=env.newest(model), data=cfg.data,
                                                          image_root=cfg.image_root, out=os.path.join(parent, "eval", name),
                                                          limit=cfg.n_score))
        seconds[f"eval_{name}"] = summary[name]["seconds"]
    if rank == 0:
        summary["seconds"] = {**{k: round(v, 1) for k, v in seconds.items()}, "total": round(time.time() - started, 1)}
        env.write_text(os.path.join(parent, "summary.json"), json.dumps(summary, indent=1))
        print(f"\n{'':10}{'greedy':>7} {evaluation.HEADER}")
        for name in ("sft", "rppo"):
            print(f"{name:10}{summary[name]['accuracy_greedy']:7.3f} {evaluation.line(summary[name])}")
        print("seconds " + " ".join(f"{k}={v}" for k, v in summary["seconds"].items()) + f" -> {parent}/summary.json")


if __name__ == "__main__":
    env.run(main, Config, REAL)
