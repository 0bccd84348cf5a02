"""sft.py, file 3 of 5 (read env.py and data.py first): cold start by imitation.

    torchrun sft.py                                                # the tiny model on the scenes of `python data.py`
    torchrun --nproc-per-node=8 sft.py --model=Qwen/Qwen3-VL-4B-Instruct --data=data/mine

    loss = - sum_{i,t} m_it log p(token_it | tokens before it) / sum m        m = 1 on the assistant's tokens only

The sums run over all conversations of a step on all ranks. A conversation is rendered by replaying its turns through
the tool, by the code that makes rollouts. Rows are taken in the order of the file, so a curriculum is the data's affair.
Reads <data>/sft.jsonl; writes <out>/checkpoints/<step>/ (plain save_pretrained), config.json, log.jsonl, last.
Killed at any moment and started again, a run ends with the same bits: nothing that a step does depends on a random state.
"""
import hashlib
import json
import math
import os
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields

import torch
import torch.distributed as dist

import data
import env

@dataclass
class Config(env.World):
    seed: int = 0
    model: str = ""                  # a folder or hub id; empty: the tiny model, made here
    data: str = "data/scenes-{seed}"
    image_root: str = ""             # where the images of the rows lie; empty: relative to the file of the rows
    out: str = "runs/sft"
    steps: int = 420                 # x batch = 20,160 rows: one pass over the scenes, whose last 30 % are the imperfect ones
    batch: int = 48                  # conversations per step, over all ranks
    micro_batch: int = 16            # conversations per forward pass
    lr: float = 4e-3
    muon_lr: float = 0.03
    warmup: int = 30                 # steps to reach lr
    decay: float = 0.3               # last share of the steps: linear to zero
    weight_decay: float = 0.01
    clip_norm: float = 1.0
    log_every: int = 25              # steps between printed lines; log.jsonl has every step
    save_every: int = 150
    keep: int = 2                    # newest checkpoints kept
    resume: bool = True              # go on from the last checkpoint in out; false: put the old run aside
    max_skips: int = 5               # steps in a row without a finite gradient that end the run
    train_vision: bool = True        # false: the vision tower stays as it is
    recompute: bool = False          # activation checkpointing: a third more computation for a fraction of the memory
    shard: bool = False              # FSDP2 over all ranks (one is enough: it keeps fp32 weights and computes in bf16)
    bf16_moments: bool = False       # Adam's moments in bf16: 4 bytes a parameter less (see AdamW16)


REAL = dict(steps=1000, batch=32, micro_batch=1, lr=1e-5, muon_lr=0.0, warmup=50, save_every=200, train_vision=False,
            recompute=True, shard=True)


