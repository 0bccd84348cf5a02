"""How fast are rollout (eval.py) and update (rppo.py)? Measured beside plain transformers, on the same prompts with the same forced turns.

    python tests/bench.py                                             # the tiny model, on the CPU
    python tests/bench.py --shape=main-job                            # the same at the main job's sizes, see Config
    python tests/bench.py --shape=qwen3-vl-4b                         # a true shape with random weights, on CUDA
    python tests/bench.py --shape=qwen3-vl-4b --shrink=16 --repeats=1 # its code on the CPU, every size divided by 16

Plain rollout: `generate` on the whole dialogues, turn by turn, all of them one left-padded batch with the pixels of all
images so far, as TRL does it. Plain update: whole dialogues padded, with an attention mask, the logits of every position and
log_softmax over the vocabulary. Both sides share weights, tool and resized images. Of ours the random number of a token is
its scripted id, of `generate` a hook makes the scripted token certain. What was drawn, how likely it was, the images and the
norm of the gradient are asserted to be equal.

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
from contextlib import redirect_stdout
from ctypes import CDLL
from dataclasses import dataclass
from statistics import median
from unittest.mock import patch

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import env  # noqa: E402, before torch: see there
import numpy as np  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
from PIL import Image  # noqa: E402

import data  # noqa: E402
import eval as evaluation  # noqa: E402
import rppo  # noqa: E402
import sft  # noqa: E402


@dataclass
class Config:
    """The benchmark."""
    shape: str = "tiny"              # the tiny model, image : crop : turn as in the real preset, an eighth of its tokens;
    #                                  main-job: the tiny model on the main job's 2 x 2 tokens an image; or one of SHAPES
    prompts: int = 8                 # P
    samples: int = 8                 # G
    turns: int = 5                   # calls, and an answer in the last one
    turn_tokens: int = 0             # longest turn, the shortest has half of it; 0: 32 (the tiny cold start's mean is 23), else 256
    repeats: int = 5                 # of each measurement, ours and plain by turns; medians are reported
    scaling: bool = True             # also measure how the rollout's time grows
    shrink: int = 1                  # divide a true shape by this: a trial of the command without its GPU
    seed: int = 0                    # of the weights and the scripted turns
    out: str = "runs/bench.json"


# text: width, width of the MLP, layers, heads, key-value heads, V, tied head; vision: width, width of the MLP, blocks, heads,
# blocks that feed deepstack (Qwen3-VL) or attend to the whole image (Qwen2.5-VL). Of Qwen3.5 the heads of values of the linear
# layers follow.
SHAPES = {"qwen3-vl-2b": (2048, 6144, 28, 16, 8, 151936, True, 1024, 4096, 24, 16, (5, 11, 17)),
          "qwen3-vl-4b": (2560, 9728, 36, 32, 8, 151936, True, 1024, 4096, 24, 16, (5, 11, 17)),
          "qwen3-vl-8b": (4096, 12288, 36, 32, 8, 151936, False, 1152, 4304, 27, 16, (8, 16, 24)),
          "qwen2.5-vl-3b": (2048, 11008, 36, 16, 2, 151936, True, 1280, 3420, 32, 16, (7, 15, 23, 31)),
          "qwen2.5-vl-7b": (3584, 18944, 28, 28, 4, 152064, False, 1280, 3420, 32, 16, (7, 15, 23, 31)),
          "qwen3.5-0.8b": (1024, 3584, 24, 8, 2, 248320, True, 768, 3072, 12, 12, (), 16),
          "qwen3.5-2b": (2048, 6144, 24, 8, 2, 248320, True, 1024, 4096, 24, 16, (), 16),
          "qwen3.5-4b": (2560, 9216, 32, 16, 4, 248320, True, 1024, 4096, 24, 16, (), 32),
          "qwen3.5-9b": (4096, 12288, 32, 16, 4, 248320, False, 1152, 4304, 27, 16, (), 32)}


def make_config(cfg, tok):
    """The transformers configuration of a true shape, divided by cfg.shrink, with the special ids of a tokenizer."""
    width, mlp, layers, heads, kv, vocab, tied, v_width, v_mlp, blocks, v_heads, marks, *linear = SHAPES[cfg.shape]

    def less(n, least=1):
        return max(least, n // cfg.shrink)
    scale, v_scale, depth = less(heads) / heads, less(v_heads) / v_heads, less(blocks, 4)
    marks = sorted({i * depth // blocks for i in marks})
    text = dict(hidden_size=int(width * scale), intermediate_size=int(mlp * scale), num_hidden_layers=less(layers, 4),
                num_attention_heads=less(heads), num_key_value_heads=less(kv), vocab_size=less(vocab),
                tie_word_embeddings=tied, bos_token_id=None, eos_token_id=tok.convert_tokens_to_ids("<|im_end|>"))
    vision = dict(hidden_size=int(v_width * v_scale), intermediate_size=int(v_mlp * v_scale), depth=depth,
                  num_heads=less(v_heads), spatial_merge_size=2, temporal_patch_size=2, out_hidden_size=text["hidden_size"])
    if linear:
        kind = transformers.Qwen3_5Config
        text |= dict(head_dim=256, linear_num_key_heads=less(16), linear_num_value_heads=less(*linear), rope_parameters=dict(
            rope_type="default", rope_theta=1e7, mrope_section=[11, 11, 10], mrope_interleaved=True, partial_rotary_factor=0.25))
        vision |= dict(patch_size=16, num_position_embeddings=2304)
    elif cfg.shape.startswith("qwen3"):
        kind = transformers.Qwen3VLConfig
        text |= dict(head_dim=128, rope_parameters=dict(
            rope_type="default", rope_theta=5e6, mrope_section=[24, 20, 20], mrope_interleaved=True))
        vision |= dict(patch_size=16, num_position_embeddings=2304, deepstack_visual_indexes=marks)
    else:
        kind = transformers.Qwen2_5_VLConfig
        text["rope_parameters"] = dict(rope_type="default", rope_theta=1e6, mrope_section=[16, 24, 24])
        vision |= dict(patch_size=14, window_size=112, fullatt_block_indexes=marks)
    names = dict(image="image_pad", video="video_pad", vision_start="vision_start", vision_end="vision_end")
    ids = {f"{key}_token_id": tok.convert_tokens_to_ids(f"<|{name}|>") for key, name in names.items()}
    return kind(text_config=text, vision_config=vision, tie_word_embeddings=tied, **ids)


def make_policy(cfg, rows, device):
    """The tiny policy of sft.py, or a random one of a true shape, made on the device, with the tiny one's tokenizer."""
    tiny = sft.make_tiny(rows, cfg.seed)
    if cfg.shape not in SHAPES:
        return tiny.to(device)
    config = make_config(cfg, tiny.proc.tokenizer)
    with torch.device(device):
        vlm = transformers.AutoModelForImageTextToText.from_config(config)
    return sft.make_policy(vlm, tiny.proc.tokenizer).to(device)


