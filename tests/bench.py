"""How fast are env.rollout and rppo.update? Measured against plain transformers in the same run, on the same prompts, with
the same forced turns.

    python tests/bench.py                                             # the tiny model, on the CPU
    python tests/bench.py --shape=qwen3-vl-4b                         # a true shape with random weights, on CUDA
    python tests/bench.py --shape=qwen3-vl-4b --shrink=16 --repeats=1 # all its code on the CPU: every width divided by 16

Plain rollout: `generate` on the whole dialogues, turn by turn, all of them one left-padded batch with the pixels of all
images so far, as TRL does it. Plain update: the whole dialogues as padded batches with an attention mask, the logits of
every position, log_softmax over the vocabulary. Both use the same weights, tool and resized images as ours.
Every turn is scripted: a hook on both sides adds so much to the logit of the next scripted token that it is certain to be
drawn. What was drawn, the images, the logits before the hook and the norm of the gradient are asserted to be equal.

Prints one table and writes runs/bench.json: rollout_ratio and update_ratio (plain seconds / ours), update_memory_ratio (our
peak / theirs, above what is held before), and what they are made of.
"""
import copy
import json
import multiprocessing
import os
import resource
import sys
import tempfile
import time
from collections import Counter
from ctypes import CDLL
from dataclasses import dataclass, replace
from statistics import median
from unittest.mock import patch

import numpy as np
import torch
import transformers

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import data  # noqa: E402
import env  # noqa: E402
import rppo  # noqa: E402
import sft  # noqa: E402


@dataclass
class Config:
    shape: str = "tiny"              # or one of SHAPES
    prompts: int = 8                 # P
    samples: int = 8                 # G
    turns: int = 5                   # calls, and an answer in the last one
    turn_tokens: int = 0             # longest turn, the shortest has half of it; 0: 48 for tiny, else 256
    repeats: int = 5                 # of each measurement, ours and plain by turns; medians are reported
    scaling: bool = True             # also measure how the rollout's time grows
    shrink: int = 1                  # divide a true shape by this: a trial of the command without its GPU
    seed: int = 0
    out: str = "runs/bench.json"


# text: width, width of the MLP, layers, heads, key-value heads, V, tied head; vision: width, width of the MLP, blocks, heads,
# blocks that feed deepstack (Qwen3-VL) or attend to the whole image (Qwen2.5-VL)
SHAPES = {"qwen3-vl-2b": ((2048, 6144, 28, 16, 8, 151936, True), (1024, 4096, 24, 16, (5, 11, 17))),
          "qwen3-vl-4b": ((2560, 9728, 36, 32, 8, 151936, True), (1024, 4096, 24, 16, (5, 11, 17))),
          "qwen3-vl-8b": ((4096, 12288, 36, 32, 8, 151936, False), (1152, 4304, 27, 16, (8, 16, 24))),
          "qwen2.5-vl-3b": ((2048, 11008, 36, 16, 2, 151936, True), (1280, 3420, 32, 16, (7, 15, 23, 31))),
          "qwen2.5-vl-7b": ((3584, 18944, 28, 28, 4, 152064, False), (1280, 3420, 32, 16, (7, 15, 23, 31)))}