def make_tiny(rows, seed):
    """A randomly initialised Qwen3-VL of 0.6 M parameters and a tokenizer trained on the rows' own text.

    Same special tokens and chat format as Qwen3-VL, on a small scale: a word is a token, and so are the system prompt
    and the three constant pieces of a call. A patch is 8 pixels, an image token 16 x 16.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast, Qwen3VLConfig, Qwen3VLForConditionalGeneration
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>",
               "<|image_pad|>", "<|video_pad|>"]
    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(r"\s*</?\w+>|,? ?\w+|[^\w<]+|<"), "isolated"),
                                                 pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tok.decoder = decoders.ByteLevel()
    frames = [env.SYSTEM, '\n{"name": "image_zoom_in_tool", "arguments": {"bbox_2d": [', '], "img_idx": ', "}}\n"]
    texts = [t for r in rows for t in (r["problem"], *r["turns"])] + list(env.ERRORS.values()) * 50 + [env.SYSTEM_NO_TOOL] * 50
    texts = [p for t in texts for p in _split(t, frames + list(env.TAGS))]
    texts += ["user\n", "assistant\n", "system\n", "\n"] * 50
    tok.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=1200, min_frequency=20, show_progress=False,
                            special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    tok.add_tokens([AddedToken(t, normalized=False) for t in (*env.TAGS, *frames)])
    tok = PreTrainedTokenizerFast(tokenizer_object=tok, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    ids = {k: tok.convert_tokens_to_ids(f"<|{k}|>") for k in ("image_pad", "video_pad", "vision_start", "vision_end", "im_end")}
    torch.manual_seed(seed)
    config = Qwen3VLConfig(
        text_config=dict(vocab_size=len(tok), hidden_size=96, intermediate_size=256, num_hidden_layers=3, num_attention_heads=3,
                         num_key_value_heads=3, head_dim=32, max_position_embeddings=4096, tie_word_embeddings=True,
                         eos_token_id=ids["im_end"],
                         rope_parameters=dict(rope_type="default", rope_theta=10000.0, mrope_section=[6, 5, 5], mrope_interleaved=True)),
        vision_config=dict(depth=2, hidden_size=64, intermediate_size=192, num_heads=2, patch_size=8, spatial_merge_size=2,
                           temporal_patch_size=2, out_hidden_size=96, num_position_embeddings=64, deepstack_visual_indexes=[0]),
        image_token_id=ids["image_pad"], video_token_id=ids["video_pad"], vision_start_token_id=ids["vision_start"],
        vision_end_token_id=ids["vision_end"], tie_word_embeddings=True)
    vlm = Qwen3VLForConditionalGeneration(config)
    # At transformers' 0.02 an image token hardly says where it is, and finding the boxes takes three times as long to learn.
    torch.nn.init.normal_(vlm.model.visual.pos_embed.weight, std=0.5)
    return env.Policy(vlm, env.Processor(tok, 8, 2, (0.5,) * 3, (0.5,) * 3, len(tok)))


def _split(text, cuts):
    """Text without the pieces in cuts."""
    for c in cuts:
        text = text.replace(c, "\0")
    return [t for t in text.split("\0") if t]


def lr_scale(step, cfg):
    """Share of the peak rate: linear warm-up, constant, then linear to zero over the last `decay` share of the steps."""
    return min((step + 1) / max(cfg.warmup, 1), 1, (cfg.steps - step) / max(cfg.decay * cfg.steps, 1))


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised: every matrix moves by about the same in every direction (Jordan et al. 2024). As
    torch.optim.Muon, but in fp32: its bf16 makes of a rounding difference between ranks one of 1 % of the step."""

    def __init__(self, params, lr, momentum):
        super().__init__(params, dict(lr=lr, momentum=momentum))

    @torch.no_grad()
    def step(self):
        for g in self.param_groups:
            for p in g["params"]:
                if p.grad is None:
                    continue
                m = self.state[p].setdefault("momentum_buffer", torch.zeros_like(p))
                m.lerp_(p.grad, 1 - g["momentum"])
                x = p.grad.lerp(m, g["momentum"])                     # Nesterov
                tall = x.shape[0] > x.shape[1]
                x = (x.T if tall else x) / x.norm().clamp_min(1e-7)
                for _ in range(5):                                    # Newton-Schulz: singular values towards 1
                    a = x @ x.T
                    x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
                p.add_(x.T if tall else x, alpha=-g["lr"] * max(1, p.shape[0] / p.shape[1]) ** 0.5)


