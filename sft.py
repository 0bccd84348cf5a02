"""sft.py, file 3 of 5 (read env.py and data.py first): cold start by imitation.

    torchrun sft.py                                                # the tiny model on the scenes of `python data.py`
    torchrun --nproc-per-node=8 sft.py --model=Qwen/Qwen3-VL-4B-Instruct --data=data/mine

    loss = - sum_{i,t} m_it log p(token_it | tokens before it) / sum m        m = 1 on the assistant's tokens only

The sums run over all conversations of a step on all ranks. A conversation is rendered by replaying its turns through
the tool, by the code that makes rollouts. Rows are taken in the order of the file, so a curriculum is the data's affair.
Reads <data>/sft.jsonl; writes <out>/checkpoints/<step>/ (plain save_pretrained), config.json, log.jsonl, last.
"""
import json
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
    steps: int = 300                 # x batch = 14,400 rows: one pass over the scenes, whose last 30 % are the imperfect ones
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
    resume: bool = True              # go on from the last checkpoint in out; false: start anew beside it


REAL = dict(steps=1000, batch=32, micro_batch=1, lr=1e-5, muon_lr=0.0, warmup=50, save_every=200)


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


def make_optimizers(policy, cfg):
    """AdamW, and with muon_lr (the tiny preset) Muon for the weight matrices."""
    mats = {p for n, p in policy.named_parameters() if p.ndim == 2 and "embed" not in n and "lm_head" not in n and cfg.muon_lr}
    rest = [p for p in policy.parameters() if p not in mats]
    out = [torch.optim.AdamW(rest, lr=cfg.lr, betas=(0.9, 0.98), weight_decay=cfg.weight_decay)]
    if mats:
        out.append(Muon([p for p in policy.parameters() if p in mats], cfg.muon_lr, 0.95))
    for o in out:
        for g in o.param_groups:
            g["peak"] = g["lr"]
    return out


# ---------------------------------------------------------------------------------------------------------------
# What both training stages need: run folders, checkpoints, sums over ranks (rppo.py imports these).

def save_checkpoint(out, step, policy, cfg, preset, optimizers):
    """Write out/checkpoints/<step>: a plain save_pretrained folder, world.json, and the optimizer's state. Complete or
    absent: it is written beside and renamed, and only then does out/last name it. Call on rank 0."""
    from safetensors.torch import save_file
    folder = os.path.join(out, "checkpoints", str(step))
    tmp = folder + ".tmp"
    shutil.rmtree(tmp, ignore_errors=True)
    os.makedirs(tmp)
    policy.vlm.save_pretrained(tmp)
    policy.proc.save(tmp)
    with open(os.path.join(tmp, "world.json"), "w") as f:
        json.dump({"preset": preset, **{x.name: getattr(cfg, x.name) for x in fields(env.World)}}, f, indent=1)
    names = {p: n for n, p in policy.named_parameters()}
    save_file({f"{names[p]}|{k}": torch.as_tensor(v) for o in optimizers for p, s in o.state.items() for k, v in s.items()},
              os.path.join(tmp, "optimizer.safetensors"))
    if os.path.exists(folder):
        shutil.rmtree(folder)
    os.replace(tmp, folder)
    env.write_text(os.path.join(out, "last"), str(step))


def load_optimizer(folder, policy, optimizers):
    """Restore what save_checkpoint wrote."""
    from safetensors.torch import load_file
    params = dict(policy.named_parameters())
    owner = {p: o for o in optimizers for g in o.param_groups for p in g["params"]}
    for key, v in load_file(os.path.join(folder, "optimizer.safetensors")).items():
        name, k = key.split("|")
        p = params[name]
        owner[p].state[p][k] = v if k == "step" else v.to(p.device)


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
        if not cfg.resume and os.path.exists(cfg.out):
            aside = next(f"{cfg.out.rstrip('/')}.{i}" for i in range(1, 10 ** 6) if not os.path.exists(f"{cfg.out.rstrip('/')}.{i}"))
            os.rename(cfg.out, aside)
            print(f"--resume=false: the old run is now {aside}")
        if env.same_settings(cfg.out, cfg) and os.path.exists(os.path.join(cfg.out, "last")):
            step = int(open(os.path.join(cfg.out, "last")).read())
            print(f"{cfg.out}: " + (f"going on from step {step} of {cfg.steps}" if step < cfg.steps else "finished before, reused"))
        os.makedirs(cfg.out, exist_ok=True)
        env.write_text(os.path.join(cfg.out, "config.json"), json.dumps(asdict(cfg), indent=1))
        log = os.path.join(cfg.out, "log.jsonl")
        lines = [x for x in open(log) if x.endswith("}\n")] if os.path.exists(log) else []  # a killed run may leave half a line
        kept = [x for x in lines if json.loads(x)["step"] < step]
        env.write_text(log, "".join(kept))
    return int(total([step], world, torch.device("cuda") if torch.cuda.is_available() else "cpu")[0])


