"""sft.py, file 2 of 5: command line, ranks, run folders, the policy, LoRA, checkpoints, and the cold start.

    torchrun sft.py                                        # the tiny model on the scenes of `python data.py`
    torchrun sft.py --model=Qwen/Qwen3-VL-2B-Instruct --data=data/mine
    torchrun --nproc-per-node=8 sft.py --model=Qwen/Qwen3-VL-8B-Instruct --data=data/mine

    loss = - sum_{i,t} mask_it * log p(token_it | tokens before it) / sum_{i,t} mask_it

The sums run over all conversations of a step on all ranks; mask is 1 on the assistant's tokens only; p is the
softmax over the vocabulary without the banned ids (vision tokens, ids without a text).
Shapes: B conversations, T tokens of the longest, n trained tokens, N image tokens, V rows of the head. Reads
<data>/{sft.jsonl, tiny}. Writes <out>/{config.json, log.jsonl, checkpoints/<step>/, last}.
"""
import argparse
import fcntl
import inspect
import json
import math
import os
import re
import shlex
import shutil
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from datetime import timedelta
from pathlib import Path
from types import MethodType

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

import env
from env import UserError


@dataclass
class TrainConfig(env.EpisodeConfig):
    """Training: what sft.py and rppo.py have in common."""
    seed: int = 0
    model: str = ""                  # a checkpoint, a run folder or a hub id; empty: the tiny built-in model
    data: str = "data/scenes-{seed}" # folder of the rows
    image_root: str = ""             # where the rows' images lie; empty: relative to the file of the rows
    out: str = ""                    # run folder
    steps: int = 100
    micro_batch: int = 16            # conversations per forward pass
    lr: float = 1e-3                 # AdamW's peak rate
    warmup: int = 30                 # steps to reach the peak
    decay: float = 0.3               # last share of the steps: linear to zero
    weight_decay: float = 0.01
    clip_norm: float = 1.0           # largest norm of a gradient
    save_every: int = 150            # steps between checkpoints
    keep: int = 2                    # newest checkpoints kept
    train_vision: bool = True        # false: the vision tower stays as it is
    lora: int = 0                    # rank of the updates of the text blocks, which alone are trained; 0: off
    lora_alpha: float = 32.0         # the updates are multiplied by lora_alpha / lora
    lora_lr: float = 2.5e-3          # replaces lr; real: ten times lr, as in LoRA Without Regret (2025)
    recompute: bool = False          # recompute activations: a third more computation for less memory
    shard: bool = False              # FSDP2: torchrun's ranks share weights, gradients and optimizer state


@dataclass
class Config(TrainConfig):
    """Imitation."""
    out: str = "runs/sft"
    steps: int = 450
    batch: int = 24                  # conversations per step, over all ranks
    micro_batch: int = 24
    warmup: int = 50
    lr: float = 4e-3
    muon_lr: float = 0.03            # Muon's peak rate, for matrices, not embeddings; off with lora or shard
    log_every: int = 25              # steps between printed lines; log.jsonl has every step


REAL = dict(env.REAL_EPISODE, steps=1000, batch=32, micro_batch=1, lr=1e-5, lora_lr=1e-4, muon_lr=0.0,
            save_every=200, train_vision=False, recompute=True, shard=True)


# --- The command line: argparse over the dataclasses ----------------------------------------------------
MAY_BE_ZERO = "seed lora warmup max_crops eval_rows n_score limit n_sft n_train n_test blind agree".split()


def make_parser(cls, real):
    """A flag for each field. --help has its comment, default and, in brackets, default with a real model."""
    parser = argparse.ArgumentParser(usage="%(prog)s [--FLAG=VALUE ...]", allow_abbrev=False,
                                     description=inspect.getmodule(cls).__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter,
                                     argument_default=argparse.SUPPRESS)
    comments, groups = {}, {}
    for base in reversed(cls.__mro__[:-1]):
        group = parser.add_argument_group(inspect.getdoc(base).split("\n")[0])
        for name, comment in re.findall(r"^    (\w+): [^#\n]*(?:# *(.*))?$", inspect.getsource(base), re.M):
            groups.setdefault(name, group)
            comments[name] = comment or comments.get(name, "")
    for f in fields(cls):
        text = f"{comments[f.name]} (default: {f.default})"
        if real.get(f.name, f.default) != f.default:
            text += f" [{real[f.name]}]"
        kind = json.loads if f.type is bool else f.type        # true or false
        groups[f.name].add_argument(f"--{f.name}", type=kind, help=text.replace("%", "%%"))
    return parser