def without_patches(vlm):
    """The model as transformers has it: a copy that shares the weights, without sft.Policy's forward of the patches."""
    plain = copy.deepcopy(vlm, {id(p): p for p in vlm.parameters()})
    for module in plain.modules():
        module.__dict__.pop("forward", None)
    return plain


def settings(cfg, turns=None, **given):
    """rppo.py's settings for this shape, with room for all scripted turns; given: what differs, for the tables of `scaling`."""
    preset = {**env.REAL_EPISODE, **rppo.REAL} if cfg.shape in SHAPES else {}
    pixels = {k: v for k, v in env.REAL_EPISODE.items() if k.endswith("pixels") and cfg.shape != "main-job"}
    # a token of the tiny model is a quarter of Qwen3-VL's 32 x 32 pixels
    preset |= {k: v // (cfg.shrink if preset else 8 * 4) for k, v in pixels.items()}
    longest = cfg.turn_tokens or (256 // min(cfg.shrink, 5) if cfg.shape in SHAPES else 32)
    task = rppo.Config(**{**preset, "max_crops": (turns or cfg.turns) - 1, "turn_tokens": longest, "in_flight": 10 ** 6,
                          "samples": cfg.samples, "prompts": cfg.prompts, "seed": cfg.seed, **given})
    side = 16 if cfg.shape not in SHAPES else 32 if cfg.shape.startswith("qwen3") else 28
    each = task.turn_tokens + task.max_crop_pixels // side ** 2 + 64
    task.max_tokens = task.max_pixels // side ** 2 + 512 + each * (task.max_crops + 1)    # slots of the cache
    return task


class Script:
    """The turns that every rollout takes: for each of B trajectories max_crops calls and an answer."""

    def __init__(self, policy, task):
        """Makes `turns`, a list (turns) of lists (B) of ids, `table` (turns, turn_tokens, B, 1), padded with the end, and room
        for the scripted tokens' log-probabilities, `logp`, alike."""
        proc, rng, B = policy.proc, np.random.default_rng(task.seed), task.prompts * task.samples
        ids, self.turns = lambda text: proc.encode_data(text, keep=env.TAGS), []
        for k in range(task.max_crops + 1):
            corner, sizes = rng.integers(0, 4, (B, 2)), rng.integers(task.turn_tokens // 2, task.turn_tokens + 1, B)
            acts = [data.crop_call(250 * np.array([*c, *c + 1])) if k < task.max_crops else "<answer>red</answer>" for c in corner]
            acts = [ids("</think>\n" + a) + [proc.end] for a in acts]
            self.turns.append([(ids("<think>") + ids(" black") * n)[:max(1, n - len(a))] + a for a, n in zip(acts, sizes)])
        if max(len(t) for turn in self.turns for t in turn) > task.turn_tokens:
            raise env.UserError(f"--turn_tokens={task.turn_tokens} leaves no room for a call; raise it")
        table = [[t + [proc.end] * (task.turn_tokens - len(t)) for t in turn] for turn in self.turns]
        self.table = torch.tensor(table, device=policy.device).transpose(1, 2)[..., None]
        self.logp = torch.zeros(self.table.shape, device=policy.device)

    def begin(self, turn):
        self.turn, self.at = turn, 0

    def __call__(self, _, logits):
        """The hook in `generate`: logits (B, V), made certain in place."""
        ids = self.table[self.turn, self.at]
        self.logp[self.turn, self.at] = logits.float().log_softmax(-1).gather(1, ids)
        self.at += 1
        return logits.scatter_(1, ids, 1e4)


def our_rollout(policy, rows, task, script):
    """The random number of a token is its id. What it is drawn from is computed all the same."""
    drawn = evaluation.draw

    def uniforms(seed, prompt, sample, n):
        turns = script.table[:n // task.turn_tokens, :, prompt * task.samples + sample]
        return turns.flatten().double() / 2 ** 20

    def draw(logp, u):
        drawn(logp, u)
        return (u * 2 ** 20).round().long()
    with patch.object(evaluation, "uniforms", uniforms), patch.object(evaluation, "draw", draw):
        return evaluation.rollout(policy, rows, task, task.samples)


def padded(trajs, policy, left):
    """Whole dialogues as transformers' processors would give them, and the mask of the sampled tokens (B, T)."""
    T = max(len(t.ids) for t in trajs)

    def pad(lists, fill):
        rows = [[fill] * (T - len(x)) + x if left else x + [fill] * (T - len(x)) for x in lists]
        return torch.tensor(rows, device=policy.device)
    ids = pad([t.ids for t in trajs], policy.proc.end)
    views = [x.view.numpy() for t in trajs for x in t.shown]
    pixels = policy.image_processor(views, input_data_format="channels_last", return_tensors="pt").to(policy.device)
    return dict(pixels, input_ids=ids, attention_mask=pad([[1] * len(t.ids) for t in trajs], 0),
                mm_token_type_ids=(ids == policy.proc.image).int()), pad([t.mask for t in trajs], 0)


@torch.no_grad()
def plain_rollout(vlm, policy, rows, task, script):
    end, prompts = policy.proc.end, [env.reset(policy.proc, row, task) for row in rows]
    trajs = [t.fork() for t in prompts for _ in range(task.samples)]
    vlm.eval()
    for k in range(task.max_crops + 1):
        script.begin(k)
        batch, _ = padded(trajs, policy, left=True)
        with policy.autocast():
            out = vlm.generate(**batch, logits_processor=[script], max_new_tokens=task.turn_tokens, do_sample=True,
                               temperature=1.0, top_k=0, top_p=1.0, eos_token_id=end, pad_token_id=end)
        for t, ids in zip(trajs, out[:, batch["input_ids"].shape[1]:].tolist()):
            env.step(t, env.respond(t, policy.proc, ids[:ids.index(end) + 1]), task, policy.proc)
    return trajs


def plain_update(vlm, policy, optimizer, trajs, advantages, task):
    """One step as one batch; on CUDA in the micro-batches of rppo.py, or the logits would not fit. Returns the gradient's norm."""
    n_tokens, size = sum(sum(t.mask) for t in trajs), task.micro_batch if policy.device.type == "cuda" else len(trajs)
    vlm.train()
    for i in range(0, len(trajs), size):
        batch, mask = padded(trajs[i:i + size], policy, left=False)
        with policy.autocast():
            logits = vlm(**batch, use_cache=False).logits
        logp = (logits[:, :-1].float() / task.temperature).log_softmax(-1).gather(2, batch["input_ids"][:, 1:, None])[..., 0]
        trained = mask[:, 1:] > 0
        a = torch.tensor(advantages[i:i + size], device=policy.device)[:, None].expand_as(trained)[trained]
        logp = logp[trained]
        rppo.policy_loss(logp, logp.detach(), a, task.clip_low, task.clip_high, n_tokens).backward()
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
    """Bytes that f needs at most, above what is held before. On the CPU: how much a forked process grows."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        f()
        return torch.cuda.max_memory_allocated() - held
    used = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1024 if sys.platform == "linux" else 1)

    def child(grown):
        torch.set_num_threads(1)  # the threads of the parent do not survive the fork
        before = used()
        f()
        grown.value = used() - before
    if sys.platform == "linux":
        CDLL(None).malloc_trim(0)  # give back what was freed, or the child would take from it unseen
    fork = multiprocessing.get_context("fork")
    grown = fork.Value("q")
    process = fork.Process(target=child, args=(grown,))
    process.start()
    process.join()
    assert process.exitcode == 0
    return grown.value


def parts_of(rollout, policy):
    """One rollout's seconds by part. decode includes choosing the tokens; python is the tool, text, and copying of rows."""
    spent = Counter()

    def timed(name, f):
        def run(*args):
            t = clock(policy.device)
            out = f(*args)
            spent[name] += clock(policy.device) - t
            return out
        return run
    with patch.object(evaluation.Engine, "feed", timed("prefill", evaluation.Engine.feed)), \
         patch.object(policy, "see", timed("vision", policy.see)), \
         patch.object(evaluation.Engine, "decode", timed("decode", evaluation.Engine.decode)):
        timed("python", rollout)()
    spent["prefill"] -= spent["vision"]  # each was timed with what it calls
    spent["python"] -= spent["prefill"] + spent["vision"] + spent["decode"]
    return dict(spent)


def limits(device):
    """What the machine can do: bytes/s of a copy (read and written), operations/s of a matrix product in the compute type."""
    cuda = device.type == "cuda"
    x, n = torch.zeros(2 ** (30 if cuda else 26), dtype=torch.uint8, device=device), 8192 if cuda else 512
    y, a = torch.zeros_like(x), torch.randn(n, n, device=device, dtype=torch.bfloat16 if cuda else torch.float32)
    copying, product = by_turns(12, device, lambda: x.copy_(y), lambda: a @ a)
    return 2 * len(x) / copying, 2 * n ** 3 / product


def counted(policy, trajs, script, samples):
    """(bytes that decoding must read: the weights once a step, keys and values of each live row, those of a prompt once for its
    group; operations of an update: 6 per parameter and token it is applied to, plus attention). An image counts once, the
    windows of the tower do not."""
    core, text, vision = policy.vlm.model, policy.vlm.config.get_text_config(), policy.vlm.config.vision_config
    size = lambda module: sum(p.numel() for p in module.parameters())
    stack, tower = size(core.language_model) - size(core.get_input_embeddings()), size(core.visual)
    head, width = policy.vlm.lm_head.weight.numel(), 2 if policy.device.type == "cuda" else 4
    depth, per_head = text.num_hidden_layers, getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    read = sum(max(map(len, turn)) - 1 for turn in script.turns) * (stack + head) * width
    slots = 0
    for b, (t, turns) in enumerate(zip(trajs, zip(*script.turns))):
        starts = np.flatnonzero(np.diff([0, *t.mask]) == 1)  # a turn of n tokens feeds all but its last
        slots += sum(int(s - starts[0]) + i for s, ids in zip(starts, turns) for i in range(1, len(ids)))
        if b % samples == 0:
            slots += int(starts[0]) * sum(max(map(len, turn[b:b + samples])) - 1 for turn in script.turns)
    read += slots * 2 * depth * text.num_key_value_heads * per_head * width
    attend = 6 * depth * text.num_attention_heads * per_head  # half of 12, for it is causal
    work = sum(6 * stack * len(t.ids) + attend * len(t.ids) ** 2 + 6 * head * sum(t.mask) for t in trajs)
    full = len(getattr(vision, "fullatt_block_indexes", range(vision.depth)))
    for v in {id(x.view): x.view for t in trajs for x in t.shown}.values():
        n = v.shape[0] * v.shape[1] // vision.patch_size ** 2
        work += 6 * tower * n + 12 * full * vision.hidden_size * n * n
    return read, work


def check_equal(script, ours, plain):
    """Both sides drew the scripted tokens, saw the same images, and found them as likely (to the compute type)."""
    for i, (a, b, turns) in enumerate(zip(ours, plain, zip(*script.turns), strict=True)):
        assert a.ids == b.ids and a.mask == b.mask and a.status == b.status == "answered"
        assert [x for x, m in zip(a.ids, a.mask) if m] == sum(turns, [])
        assert all(torch.equal(x.view, y.view) for x, y in zip(a.shown, b.shown, strict=True))
        logp = torch.cat([script.logp[k, :len(turn), i, 0] for k, turn in enumerate(turns)]).cpu()
        gap = torch.tensor([p for p, m in zip(a.logp, a.mask) if m]) - logp
        assert gap.abs().mean() < (0.1 if script.logp.is_cuda else 1e-4)


def compare_rollouts(cfg, policy, plain, rows, task, script):
    """Returns (trajectories, results)."""
    ours, theirs = (lambda: our_rollout(policy, rows, task, script)), (lambda: plain_rollout(plain, policy, rows, task, script))
    trajs = ours()
    check_equal(script, trajs, theirs())
    our_s, plain_s = by_turns(cfg.repeats, policy.device, ours, theirs)
    parts = parts_of(ours, policy)
    return trajs, dict(ours_s=our_s, plain_s=plain_s, trajectories_per_s=len(trajs) / our_s, decode_s=parts["decode"],
                       share={k: v / sum(parts.values()) for k, v in parts.items()})


def compare_updates(cfg, policy, plain, trajs, task):
    """At learning rate 0 every repetition computes the same. A flat group has advantage 0: ours leaves it out."""
    optimizer, advantages = torch.optim.AdamW(policy.parameters(), lr=0.0), [1.0 - 2 * (i % 2) for i in range(len(trajs))]
    half = [a * (i // task.samples % 2) for i, a in enumerate(advantages)]
    samples = lambda a: [rppo.Sample(t, {}, x) for t, x in zip(trajs, a)]
    ours = lambda a=advantages: rppo.update(policy, [optimizer], samples(a), task)["grad_norm"]
    theirs = lambda: plain_update(plain, policy, optimizer, trajs, advantages, task)
    a, b = ours(), theirs()
    assert abs(a - b) < (0.05 if policy.device.type == "cuda" else 1e-3) * b, (a, b)
    our_peak, plain_peak = peak_memory(ours, policy.device), peak_memory(theirs, policy.device)
    our_s, half_s, plain_s = by_turns(cfg.repeats, policy.device, ours, lambda: ours(half), theirs)
    return dict(ours_s=our_s, ours_half_flat_s=half_s, plain_s=plain_s, ours_peak=our_peak, plain_peak=plain_peak)


def scaling(policy, rows, cfg):
    """How the rollout grows: tables of (value, seconds, tokens fed to the model, bytes that decoding must read). A prompt is
    fed once for its group. The time should grow no faster than the faster of the two: long dialogues are bound by reading."""
    base, tables = settings(cfg), {}
    pixels = [base.max_pixels * x // 4 for x in (1, 2, 4)]
    for field, values in dict(turns=(2, 4, 8), samples=(4, 8, 16), max_pixels=pixels,
                              turn_tokens=[base.turn_tokens * x for x in (1, 2, 4)]).items():
        tables[field] = []
        for value in values:
            task = settings(cfg, **{field: value})
            script = Script(policy, task)
            trajs = our_rollout(policy, rows, task, script)
            first = [t.mask.index(1) for t in trajs]
            tokens = sum(len(t.ids) for t in trajs) - sum(first) + sum(first[::task.samples])
            [seconds] = by_turns((cfg.repeats + 1) // 2, policy.device, lambda: our_rollout(policy, rows, task, script))
            tables[field].append((value, seconds, tokens, counted(policy, trajs, script, task.samples)[0]))
    return tables


def report(r):
    """Print the table."""
    roll, upd, mib = r["rollout"], r["update"], 2 ** 20
    print("{shape} (1/{shrink}) on {device}, {threads} threads: {prompts} prompts x {samples} samples, {turns} turns, {tokens} tokens, "
          "{sampled_tokens} of them sampled".format(**r))
    line = "{:30}{:>12.5g}{:>12.5g}{:8.2f}".format
    print(f"{'':30}{'ours':>12}{'plain':>12}{'ratio':>8}")
    print(line("rollout, seconds", roll["ours_s"], roll["plain_s"], r["rollout_ratio"]))
    print(line("rollout, sampled tokens/s", *(r["sampled_tokens"] / roll[k] for k in ("ours_s", "plain_s")), r["rollout_ratio"]))
    if upd:
        print(line("update, seconds", upd["ours_s"], upd["plain_s"], r["update_ratio"]))
        print(line("update, half the groups flat", upd["ours_half_flat_s"], upd["plain_s"], r["update_ratio_half_flat"]))
        print(line("update, tokens/s", *(r["tokens"] / upd[k] for k in ("ours_s", "plain_s")), r["update_ratio"]))
        print(line("update, peak MiB above held", upd["ours_peak"] / mib, upd["plain_peak"] / mib, r["update_memory_ratio"]))
    print(f"rollout: {roll['trajectories_per_s']:.2f} trajectories/s; " + ", ".join(f"{k} {v:.0%}" for k, v in roll["share"].items()))
    print("decode reaches {decode_share:.0%} of the copying rate, {bytes_per_s:.1e} bytes/s; the update {update_share:.0%} of the matrix "
          "rate, {operations_per_s:.1e} operations/s".format(**r["limits"]))
    for field, table in r["scaling"].items():
        print(f"{field:12}" + " |".join(" {}: {:.2f} s".format(*x) + "".join(f", {name} x{x[i] / table[0][i]:.1f}" for i, name in
                                        ((1, "time"), (2, "tokens"), (3, "bytes"))) for x in table))


def main(cfg):
    real = cfg.shape in SHAPES
    if not real and cfg.shape not in ("tiny", "main-job"):
        raise env.UserError(f"--shape={cfg.shape}: the shapes are tiny, main-job, " + ", ".join(SHAPES))
    cuda = torch.cuda.is_available() and real
    torch.backends.cuda.enable_cudnn_sdp(False)  # as sft.setup has it
    if real and not cuda and cfg.shrink == 1:
        raise env.UserError(f"--shape={cfg.shape} needs a CUDA device; --shrink=16 tries the command without one")
    with tempfile.TemporaryDirectory() as folder:
        with redirect_stdout(None):
            data.main(data.Config(out=folder + "/words", n_sft=40, n_train=0, n_test=0))
            data.main(data.Config(out=folder, n_sft=0, n_train=cfg.prompts, n_test=0))
        policy = make_policy(cfg, data.load_rows(folder + "/words/sft.jsonl"), torch.device("cuda" if cuda else "cpu"))
        policy.banned.zero_()  # the plain side bans nothing
        rows = data.load_rows(folder + "/train.jsonl")
        for row in rows:
            if cfg.shape != "main-job":
                side = 2048 if real else 1024
                Image.open(row["images"][0]).resize((side, side)).save(row["images"][0])
            # the system prompt is one token of the tiny tokenizer, and hundreds of a real one's
            row["problem"] += " black" * (0 if cfg.shape == "main-job" else 300 // (cfg.shrink if real else 8))
        plain, task, upd = without_patches(policy.vlm), settings(cfg), {}
        script = Script(policy, task)
        trajs, roll = compare_rollouts(cfg, policy, plain, rows, task, script)
        try:
            upd = compare_updates(cfg, policy, plain, trajs, task)
        except torch.OutOfMemoryError as e:
            print(f"no update: {str(e).splitlines()[0]}")
        tables = scaling(policy, rows, cfg) if cfg.scaling else {}
    copied, product = limits(policy.device)
    read, work = counted(policy, trajs, script, task.samples)
    ratio = lambda x, ours="ours_s", plain="plain_s": x[plain] / x[ours] if x else None
    result = dict(
        vars(cfg), device=torch.cuda.get_device_name() if cuda else "CPU", threads=torch.get_num_threads(), torch=torch.__version__,
        transformers=transformers.__version__, tokens=sum(len(t.ids) for t in trajs), sampled_tokens=sum(sum(t.mask) for t in trajs),
        rollout_ratio=ratio(roll), update_ratio=ratio(upd), update_ratio_half_flat=ratio(upd, "ours_half_flat_s"),
        update_memory_ratio=ratio(upd, "plain_peak", "ours_peak"), rollout=roll, update=upd, scaling=tables,
        limits=dict(bytes_per_s=copied, decode_bytes=read, decode_share=read / roll["decode_s"] / copied,
                    operations_per_s=product, update_operations=work, update_share=work / upd["ours_s"] / product if upd else 0.0))
    report(result)
    os.makedirs(os.path.dirname(cfg.out) or ".", exist_ok=True)
    env.write_text(cfg.out, json.dumps(result, indent=1))
    return result


if __name__ == "__main__":
    sft.cli(main, Config, {})
