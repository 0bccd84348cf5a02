"""rppo.py, file 5 of 5: the method. It rests on env.py, and samples with `rollout` of eval.py.

    python rppo.py                                # from nothing: scenes, tiny model, cold start, RPPO, scores
    python rppo.py --model=runs/sft --lam=0 --out=runs/grpo/rppo     # GRPO from the same cold start
    torchrun --nproc-per-node=8 rppo.py --model=runs/real/sft --data=data/mine

The objective (DRIM, arXiv 2512.17306). In each step P prompts get G trajectories each. A trajectory makes T
crops, with boxes b_1 .. b_T (DRIM's letter; in the shapes of the code T counts tokens):

    gamma      = -lam / T^2 * sum_{t<t'} max(0, IoU(b_t, b_t') - eps)                  env.redundancy
    reward     = accuracy + 1{accuracy = 0 and T > 1} * gamma                          env.rewards
    advantage  = reward - mean of its group        optionally / std of its group       group_advantages
    ratio      = exp(logp - old_logp)              of each sampled token               policy_loss
    clipped    = ratio, kept within [1 - clip_low, 1 + clip_high]
    loss       = -sum min(ratio * advantages, clipped * advantages) / n_tokens

The sum is over the n tokens that the policy has sampled itself, each with its trajectory's advantage;
n_tokens is their number in the whole step, on all ranks. There is no KL term.

Shapes in the code: P prompts, G samples of each, b trajectories of a micro-batch, T tokens of the longest of
them, n trained tokens.

The paper's code and numbers are not published. Gamma and reward are as a reading note of it has them; ours:
1. All numbers of Config.
2. T counts crops that were made. A call that is malformed or refused has no box.
3. A trajectory without an answer is wrong. After max_crops tool turns it has one turn, only to answer.
4. Advantages are not divided by the std (norm_std), and clip_high is wider than clip_low.
5. A group with an answer that the judge failed to judge is not learned from.
Related methods are settings: lam=0 is GRPO, tool_bonus is DeepEyes', mask_over_turns is Mini-o3's.

Reads <data>/train.jsonl. Writes <out>/{config.json, log.jsonl, checkpoints/<step>/, last, best.json} and,
beside <out>, report.html. With --n_score it reads <data>/test.jsonl, too, and writes beside <out> eval/sft/,
eval/rppo/ and summary.json; without --model, the main job, the cold start sft/ as well.
"""
import json
import os
import time
from dataclasses import dataclass, replace
from pathlib import Path

import env  # before torch: see there
import numpy as np
import torch

import data
import eval as evaluation
import sft


@dataclass
class Config(sft.TrainConfig, evaluation.RolloutConfig, env.RewardConfig):
    """RPPO."""
    out: str = env.setting("runs/rppo", free=True)
    task: str = "tiny"               # the built-in task (data.py) of the main job; large is for real models
    steps: int = env.setting(40, free=True)  # more of them prolong a run
    prompts: int = 16                # P per step, over all ranks
    samples: int = env.setting(8, least=2)  # G per prompt; one alone has nothing to be compared with
    updates: int = 1                 # passes over a whole rollout; above 1 the ratio leaves 1, clipping acts
    micro_batch: int = env.setting(32, free=True)  # trajectories of mean length a pass; fewer if long
    lr: float = 5e-4
    warmup: int = env.setting(5, least=0)
    decay: float = 0.4
    weight_decay: float = 0.0
    train_vision: bool = False       # false: the tower stays; rollout and update share its features
    clip_low: float = 0.2            # ratios are held above 1 - clip_low and below 1 + clip_high
    clip_high: float = 0.28          # a wider upper clip, as in DAPO (arXiv 2503.14476)
    norm_std: bool = False           # divide advantages by the group's std
    mask_over_turns: bool = False    # no loss on trajectories that ran out of turns or tokens (Mini-o3)
    eval_every: int = 10             # steps between held-out evaluations ...
    eval_rows: int = env.setting(128, least=0)  # ... on train.jsonl's last rows, never trained on
    show_every: int = env.setting(20, free=True)  # steps between printed trajectories
    save_every: int = 20             # steps between checkpoints; every evaluation saves one, too
    n_score: int = env.setting(512, least=0, free=True)  # test rows scored at the end; 0: none