def checked(values, cls, where):
    """The values that cls has a field for. UserError unless each has the field's type and range."""
    known = {}
    for f in fields(cls):
        if f.name not in values:
            continue
        value = known[f.name] = values[f.name]
        least = 1e-6 if f.name == "temperature" else int(f.type is int and f.name not in MAY_BE_ZERO)
        if type(value) is not f.type and (type(value), f.type) != (int, float):
            raise UserError(f"{where}: {f.name} takes a value of type {f.type.__name__}, not {value!r}")
        if f.type in (int, float) and not least <= value < 2 ** 63:
            raise UserError(f"{where}: {f.name} is {value}; it has to be finite and at least {least}")
    return known


def load_episode(path):
    """Preset ("tiny" or "real") and EpisodeConfig fields of a checkpoint; no address or key is read."""
    where = f"{path}/episode.json"
    saved = read_json(where, {})
    return saved.get("preset", "real"), checked(saved, env.EpisodeConfig, where)


def configure(cls, real, argv=None):
    """The config (of class cls) of the flags in argv (default: this process's). With --model the episode's
    defaults are the checkpoint's, others those of `real` unless its preset is tiny. Raises UserError."""
    values = vars(make_parser(cls, real).parse_args(argv))
    if values.get("model"):
        values["model"] = newest(values["model"])
        preset, episode = load_episode(values["model"])
        values = {**(real if preset == "real" else {}), **episode, **values}
    cfg = cls(**checked(values, cls, "flags"))
    for name, value in vars(cfg).items():
        if isinstance(value, str):
            setattr(cfg, name, value.replace("{seed}", str(cfg.seed)).rstrip("/") or value)
    if isinstance(cfg, env.EpisodeConfig) and cfg.max_crop_pixels < cfg.min_crop_pixels:
        raise UserError(f"--max_crop_pixels={cfg.max_crop_pixels} is below --min_crop_pixels")
    return cfg


def shared(cfg, cls):
    """The fields of cfg that another config class has too, as a dict."""
    return {f.name: getattr(cfg, f.name) for f in fields(cls) if hasattr(cfg, f.name)}


def cli(main, cls, real):
    """The command line of a stage: main(cfg) on every rank."""
    try:
        main(configure(cls, real))
    except torch.OutOfMemoryError as e:
        raise UserError(f"out of GPU memory ({str(e).splitlines()[0]}); use more GPUs with "
                        "--shard=true; lower --micro_batch (updates), --in_flight (rollouts), --max_tokens")
    leave()


# --- Ranks. Without torchrun there is one, and no process group -----------------------------------------
def setup():
    """Returns (rank, world_size, device); joins torchrun's process group when there is one."""
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = torch.device("cpu")
    if torch.cuda.is_available():
        local = int(os.environ.get("LOCAL_RANK", 0))
        if local >= torch.cuda.device_count():
            raise UserError(f"--nproc-per-node: there is no GPU for rank {local}; start fewer")
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
        torch.backends.cuda.enable_cudnn_sdp(False)        # it plans anew for every new length
    else:
        torch.use_deterministic_algorithms(True)           # else two threads add in changing order
        torch.utils.deterministic.fill_uninitialized_memory = False
    if "WORLD_SIZE" in os.environ and not dist.is_initialized():
        store, rank, _ = next(dist.rendezvous("env://"))
        # torchrun keeps its store when it restarts the ranks, and with it the addresses of those that died.
        store = dist.PrefixStore("restart" + os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", store=store, rank=rank,
                                world_size=world_size, timeout=timedelta(hours=2))  # to write a large model
    return rank, world_size, device


def gather_objects(obj):
    """The objects of all ranks, rank by rank. All ranks must reach this."""
    if not dist.is_initialized():
        return [obj]
    objects = [None] * dist.get_world_size()
    dist.all_gather_object(objects, obj)
    return objects


def all_sum(*values):
    """The sum of each number over the ranks. All ranks must reach this."""
    return [sum(column) for column in zip(*gather_objects(values))]