def append_log(out, entry):
    with open(os.path.join(out, "log.jsonl"), "a") as f:
        f.write(json.dumps(entry) + "\n")


def sync_gradients(policy, world):
    """Sum gradients over the ranks (each rank's loss is already divided by the global count). All ranks must reach this."""
    if world == 1:
        return
    params = [p for p in policy.parameters() if p.requires_grad]
    flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in params])
    dist.all_reduce(flat)
    for p, g in zip(params, flat.split([p.numel() for p in params])):
        p.grad = g.view_as(p)


def total(value, world, device):
    """Sum of a number (float64) over the ranks. All ranks must reach this."""
    t = torch.tensor(value, dtype=torch.float64, device=device)
    if world > 1:
        dist.all_reduce(t)
    return t.tolist()


def main(cfg):
    rank, world, device = env.setup()
    if cfg.batch % world:
        raise env.UserError(f"--batch={cfg.batch} is not a multiple of the {world} ranks; change --batch or --nproc-per-node")
    rows = data.load_rows(os.path.join(cfg.data, "sft.jsonl"), cfg.image_root)
    if lacking := [i for i, r in enumerate(rows) if not r.get("turns")]:
        raise env.UserError(f"{cfg.data}/sft.jsonl: row {lacking[0]} has no `turns` ({len(lacking)} rows in all)")
    resumed = begin(cfg, rank, world)              # the step to go on from, or 0
    start = env.newest(cfg.out) if resumed else cfg.model
    policy = env.load_policy(start, device) if start else make_tiny(rows, cfg.seed).to(device)
    optimizers = make_optimizers(policy, cfg)
    if resumed:
        load_optimizer(start, policy, optimizers)
    share = cfg.batch // world
    preset = env.read_json(os.path.join(start, "world.json"), {"preset": "real"})["preset"] if start else "tiny"

    def batch_of(step):
        """This rank's micro-batches of a step: conversations of like length together, so that little is padding."""
        at = [(step * cfg.batch + rank + i * world) % len(rows) for i in range(share)]
        trajs = sorted((env.render(policy.proc, rows[i], rows[i]["turns"], cfg) for i in at), key=lambda t: len(t.ids))
        return [env.collate(trajs[i:i + cfg.micro_batch], policy.proc) for i in range(0, share, cfg.micro_batch)]

    policy.train()
    pool, t0 = ThreadPoolExecutor(1), time.time()      # the next step is rendered while this one computes
    pending = pool.submit(batch_of, resumed) if resumed < cfg.steps else None
    for step in range(resumed, cfg.steps):
        # 1. batch
        batches = pending.result()
        pending = pool.submit(batch_of, step + 1) if step + 1 < cfg.steps else None
        n_tokens = total([sum(b["mask"].sum().item() for b in batches)], world, device)[0]

        # 2. loss and gradient, normalised by the trained tokens of all ranks
        loss_sum = 0.0
        for b in batches:
            with policy.autocast():
                logp, _ = policy(b)
            loss = -logp.sum() / n_tokens
            loss.backward()
            loss_sum += loss.item()
        sync_gradients(policy, world)

        # 3. step
        norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), cfg.clip_norm).item()
        for o in optimizers:
            for g in o.param_groups:
                g["lr"] = g["peak"] * lr_scale(step, cfg)
            o.step()
            o.zero_grad(set_to_none=True)

        # 4. log and save
        loss_sum = total([loss_sum], world, device)[0]
        if rank == 0:
            seconds = time.time() - t0
            eta = seconds / (step + 1 - resumed) * (cfg.steps - step - 1)
            append_log(cfg.out, dict(step=step, loss=loss_sum, tokens=int(n_tokens), grad_norm=norm, seconds=seconds,
                                         lr=optimizers[0].param_groups[0]["lr"]))
            if step % cfg.log_every == 0 or step + 1 == cfg.steps:
                print(f"step {step:5d} loss {loss_sum:7.4f} norm {norm:6.3f} tokens {int(n_tokens):6d} "
                      f"{seconds:7.1f}s eta {int(eta) // 60:3d}:{int(eta) % 60:02d}", flush=True)
            if (step + 1) % cfg.save_every == 0 or step + 1 == cfg.steps:
                save_checkpoint(cfg.out, step + 1, policy, cfg, preset, optimizers)
                prune(cfg.out, cfg.keep)
    if world > 1:
        dist.barrier()                             # the checkpoint is there before anyone reads it


if __name__ == "__main__":
    env.run(main, Config, REAL)