class AdamW16(torch.optim.Optimizer):
    """AdamW (Loshchilov and Hutter 2019) that keeps its two moments in bf16 and computes in fp32. An average that moves by
    1 - beta2 = 0.02 to 0.05 of the difference a step still moves at bf16's resolution of 2^-8; at 0.001 it would stand still."""

    def __init__(self, params, lr, betas, weight_decay):
        assert betas[1] <= 0.98
        super().__init__(params, dict(lr=lr, betas=betas, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self):
        for g in self.param_groups:
            for p in (p for p in g["params"] if p.grad is not None):
                s, (b1, b2) = self.state[p], g["betas"]
                s["step"] = s.get("step", torch.zeros(())) + 1
                averages = []
                for k, b, x in (("exp_avg", b1, p.grad), ("exp_avg_sq", b2, p.grad ** 2)):
                    averages.append(s[k].float().lerp(x, 1 - b) if k in s else x * (1 - b))
                    s[k] = averages[-1].to(torch.bfloat16)
                m, v = (a / (1 - b ** s["step"].item()) for a, b in zip(averages, g["betas"]))
                p.mul_(1 - g["lr"] * g["weight_decay"]).sub_(g["lr"] * m / (v.sqrt() + 1e-8))


def adamw(params, cfg, betas):
    """AdamW. foreach=False: on CUDA the other way needs temporaries as large as the weights."""
    given = dict(lr=cfg.lr, betas=betas, weight_decay=cfg.weight_decay)
    return AdamW16(params, **given) if cfg.bf16_moments else torch.optim.AdamW(params, **given, foreach=False)


def make_optimizers(policy, cfg):
    """AdamW, and with muon_lr (the tiny preset) Muon for the weight matrices."""
    if cfg.muon_lr and cfg.shard:
        raise env.UserError("--shard=true: Muon needs whole matrices; give --muon_lr=0")
    mats = {p for n, p in policy.named_parameters() if p.ndim == 2 and "embed" not in n and "lm_head" not in n and cfg.muon_lr}
    rest = [p for p in policy.parameters() if p not in mats and p.requires_grad]
    out = [adamw(rest, cfg, (0.9, 0.98))]
    if mats:
        out.append(Muon([p for p in policy.parameters() if p in mats and p.requires_grad], cfg.muon_lr, 0.95))
    for o in out:
        for g in o.param_groups:
            g["peak"] = g["lr"]
    return out


# ---------------------------------------------------------------------------------------------------------------
# What both training stages need: run folders, checkpoints, sums over ranks (rppo.py imports these).

def estimate(vlm, cfg, ranks):
    """Estimate of GiB per GPU for training vlm (it may be on the meta device), as {part: GiB}.

    Per parameter 4 bytes of weight, of gradient and of each Adam moment (2 with bf16_moments), shared out over the ranks
    with cfg.shard. A rollout holds all weights in bf16 and its cache; an update its activations (with recompute one state
    per layer and one layer's inside), slabs of logits and the embeddings; a step some copies of the largest weight. "peak" is
    the largest of the three phases.
    """
    text, vision, split = vlm.config.get_text_config(), vlm.config.vision_config, ranks if cfg.shard else 1
    n, tower = (sum(p.numel() for p in m.parameters()) for m in (vlm, vlm.model.visual))
    trained = n if cfg.train_vision else n - tower
    head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads

    def activations(tokens, part, layers):
        states, inside = part.hidden_size, 8 * part.hidden_size + 3 * part.intermediate_size
        return 2 * tokens * (states * layers + inside * (1 if cfg.recompute else layers))

    tokens = cfg.micro_batch * cfg.max_tokens
    patches = cfg.micro_batch * (cfg.max_pixels + cfg.max_crops * cfg.max_crop_pixels) / vision.patch_size ** 2
    part = dict(weights=4 * n / split, adam=(4 if cfg.bf16_moments else 8) * trained / split, gathered=2 * n,
                cache=4 * max(cfg.in_flight, getattr(cfg, "samples", 1)) * cfg.max_tokens * text.num_hidden_layers * text.num_key_value_heads * head,
                gradients=4 * trained / split, logits=12 * min(2 ** 26, tokens * text.vocab_size) + 8 * text.vocab_size * text.hidden_size,
                activations=activations(tokens, text, text.num_hidden_layers) + activations(patches, vision, vision.depth))
    step = part["gradients"] + (8 if cfg.bf16_moments else 2) * 4 * text.vocab_size * text.hidden_size / split
    phases = part["gathered"] + part["cache"], part["gradients"] + part["activations"] + part["logits"], step
    return {k: v / 2 ** 30 for k, v in {**part, "peak": part["weights"] + part["adam"] + max(phases)}.items()}


def announce_memory(policy, cfg, device, rank, ranks):
    """Print the estimate and, on a GPU where it does not fit, what to change."""
    need = estimate(policy.vlm, cfg, ranks)
    there = torch.cuda.get_device_properties(device).total_memory / 2 ** 30 if device.type == "cuda" else None
    if rank == 0:
        print("memory per GPU, estimated: " + " ".join(f"{k} {v:.2f}" for k, v in need.items()) + " GiB" + (f" of {there:.1f}" if there else "")
              + ("; it may not fit: use more ranks, --bf16_moments=true, --train_vision=false, or lower --in_flight, --max_tokens, "
                 "--micro_batch" if there and need["peak"] > there else ""), flush=True)


def whole(t, rank):
    """A weight or moment, gathered if it is sharded (then all ranks must reach this): on rank 0, on the CPU; elsewhere None."""
    t = t.full_tensor() if hasattr(t, "full_tensor") else t
    return t.detach().cpu() if rank == 0 else None


def save_checkpoint(out, step, policy, cfg, preset, optimizers, rank=0):
    """Write out/checkpoints/<step>: a plain save_pretrained folder, world.json, the optimizer's state, and checksums.json.
    Complete or absent: it is written beside and renamed, and only then does out/last name it. All ranks must reach this,
    rank 0 writes."""
    from safetensors.torch import save_file
    names = {p: n for n, p in policy.named_parameters()}
    weights = {n: whole(p, rank) for n, p in policy.vlm.named_parameters()}
    moments = {f"{names[p]}|{k}": whole(v, rank) for o in optimizers for p, s in o.state.items() for k, v in s.items()}
    if rank:
        return
    folder = os.path.join(out, "checkpoints", str(step))
    tmp = folder + ".tmp"
    try:
        os.makedirs(tmp)
        policy.vlm.save_pretrained(tmp, state_dict=weights)
        policy.proc.save(tmp, cfg)
        world = {"preset": preset, **{x.name: getattr(cfg, x.name) for x in fields(env.World)}}
        env.write_text(os.path.join(tmp, "world.json"), json.dumps(world, indent=1))
        save_file(moments, os.path.join(tmp, "optimizer.safetensors"))
        sums = {x: checksum(os.path.join(tmp, x)) for x in sorted(os.listdir(tmp))}
        env.write_text(os.path.join(tmp, "checksums.json"), json.dumps(sums, indent=1))
        os.replace(tmp, folder)
    except Exception:                              # a full disk
        shutil.rmtree(tmp, ignore_errors=True)
        raise
    env.write_text(os.path.join(out, "last"), str(step))


def checksum(path):
    """[bytes, sha256] of a file, which is then on the disk."""
    sha = hashlib.sha256()
    with open(path, "rb") as f:
        while piece := f.read(2 ** 20):
            sha.update(piece)
        os.fsync(f.fileno())
    return [os.path.getsize(path), sha.hexdigest()]


def newest_whole(out):
    """The step of the newest checkpoint whose files are as they were written, or 0. What is half-written is removed, what is
    damaged (a file is missing, cut short or altered) is named and put aside."""
    folder = os.path.join(out, "checkpoints")
    names = os.listdir(folder) if os.path.exists(folder) else []
    for x in names:
        if x.endswith(".tmp"):
            shutil.rmtree(os.path.join(folder, x))
    for step in sorted((int(x) for x in names if x.isdigit()), reverse=True):
        path = os.path.join(folder, str(step))
        try:
            with open(os.path.join(path, "checksums.json")) as f:
                damage = [x for x, sums in json.load(f).items() if checksum(os.path.join(path, x)) != sums]
        except (OSError, ValueError) as e:
            damage = e
        if not damage:
            env.write_text(os.path.join(out, "last"), str(step))
            return step
        print(f"{path}: damaged ({damage}); it is now {path}.damaged, and the one before it is used")
        shutil.rmtree(path + ".damaged", ignore_errors=True)
        os.replace(path, path + ".damaged")
    return 0


def load_optimizer(folder, policy, optimizers):
    """Restore what save_checkpoint wrote, each rank its shard."""
    from safetensors import safe_open
    from torch.distributed.tensor import distribute_tensor
    params = dict(policy.named_parameters())
    owner = {p: o for o in optimizers for g in o.param_groups for p in g["params"]}
    with safe_open(os.path.join(folder, "optimizer.safetensors"), "pt") as f:
        for key in f.keys():
            name, k = key.split("|")
            p, v = params[name], f.get_tensor(key)
            v = v if k == "step" else v.to(p.device)
            sharded = k != "step" and hasattr(p, "placements")
            owner[p].state[p][k] = distribute_tensor(v, p.device_mesh, p.placements, src_data_rank=None) if sharded else v


def prune(out, keep, best=None):
    """Remove all but the newest `keep` checkpoints and the best one."""
    steps = sorted(int(x) for x in os.listdir(os.path.join(out, "checkpoints")) if x.isdigit())
    for step in steps[:-keep]:
        if step != best:
            shutil.rmtree(os.path.join(out, "checkpoints", str(step)))


def begin(cfg, rank, world):
    """Open the run folder cfg.out. Returns the step to go on from (0 for a new run). All ranks must reach this."""
    step = 0
    if rank == 0:
        if not cfg.resume and os.path.exists(cfg.out) and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0":
            aside = next(f"{cfg.out.rstrip('/')}.{i}" for i in range(1, 10 ** 6) if not os.path.exists(f"{cfg.out.rstrip('/')}.{i}"))
            os.rename(cfg.out, aside)
            print(f"--resume=false: the old run is now {aside}")
        if env.same_settings(cfg.out, cfg) and (step := newest_whole(cfg.out)):
            print(f"{cfg.out}: " + (f"going on from step {step} of {cfg.steps}" if step < cfg.steps else "finished before, reused"))
        os.makedirs(cfg.out, exist_ok=True)
        env.write_text(os.path.join(cfg.out, "config.json"), json.dumps(asdict(cfg), indent=1))
        kept = [json.dumps(e) + "\n" for e in read_log(cfg.out) if e["step"] < step]
        env.write_text(os.path.join(cfg.out, "log.jsonl"), "".join(kept))
    return int(total([step], world, torch.device("cuda") if torch.cuda.is_available() else "cpu")[0])


def read_log(out):
    """The entries of log.jsonl; a killed run may leave half a line at the end."""
    path = os.path.join(out, "log.jsonl")
    return [json.loads(x) for x in open(path) if x.endswith("}\n")] if os.path.exists(path) else []


def append_log(out, entry):
    """Add a step to log.jsonl; it is on the disk before any checkpoint that includes it. JSON has no NaN: null."""
    with open(os.path.join(out, "log.jsonl"), "a") as f:
        f.write(json.dumps({k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in entry.items()}) + "\n")
        f.flush()
        os.fsync(f.fileno())


def check_skips(cfg, entry, rows):
    """Say that a step was skipped; UserError naming step and rows when it was the last of max_skips in a row."""
    if entry["skipped"]:
        print(f"step {entry['step']} skipped: loss or gradient not finite, rows {[r.get('doc_id') for r in rows]}", flush=True)
        last = read_log(cfg.out)[-cfg.max_skips:]
        if len(last) == cfg.max_skips and all(e["skipped"] for e in last):
            raise env.UserError(f"step {entry['step']}: no finite gradient in {cfg.max_skips} steps in a row (--max_skips); lower --lr "
                                f"or look at the rows of the last one, {[r.get('doc_id') for r in rows]}")


def sync_gradients(policy, world, sums):
    """Sum gradients over the ranks (each rank's loss is already divided by the global count), and in the same message the
    numbers in `sums`, which it returns. All ranks must reach this."""
    if world == 1:
        return sums
    params = [p for p in policy.parameters() if p.requires_grad]
    if policy.sharded:                                 # FSDP2 has made averages of them already
        for p in (p for p in params if p.grad is not None):
            p.grad *= world
        return total(sums, world, policy.device)
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in params]
    flat = torch.cat([g.flatten() for g in grads] + [torch.tensor(sums, device=policy.device)])
    dist.all_reduce(flat)
    *grads, sums = flat.split([p.numel() for p in params] + [len(sums)])
    for p, g in zip(params, grads):
        p.grad = g.view_as(p)
    return sums.tolist()