def leave():
    """Ranks leave together: one that is gone while others still write can end in an abort."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


@contextmanager
def deferred_signals():
    """Within it SIGTERM and Ctrl-C only fill the list that it yields: a step is finished and saved."""
    asked, numbers = [], (signal.SIGTERM, signal.SIGINT)
    handlers = [signal.signal(number, lambda number, frame: asked.append(number)) for number in numbers]
    try:
        yield asked
    finally:
        list(map(signal.signal, numbers, handlers))


def stop(step, rank):
    """End this process in good order after a signal. All ranks must reach this."""
    if rank == 0:
        print(f"stopped by a signal; the same command goes on from step {step}", flush=True)
    leave()
    raise SystemExit(0)


# --- The run folder: config.json, log.jsonl, lock, checkpoints/<step>/, last ----------------------------
FREE = "out keep log_every show_every n_score micro_batch in_flight judge_url".split()    # may change midway
locks = {}      # path -> locked file, open until the process ends


def read_json(path, default):
    """The JSON object in a file, or `default` without one. Raises UserError."""
    if not os.path.exists(path):
        return default
    try:
        return dict(json.loads(Path(path).read_text()))
    except (ValueError, TypeError, RecursionError) as e:
        raise UserError(f"{path}: not a JSON object ({e}); mend or remove the file")


def write_text(path, text):
    """Replace a file: whatever happens, it holds the old text or the new one."""
    with open(path + ".tmp", "w") as f:
        f.write(text)
        f.flush()
        os.fsync(f.fileno())
    os.replace(path + ".tmp", path)


def read_log(folder):
    """The entries of a run's log.jsonl, if there is one. A killed run may leave half a line at its end."""
    path = Path(folder, "log.jsonl")
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("}\n")]


def append_log(folder, entry):
    finite = {k: v for k, v in entry.items() if not isinstance(v, float) or math.isfinite(v)}
    with open(f"{folder}/log.jsonl", "a") as f:
        f.write(json.dumps(finite) + "\n")


def newest(folder):
    """A run folder stands for its newest checkpoint; anything else (a checkpoint, a hub id) for itself."""
    last = Path(folder, "last")
    return f"{folder}/checkpoints/{last.read_text().strip()}" if last.exists() else folder


def lock(folder):
    """Keep other processes out of a run folder until this one ends. UserError names the one that has it."""
    os.makedirs(folder, exist_ok=True)
    path = f"{os.path.realpath(folder)}/lock"
    if path in locks:
        return
    file = open(path, "a+")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"{folder} is in use by {Path(path).read_text()[:-1]}; end it, or give another --out")
    file.truncate(0)
    print(f"process {os.getpid()} on {os.uname().nodename} since {time.ctime()}", file=file, flush=True)
    locks[path] = file


def same_settings(folder, cfg):
    """UserError if a folder has other settings. A key that config.json lacks is at its default."""
    old = {**asdict(type(cfg)()), **read_json(f"{folder}/config.json", asdict(cfg))}
    changes = [f"{name}: {old[name]} -> {value}" for name, value in asdict(cfg).items()
               if name not in FREE and old[name] != value]
    if changes:
        raise UserError(f"{folder} was made with other settings ({'; '.join(changes)}); give another folder")


def begin(cfg, rank):
    """Open cfg.out: returns the step to go on from. UserError if it is in use or has other settings."""
    step = 0
    if rank == 0:
        lock(cfg.out)
        last = newest(cfg.out)
        if last != cfg.out:
            same_settings(cfg.out, cfg)
            step = int(os.path.basename(last))
            print(f"{cfg.out}: going on from step {step} of {cfg.steps}", flush=True)
        here = shlex.quote(os.path.dirname(os.path.abspath(__file__)))
        commit = os.popen(f"git -C {here} describe --always --dirty 2>/dev/null").read().strip()
        write_text(f"{cfg.out}/config.json", json.dumps({**asdict(cfg), "commit": commit}, indent=1))
        kept = [json.dumps(entry) + "\n" for entry in read_log(cfg.out) if entry["step"] < step]
        write_text(f"{cfg.out}/log.jsonl", "".join(kept))
    return gather_objects(step)[0]


# --- The policy: a Qwen VLM, driven through its parts so that positions, caches and logits are explicit -
def linear_patches(self, hidden_states):
    """The patch convolution (its kernel is its stride) as the matrix product that it is."""
    return F.linear(hidden_states.to(self.proj.weight.dtype), self.proj.weight.flatten(1), self.proj.bias)


@torch.autocast("cuda", enabled=False)           # torch 2.13's would go through fp32
def rms_norm(self, x):
    return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.variance_epsilon)


def pack(images, proc):
    """The distinct Shown images, sorted by shape, and of each image token of `images` in order the row of its
    feature (N,). The G samples of a prompt share the original, see `fork`."""
    distinct = sorted({id(image): image for image in images}.values(), key=lambda image: image.view.shape)
    sizes = [math.prod(proc.grid(image.view)) for image in distinct]
    rows = dict(zip(map(id, distinct), torch.arange(sum(sizes)).split(sizes)))
    return distinct, torch.cat([torch.arange(0), *(rows[id(image)] for image in images)])