REAL = dict(
    env.REAL_EPISODE,
    in_flight=64,
    steps=200,
    prompts=32,
    micro_batch=1,
    lr=1e-6,
    lora_lr=1e-5,
    decay=0.0,
    eval_every=20,
    eval_rows=64,
    save_minutes=30.0,
    show_every=5,
    n_score=0,
    recompute=True,
    shard=True)


# --- The objective. FORK: the algorithm, in the next four functions and in token_advantages -------------
def group_advantages(rewards, norm_std):
    """rewards (P, G) -> advantages (P, G): minus the group's mean, divided by its unbiased std if asked.

    Exactly 0 for a flat group and for G = 1: a rounding residue divided by a tiny std would be noise of size
    1. Computed in float64.
    """
    rewards = torch.as_tensor(rewards).double()
    advantages = rewards - rewards.mean(1, keepdim=True)
    if norm_std and rewards.shape[1] > 1:
        advantages = advantages / rewards.std(1, keepdim=True)

    flat = (rewards == rewards[:, :1]).all(1, keepdim=True)       # (P, 1)
    return advantages.masked_fill(flat, 0.0)


def policy_loss(logp, old_logp, advantages, clip_low, clip_high, n_tokens=None):
    """The clipped loss (PPO, arXiv 1707.06347) of n trained tokens, all arguments (n,) -> scalar.

    Each token has the advantage of its trajectory. The sum is divided by n_tokens (default: n). Training
    passes the count of the whole step, so that the loss does not depend on micro-batches or ranks.
    """
    if n_tokens is None:
        n_tokens = len(logp)
    ratio = (logp - old_logp).exp()
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    surrogate = torch.minimum(ratio * advantages, clipped * advantages)
    return -surrogate.sum() / max(n_tokens, 1)


def counts(sample, cfg):
    """Do a Sample's tokens count in the divisor of the loss?"""
    return sample.traj.status == "answered" or not cfg.mask_over_turns


def has_gradient(sample, cfg):
    """Does it go through the model? If not, its tokens may still count in the divisor.

    A further term of the loss needs the trajectories of advantage 0 too: then this is counts(sample, cfg).
    """
    return sample.advantage != 0 and counts(sample, cfg)


# --- One step: collect, then update ---------------------------------------------------------------------
@dataclass
class Sample:
    """A trajectory and what is learned from it."""
    traj: env.Trajectory
    parts: dict                      # of its reward, by name, and their total
    advantage: float