def clip_gradients(policy, cfg):
    """Scale the gradient to a norm of at most clip_norm. Returns the norm before, of all ranks' shards."""
    norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), cfg.clip_norm)
    return (norm.full_tensor() if hasattr(norm, "full_tensor") else norm).item()


def total(value, world, device):
    """Sum of a number (float64) over the ranks. All ranks must reach this."""
    t = torch.tensor(value, dtype=torch.float64, device=device)
    if world > 1:
        dist.all_reduce(t)
    return t.tolist()


def update(policy, optimizers, batches, step, cfg, world, asked):
    """One step on this rank's micro-batches. Returns its log entry, and whether a signal asked any rank to stop."""
    [n_tokens] = total([sum(b["mask"].sum().item() for b in batches)], world, policy.device)

    # 2. loss and gradient, normalised by the trained tokens of all ranks
    loss_sum = 0.0
    for b in batches:
        with policy.autocast():
            logp, _ = policy(b)
        loss = -logp.sum() / max(n_tokens, 1)
        loss.backward()
        loss_sum += loss.item()
    loss_sum, stop = sync_gradients(policy, world, [loss_sum, float(len(asked))])

    # 3. step, unless one rank's loss is not finite: then so is the norm or the sum of all, and none of them steps
    norm = clip_gradients(policy, cfg)
    skipped = not math.isfinite(loss_sum + norm)
    for o in optimizers:
        for g in o.param_groups:
            g["lr"] = g["peak"] * lr_scale(step, cfg)
        if not skipped:
            o.step()
        o.zero_grad(set_to_none=True)
    return dict(step=step, loss=loss_sum, tokens=int(n_tokens), grad_norm=norm, skipped=int(skipped),
                lr=optimizers[0].param_groups[0]["lr"]), stop