def collate(trajs, proc):
    """Trajectories padded on the right: CPU tensors ids, mask, logp (as recorded while sampling) (B, T) and
    pos (3, B, T); from `pack` the images and the `feature` (N,) of all image tokens in reading order."""
    images, feature = pack(sum([t.shown for t in trajs], []), proc)
    ids = pad_sequence([torch.tensor(t.ids) for t in trajs], True, proc.end)
    mask = pad_sequence([torch.tensor(t.mask).float() for t in trajs], True)
    logp = pad_sequence([torch.tensor(t.logp).float() for t in trajs], True)
    pos = pad_sequence([torch.from_numpy(t.pos.T) for t in trajs], True).permute(2, 0, 1)
    return dict(ids=ids, mask=mask, logp=logp, pos=pos, images=images, feature=feature)


class Policy(torch.nn.Module):
    """A transformers model, its env.Processor, and an image processor that makes patches of views."""

    def __init__(self, vlm, proc, image_processor):
        super().__init__()
        self.vlm, self.proc, self.image_processor = vlm, proc, image_processor
        vlm.model.visual.patch_embed.forward = MethodType(linear_patches, vlm.model.visual.patch_embed)
        for module in vlm.modules():
            if type(module).__name__.endswith("RMSNorm"):      # torch's takes one kernel, transformers' six
                module.forward = MethodType(rms_norm, module)
        # A sampled vision token would be taken for an image, an id past the tokenizer decodes to nothing.
        banned = torch.zeros(vlm.config.get_text_config().vocab_size, dtype=torch.bool)
        for token in ("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"):
            banned[proc.tokenizer.convert_tokens_to_ids(token)] = True
        banned[len(proc.tokenizer):] = True
        self.register_buffer("banned", banned, persistent=False)
        self.sharded = self.reuses_features = False      # see `shard` and `see`

    @property
    def device(self):
        return self.banned.device

    def autocast(self):
        """bf16 matrix products on CUDA, fp32 on the CPU; weights that are trained stay fp32."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda")

    @contextmanager
    def gathered(self):
        """A sharded policy is whole meanwhile, as ranks differ in turns. All ranks must reach this."""
        parts = [module for module in self.modules() if hasattr(module, "reshard")]
        for module in parts:
            module.unshard()
            module.set_reshard_after_forward(False, recurse=False)
        yield
        for module in parts:
            module.reshard()
            module.set_reshard_after_forward(module is not self, recurse=False)    # FSDP2's default

    def see(self, images):
        """Encode Shown images: features (N, width), those of Qwen3-VL's deepstack levels beside them (N, 4
        width). Of a frozen tower they stay in host memory from the rollout to the update."""
        if not images:
            return None
        if self.reuses_features and all(image.features is not None for image in images):
            return torch.cat([image.features for image in images]).to(self.device)
        pixels = self.image_processor(images=[image.view.numpy() for image in images], return_tensors="pt",
                                      input_data_format="channels_last")
        patches, grid = pixels["pixel_values"].to(self.device), pixels["image_grid_thw"]
        ends = F.pad(grid.prod(1).cumsum(0), (1, 0))         # on the CPU, so that no block waits for the GPU
        out = self.vlm.model.visual(patches, grid_thw=grid.to(self.device), cu_seqlens=ends)
        features = torch.cat([out.pooler_output, *getattr(out, "deepstack_features", [])], 1)
        if self.reuses_features and not torch.is_grad_enabled():
            for image, part in zip(images, features.cpu().split((grid.prod(1) // 4).tolist())):   # 2 x 2
                image.features = part
        return features

    def hidden(self, ids, pos, features, feature, mask=None, cache=None):
        """Last hidden states (B, T, width) of ids (B, T) at pos (3, B, T). feature (N,): the row in features
        of each image token. Positions are given: inferred beside a cache, they are wrong."""
        x = self.vlm.get_input_embeddings()(ids)
        extra = {}
        if features is not None:
            at = ids == self.proc.image
            own, *deepstack = features[feature].to(x.dtype).split(x.shape[2], 1)
            x = x.masked_scatter(at[..., None], own)
            if deepstack:
                extra = dict(visual_pos_masks=at, deepstack_visual_embeds=deepstack)
        return self.vlm.model.language_model(inputs_embeds=x, position_ids=pos, attention_mask=mask, **extra,
                                             past_key_values=cache, use_cache=bool(cache)).last_hidden_state

    def logits(self, h, temperature):
        """Logits of the sampling distribution in fp32: divided by the temperature, banned ids at -inf."""
        return (self.vlm.lm_head(h).float() / temperature).masked_fill(self.banned, -torch.inf)

    def score(self, h, target, temperature):
        """Of hidden states h (n, width): log-probability of each target, entropy of what is sampled (n,)."""
        logits = self.logits(h, temperature)                      # (n, V)
        total = logits.logsumexp(-1)
        with torch.no_grad():
            p = (logits - total[:, None]).exp()
            entropy = total - (p * logits.masked_fill(self.banned, 0)).sum(-1)
        return logits.gather(1, target[:, None])[:, 0] - total, entropy

    def forward(self, batch, temperature=1.0):
        """Log-probability and entropy (n,) of every trained token. Logits exist only there, 2^26 entries at a
        time, recomputed in the backward pass. Padding is on the right, where causal attention never looks."""
        ids, mask, pos, feature = (batch[k].to(self.device) for k in ("ids", "mask", "pos", "feature"))
        h = self.hidden(ids, pos, self.see(batch["images"]), feature)         # (B, T, width)
        trained = mask[:, 1:] > 0                                 # (B, T-1): state t predicts token t + 1
        h, target = h[:, :-1][trained], ids[:, 1:][trained]       # (n, width), (n,)
        size, parts = max(1, 2 ** 26 // len(self.banned)), []
        if len(h) <= size:
            return self.score(h, target, temperature)
        for h_part, target_part in zip(h.split(size), target.split(size)):
            parts.append(checkpoint(self.score, h_part, target_part, temperature, use_reentrant=False))
        return tuple(map(torch.cat, zip(*parts)))


# --- From a checkpoint to a policy that can be trained --------------------------------------------------
# FORK: the model. The known families, with mean and standard deviation of the pixels that a tower expects.
PIXELS = {"qwen3_vl": ((0.5,) * 3, (0.5,) * 3),
          "qwen2_5_vl": ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))}


def make_policy(vlm, tokenizer):
    """The Policy of a transformers model of one of the families in PIXELS."""
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
    vision = vlm.config.vision_config
    mean, std = PIXELS[vlm.config.model_type]
    images = Qwen2VLImageProcessorPil(do_resize=False, do_convert_rgb=False, patch_size=vision.patch_size,
                                      temporal_patch_size=2, merge_size=vision.spatial_merge_size,
                                      image_mean=list(mean), image_std=list(std))
    ends = vlm.generation_config.eos_token_id
    ends = [i for i in (ends if isinstance(ends, list) else [ends]) if isinstance(i, int)]
    return Policy(vlm, env.Processor(tokenizer, vision.patch_size * vision.spatial_merge_size, ends), images)


DAMAGED = "{!r} does not load ({!r:.200}); check --model, or put an older step's number into the run's `last`"


def load_policy(path, device, train=False):
    """A Policy from a folder or a hub id; UserError. On CUDA its weights are bf16, enough for rollouts; to
    train they are fp32, still on the CPU. Only safetensors are read, no code of a checkpoint is run."""
    from transformers import AutoConfig, AutoModelForImageTextToText, AutoTokenizer
    from transformers.utils import logging
    logging.disable_progress_bar()
    dtype = torch.float32 if train or torch.device(device).type == "cpu" else torch.bfloat16
    try:
        family = AutoConfig.from_pretrained(path, trust_remote_code=False).model_type
        if family not in PIXELS:
            raise UserError(f"{path}: a {family} model; --model takes Qwen3-VL or Qwen2.5-VL")
        vlm, found = AutoModelForImageTextToText.from_pretrained(
            path, dtype=dtype, use_safetensors=True, trust_remote_code=False, output_loading_info=True)
        if found["missing_keys"]:                # transformers would leave them random
            raise ValueError(f"no weights of {sorted(found['missing_keys'])[:3]}")
        policy = make_policy(vlm, AutoTokenizer.from_pretrained(path, trust_remote_code=False))
    except Exception as e:                       # a damaged folder can make a loader raise anything
        raise UserError(DAMAGED.format(path, e))
    return policy if train else policy.to(device)


def add_lora(policy, cfg):
    """Freeze the policy and give every linear map W of the text model's blocks fp32 adapters A, B:
    y = W x + lora_alpha / lora B A x (Hu et al., arXiv 2106.09685). B is zero: nothing changes at first."""
    def forward(self, x):
        return F.linear(x, self.weight, self.bias) + F.linear(scale * F.linear(x, self.lora_A), self.lora_B)
    policy.requires_grad_(False)
    scale = cfg.lora_alpha / cfg.lora
    generator = torch.Generator().manual_seed(cfg.seed)                # A is the same on all ranks
    for module in policy.vlm.model.language_model.layers.modules():
        if isinstance(module, torch.nn.Linear):
            bound = module.in_features ** -0.5
            A = torch.empty(cfg.lora, module.in_features).uniform_(-bound, bound, generator=generator)
            module.lora_A = torch.nn.Parameter(A)
            module.lora_B = torch.nn.Parameter(torch.zeros(module.out_features, cfg.lora))
            module.forward = MethodType(forward, module)


def merge_lora(weights, cfg):
    """Add the adapters among weights (name -> tensor) to the others, and return them, taken out."""
    adapters = {name: weights.pop(name) for name in list(weights) if "lora_" in name}
    for name, A in adapters.items():
        if name.endswith("lora_A"):
            plain = name.replace("lora_A", "weight")
            delta = cfg.lora_alpha / cfg.lora * adapters[name.replace("lora_A", "lora_B")] @ A
            weights[plain] = (weights[plain] + delta).to(weights[plain].dtype)
    return adapters


def shard(policy, device):
    """FSDP2 over torchrun's ranks (one is enough). A rank keeps its part of each block's weights; a block is
    gathered while it computes, in bf16 on CUDA, and gradients come back as fp32 sums over the ranks."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    dtype = torch.bfloat16 if device.type == "cuda" else None
    precision = MixedPrecisionPolicy(dtype, torch.float32, cast_forward_inputs=False)   # angles stay fp32
    blocks = (*policy.vlm.model.visual.blocks, *policy.vlm.model.language_model.layers)
    for module in (*blocks, policy):             # the rest, tied embeddings among it, belongs to the root
        fully_shard(module, mp_policy=precision)
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)
    policy.sharded = True
    # FSDP2 wants its first forward pass to go through the root, but a rollout goes through the parts.
    blank = env.Trajectory({})
    blank.extend(policy.proc, [policy.proc.end] * 2, sampled=True)
    with torch.no_grad():
        policy.to(device)(collate([blank], policy.proc))