def make_policy(cfg, rows, device):
    """The tiny policy of sft.py, or a random one of a true shape, made on the device, with the tiny one's tokenizer."""
    tiny = sft.make_tiny(rows, cfg.seed)
    if cfg.shape == "tiny":
        return tiny.to(device)
    (width, mlp, layers, heads, kv, vocab, tied), (v_width, v_mlp, depth, v_heads, special) = SHAPES[cfg.shape]
    less = lambda n, least=1: max(least, n // cfg.shrink)
    scale, v_scale = less(heads) / heads, less(v_heads) / v_heads
    text = dict(hidden_size=int(width * scale), intermediate_size=int(mlp * scale), num_hidden_layers=less(layers, 4),
                num_attention_heads=less(heads), num_key_value_heads=less(kv), vocab_size=less(vocab), tie_word_embeddings=tied)
    marks = sorted({i * less(depth, 4) // depth for i in special})
    vision = dict(hidden_size=int(v_width * v_scale), intermediate_size=int(v_mlp * v_scale), depth=less(depth, 4),
                  num_heads=less(v_heads), spatial_merge_size=2, temporal_patch_size=2, out_hidden_size=text["hidden_size"])
    tok = tiny.proc.tok
    ids = {f"{k}_token_id": tok.convert_tokens_to_ids(f"<|{n}|>") for k, n in dict(
        image="image_pad", video="video_pad", vision_start="vision_start", vision_end="vision_end").items()}
    if cfg.shape.startswith("qwen3"):
        text |= dict(head_dim=128, rope_parameters=dict(rope_type="default", rope_theta=5e6, mrope_section=[24, 20, 20], mrope_interleaved=True))
        vision |= dict(patch_size=16, num_position_embeddings=2304, deepstack_visual_indexes=marks)
        kind, patch = "Qwen3VL", 16
    else:
        text |= dict(bos_token_id=None, rope_parameters=dict(rope_type="default", rope_theta=1e6, mrope_section=[16, 24, 24]))
        vision |= dict(patch_size=14, window_size=112, fullatt_block_indexes=marks)
        kind, patch = "Qwen2_5_VL", 14
    text["eos_token_id"] = tiny.proc.end
    torch.manual_seed(cfg.seed)
    config = getattr(transformers, kind + "Config")(text_config=text, vision_config=vision, tie_word_embeddings=tied, **ids)
    with torch.device(device):
        vlm = getattr(transformers, kind + "ForConditionalGeneration")(config)
    return env.Policy(vlm, env.Processor(tok, patch, 2, (0.5,) * 3, (0.5,) * 3, text["vocab_size"])).to(device)


def without_patches(vlm):
    """The model as transformers has it: a copy that shares the weights, without env.Policy's forwards of the tower."""
    plain = copy.deepcopy(vlm, {id(p): p for p in vlm.parameters()})
    for module in plain.modules():
        module.__dict__.pop("forward", None)
    return plain


def settings(cfg, **given):
    """The settings of rppo.py for this shape, with room for all scripted turns. given: fields of Config or of World."""
    real, turns = cfg.shape != "tiny", given.pop("turns", cfg.turns)
    preset = {**env.REAL_WORLD, **rppo.REAL} if real else {}
    pixels = {k: v // cfg.shrink for k, v in preset.items() if k.endswith("pixels")}
    longest = cfg.turn_tokens or (256 // min(cfg.shrink, 5) if real else 48)
    return rppo.Config(**{**preset, **pixels, "max_crops": turns - 1, "turn_tokens": longest, "max_tokens": 10 ** 6,
                          "in_flight": 10 ** 6, "samples": cfg.samples, "prompts": cfg.prompts, **given})


class Script:
    """The turns that every rollout takes: for each of B trajectories max_crops calls and an answer."""

    def __init__(self, policy, task):
        """Makes `turns`, a list (turns) of lists (B) of ids, and `table` (turns, turn_tokens, B, 1), padded with the end."""
        proc, rng, B = policy.proc, np.random.default_rng(0), task.prompts * task.samples
        ids = lambda text: proc.encode(text, keep=env.TAGS)
        self.turns, self.raw = [], []
        for k in range(task.max_crops + 1):
            boxes = 250 * np.hstack([c := rng.integers(0, 4, (B, 2)), c + 1])
            acts = [ids("</think>\n" + (data.look(b) if k < task.max_crops else "<answer>red</answer>")) + [proc.end] for b in boxes]
            sizes = rng.integers(task.turn_tokens // 2, task.turn_tokens + 1, B)
            thoughts = [ids("<think>") + ids(" black") * n for n in sizes]
            self.turns.append([t[:max(1, n - len(a))] + a for t, a, n in zip(thoughts, acts, sizes)])
        assert max(len(t) for turn in self.turns for t in turn) <= task.turn_tokens, "the turns are too short for a call"
        table = [[t + [proc.end] * (task.turn_tokens - len(t)) for t in turn] for turn in self.turns]
        self.table = torch.tensor(table, device=policy.device).transpose(1, 2)[..., None]

    def begin(self, turn):
        self.ids, self.raw = iter(self.table[turn]), self.raw[:turn] + [[]]

    def __call__(self, _, logits):
        """The hook: logits (B, V), made certain in place. What the scripted tokens had before is kept in raw[turn]."""
        ids = next(self.ids)
        self.raw[-1].append(logits.gather(1, ids))
        return logits.scatter_(1, ids, 1e4)


def our_rollout(policy, rows, task, script):
    def sample_turn(policy, cache, last, trajs, *more):
        assert len(trajs) == script.table.shape[2]
        script.begin(len(trajs[0].turns))
        return real(policy, cache, last, trajs, *more)
    real = env.sample_turn
    with patch.object(env, "sample_turn", sample_turn), \
         patch.object(policy, "logits", lambda h, t: script(None, env.Policy.logits(policy, h, t))):
        return env.rollout(policy, rows, task, task.samples)


def padded(trajs, proc, device, left):
    """What transformers' processors would make of whole dialogues: padded ids, masks, and the pixels of every image."""
    T = max(len(t.ids) for t in trajs)
    pad = lambda x, fill: torch.tensor([[fill] * (T - len(v)) * left + v + [fill] * (T - len(v)) * (not left) for v in x], device=device)
    ids = pad([t.ids for t in trajs], proc.end)
    pixels, grid = proc.patchify([v for t in trajs for v in t.views], device)
    return dict(input_ids=ids, attention_mask=pad([[1] * len(t.ids) for t in trajs], 0), mm_token_type_ids=(ids == proc.image).int(),
                pixel_values=pixels, image_grid_thw=grid.to(device)), pad([t.mask for t in trajs], 0)


@torch.no_grad()
def plain_rollout(vlm, policy, rows, task, script):
    vlm.eval()
    prompts = [env.reset(policy.proc, row, task) for row in rows]
    trajs = [replace(t, boxes=list(t.boxes), turns=[]) for t in prompts for _ in range(task.samples)]
    for k in range(task.max_crops + 1):
        script.begin(k)
        batch, _ = padded(trajs, policy.proc, policy.device, left=True)
        with policy.autocast():
            out = vlm.generate(**batch, logits_processor=[script], max_new_tokens=task.turn_tokens, do_sample=True, temperature=1.0,
                               top_k=0, top_p=1.0, eos_token_id=policy.proc.end, pad_token_id=policy.proc.end)
        for t, ids in zip(trajs, out[:, batch["input_ids"].shape[1]:].tolist()):
            env.respond(t, policy.proc, ids[:ids.index(policy.proc.end) + 1])
            env.observe(t, policy.proc, task)
    return trajs


def plain_update(vlm, policy, optimizer, trajs, advantages, task):
    """One step, on CUDA in the micro-batches of rppo.py (the logits of all 64 would not fit). Returns the gradient's norm."""
    vlm.train()
    n_tokens = sum(sum(t.mask) for t in trajs)
    size = len(trajs) if policy.device.type == "cpu" else task.micro_batch
    for i in range(0, len(trajs), size):
        batch, mask = padded(trajs[i:i + size], policy.proc, policy.device, left=False)
        with policy.autocast():
            logits = vlm(**batch, use_cache=False).logits
        logp = (logits[:, :-1].float() / task.temperature).log_softmax(-1).gather(2, batch["input_ids"][:, 1:, None])[..., 0]
        a = torch.tensor(advantages[i:i + size], device=policy.device)
        rppo.policy_loss(logp, logp.detach(), a, mask[:, 1:], task.clip_low, task.clip_high, n_tokens).backward()
    norm = torch.nn.utils.clip_grad_norm_(vlm.parameters(), task.clip_norm)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return float(norm)


# ---------------------------------------------------------------------------------------------------------------
# Measuring.

def clock(device):
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def by_turns(repeats, device, *functions):
    """Median seconds of each function, called by turns so that a busy machine is busy for all of them."""
    spent = [[] for _ in functions]
    for _ in range(repeats):
        for f, s in zip(functions, spent):
            t = clock(device)
            f()
            s.append(clock(device) - t)
    return [median(s) for s in spent]


def peak_memory(f, device):
    """Bytes that f needs at most, above what is held before. On the CPU the growth of a forked process."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        f()
        return torch.cuda.max_memory_allocated() - held

    def child(grown):
        torch.set_num_threads(1)  # the threads of the parent do not survive the fork
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        f()
        grown.value = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    if sys.platform == "linux":
        CDLL(None).malloc_trim(0)  # give back what was freed, or the child would take from it unseen
    fork = multiprocessing.get_context("fork")
    grown = fork.Value("d", -1.0)
    process = fork.Process(target=child, args=(grown,))
    process.start()
    process.join()
    assert process.exitcode == 0
    return int(grown.value) * (1024 if sys.platform == "linux" else 1)


def parts_of(rollout, policy):
    """One rollout's seconds by part. `decode` includes choosing the tokens; `other` is the tool, text and copying rows."""
    spent = Counter()

    def timed(name, f):
        def run(*args):
            t = clock(policy.device)
            out = f(*args)
            spent[name] += clock(policy.device) - t
            return out
        return run
    sample_turn = timed("decode", env.sample_turn)
    with patch.object(env, "prefill", timed("prefill", env.prefill)), patch.object(env, "sample_turn", sample_turn), \
         patch.object(policy, "see", timed("vision", policy.see)):
        timed("total", rollout)()
    spent["prefill"] -= spent["vision"]  # it is part of it
    spent["other"] = spent["total"] - spent["prefill"] - spent["decode"] - spent["vision"]
    return dict(spent)


def limits(device):
    """What the machine can do: bytes/s of a copy (read and written), operations/s of a matrix product in the compute type."""
    cuda = device.type == "cuda"
    x, n = torch.empty(2 ** (30 if cuda else 24), dtype=torch.uint8, device=device), 8192 if cuda else 512
    y, a = torch.empty_like(x), torch.randn(n, n, device=device, dtype=torch.bfloat16 if cuda else torch.float32)
    copying, product = by_turns(12, device, lambda: x.copy_(y), lambda: a @ a)
    return 2 * len(x) / copying, 2 * n ** 3 / product


def counted(policy, trajs, script):
    """(bytes that decoding must read: weights once a step, keys and values of each live row; operations of the update: 6 per
    parameter and token it is applied to, plus attention). Each image counts once, windows of the tower not at all."""
    core, text, vision = policy.vlm.model, policy.vlm.config.get_text_config(), policy.vlm.config.vision_config
    size = lambda module: sum(p.numel() for p in module.parameters())
    width, head = (2 if policy.device.type == "cuda" else 4), policy.vlm.lm_head.weight.numel()
    stack, tower = size(core.language_model) - size(core.get_input_embeddings()), size(core.visual)
    one_head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    kv = 2 * text.num_hidden_layers * text.num_key_value_heads * one_head * width
    read, spans = 0, [np.flatnonzero(np.diff([0, *t.mask, 0])) for t in trajs]  # where each turn begins and ends
    for turn in range(len(script.turns)):
        read += (max(len(t) for t in script.turns[turn]) - 1) * (stack + head) * width
        read += sum(kv * sum(range(s[2 * turn] + 1, s[2 * turn + 1])) for s in spans)
    full = len(getattr(vision, "fullatt_block_indexes", range(vision.depth)))
    attend = 6 * text.num_hidden_layers * text.num_attention_heads * one_head  # half of 12: causal
    patches = [v.shape[0] * v.shape[1] // policy.proc.patch ** 2 for v in {id(v): v for t in trajs for v in t.views}.values()]
    work = sum(6 * stack * len(t.ids) + attend * len(t.ids) ** 2 + 6 * head * sum(t.mask) for t in trajs)
    return read, work + sum(6 * tower * n + 12 * full * vision.hidden_size * n * n for n in patches)


def scaling(policy, rows, cfg):
    """Tables of (value, seconds, tokens fed to the model); a prompt's tokens are fed once for its group."""
    real, tables = cfg.shape != "tiny", {}
    base = settings(cfg)
    for field, values in {"turns": (2, 3, 5, 9), "samples": (2, 4, 8, 16),
                          "max_pixels": [base.max_pixels * x // 4 for x in (1, 2, 4, 8)] if real else [32 ** 2, 64 ** 2, 128 ** 2, 256 ** 2],
                          "turn_tokens": [base.turn_tokens * x // 2 for x in (1, 2, 4, 8)]}.items():
        tables[field] = []
        for value in values:
            task = settings(cfg, **{field: value})
            script = Script(policy, task)
            run = lambda: our_rollout(policy, rows, task, script)
            trajs = run()
            tokens = sum(len(t.ids) - t.mask.index(1) for t in trajs) + sum(t.mask.index(1) for t in trajs[::task.samples])
            tables[field].append((value, by_turns(max(1, cfg.repeats // 2), policy.device, run)[0], tokens))
    return tables


# ---------------------------------------------------------------------------------------------------------------

def check_equal(script, ours, plain, our_raw, plain_raw):
    """Both sides drew the scripted tokens, saw the same images, and computed the same logits (to the compute type)."""
    for a, b, turns in zip(ours, plain, zip(*script.turns), strict=True):
        assert a.ids == b.ids and a.mask == b.mask and a.status == b.status == "answered"
        assert [i for i, m in zip(a.ids, a.mask) if m] == [i for t in turns for i in t]
        assert len(a.views) == len(b.views) and all(torch.equal(x, y) for x, y in zip(a.views, b.views))
    for turns, x, y in zip(script.turns, our_raw, plain_raw, strict=True):
        length = torch.tensor([[len(t)] for t in turns], device=x[0].device)
        n = int(length.max())  # more steps than that may have been made; a row that is done computes nothing of meaning
        gap = (torch.cat(x[:n], 1) - torch.cat(y[:n], 1)).abs().masked_fill(torch.arange(n, device=length.device) >= length, 0)
        assert (gap.sum(1) / length[:, 0]).max() < (0.1 if gap.is_cuda else 1e-4)


def compare_rollouts(cfg, policy, plain, rows, task, script):
    """Returns (trajectories, results)."""
    ours, theirs = (lambda: our_rollout(policy, rows, task, script)), (lambda: plain_rollout(plain, policy, rows, task, script))
    trajs = ours()
    raw = script.raw
    check_equal(script, trajs, theirs(), raw, script.raw)
    our_s, plain_s = by_turns(cfg.repeats, policy.device, ours, theirs)
    sampled = sum(sum(t.mask) for t in trajs)
    parts = parts_of(ours, policy)
    return trajs, dict(ours_s=our_s, plain_s=plain_s, trajectories_per_s=len(trajs) / our_s, sampled_tokens_per_s=sampled / our_s,
                       plain_sampled_tokens_per_s=sampled / plain_s, decode_s=parts["decode"],
                       share={k: parts[k] / parts["total"] for k in ("prefill", "decode", "vision", "other")})


def compare_updates(cfg, policy, plain, trajs, task):
    """Learning rate 0, so that every repetition computes the same. Every advantage counts: a step's flat groups would cost nothing."""
    optimizer = torch.optim.AdamW(policy.parameters(), lr=0.0)
    advantages = [1.0 - 2 * (i % 2) for i in range(len(trajs))]
    ours = lambda: float(rppo.update(policy, optimizer, trajs, advantages, task, 1)[1][5])
    theirs = lambda: plain_update(plain, policy, optimizer, trajs, advantages, task)
    a, b = ours(), theirs()
    assert abs(a - b) < (0.05 if policy.device.type == "cuda" else 1e-3) * b, (a, b)
    our_peak, plain_peak = peak_memory(ours, policy.device), peak_memory(theirs, policy.device)
    our_s, plain_s = by_turns(cfg.repeats, policy.device, ours, theirs)
    tokens = sum(len(t.ids) for t in trajs)
    return dict(ours_s=our_s, plain_s=plain_s, tokens_per_s=tokens / our_s, plain_tokens_per_s=tokens / plain_s,
                ours_peak_bytes=our_peak, plain_peak_bytes=plain_peak,
                held_bytes=torch.cuda.memory_allocated() if policy.device.type == "cuda" else None)


def report(r):
    """Print the table."""
    roll, upd, lim = r["rollout"], r["update"], r["limits"]
    print(f"{r['shape']} on {r['device']}, {r['threads']} threads, torch {r['torch']}, transformers {r['transformers']}: "
          f"{r['prompts']} prompts x {r['samples']} samples, {r['turns']} turns, {r['tokens']} tokens, {r['sampled_tokens']} of them sampled")
    print(f"{'':34}{'ours':>12}{'plain':>12}{'ratio':>8}")
    for name, a, b, ratio, form in (
            ("rollout, seconds", roll["ours_s"], roll["plain_s"], r["rollout_ratio"], "12.3f"),
            ("rollout, sampled tokens/s", roll["sampled_tokens_per_s"], roll["plain_sampled_tokens_per_s"], r["rollout_ratio"], "12.0f"),
            ("update, seconds", upd["ours_s"], upd["plain_s"], r["update_ratio"], "12.3f"),
            ("update, tokens/s", upd["tokens_per_s"], upd["plain_tokens_per_s"], r["update_ratio"], "12.0f"),
            ("update, peak MiB above held", upd["ours_peak_bytes"] / 2 ** 20, upd["plain_peak_bytes"] / 2 ** 20, r["update_memory_ratio"], "12.0f")):
        print(f"{name:34}{a:{form}}{b:{form}}{ratio:8.2f}")
    print(f"rollout: {roll['trajectories_per_s']:.2f} trajectories/s; time in " + ", ".join(f"{k} {v:.0%}" for k, v in roll["share"].items()))
    print(f"limits: copy {lim['copy_bytes_per_s'] / 1e9:.0f} GB/s, decode reaches {lim['decode_share']:.0%} of it ({lim['decode_bytes'] / 1e9:.2f} GB); "
          f"product {lim['product_per_s'] / 1e12:.2f} Tops/s, update reaches {lim['update_share']:.0%} ({lim['update_operations'] / 1e12:.3f} Tops)")
    for field, table in r["scaling"].items():
        _, s0, n0 = table[0]
        print(f"{field:12}" + "".join(f"{v:>9}: {s:6.2f} s, time x{s / s0:4.1f}, tokens x{n / n0:4.1f}" for v, s, n in table))


def main(cfg):
    if cfg.shape not in ("tiny", *SHAPES):
        raise env.UserError(f"--shape={cfg.shape}: the shapes are tiny, " + ", ".join(SHAPES))
    cuda = torch.cuda.is_available() and cfg.shape != "tiny"
    if cfg.shape != "tiny" and not cuda and cfg.shrink == 1:
        raise env.UserError(f"--shape={cfg.shape} needs a CUDA device; --shrink=16 tries the command without one")
    device = torch.device("cuda" if cuda else "cpu")
    with tempfile.TemporaryDirectory() as folder:
        few, n = dict(n_test=0, seed=cfg.seed), cfg.prompts
        data.main(data.Config(out=f"{folder}/tiny", n_sft=40, n_train=n, **few))
        policy = make_policy(cfg, data.load_rows(f"{folder}/tiny/sft.jsonl"), device)
        if cfg.shape != "tiny":
            data.main(data.Config(out=f"{folder}/real", level=2, n_sft=0, n_train=n, **few))
        rows = data.load_rows(f"{folder}/{'tiny' if cfg.shape == 'tiny' else 'real'}/train.jsonl")
        for row in rows:  # the system prompt is one token of the tiny tokenizer, and hundreds of a real one's
            row["problem"] += " black" * (300 * (cfg.shape != "tiny") // cfg.shrink)
        plain, task = without_patches(policy.vlm), settings(cfg)
        script = Script(policy, task)
        trajs, roll = compare_rollouts(cfg, policy, plain, rows, task, script)
        upd = compare_updates(cfg, policy, plain, trajs, task)
        tables = scaling(policy, rows, cfg) if cfg.scaling else {}
    copying, product = limits(device)
    read, work = counted(policy, trajs, script)
    result = dict(
        shape=cfg.shape, shrink=cfg.shrink, device=torch.cuda.get_device_name() if cuda else "CPU", threads=torch.get_num_threads(),
        torch=torch.__version__, transformers=transformers.__version__, prompts=cfg.prompts, samples=cfg.samples, turns=cfg.turns,
        tokens=sum(len(t.ids) for t in trajs), sampled_tokens=sum(sum(t.mask) for t in trajs),
        rollout_ratio=roll["plain_s"] / roll["ours_s"], update_ratio=upd["plain_s"] / upd["ours_s"],
        update_memory_ratio=upd["ours_peak_bytes"] / upd["plain_peak_bytes"], rollout=roll, update=upd,
        limits=dict(copy_bytes_per_s=copying, decode_bytes=read, decode_share=read / roll["decode_s"] / copying,
                    product_per_s=product, update_operations=work, update_share=work / upd["ours_s"] / product), scaling=tables)
    report(result)
    os.makedirs(os.path.dirname(cfg.out) or ".", exist_ok=True)
    env.write_text(cfg.out, json.dumps(result, indent=1))
    return result


if __name__ == "__main__":
    env.run(main, Config, {})