def collect(policy, rows, streams, step, cfg):
    """Sample G trajectories of each row, reward them and compare them within their group: P * G samples.

    A row's trajectories stand together. `streams` has for each row the number of its random stream.
    """
    G = cfg.samples
    trajs = evaluation.rollout(
        policy, rows, cfg, G,
        seed=(cfg.seed, step),
        streams=streams)
    evaluation.judge(trajs, cfg)

    parts = []
    for i in range(0, len(trajs), G):
        parts += env.rewards(trajs[i:i + G], cfg)
    rewards = np.array([p["total"] for p in parts]).reshape(-1, G)        # (P, G)
    advantages = group_advantages(rewards, cfg.norm_std)                  # (P, G)

    # Where the judge failed nobody knows the group's mean: such a group counts as a flat one.
    for i, traj in enumerate(trajs):
        if traj.verdict == "failed":
            advantages[i // G] = 0.0
    return list(map(Sample, trajs, parts, advantages.flatten().tolist()))


def length(sample):
    return len(sample.traj.ids)


def micro_batches(samples, size):
    """The samples in about len(samples) / size micro-batches, the longest first. size: cfg.micro_batch.

    None has more tokens, padding included, than the larger of its share and the longest trajectory.
    Neighbours in length stand together, so that little is padding.
    """
    if not samples:
        return []
    samples = sorted(samples, key=length, reverse=True)
    tokens = sum(map(length, samples))
    room = max(size * tokens / len(samples), length(samples[0]))

    micro = []
    while samples:
        n = int(room // length(samples[0]))
        micro.append(samples[:n])
        samples = samples[n:]
    return micro


def idle(samples):
    """The shortest trajectory with mask 0: it passes through the model, but no token of it is trained."""
    shortest = min(samples, key=length)
    untrained = replace(shortest.traj, mask=[0] * length(shortest))
    return replace(shortest, traj=untrained)


def token_advantages(chosen, trained):
    """FORK: credit. The advantages (n,) of a micro-batch's trained tokens; trained (b, T-1) says which."""
    advantages = torch.tensor([s.advantage for s in chosen])                  # (b,)
    return advantages[:, None].expand(trained.shape)[trained]


def update(policy, optimizers, samples, cfg, reference=None):
    """Learn from one rollout, cfg.updates passes over it: returns what the log says of it. All ranks must
    reach this. `reference` is for a fork with a KL term: a Policy that stays as it is."""
    # 1. This rank's micro-batches, and the divisor: the tokens of all trajectories of all ranks
    learned = [s for s in samples if has_gradient(s, cfg)]
    micro = micro_batches(learned, cfg.micro_batch)
    tokens = sum(sum(s.traj.mask) for s in samples if counts(s, cfg))
    n_tokens, n_micro = sft.all_sum(tokens, len(micro))
    if policy.sharded:                   # ranks gather weights from each other: they must pass equally often
        most = max(sft.gather_objects(len(micro)))
        micro += [[idle(samples)]] * (most - len(micro))

    old_logps = []                       # of each micro-batch (n,), from before the first optimizer step
    sums = np.zeros(4)                   # over trained tokens: 1, entropy, |old - sampled|, is it clipped
    skipped = 0
    policy.train()
    for k in range(cfg.updates):
        loss_sum = 0.0
        for j, chosen in enumerate(micro):
            # 2. Forward: log-probability and entropy (n,) of the trained tokens, row by row
            batch = sft.collate([s.traj for s in chosen], policy.proc)
            with policy.autocast():
                logp, entropy = policy(batch, cfg.temperature)
            if k == 0:
                old_logps.append(logp.detach())

            # 3. Loss and gradient
            old_logp = old_logps[j]
            trained = batch["mask"][:, 1:] > 0                                # (b, T-1), on the CPU
            advantages = token_advantages(chosen, trained).to(policy.device)  # (n,)
            loss = policy_loss(logp, old_logp, advantages, cfg.clip_low, cfg.clip_high, n_tokens)
            # FORK: add another term here: a sum over the same tokens, divided by n_tokens
            loss.backward()
            loss_sum += loss.item()

            # 4. For the log
            sampled_logp = batch["logp"][:, 1:][trained].to(policy.device)
            gap = (old_logp - sampled_logp).abs()
            ratio = (logp.detach() - old_logp).exp()
            clipped = (ratio < 1 - cfg.clip_low) | (ratio > 1 + cfg.clip_high)
            sums += [
                len(logp),
                entropy.sum().item(),
                gap.sum().item(),
                clipped.sum().item()]

        # 5. Step. After flat groups alone, the optimizers' momentum would still move the weights.
        _, norm, skip = sft.optimizer_step(policy, optimizers, loss_sum, cfg, nothing_learned=n_micro == 0)
        skipped += skip

    n, entropy, gap, clipped = sft.all_sum(*sums.tolist())
    n = n or np.nan                      # after flat groups alone the three are NaN, so not logged
    return dict(
        tokens=n_tokens,
        entropy=entropy / n,
        log_ratio=gap / n,
        clip_share=clipped / n,
        grad_norm=norm,
        skipped=skipped)


def update_bytes(config, cfg, whole_fp32=False):
    """An estimate of the memory that one trajectory of max_tokens takes in the update, on CUDA: in bf16, with
    recomputation, by itself. The factors (8, 34, 7) say how many vectors of a width PyTorch keeps for each
    token, as counted. What the allocator cannot use, and the vision tower, are left out. whole_fp32: weights
    that are neither sharded nor frozen are fp32, and so is what goes from block to block."""
    text = config.get_text_config()
    inner = text.num_attention_heads * evaluation.head_dim(text)
    width = text.hidden_size
    n = cfg.max_tokens

    bf16, fp32 = 2, 4                    # bytes of a number
    stream = fp32 if whole_fp32 else bf16
    kept = stream * n * width * (text.num_hidden_layers + 2)      # inputs of the blocks
    attention = bf16 * n * 8 * inner                              # within one of them
    if hasattr(text, "linear_num_value_heads"):                   # Qwen3.5's linear layers take much more
        attention = fp32 * n * 34 * text.linear_num_value_heads * text.linear_value_head_dim
    mlp = n * (bf16 * 7 * text.intermediate_size + stream * 8 * width)
    logits = fp32 * 8 * 2 ** 26                                   # of a part: see Policy.forward
    return kept + max(attention + mlp, logits)


def check_memory(policy, first, cfg):
    """UserError if an update can hardly fit on the GPU, before the first rollout takes its minutes."""
    whole_fp32 = not policy.sharded and not policy.lora
    needed = update_bytes(policy.vlm.config, cfg, whole_fp32)
    each = 4 if first else 12            # of a parameter: gradient; moments, unless the checkpoint had them
    for p in policy.parameters():
        if p.requires_grad:
            part = p.to_local() if policy.sharded else p          # what this rank holds
            needed += each * part.numel()

    torch.cuda.empty_cache()
    free = torch.cuda.mem_get_info()[0]
    if needed > 0.9 * free:              # a tenth is for what the allocator cannot use
        raise env.UserError(
            f"an update takes about {needed / 2 ** 30:.1f} GiB, and {free / 2 ** 30:.1f} are free; "
            "lower --max_tokens, or use more GPUs / --lora")


# --- The log --------------------------------------------------------------------------------------------
def summarise(samples, cfg):
    """What a step's log entry says of all ranks' trajectories. All ranks must reach this."""
    mine = []
    for s in samples:
        mine.append((evaluation.measure(s.traj, cfg.eps), s.parts))
    everyone = sum(sft.gather_objects(mine), [])
    measures, parts = zip(*everyone)

    means = {}
    for name in sorted(set().union(*parts)):
        values = [p.get(name, 0.0) for p in parts]                # 0 for a trajectory without this part
        means[name] = float(np.mean(values))

    rewards = np.reshape([p["total"] for p in parts], (-1, cfg.samples))      # (P, G)
    flat = rewards.max(1) == rewards.min(1)                                   # (P,)
    return dict(
        reward=means["total"],
        **evaluation.metrics(measures),
        parts=means,
        flat_groups=float(flat.mean()))


def mark_best(out):
    """Write best.json: of the checkpoints that are there, the first with the highest held-out accuracy in the
    log. Returns its step, None without one."""
    best = dict(step=None, accuracy=-1.0)
    for entry in sft.read_log(out):
        if "held_out" in entry:
            found = dict(step=entry["step"] + 1, accuracy=entry["held_out"]["accuracy"])
            is_there = os.path.exists(f"{out}/checkpoints/{found['step']}")
            if is_there and found["accuracy"] > best["accuracy"]:
                best = found
    if best["step"]:
        env.write_text(f"{out}/best.json", json.dumps(best))
    return best["step"]


def print_step(entry, samples, proc, first, cfg):
    """Print a step, and every show_every steps the longest trajectory of rank 0."""
    step = entry["step"]
    if (step - first) % 20 == 0:
        print(f"{'':10} reward{evaluation.HEADER} entrp  norm   sec")
    text = f"step {step:5d} {entry['reward']:6.3f}{evaluation.line(entry)}"
    seconds = entry["rollout_s"] + entry["update_s"]
    text += f" {entry['entropy']:5.2f} {entry['grad_norm']:5.2f} {seconds:5.1f} "
    failed = entry["judge_failed_rate"]                  # of the answers that the judge was asked about
    text += f"failed {failed:.1%}" if failed else sft.eta(entry, cfg)
    print(text, flush=True)

    for name in ("cold_start", "held_out"):
        if name in entry:
            print(f"{name:17}{evaluation.line(entry[name])}", flush=True)
    if (step + 1) % cfg.show_every == 0:
        longest = max(samples, key=length)
        print(evaluation.show(longest.traj, proc), flush=True)


# --- RPPO: steps, and what is saved ---------------------------------------------------------------------
ORDER = 11      # stands in the seed of the rows' order


def prompts_of(step, cfg, n):
    """Row numbers of a step: pieces of a permutation of the n rows that is drawn anew for each pass over
    them."""
    chosen = []
    for p in range(cfg.prompts):
        again, place = divmod(step * cfg.prompts + p, n)
        order = np.random.default_rng([cfg.seed, ORDER, again]).permutation(n)
        chosen.append(int(order[place]))
    return chosen


def hold_out(rows, n):
    """(rows to train on, the last n rows). Rows that share an image with the last n are on neither side."""
    held_out = rows[max(len(rows) - n, 0):]
    images = {row["images"][0] for row in held_out}
    others = [row for row in rows if row["images"][0] not in images]
    return others, held_out


def score_held_out(policy, held_out, cfg, rank, world_size):
    """The metrics of one sampled answer to each held-out row. All ranks must reach this."""
    records = evaluation.evaluate(policy, held_out, cfg, rank, world_size)
    return evaluation.metrics([record["metrics"] for record in records])


def train(policy, optimizers, preset, rows, held_out, first, cfg, rank, world_size, reference=None):
    """The steps from `first` on. A signal, or a UserError of a rollout, ends them when what has been learned
    is saved. One of an evaluation leaves the last checkpoint.
    preset: saved with checkpoints; rows, held_out: to train on, to evaluate; reference: see `update`.
    """
    def save(step):
        sft.save_checkpoint(step, policy, optimizers, cfg, preset)
        if rank == 0:
            sft.prune(cfg, step, mark_best(cfg.out))
            refresh_page(cfg)

    mine = list(range(rank, cfg.prompts, world_size))      # this rank's prompts of a step
    newest = first               # the step of the newest checkpoint
    saved = time.time()          # when it was written
    started = saved - sft.spent(cfg.out)
    with sft.deferred_signals() as signals:
        for step in range(first, cfg.steps):
            entry = dict(step=step)
            if step == 0 and cfg.eval_rows:
                entry["cold_start"] = score_held_out(policy, held_out, cfg, rank, world_size)

            # 1. Collect: G trajectories of each prompt, rewarded and compared within their group
            clock = time.time()
            chosen = prompts_of(step, cfg, len(rows))
            asked = [rows[chosen[p]] for p in mine]
            try:
                samples = sft.together(collect, policy, asked, mine, step, cfg)
            except env.UserError:        # e.g. an image that cannot be read, a judge that refuses
                if step > newest:
                    save(step)
                raise
            entry["rollout_s"] = time.time() - clock

            # 2. Update
            clock = time.time()
            entry["lr"] = sft.set_lr(optimizers, step, cfg)
            entry.update(update(policy, optimizers, samples, cfg, reference))
            entry["update_s"] = time.time() - clock

            # 3. Evaluate
            done = step + 1
            evaluates = cfg.eval_rows and (done % cfg.eval_every == 0 or done == cfg.steps)
            if evaluates:
                entry["held_out"] = score_held_out(policy, held_out, cfg, rank, world_size)

            # 4. Log
            entry.update(summarise(samples, cfg), seconds=time.time() - started)
            if rank == 0:
                sft.append_log(cfg.out, entry)
                print_step(entry, samples, policy.proc, first, cfg)
            del samples                  # with their images' features, before the next are sampled

            # 5. Save
            stopped, is_due = sft.due(done, signals, saved, cfg)
            if is_due or evaluates:
                save(done)
                newest = done
                saved = time.time()
            if stopped:
                sft.stop(done, rank)


# --- The main job: scenes, cold start, RPPO, scores -----------------------------------------------------
def parent(cfg):
    """The folder that holds cfg.out; what is written beside <out> goes there."""
    return os.path.dirname(cfg.out) or "."


def refresh_page(cfg):
    """Write ../report.html: what the cold start and this run have logged and answered."""
    top = parent(cfg)
    evaluation.refresh_report(top, f"{top}/sft", cfg.out, f"{top}/eval/sft", f"{top}/eval/rppo")


def say(rank, text):
    if rank == 0:
        print(f"\n{text}", flush=True)


def make_scenes(cfg):
    """Draw the built-in rows, unless cfg.data has them or is a folder of somebody's own."""
    if not data.has_other_rows(cfg.data):
        say(0, f"1 of 4: scenes into {cfg.data}")
        data.main(data.Config(
            seed=cfg.seed,
            out=cfg.data,
            task=cfg.task,
            max_crops=cfg.max_crops))


def read_rows(cfg):
    """(rows to train on, held-out rows, test rows that are scored at the end). Raises UserError."""
    path = data.split_path(cfg.data, "train")
    everything = data.load_rows(path, cfg.image_root)
    rows, held_out = hold_out(everything, cfg.eval_rows)
    if not rows:
        raise env.UserError(f"{path}: too few rows for --eval_rows={cfg.eval_rows}; lower it")

    tests = []
    if cfg.n_score:                                      # better known now than at the end
        path = data.split_path(cfg.data, "test")
        if not os.path.exists(path):
            raise env.UserError(f"{path}: not there to score at the end; add it, or give --n_score=0")
        tests = data.load_rows(path, cfg.image_root)[:cfg.n_score]
    return rows, held_out, tests


def imitation_config(cfg):
    """The sft.Config of the imitation that comes first where no model is given."""
    given = env.shared(cfg, env.EpisodeConfig)
    for name in ("seed", "data", "image_root", "tiny"):
        given[name] = getattr(cfg, name)
    return sft.Config(**given, out=f"{parent(cfg)}/sft")


def check_scores(cfg):
    """UserError if the scores of another run lie, or will lie, where those of this one would go."""
    if not cfg.n_score:
        return
    folder = f"{parent(cfg)}/eval/rppo"
    cure = f"give --out={cfg.out}/rppo, as scores go beside --out"
    env.lock(folder, cure)

    scores = env.read_json(f"{folder}/eval.json", {})
    scored = scores.get("config", {}).get("model")       # .../rppo/checkpoints/40
    if scored and Path(scored).parent.parent.name != Path(cfg.out).name:
        raise env.UserError(f"{folder} has the scores of {scored}; {cure}")


def compare(cfg, start, rank, started):
    """Score the cold start and the final policy on the test rows; print the table and write summary.json."""
    summary = {}
    models = dict(sft=start, rppo=f"{cfg.out}/checkpoints/{cfg.steps}")
    for name, model in models.items():
        given = env.shared(cfg, evaluation.Config)
        given.update(model=model, out=f"{parent(cfg)}/eval/{name}", limit=cfg.n_score)
        summary[name] = evaluation.main(evaluation.Config(**given))
    if rank > 0:
        return

    summary["seconds"] = round(time.time() - started, 1)
    env.write_text(f"{parent(cfg)}/summary.json", json.dumps(summary, indent=1))
    refresh_page(cfg)
    print(f"\n{'':10} greedy {evaluation.HEADER}")
    labels = dict(sft="cold start", rppo="RPPO" if cfg.lam else "GRPO")
    for name, label in labels.items():
        print(f"{label:10} {summary[name]['accuracy_greedy']:6.3f} {evaluation.line(summary[name])}")
    print(f"This command took {summary['seconds']:.0f} s. Next: open {parent(cfg)}/report.html", flush=True)


def main(cfg):
    """RPPO as cfg says, and without a model all that comes before it; all ranks call it. Returns the trained
    Policy."""
    rank, world_size, device = sft.setup()
    if cfg.prompts % world_size:
        raise env.UserError(f"--prompts={cfg.prompts} is not a multiple of the {world_size} ranks")
    started = time.time()

    # 1. Rows. Folders with other settings are refused before anything is made.
    imitation = imitation_config(cfg)
    if rank == 0:
        sft.saved_step(cfg)
        if not cfg.model:
            sft.check_flags(imitation, world_size)
            cure = f"give --model={imitation.out}, or for a new cold start --out={cfg.out}/rppo"
            sft.saved_step(imitation, cure)
        check_scores(cfg)
    if rank == 0 and not cfg.model:
        make_scenes(cfg)
    sft.barrier()
    rows, held_out, tests = read_rows(cfg)

    # 2. What it starts from: the given model, or the tiny one after its cold start
    start = cfg.model
    if not start:
        say(rank, f"2 of 4: cold start by imitation, {imitation.steps} steps, into {imitation.out}")
        sft.main(imitation)
        start = f"{imitation.out}/checkpoints/{imitation.steps}"      # which every run ends with

    # 3. RL
    say(rank, f"3 of 4: RL from {start}, {cfg.prompts} prompts x {cfg.samples} a step, into {cfg.out}")
    first = sft.open_run(cfg, rank, rows + held_out)      # the step to go on from, or 0
    policy, optimizers, preset = sft.load_trainable(cfg, start, first, device, betas=(0.9, 0.95))
    if device.type == "cuda":
        sft.together(check_memory, policy, first, cfg)
    sft.together(data.check_rows, rows + held_out + tests, rank, world_size, policy.proc, cfg)
    train(policy, optimizers, preset, rows, held_out, first, cfg, rank, world_size)

    # 4. Scores of both
    if cfg.n_score:
        say(rank, f"4 of 4: scores on {len(tests)} test rows into {parent(cfg)}/eval")
        compare(cfg, start, rank, started)
    return policy


if __name__ == "__main__":
    sft.cli(main, Config, REAL)