def load_trainable(cfg, start, first, device, betas, muon_lr=0.0):
    """Policy, optimizers and preset of a stage, from the checkpoint `start` or as saved at step `first`."""
    from safetensors.torch import load_file
    from torch.distributed.checkpoint import state_dict
    last = newest(cfg.out)                       # with LoRA, training/ has what is added to `start`
    policy = load_policy(last if first and not cfg.lora else start, device, train=not cfg.lora)
    policy.vlm.model.visual.requires_grad_(cfg.train_vision)
    if cfg.lora:
        add_lora(policy, cfg)
    policy.reuses_features = bool(cfg.lora) or not cfg.train_vision
    if cfg.recompute:
        policy.vlm.gradient_checkpointing_enable({"use_reentrant": False})
    if cfg.shard and dist.is_initialized():
        shard(policy, device)
    policy.to(device)                            # FSDP2's also shards the root again, left gathered
    optimizers = make_optimizers(policy, cfg, betas, muon_lr)
    if first:
        options = state_dict.StateDictOptions(full_state_dict=True, strict=False)   # to each rank its part
        state = state_dict.get_optimizer_state_dict(policy.vlm, optimizers)         # for its param_groups
        state["state"] = {}
        try:
            if cfg.lora:
                adapters = load_file(f"{last}/training/adapters.safetensors")
                state_dict.set_model_state_dict(policy.vlm, adapters, options=options)
            for path, value in load_file(f"{last}/training/optimizer.safetensors").items():
                name, key = path.removeprefix("state.").rsplit(".", 1)
                state["state"].setdefault(name, {})[key] = value
            state_dict.set_optimizer_state_dict(policy.vlm, optimizers, state, options=options)
        except Exception as e:
            raise UserError(DAMAGED.format(last, e))
    return policy, optimizers, load_episode(start)[0]