def main(cfg):
    rank, world, device = env.setup()
    if cfg.batch % world:
        raise env.UserError(f"--batch={cfg.batch} is not a multiple of the {world} ranks; change --batch or --nproc-per-node")
    rows = data.load_rows(os.path.join(cfg.data, "sft.jsonl"), cfg.image_root)
    if lacking := [i for i, r in enumerate(rows) if not r.get("turns")]:
        raise env.UserError(f"{cfg.data}/sft.jsonl: row {lacking[0]} has no `turns` ({len(lacking)} rows in all)")
    data.check_images(rows, rank, world)
    resumed = begin(cfg, rank, world)              # the step to go on from, or 0
    start = env.newest(cfg.out) if resumed else cfg.model
    policy = env.load_policy(start, device, train=True) if start else make_tiny(rows, cfg.seed)
    announce_memory(policy, cfg, device, rank, world)
    with env.memory("loading", 0):
        policy = env.make_trainable(policy, cfg, device)
    optimizers = make_optimizers(policy, cfg)
    if resumed:
        load_optimizer(start, policy, optimizers)
    preset = env.read_json(os.path.join(start, "world.json"), {"preset": "real"})["preset"] if start else "tiny"
    rows_of = lambda step: [rows[(step * cfg.batch + i) % len(rows)] for i in range(cfg.batch)]

    def batches_of(step):
        """This rank's micro-batches of a step: conversations of like length together, so that little is padding."""
        trajs = sorted((env.render(policy.proc, r, r["turns"], cfg) for r in rows_of(step)[rank::world]), key=lambda t: len(t.ids))
        if cut := sum(t.status != "answered" for t in trajs):
            print(f"{cut} conversations of step {step} do not fit --max_crops or --max_tokens: their ends are not trained", flush=True)
        return [env.collate(trajs[i:i + cfg.micro_batch], policy.proc) for i in range(0, len(trajs), cfg.micro_batch)]

    policy.train()
    t0 = time.time()
    with env.interruptible() as asked, ThreadPoolExecutor(1) as pool:  # the next step is rendered while this one computes
        pending = pool.submit(batches_of, resumed) if resumed < cfg.steps else None
        for step in range(resumed, cfg.steps):
            # 1. batch
            batches = pending.result()
            pending = pool.submit(batches_of, step + 1) if step + 1 < cfg.steps else None
            with env.memory("update", max(b["ids"].shape[1] for b in batches)):
                entry, stop = update(policy, optimizers, batches, step, cfg, world, asked)

            # 4. log and save
            if rank == 0:
                seconds = time.time() - t0
                eta = seconds / (step + 1 - resumed) * (cfg.steps - step - 1)
                append_log(cfg.out, dict(entry, seconds=seconds))
                check_skips(cfg, entry, rows_of(step))
                if step % cfg.log_every == 0 or step + 1 == cfg.steps:
                    print(f"step {step:5d} loss {entry['loss']:7.4f} norm {entry['grad_norm']:6.3f} tokens {entry['tokens']:6d} "
                          f"{seconds:7.1f}s eta {int(eta) // 60:3d}:{int(eta) % 60:02d}", flush=True)
            if (step + 1) % cfg.save_every == 0 or step + 1 == cfg.steps or stop:
                save_checkpoint(cfg.out, step + 1, policy, cfg, preset, optimizers, rank)
                if rank == 0:
                    prune(cfg.out, cfg.keep)
            if stop:
                env.leave()
    if world > 1:
        dist.barrier()                             # the checkpoint is there before anyone reads it


if __name__ == "__main__":
    env.run(main, Config, REAL)