# --- Optimizers, and gradients over the ranks -----------------------------------------------------------
def make_optimizers(policy, cfg, betas, muon_lr=0.0):
    """AdamW; with a muon_lr, Muon (Jordan et al., 2024) for whole matrices, not embeddings or LoRA's."""
    matrices, rest = [], []
    for name, p in policy.named_parameters():
        if p.requires_grad:
            muon = muon_lr and not policy.sharded and not cfg.lora and p.ndim == 2 and "embed" not in name
            (matrices if muon else rest).append(p)
    lr = cfg.lora_lr if cfg.lora else cfg.lr
    # foreach=False: on CUDA the other way needs temporaries as large as the weights.
    optimizers = [torch.optim.AdamW(rest, lr, betas, weight_decay=cfg.weight_decay, foreach=False)]
    if matrices:
        optimizers.append(torch.optim.Muon(matrices, muon_lr, weight_decay=0.0, momentum=0.95))
    return optimizers


def set_lr(optimizers, step, cfg):
    """Linear warm-up, constant, linear to zero over the last `decay` share. Returns AdamW's rate."""
    left = (cfg.steps - step) / max(cfg.decay * cfg.steps, 1)
    scale = min((step + 1) / max(cfg.warmup, 1), 1, left)
    for optimizer in optimizers:
        optimizer.param_groups[0]["lr"] = optimizer.defaults["lr"] * scale
    return optimizers[0].param_groups[0]["lr"]


def optimizer_step(policy, optimizers, loss_sum, cfg, rest=False):
    """Sum and clip the gradients and step, unless loss or norm is not finite or the caller says `rest`.
    Returns, the same on all ranks: the loss, the norm before clipping, and if the step was skipped."""
    for p in policy.parameters():
        if p.requires_grad and dist.is_initialized() and not policy.sharded:   # FSDP2 has summed them
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
            dist.all_reduce(p.grad)
    [loss_sum] = all_sum(loss_sum)
    norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), cfg.clip_norm)
    norm = (norm.full_tensor() if hasattr(norm, "full_tensor") else norm).item()
    skipped = not math.isfinite(loss_sum + norm)
    for optimizer in optimizers:
        if not skipped and not rest:
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return loss_sum, norm, int(skipped)


# --- Checkpoints: servers load every *.safetensors of the folder, so training state lies in a subfolder ---
def save_model(folder, policy, weights, cfg, preset):
    """Write what transformers and servers load, and episode.json, by which later stages ask as this one."""
    for name in policy.vlm.all_tied_weights_keys:          # gathered from ranks it would be a second copy
        weights.pop(name, None)
    policy.vlm.save_pretrained(folder, state_dict=weights)
    policy.proc.tokenizer.chat_template = env.CHAT_TEMPLATE
    policy.proc.tokenizer.save_pretrained(folder)
    areas = dict(shortest_edge=min(cfg.min_crop_pixels, cfg.max_pixels), longest_edge=cfg.max_pixels)
    images = dict(policy.image_processor.to_dict(), do_resize=True, do_convert_rgb=True, size=areas,
                  image_processor_type="Qwen2VLImageProcessor")
    files = {"preprocessor_config.json": images, "episode.json": shared(cfg, env.EpisodeConfig)}
    files["episode.json"]["preset"] = preset
    if policy.vlm.config.model_type == "qwen3_vl":
        files["video_preprocessor_config.json"] = dict(images, video_processor_type="Qwen3VLVideoProcessor")
    for name, content in files.items():
        write_text(f"{folder}/{name}", json.dumps(content, indent=1))


def save_checkpoint(step, policy, optimizers, cfg, preset):
    """Write cfg.out/checkpoints/<step>. All ranks must reach this; rank 0 writes, and holds the weights, then
    the optimizers' state. It is renamed when it is on the disk, and only then does cfg.out/last name it."""
    from safetensors.torch import save_file
    from torch.distributed.checkpoint import state_dict
    options = state_dict.StateDictOptions(full_state_dict=True, cpu_offload=True,    # to rank 0; {} elsewhere
                                          flatten_optimizer_state_dict=True)
    folder = f"{cfg.out}/checkpoints/{step}"
    tmp = f"{folder}.tmp"
    weights = state_dict.get_model_state_dict(policy.vlm, options=options)
    if weights:
        shutil.rmtree(tmp, ignore_errors=True)
        os.makedirs(f"{tmp}/training")
        adapters = merge_lora(weights, cfg)
        if adapters:
            save_file(adapters, f"{tmp}/training/adapters.safetensors")
        save_model(tmp, policy, weights, cfg, preset)
    del weights
    state = state_dict.get_optimizer_state_dict(policy.vlm, optimizers, options=options)
    if state:
        tensors = {name: value for name, value in state.items() if name.startswith("state.")}
        save_file(tensors, f"{tmp}/training/optimizer.safetensors")
        for path in Path(tmp).rglob("*.safetensors"):
            path.chmod(0o644)                              # safetensors leaves them unreadable to others
        os.sync()
        shutil.rmtree(folder, ignore_errors=True)          # of a run that was killed before `last` named it
        os.replace(tmp, folder)
        write_text(f"{cfg.out}/last", str(step))
    gather_objects(0)                                      # it is there before anyone reads it


def prune(cfg, step, best=None):
    """Keep the newest checkpoints and that of step `best`, nothing that killed runs left half-written."""
    paths = list(Path(cfg.out, "checkpoints").iterdir())
    steps = sorted(int(path.name) for path in paths if path.name.isdigit() and int(path.name) <= step)
    for path in paths:
        if path.name not in map(str, (*steps[-cfg.keep:], best)):
            shutil.rmtree(path)


# --- Imitation ------------------------------------------------------------------------------------------
def render_batches(proc, rows, cfg):
    """Rows as micro-batches of conversations of like length, and how many are not trained because they call a
    tool in the turn that may only answer. One that outgrows max_tokens is trained as far as it goes."""
    trajs = [env.render(proc, row, row["turns"], cfg) for row in rows]
    trajs.sort(key=lambda traj: len(traj.ids))
    left_out = [traj for traj in trajs if traj.status == "over_turns"]
    for traj in left_out:                # it stays, as ranks must have equal numbers of batches
        traj.mask = [0] * len(traj.mask)
    n = cfg.micro_batch
    return [collate(trajs[i:i + n], proc) for i in range(0, len(trajs), n)], len(left_out)


def train_step(policy, optimizers, batches, step, cfg):
    """One step on this rank's micro-batches. Returns its log entry."""
    [n_tokens] = all_sum(sum(int(batch["mask"].sum()) for batch in batches))
    loss_sum = 0.0
    for batch in batches:
        with policy.autocast():
            logp, _ = policy(batch)                        # (n,) the micro-batch's trained tokens
        loss = -logp.sum() / max(n_tokens, 1)
        loss.backward()
        loss_sum += loss.item()
    lr = set_lr(optimizers, step, cfg)
    loss_sum, norm, skipped = optimizer_step(policy, optimizers, loss_sum, cfg)
    return dict(step=step, loss=loss_sum, tokens=n_tokens, grad_norm=norm, skipped=skipped, lr=lr)


def eta(entry, first, cfg):
    """Time that is left, as minutes:seconds; after the first step on CUDA the peak of memory instead."""
    if entry["step"] == first and torch.cuda.is_available():
        return f"peak {torch.cuda.max_memory_allocated() / 2 ** 30:.1f} GiB"
    left = entry["seconds"] / (entry["step"] + 1 - first) * (cfg.steps - entry["step"] - 1)
    return f"eta {left // 60:3.0f}:{left % 60:02.0f}"


def main(cfg):
    rank, world_size, device = setup()
    if cfg.batch % world_size:
        raise UserError(f"--batch={cfg.batch} is not a multiple of the {world_size} ranks; change --batch")
    path = f"{cfg.data}/sft.jsonl"
    rows = env.load_rows(path, cfg.image_root)
    for i, row in enumerate(rows):
        if not row.get("turns"):
            raise UserError(f"{path}: row {i} has no `turns` (the assistant's texts); remove it")
    env.check_images(rows, rank, world_size)
    first = begin(cfg, rank)                       # the step to go on from, or 0
    start = cfg.model or f"{cfg.data}/tiny"
    policy, optimizers, preset = load_trainable(cfg, start, first, device, (0.9, 0.98), cfg.muon_lr)
    policy.train()
    def prepare(step):
        chosen = [rows[i % len(rows)] for i in range(step * cfg.batch, (step + 1) * cfg.batch)]
        return render_batches(policy.proc, chosen[rank::world_size], cfg)
    started = time.time()
    with deferred_signals() as asked, ThreadPoolExecutor(1) as pool:
        pending = pool.submit(prepare, first)
        for step in tqdm(range(first, cfg.steps), "sft", disable=rank > 0 or None, leave=False):
            # 1. batch; the next one is rendered while this step computes
            batches, left_out = pending.result()
            pending = pool.submit(prepare, step + 1)
            # 2. loss, gradient and step
            entry = train_step(policy, optimizers, batches, step, cfg)
            # 3. log
            left_out, stopped = all_sum(left_out, len(asked))
            done = step + 1 == cfg.steps
            entry.update(left_out=left_out, seconds=time.time() - started)
            if rank == 0:
                append_log(cfg.out, entry)
                if step % cfg.log_every == 0 or done or entry["skipped"]:
                    with tqdm.external_write_mode():       # above the bar
                        print(f"step {step} loss {entry['loss']:.4f} norm {entry['grad_norm']:.3f} left out "
                              f"{left_out} skipped {entry['skipped']}", eta(entry, first, cfg), flush=True)
            # 4. save
            if (step + 1) % cfg.save_every == 0 or done or stopped:
                save_checkpoint(step + 1, policy, optimizers, cfg, preset)
                if rank == 0:
                    prune(cfg, step + 1)
            if stopped:
                stop(step + 1, rank)


if __name__ == "__main__":
    cli(main, Config, REAL)
