"""sft.py, file 3 of 5 (after env.py and data.py): the policy, checkpoints, ranks, and the cold start.

    torchrun sft.py                                        # the tiny model on the scenes of `python data.py`
    torchrun sft.py --model=Qwen/Qwen3-VL-2B-Instruct --data=data/mine
    torchrun --nproc-per-node=8 sft.py --model=Qwen/Qwen3-VL-8B-Instruct --data=data/mine

    loss = - sum_{i,t} mask_it * log p(token_it | tokens before it) / sum_{i,t} mask_it

The sums run over all conversations of a step on all ranks; mask is 1 on the assistant's tokens only; p is the
softmax over the vocabulary without the banned ids (vision tokens, ids without a text).
Reads <data>/sft.jsonl and, without --model, the model <data>/tiny, which it makes if it is not there.
Writes <out>/{config.json, log.jsonl, checkpoints/<step>/, last}.

    collate, Policy, load_policy      the policy, and the families of models that it can be
    make_tiny                         the tiny model
    add_lora, shard                   LoRA and FSDP2
    save_checkpoint, load_trainable   checkpoints
    Muon, optimizer_step              optimizers
    setup, together, due              ranks and signals
    open_run                          the run folder
    render_batches, train             imitation

Shapes:
    B   conversations of a micro-batch        N   image tokens of a micro-batch
    T   tokens of the longest of them         V   rows of the head, one for each id
    n   trained tokens of them all
"""
import inspect
import json
import math
import os
import re
import shlex
import shutil
import signal
import sys
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from types import MethodType

import env  # before torch: see there
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

import data
from env import UserError


@dataclass
class TrainConfig(env.EpisodeConfig):
    """Training: what sft.py and rppo.py have in common."""
    seed: int = env.setting(0, least=0)  # of all that is drawn
    model: str = ""                  # a checkpoint, a run folder or a hub id; empty: a tiny built-in model
    tiny: str = "tiny"               # which one: tiny (a Qwen3-VL) or tiny3_5 (a Qwen3.5)
    data: str = "data/scenes-{seed}" # folder of the rows
    image_root: str = ""             # where the rows' images lie; empty: relative to the file of the rows
    out: str = env.setting("", free=True)  # run folder
    steps: int = env.setting(100, free=True)     # more of them later prolong a run
    micro_batch: int = env.setting(16, free=True)  # conversations per forward pass
    lr: float = 1e-3                 # AdamW's peak rate
    warmup: int = env.setting(30, least=0)  # steps to reach the peak
    decay: float = 0.3               # last share of the steps: linear to zero
    weight_decay: float = 0.01       # AdamW's
    clip_norm: float = 1.0           # largest norm of a gradient
    save_every: int = 150            # steps between checkpoints
    save_minutes: float = env.setting(0.0, free=True)  # a step that ends later saves, too; 0: off
    keep: int = env.setting(2, free=True)  # newest checkpoints kept
    train_vision: bool = True        # false: the vision tower stays as it is
    lora: int = env.setting(0, least=0)  # rank of the text blocks' updates, trained alone; 0: off
    lora_alpha: float = 32.0         # the updates are multiplied by lora_alpha / lora
    lora_lr: float = 2.5e-3          # replaces lr; real: ten times lr, as in LoRA Without Regret (2025)
    recompute: bool = False          # recompute activations: a third more computation for less memory
    shard: bool = False              # FSDP2: torchrun's ranks share weights, gradients and optimizer state


@dataclass
class Config(TrainConfig):
    """Imitation."""
    out: str = env.setting("runs/sft", free=True)
    steps: int = env.setting(450, free=True)
    batch: int = 24                  # conversations per step, over all ranks
    micro_batch: int = env.setting(12, free=True)
    warmup: int = env.setting(50, least=0)
    lr: float = 4e-3
    muon_lr: float = 0.03            # Muon's peak rate, for matrices, not embeddings; not with lora or shard
    log_every: int = env.setting(25, free=True)  # steps between printed lines; log.jsonl has every step


REAL = dict(
    env.REAL_EPISODE,
    steps=1000,
    batch=32,
    micro_batch=1,
    lr=1e-5,
    lora_lr=1e-4,
    muon_lr=0.0,
    save_every=200,
    save_minutes=30.0,
    train_vision=False,
    recompute=True,
    shard=True)


DTYPE = {"cuda": torch.bfloat16, "cpu": torch.float32}     # of matrix products; trained weights stay fp32


# --- The policy: a Qwen VLM, driven through its parts so that positions, caches and logits are explicit -
def collate(trajs, proc):
    """Trajectories padded on the right: CPU tensors ids, mask, logp (as recorded while sampling) (B, T) and
    pos (3, B, T), and their images, a list of Shown in reading order."""
    B = len(trajs)
    T = max(len(traj.ids) for traj in trajs)
    ids = torch.full((B, T), proc.end)
    mask = torch.zeros(B, T)
    logp = torch.zeros(B, T)
    pos = torch.zeros(3, B, T, dtype=torch.long)
    images = []

    for i, traj in enumerate(trajs):
        n = len(traj.ids)
        ids[i, :n] = torch.tensor(traj.ids)
        mask[i, :n] = torch.tensor(traj.mask)
        logp[i, :n] = torch.tensor(traj.logp)
        pos[:, i, :n] = torch.from_numpy(traj.pos)
        images += traj.shown
    return dict(ids=ids, mask=mask, logp=logp, pos=pos, images=images)


class Policy(torch.nn.Module):
    """A transformers model, its env.Processor, and an image processor that makes patches of views."""

    def __init__(self, vlm, proc, image_processor):
        super().__init__()
        self.vlm = vlm
        self.proc = proc
        self.image_processor = image_processor
        self.family = FAMILIES[vlm.config.model_type]
        # Some modules compute the same in another way, see FAMILIES.
        for module in vlm.modules():
            for ending, forward in self.family.forwards.items():
                if type(module).__name__.endswith(ending):
                    module.forward = MethodType(forward, module)

        # A sampled vision token would be taken for an image, an id past the tokenizer decodes to nothing.
        banned = torch.zeros(vlm.config.get_text_config().vocab_size, dtype=torch.bool)
        for token in ("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"):
            banned[proc.tokenizer.convert_tokens_to_ids(token)] = True
        banned[len(proc.tokenizer):] = True
        self.register_buffer("banned", banned, persistent=False)

        # What transformers calls the cache: `past_key_values`, from 5.24 on `cache`.
        names = inspect.signature(vlm.model.language_model.forward).parameters
        self.cache_name = "cache" if "cache" in names else "past_key_values"

        self.sharded = False                             # see `shard`
        self.reuses_features = False                     # see `see`
        self.fingerprint = ""                            # see load_policy
        self.lora = None                                 # (rank, scale), see add_lora

    @property
    def device(self):
        return self.banned.device

    def autocast(self):
        """bf16 matrix products on CUDA, fp32 on the CPU; weights that are trained stay fp32. A rollout keeps
        their copies in bf16 until it ends; an update has no room for all of them at once."""
        dtype = DTYPE[self.device.type]
        return torch.autocast(
            self.device.type, torch.bfloat16,
            enabled=dtype == torch.bfloat16,
            cache_enabled=not torch.is_grad_enabled())

    @contextmanager
    def gathered(self):
        """Within it a sharded policy is whole on every rank: in a rollout ranks differ in the number of
        forward passes, so that none may wait for another's. All ranks must reach this."""
        parts = [module for module in self.modules() if hasattr(module, "reshard")]
        for module in parts:
            module.unshard()
            module.set_reshard_after_forward(False, recurse=False)
        try:
            yield
        finally:
            for module in parts:
                module.reshard()
                module.set_reshard_after_forward(module is not self, recurse=False)    # FSDP2's default

    def run_tower(self, images):
        """The vision tower: of Shown images the features (their tokens, width), or with those of Qwen3-VL's L
        deepstack levels beside them (their tokens, (1 + L) width)."""
        views = [image.view.numpy() for image in images]
        pixels = self.image_processor(images=views, return_tensors="pt", input_data_format="channels_last")
        patches = pixels["pixel_values"].to(self.device)     # 4 for each token
        grid = pixels["image_grid_thw"]                      # (images, 3), in patches
        ends = F.pad(grid.prod(1).cumsum(0), (1, 0))         # on the CPU, so that no block waits for the GPU
        out = self.vlm.model.visual(patches, grid_thw=grid.to(self.device), cu_seqlens=ends)
        deepstack = getattr(out, "deepstack_features", [])
        return torch.cat([out.pooler_output, *deepstack], 1)

    def see(self, images):
        """Of Shown images the features of their N tokens, in reading order, see `run_tower`; None without an
        image. Samples of a prompt share the original, which is encoded once. Of a frozen tower the features
        stay in host memory from the rollout to the update."""
        if not images:
            return None
        # Any order would do, but always the same one: in it the tower's gradients are summed.
        distinct = sorted(dict.fromkeys(images), key=lambda image: image.view.shape)
        sizes = [math.prod(self.proc.grid(image.view)) for image in distinct]

        if self.reuses_features and all(image.features is not None for image in distinct):
            features = torch.cat([image.features for image in distinct]).to(self.device)
        else:
            features = self.run_tower(distinct)
            if self.reuses_features and not torch.is_grad_enabled():
                for image, part in zip(distinct, features.cpu().split(sizes)):
                    image.features = part

        part_of = dict(zip(distinct, features.split(sizes)))
        return torch.cat([part_of[image] for image in images])

    def hidden(self, ids, pos, features, mask=None, cache=None):
        """Last hidden states (B, T, width) of ids (B, T) at pos (3, B, T). features: of the image tokens,
        from `see`. mask and cache: eval.Cache's, in a rollout. Positions are given: inferred beside a cache,
        they are wrong."""
        x = self.vlm.get_input_embeddings()(ids)
        extra = {self.cache_name: cache}
        if features is not None:
            at = ids == self.proc.image
            own, *deepstack = features.to(x.dtype).split(x.shape[2], 1)
            x = x.masked_scatter(at[..., None], own)
            if deepstack:
                extra.update(visual_pos_masks=at, deepstack_visual_embeds=deepstack)

        out = self.vlm.model.language_model(
            inputs_embeds=x,
            position_ids=pos,
            attention_mask=mask,
            use_cache=bool(cache),
            **extra)
        return out.last_hidden_state

    def logits(self, h, temperature):
        """Of hidden states h (..., width) the logits (..., V) of the sampling distribution, in fp32 (of a
        bf16 product on CUDA): divided by the temperature, banned ids at -inf. Rollout and update both take
        them from here."""
        logits = self.vlm.lm_head(h).float() / temperature
        return logits.masked_fill(self.banned, -torch.inf)

    def token_logp(self, h, target, temperature):
        """Of hidden states h (n, width): log-probability of each target, entropy of what is sampled (n,)."""
        logits = self.logits(h, temperature)                      # (n, V)
        total = logits.logsumexp(-1)
        p = (logits - total[:, None]).exp()
        entropy = total - (p * logits.masked_fill(self.banned, 0)).sum(-1)
        return logits.gather(1, target[:, None])[:, 0] - total, entropy

    def forward(self, batch, temperature=1.0):
        """Log-probability and entropy (n,) of every trained token of a batch, see `collate`. Logits exist
        only there; if they are more than 2^26 entries, one part at a time, recomputed in the backward pass.
        Padding is on the right, where causal attention never looks."""
        ids, mask, pos = (batch[name].to(self.device) for name in ("ids", "mask", "pos"))
        h = self.hidden(ids, pos, self.see(batch["images"]))      # (B, T, width)

        trained = mask[:, 1:] > 0                                 # (B, T-1): state t predicts token t + 1
        h = h[:, :-1][trained]                                    # (n, width)
        target = ids[:, 1:][trained]                              # (n,)
        size = max(1, 2 ** 26 // len(self.banned))
        if len(h) <= size:
            return self.token_logp(h, target, temperature)

        parts = []
        for h_part, target_part in zip(h.split(size), target.split(size)):
            parts.append(checkpoint(self.token_logp, h_part, target_part, temperature, use_reentrant=False))
        return tuple(map(torch.cat, zip(*parts)))


# --- Families: what a model needs to be a policy, and where it comes from -------------------------------
def linear_patches(self, hidden_states):
    """The patch convolution (its kernel is its stride) as the matrix product that it is."""
    weight = self.proj.weight.flatten(1)
    return F.linear(hidden_states.to(weight.dtype), weight, self.proj.bias)


def vision_attention(self, hidden_states, cu_seqlens, position_embeddings, **_):
    """Attention within each image, or within each window of Qwen2.5-VL's: those of equal length in one call.
    transformers takes a call for each, thousands for a photograph. cu_seqlens: where they begin and end."""
    from transformers.models.qwen3_vl.modeling_qwen3_vl import apply_rotary_pos_emb_vision
    q, k, v = self.qkv(hidden_states).unflatten(1, (3, self.num_heads, -1)).unbind(1)
    q, k = apply_rotary_pos_emb_vision(q, k, *position_embeddings)            # (patches, heads, size)

    starts = cu_seqlens[:-1]
    lengths = cu_seqlens.diff()
    out = torch.empty_like(q)
    for length in lengths.unique().tolist():
        at = starts[lengths == length][:, None] + torch.arange(length, device=starts.device)
        at = at.to(q.device, non_blocking=True)                 # no block waits for the GPU
        q_of, k_of, v_of = (x[at].transpose(1, 2) for x in (q, k, v))         # (images, heads, length, size)
        out[at] = F.scaled_dot_product_attention(q_of, k_of, v_of).transpose(1, 2)
    return self.proj(out.flatten(1))


@torch.autocast("cuda", enabled=False)           # with torch 2.13's it would go through fp32
def rms_norm(self, x):
    """One kernel; transformers' takes six."""
    weight = self.weight.to(x.dtype)
    return F.rms_norm(x, weight.shape, weight, self.variance_epsilon)


@torch.autocast("cuda", enabled=False)
def centred_rms_norm(self, x):
    """Qwen3.5's, whose factor is 1 + weight: in fp32, as bf16 would round a small weight away."""
    factor = 1 + self.weight.float()
    return F.rms_norm(x.float(), factor.shape, factor, self.eps).to(x.dtype)


def gated_delta_net(self, hidden_states, cache_params=None, cache=None, **_):
    """A linear layer of Qwen3.5: Gated DeltaNet (arXiv 2412.06464). hidden_states (B, n, width) -> the same.

    q, k, v are causal convolutions over the last 4 inputs. Each head has a state, a matrix S that learns
    online to map keys to values, with step size 0 < b < 1, and forgets by a factor 0 < a < 1:

        S_t = a_t S_{t-1} (I - b_t k_t k_t^T) + b_t v_t k_t^T,        o_t = S_t q_t

    With a cache (eval.Cache) it goes on from what was kept. Padding, which lies behind a row's tokens, must
    not move a state. The cache sends it to a spare place, the bin: there b = 0 and a = 1, and the inputs that
    are kept are the last ones before it. Without a cache nothing is kept, and only padding sees padding.
    """
    from transformers.models.qwen3_5 import modeling_qwen3_5 as qwen
    if cache is None:
        cache = cache_params                     # its name before transformers 5.24
    # 1. projections: inputs of the convolution, step size, logarithm of the factor a
    x = self.in_proj_qkv(hidden_states)                              # (B, n, channels)
    b = self.in_proj_b(hidden_states).sigmoid()                      # (B, n, heads)
    speed = F.softplus(self.in_proj_a(hidden_states).float() + self.dt_bias)
    log_a = -self.A_log.float().exp() * speed                        # (B, n, heads)

    # 2. what came before: the last 3 inputs; S^T (B, heads, key size, value size)
    before = self.conv_kernel_size - 1
    state = None
    if cache is None:
        x = F.pad(x, (0, 0, before, 0))
    else:
        inputs, state = cache.recall(self.layer_idx)
        fed = cache.places < cache.bin                               # (B, n)
        b = b * fed[..., None]
        log_a = log_a * fed[..., None]
        x = torch.cat([inputs, x], 1)                                # (B, 3 + n, channels)
        at = fed.sum(1, keepdim=True) + torch.arange(before, device=x.device)
        inputs = x.gather(1, at[..., None].expand_as(inputs))

    # 3. convolution, heads
    x = F.silu(F.conv1d(x.mT, self.conv1d.weight, groups=self.conv_dim)).mT      # (B, n, channels)
    q, k, v = x.split([self.key_dim, self.key_dim, self.value_dim], dim=2)
    v = v.unflatten(2, (self.num_v_heads, -1))
    shared = self.num_v_heads // self.num_k_heads                    # heads of values to one of keys
    q = q.unflatten(2, (self.num_k_heads, -1)).repeat_interleave(shared, dim=2)
    k = k.unflatten(2, (self.num_k_heads, -1)).repeat_interleave(shared, dim=2)

    # 4. the recurrence, in fp32: token by token when decoding, else in pieces of 64
    rule = qwen.torch_chunk_gated_delta_rule
    if state is not None and v.shape[1] == 1:
        rule = qwen.torch_recurrent_gated_delta_rule
    with torch.autocast(x.device.type, enabled=False):
        out, after = rule(q, k, v, g=log_a, beta=b, initial_state=state, use_qk_l2norm_in_kernel=True,
                          output_final_state=state is not None)
    if cache is not None:
        cache.keep(self.layer_idx, inputs, after)

    # 5. norm of each head, output gate
    gate = self.in_proj_z(hidden_states).view_as(out)
    return self.out_proj(self.norm(out, gate).flatten(2))


# FORK: the model. A row of FAMILIES is all that a family needs beside transformers' own classes.
@dataclass
class Family:
    forwards: dict                   # end of a class's name -> what its modules compute in place of `forward`
    mean: tuple = (0.5, 0.5, 0.5)    # of the pixels that the vision tower expects
    std: tuple = (0.5, 0.5, 0.5)
    video: str = "Qwen3VLVideoProcessor"  # whose file servers ask for, if any


FORWARDS = {"PatchEmbed": linear_patches, "VisionAttention": vision_attention, "RMSNorm": rms_norm}
FAMILIES = {   # by transformers' model_type
    "qwen3_vl": Family(FORWARDS),
    "qwen2_5_vl": Family(
        FORWARDS,
        mean=(0.48145466, 0.4578275, 0.40821073),
        std=(0.26862954, 0.26130258, 0.27577711),
        video=""),
    "qwen3_5": Family({**FORWARDS, "RMSNorm": centred_rms_norm, "GatedDeltaNet": gated_delta_net})}


def make_policy(vlm, tokenizer):
    """The Policy of a transformers model of one of the FAMILIES."""
    from transformers import GenerationConfig
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
    vision = vlm.config.vision_config
    family = FAMILIES[vlm.config.model_type]
    images = Qwen2VLImageProcessorPil(
        do_resize=False,
        do_convert_rgb=False,
        patch_size=vision.patch_size,
        merge_size=vision.spatial_merge_size,
        image_mean=list(family.mean),
        image_std=list(family.std))

    given = vlm.generation_config.eos_token_id
    given = given if isinstance(given, list) else [given]
    ends = [i for i in given if type(i) is int and 0 <= i < len(tokenizer)]
    proc = env.Processor(tokenizer, vision.patch_size * vision.spatial_merge_size, ends)

    # A server samples as the checkpoint's generation config says: the hub's top_k of 1 would make it greedy.
    ends = sorted(proc.ends)
    vlm.generation_config = GenerationConfig(eos_token_id=ends, pad_token_id=tokenizer.pad_token_id)
    return Policy(vlm, proc, images)


def fingerprint(weights):
    """A short name (hex) of weights (name -> tensor) by their content: names, shapes, and 16 to 31 values of
    each, rounded to bf16, so that it is the same whether they were read in bf16 or in fp32."""
    crc = 0
    for name, value in sorted(weights.items()):
        step = max(value.numel() // 16, 1)
        some = value.detach().flatten()[::step]
        some = some.bfloat16().float().cpu()
        crc = zlib.crc32(f"{name} {tuple(value.shape)}".encode(), crc)
        crc = zlib.crc32(some.numpy().tobytes(), crc)
    return f"{crc:08x}"


# In a config.json, what would be computed in two ways in rollout and update, or cannot be trained.
UNSUPPORTED = re.compile(
    '"sliding_attention"|"use_sliding_window": true|"dynamic"|"longrope"|"quantization_config": {')


def read_config(path):
    """The config of a folder or hub id, without dropouts and without what chooses code: the boolean mask of a
    rollout is right under sdpa only. UserError for what is not supported, or would hang a load."""
    from transformers import AutoConfig, PretrainedConfig
    raw, _ = PretrainedConfig.get_config_dict(path)
    family = raw.get("model_type")
    if not family:
        raise UserError(f"{path}: no model, or a run that has not saved a checkpoint yet; check --model")
    if family not in FAMILIES:
        raise UserError(f"{path}: a {family} model; --model takes Qwen3-VL, Qwen2.5-VL or Qwen3.5 (not MoE)")
    if UNSUPPORTED.search(json.dumps(raw)):
        raise UserError(f"{path}: config.json asks for a sliding window, dynamic rope or quantized weights, "
                        "which are not supported")

    for part in (raw, raw.get("text_config", {}), raw.get("vision_config", {})):
        if max(part.get("num_hidden_layers", 0), part.get("depth", 0)) > 200:
            raise UserError(f"{path}: config.json asks for more than 200 layers")
        for key in list(part):
            if "attn_implementation" in key or key == "fusion_config":
                del part[key]
            elif "dropout" in key:
                part[key] = 0.0
    return AutoConfig.for_model(**raw)


def load_policy(path, device, train=False):
    """A Policy from a checkpoint, a run folder (its newest checkpoint) or a hub id. On CUDA its weights are
    bf16, enough for rollouts; with train=True they are fp32, still on the CPU. Only safetensors are read, no
    code of a checkpoint is run. UserError for what is no model of FAMILIES, or is damaged."""
    from transformers import AutoModelForImageTextToText, PreTrainedTokenizerFast
    from transformers.utils import logging
    path = env.find_model(path)
    if os.path.isdir(path):
        logging.disable_progress_bar()           # of the loading; a download shows its own
    merged = os.path.exists(f"{path}/training/adapters.safetensors")
    dtype = DTYPE[torch.device(device).type]

    try:
        vlm, found = AutoModelForImageTextToText.from_pretrained(
            path,
            config=read_config(path),
            dtype=torch.float32 if train or merged else dtype,
            attn_implementation="sdpa",
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True)
        if found["missing_keys"]:                # transformers would leave them random
            raise ValueError(f"no weights of {sorted(found['missing_keys'])[:3]}")

        # Not AutoTokenizer, which for Qwen3.5 puts a pre-tokenizer of its own in the place of the file's.
        policy = make_policy(vlm, PreTrainedTokenizerFast.from_pretrained(path))
        policy.fingerprint = fingerprint(vlm.state_dict())
        if merged and not train:
            split_lora(policy, path, dtype)
    except Exception as e:                       # a damaged folder can make a loader raise anything
        raise damaged(path, e)
    return policy if train else policy.to(device)


def damaged(path, error):
    """The UserError for a checkpoint that does not load. It names the steps of its run that are left."""
    run = os.path.dirname(os.path.dirname(path))
    others = [step for step in checkpoint_steps(run) if str(step) != os.path.basename(path)]
    cure = f"write another step into {run}/last: {others}" if others else "check --model"
    return UserError(f"{path!r} does not load ({error!r:.200}); {cure}")


# --- The tiny model -------------------------------------------------------------------------------------
SPECIAL = [                                            # their ids are 0 to 7
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>"]


def make_tokenizer(rows):
    """A tokenizer for cold-start rows. Words, system prompt and constant parts of calls are tokens."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    # 1. Texts that are one token each
    frames = []
    for name, tool in env.TOOLS.items():
        pieces = re.split("0|</?tool_call>", env.call_text(tool.example, name))
        frames += [piece for piece in pieces if len(piece) > 2]
    whole = [*env.TAGS, env.SYSTEM, *frames]

    # 2. What lies between them, to learn words from
    texts = [*env.ERRORS.values(), env.SYSTEM_NO_TOOL, "user\n", "assistant\n", "system\n", "\n"] * 50
    for row in rows:
        texts += [row["problem"], *row.get("turns", [])]
    pieces = []
    for text in texts:
        pieces += re.split("|".join(map(re.escape, whole)), text)

    # 3. Byte pairs within words
    tokenizer = Tokenizer(models.BPE())
    words = pre_tokenizers.Split(Regex(r"\s*</?\w+>|,? ?\w+|[^\w<]+|<"), "isolated")
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, to_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1200,
        min_frequency=20,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False)
    tokenizer.train_from_iterator(pieces, trainer)

    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in whole])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=SPECIAL[2], pad_token=SPECIAL[0])


def tiny_config(name, tokenizer):
    """The configuration of a tiny model. A patch is 8 x 8 pixels, a token 16 x 16."""
    from transformers import Qwen3_5Config, Qwen3VLConfig
    rope = dict(rope_theta=10000.0, mrope_interleaved=True)
    text = dict(
        vocab_size=len(tokenizer),
        eos_token_id=tokenizer.eos_token_id,
        tie_word_embeddings=True,
        hidden_size=96,
        intermediate_size=256,
        num_attention_heads=3,
        num_key_value_heads=3,
        head_dim=32,
        rope_parameters=rope)
    vision = dict(
        depth=2,
        hidden_size=64,
        intermediate_size=192,
        num_heads=2,
        patch_size=8,
        out_hidden_size=96,
        num_position_embeddings=64)

    if name == "tiny":
        config = Qwen3VLConfig
        text.update(num_hidden_layers=3)
        rope.update(mrope_section=[6, 5, 5])
        vision.update(deepstack_visual_indexes=[0])
    else:
        config = Qwen3_5Config
        text.update(
            num_hidden_layers=4,
            layer_types=["linear_attention", "full_attention"] * 2,
            linear_num_key_heads=2,
            linear_num_value_heads=4,
            linear_key_head_dim=24,
            linear_value_head_dim=32)
        rope.update(mrope_section=[3, 3, 2], partial_rotary_factor=0.5)

    return config(
        text_config=text,
        vision_config=vision,
        tie_word_embeddings=True,
        image_token_id=6,
        video_token_id=7,
        vision_start_token_id=3,
        vision_end_token_id=4)


def make_tiny(rows, seed, name="tiny"):
    """A random model of 0.7 M parameters for these rows: "tiny" is a Qwen3-VL, "tiny3_5" a Qwen3.5."""
    from transformers import AutoModelForImageTextToText
    tokenizer = make_tokenizer(rows)
    torch.manual_seed(seed)
    vlm = AutoModelForImageTextToText.from_config(tiny_config(name, tokenizer))
    # At transformers' 0.02 an image token hardly says where it is: finding boxes takes three times as long.
    torch.nn.init.normal_(vlm.model.visual.pos_embed.weight, std=0.5)
    # At transformers' 1 most states would be forgotten within a token; at -4 they last 3 to 5,000 tokens.
    for weight, value in vlm.named_parameters():
        if weight.endswith("dt_bias"):
            torch.nn.init.constant_(value, -4.0)
    return make_policy(vlm, tokenizer)


def save_tiny(folder, seed, name="tiny"):
    """Write <folder>/<name>, whole or not at all: a random model for the texts of <folder>/sft.jsonl."""
    rows = data.read_lines(data.split_path(folder, "sft"))
    policy = make_tiny(rows, seed, name)
    unfinished = f"{folder}/{name}.tmp"
    save_model(unfinished, policy, policy.vlm.state_dict(), env.EpisodeConfig(), "tiny")
    os.replace(unfinished, f"{folder}/{name}")


# --- LoRA and FSDP2 -------------------------------------------------------------------------------------
def lora_forward(self, x):
    """y = W x + lora_scale B A x: what a linear layer computes beside its adapters."""
    update = F.linear(self.lora_scale * F.linear(x, self.lora_A), self.lora_B)
    return F.linear(x, self.weight, self.bias) + update


def add_lora(policy, rank, scale, seed=0):
    """Freeze the policy and give every linear layer of the text model's blocks fp32 adapters A (rank, in) and
    B (out, rank) (Hu et al., arXiv 2106.09685). B is zero: nothing changes at first. With every lora_scale at
    0 the policy is its base again: a reference that costs no memory."""
    policy.requires_grad_(False)
    policy.lora = rank, scale

    generator = torch.Generator().manual_seed(seed)                # A is the same on all ranks
    for module in policy.vlm.model.language_model.layers.modules():
        if isinstance(module, torch.nn.Linear):
            bound = module.in_features ** -0.5
            A = torch.empty(rank, module.in_features).uniform_(-bound, bound, generator=generator)
            module.lora_A = torch.nn.Parameter(A)
            module.lora_B = torch.nn.Parameter(torch.zeros(module.out_features, rank))
            module.lora_scale = scale
            module.forward = MethodType(lora_forward, module)


def merge_lora(weights, cfg):
    """Take the adapters out of weights (name -> tensor), add their products to the other weights, in fp32,
    and return the adapters. weights is changed in place."""
    adapters = {name: weights.pop(name) for name in list(weights) if "lora_" in name}
    for name, A in adapters.items():
        if name.endswith("lora_A"):
            plain = name.replace("lora_A", "weight")
            delta = cfg.lora_alpha / cfg.lora * adapters[name.replace("lora_A", "lora_B")] @ A
            weights[plain] = weights[plain].float() + delta
    return adapters


@torch.no_grad()
def split_lora(policy, folder, dtype):
    """Take a checkpoint's adapters out of its merged weights again and put them beside. Most of what LoRA
    learns is smaller than a step of bf16: rounded with the weights, three quarters of it can be lost."""
    adapters, notes = read_training(folder, "adapters")
    add_lora(policy, int(notes["rank"]), float(notes["scale"]))
    policy.vlm.load_state_dict(adapters, strict=False)

    for module in policy.vlm.modules():
        if hasattr(module, "lora_A"):
            module.weight -= module.lora_scale * module.lora_B @ module.lora_A

    for name, p in policy.vlm.named_parameters():
        if "lora_" not in name:
            p.data = p.data.to(dtype)            # what bf16 weights were before the merge, to the bit


def shard(policy, device):
    """FSDP2 over torchrun's ranks (one is enough). A rank keeps its part of each block's weights; a block is
    gathered while it computes, in bf16 on CUDA, and gradients come back as fp32 sums over the ranks."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    dtype = DTYPE[device.type]
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


# --- Checkpoints: servers load every *.safetensors of the folder, so training state lies in a subfolder ---
def save_model(folder, policy, weights, cfg, preset):
    """Write what transformers and servers load, and episode.json, by which later stages ask as this one."""
    from transformers.utils import logging
    for name in policy.vlm.all_tied_weights_keys:          # gathered from ranks it would be a second copy
        weights.pop(name, None)
    logging.disable_progress_bar()                         # of the writing
    policy.vlm.save_pretrained(folder, state_dict=weights)
    policy.proc.tokenizer.chat_template = env.CHAT_TEMPLATE
    policy.proc.tokenizer.save_pretrained(folder)

    areas = dict(                                          # one pair for a server's originals and crops
        shortest_edge=min(cfg.min_crop_pixels, cfg.max_pixels),
        longest_edge=max(cfg.max_crop_pixels, cfg.max_pixels))
    images = dict(
        policy.image_processor.to_dict(),
        do_resize=True,
        do_convert_rgb=True,
        size=areas,
        image_processor_type="Qwen2VLImageProcessor")
    episode = dict(env.shared(cfg, env.EpisodeConfig), preset=preset)
    files = {"preprocessor_config.json": images, "episode.json": episode}
    if policy.family.video:
        files["video_preprocessor_config.json"] = dict(images, video_processor_type=policy.family.video)
    for name, content in files.items():
        env.write_text(f"{folder}/{name}", json.dumps(content, indent=1))


def whole(named):
    """Tensors by name, sharded or not, as whole ones on the CPU of rank 0; {} elsewhere. All ranks must reach
    this."""
    tensors = {}
    for name, value in named.items():
        if hasattr(value, "full_tensor"):        # one at a time, as each rank gathers it on its GPU
            value = value.full_tensor()
        if not dist.is_initialized() or dist.get_rank() == 0:
            tensors[name] = value.detach().cpu()
    return tensors


def optimizer_state(policy, optimizers):
    """The optimizers' tensors, named "<which optimizer>.<what it is>.<the parameter's name>"."""
    state = {}
    for i, optimizer in enumerate(optimizers):
        for name, p in policy.vlm.named_parameters():
            for key, value in optimizer.state.get(p, {}).items():
                state[f"{i}.{key}.{name}"] = value
    return state


def save_checkpoint(step, policy, optimizers, cfg, preset):
    """Write cfg.out/checkpoints/<step>. All ranks must reach this; rank 0 writes, and holds the weights, then
    the optimizers' state. It is renamed when it is on the disk, and only then does cfg.out/last name it."""
    from safetensors.torch import save_file
    folder = f"{cfg.out}/checkpoints/{step}"
    tmp = f"{cfg.out}/checkpoints/unfinished"

    # 1. The model
    weights = whole(policy.vlm.state_dict())
    writes = bool(weights)                                 # rank 0
    if writes:
        shutil.rmtree(tmp, ignore_errors=True)             # of a run that was killed while it wrote
        os.makedirs(f"{tmp}/training")
        if policy.lora:
            rank, scale = policy.lora                      # as cfg has them, see load_trainable
            adapters = merge_lora(weights, cfg)
            notes = dict(base=policy.fingerprint, rank=str(rank), scale=str(scale))
            save_file(adapters, f"{tmp}/training/adapters.safetensors", notes)
        save_model(tmp, policy, weights, cfg, preset)
    del weights

    # 2. Optimizers; then the folder gets its name
    state = whole(optimizer_state(policy, optimizers))
    if writes:
        save_file(state, f"{tmp}/training/optimizer.safetensors")
        for path in Path(tmp).rglob("*.safetensors"):
            path.chmod(0o644)                              # safetensors leaves them unreadable to others

        os.sync()
        shutil.rmtree(folder, ignore_errors=True)          # of a run that was killed before `last` named it
        os.replace(tmp, folder)
        env.write_text(f"{cfg.out}/last", str(step))
    barrier()                                              # it is there before anyone reads it


def read_training(folder, name):
    """Tensors, and notes (texts), in the file `name` of a checkpoint's subfolder training/. UserError if it
    is damaged."""
    from safetensors import safe_open
    try:
        with safe_open(f"{folder}/training/{name}.safetensors", "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata()
    except Exception as e:
        raise damaged(folder, e)


def checkpoint_steps(out):
    """The steps whose checkpoints a run folder has, in order."""
    steps = []
    for path in Path(out, "checkpoints").glob("*"):
        if path.name.isdecimal() and path.is_dir() and not path.is_symlink():
            steps.append(int(path.name))
    return sorted(steps)


def prune(cfg, step, best=None):
    """Keep the newest checkpoints up to `step` and that of step `best`. Other ones go; what else lies there
    is the user's."""
    steps = checkpoint_steps(cfg.out)
    newest = [s for s in steps if s <= step][-cfg.keep:]
    for s in steps:
        if s in newest or s == best:
            continue
        try:
            shutil.rmtree(f"{cfg.out}/checkpoints/{s}")
        except OSError as e:                     # as of a network file system that still has a file open
            print(f"{cfg.out}/checkpoints/{s} could not be removed ({e})", flush=True)


def load_trainable(cfg, start, first, device, betas, muon_lr=0.0):
    """Policy, optimizers and preset of a stage: from `start` (see load_policy), or, where a run goes on, as
    it was saved at step `first`; 0: it begins. With LoRA the weights are always those of `start`, and the
    adapters on top of them come from the checkpoint of step `first`. UserError if that is damaged, or if
    `start` has other weights by now."""
    start = env.find_model(start)
    last = f"{cfg.out}/checkpoints/{first}"
    policy = load_policy(last if first and not cfg.lora else start, device, train=not cfg.lora)
    policy.vlm.model.visual.requires_grad_(cfg.train_vision and not cfg.lora)

    if cfg.lora:
        mine = cfg.lora, cfg.lora_alpha / cfg.lora
        if policy.lora is None:
            add_lora(policy, *mine, cfg.seed)
        elif policy.lora != mine:                # the adapters of `start` are trained on
            raise UserError(f"{start} has LoRA updates of rank {policy.lora[0]}, multiplied by "
                            f"{policy.lora[1]}; give --lora and --lora_alpha that lead to the same")
        if first:
            adapters, notes = read_training(last, "adapters")
            if notes["base"] != policy.fingerprint:
                raise UserError(f"{start}: not the weights that {last} was trained on; give another --out")
            policy.vlm.load_state_dict(adapters, strict=False)
    policy.reuses_features = bool(cfg.lora) or not cfg.train_vision
    if cfg.recompute:
        policy.vlm.gradient_checkpointing_enable({"use_reentrant": False})

    if cfg.shard and dist.is_initialized():
        shard(policy, device)
    elif cfg.shard:
        print("--shard is off without torchrun, by which even one process takes less memory", flush=True)
    policy.to(device)                            # FSDP2 also lets go of the root, gathered by `shard`'s pass

    optimizers = make_optimizers(policy, cfg, betas, muon_lr)
    if first:
        restore(policy, optimizers, last)
    return policy, optimizers, env.load_episode(start)[0]


def restore(policy, optimizers, folder):
    """Set the optimizers' state as the checkpoint in `folder` has it: on each rank its part."""
    from torch.distributed.tensor import distribute_tensor
    state, _ = read_training(folder, "optimizer")
    for path, value in state.items():
        i, key, name = path.split(".", 2)
        p = policy.vlm.get_parameter(name)
        if value.ndim:                           # AdamW's count of steps stays on the CPU
            value = value.to(p.device)
            if policy.sharded:
                value = distribute_tensor(value, p.device_mesh, p.placements, src_data_rank=None)
        optimizers[int(i)].state[p][key] = value


# --- Optimizers, and gradients over the ranks -----------------------------------------------------------
class Muon(torch.optim.Optimizer):
    """Muon (Jordan et al., 2024, kellerjordan.github.io/posts/muon) for matrices W (m, n) and gradients G:

        M <- 0.95 M + 0.05 G
        W <- W - lr sqrt(max(1, m / n)) orthogonal(0.95 M + 0.05 G)

    orthogonal: nearly the U V^T of a singular value decomposition U S V^T, by five steps of a polynomial that
    takes singular values from (0, 1] to about 1. As torch.optim.Muon, but in fp32: on a CPU that lacks bf16
    that one takes twenty times as long."""

    @torch.no_grad()
    def step(self, closure=None):
        [group] = self.param_groups
        for p in group["params"]:
            momentum = self.state[p].setdefault("momentum_buffer", torch.zeros_like(p))
            momentum.lerp_(p.grad, 0.05)
            x = p.grad.lerp(momentum, 0.95)

            x /= x.norm() + 1e-7
            for _ in range(5):
                square = x @ x.T
                x = 3.4445 * x + (2.0315 * square @ square - 4.775 * square) @ x

            p -= group["lr"] * max(1, len(p) / len(p.T)) ** 0.5 * x


def make_optimizers(policy, cfg, betas, muon_lr=0.0):
    """AdamW; with a muon_lr, Muon for matrices that are no embeddings."""
    matrices, rest = [], []
    for name, p in policy.named_parameters():
        if not p.requires_grad:
            continue
        if muon_lr and p.ndim == 2 and "embed" not in name:
            matrices.append(p)
        else:
            rest.append(p)

    lr = cfg.lora_lr if cfg.lora else cfg.lr
    # foreach=False: on CUDA the other way needs temporaries as large as the weights.
    optimizers = [torch.optim.AdamW(rest, lr, betas, weight_decay=cfg.weight_decay, foreach=False)]
    if matrices:
        optimizers.append(Muon(matrices, dict(lr=muon_lr)))
    return optimizers


def set_lr(optimizers, step, cfg):
    """Linear warm-up, constant, linear to zero over the last `decay` share. Returns AdamW's rate."""
    rising = (step + 1) / max(cfg.warmup, 1)
    falling = (cfg.steps - step) / max(cfg.decay * cfg.steps, 1)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = optimizer.defaults["lr"] * min(rising, 1, falling)
    return optimizers[0].param_groups[0]["lr"]


def optimizer_step(policy, optimizers, loss_sum, cfg, nothing_learned=False):
    """Sum the gradients over the ranks, clip them and step, unless loss or norm is not finite, or the caller
    says that nothing was learned. Returns, the same on all ranks: the loss, the norm before clipping, and 1
    if the step was skipped as not finite, else 0. All ranks must reach this."""
    for p in policy.parameters():
        if p.requires_grad and dist.is_initialized() and not policy.sharded:   # FSDP2 has summed them
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
            dist.all_reduce(p.grad)

    [loss_sum] = all_sum(loss_sum)
    norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), cfg.clip_norm)
    if hasattr(norm, "full_tensor"):                       # of sharded gradients
        norm = norm.full_tensor()
    norm = norm.item()
    skipped = not math.isfinite(loss_sum + norm)

    for optimizer in optimizers:
        if not skipped and not nothing_learned:
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return loss_sum, norm, int(skipped)


# --- Ranks. Without torchrun there is one, and no process group -----------------------------------------
def setup():
    """Returns (rank, world_size, device); joins torchrun's process group when there is one."""
    rank = int(os.environ.get("RANK", 0))
    world_size = int(os.environ.get("WORLD_SIZE", 1))
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
        restarts = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        store = dist.PrefixStore("restart" + restarts, store)
        dist.init_process_group(
            backend="nccl" if device.type == "cuda" else "gloo",
            store=store,
            rank=rank,
            world_size=world_size,
            timeout=timedelta(hours=2))                    # to write a large model
    return rank, world_size, device


def gather_objects(obj):
    """The objects of all ranks, rank by rank. All ranks must reach this."""
    if not dist.is_initialized():
        return [obj]
    objects = [None] * dist.get_world_size()
    dist.all_gather_object(objects, obj)
    return objects


def together(function, *args):
    """function(*args). A UserError of one rank is raised on all, or the others would wait for it. All ranks
    must reach this."""
    result = error = None
    try:
        result = function(*args)
    except UserError as e:
        error = e
    for error in gather_objects(error):
        if error:
            raise error
    return result


def barrier():
    """Wait for one another. All ranks must reach this."""
    if dist.is_initialized():
        dist.barrier()


def all_sum(*values):
    """The sum of each number over the ranks. All ranks must reach this."""
    return [sum(column) for column in zip(*gather_objects(values))]


def leave():
    """Ranks leave together: one that is gone while others still write can end in an abort."""
    barrier()
    if dist.is_initialized():
        dist.destroy_process_group()


@contextmanager
def deferred_signals():
    """Within it SIGTERM and Ctrl-C only fill the list that it yields: a step is finished and saved."""
    signals = []
    handlers = {}
    for number in (signal.SIGTERM, signal.SIGINT):
        handlers[number] = signal.signal(number, lambda number, frame: signals.append(number))
    try:
        yield signals
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def due(done, signals, saved, cfg):
    """(Is the run to stop, is it to be saved) after `done` steps. signals: those so far, see
    `deferred_signals`; saved: the time of the last save. Rank 0's clock decides. All ranks must reach
    this."""
    everyone = gather_objects((len(signals), time.time() - saved))
    stopped = any(n_signals for n_signals, _ in everyone)
    _, age = everyone[0]
    late = 0 < cfg.save_minutes * 60 < age
    is_due = stopped or late or done % cfg.save_every == 0 or done == cfg.steps
    return stopped, is_due


def stop(step, rank):
    """End this process in good order after a signal. All ranks must reach this."""
    if rank == 0:
        print(f"stopped by a signal; the same command goes on from step {step}", flush=True)
    leave()
    raise SystemExit(0)


# --- The run folder: config.json, log.jsonl, lock, checkpoints/<step>/, last ----------------------------
def read_log(folder):
    """The entries of a run's log.jsonl, if there is one. A killed run may leave half a line at its end."""
    path = Path(folder, "log.jsonl")
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("}\n")]


def append_log(folder, entry):
    finite = {}                                  # NaN and infinity are no JSON
    for name, value in entry.items():
        if not isinstance(value, float) or math.isfinite(value):
            finite[name] = value
    with open(f"{folder}/log.jsonl", "a") as f:
        f.write(json.dumps(finite) + "\n")


def saved_step(cfg, cure="give another --out"):
    """The step of the newest checkpoint in cfg.out, or 0. UserError if it was made with other settings."""
    last = env.newest(cfg.out)
    if last == cfg.out:
        return 0
    env.same_settings(cfg.out, cfg, cure)
    step = int(os.path.basename(last))
    if step > cfg.steps:
        raise UserError(f"{cfg.out} has made {step} steps, more than {cfg.steps}; raise --steps, or {cure}")
    return step


def provenance():
    """What made a run, for its config.json and the page."""
    here = shlex.quote(os.path.dirname(os.path.abspath(__file__)))
    return dict(
        date=time.strftime("%Y-%m-%d %H:%M"),
        command=shlex.join(sys.argv),
        commit=os.popen(f"git -C {here} describe --always --dirty 2>/dev/null").read().strip(),
        threads=torch.get_num_threads())


def checksum(rows):
    """A short name (hex) of what rows say; where their images lie does not count."""
    plain = [{**row, "images": os.path.basename(row["images"][0])} for row in rows]
    return f"{zlib.crc32(json.dumps(plain).encode()):08x}"


def open_run(cfg, rank, rows):
    """Open cfg.out for training on rows: returns the step to go on from. UserError if it is in use, or has
    other settings or rows."""
    step = 0
    if rank == 0:
        env.lock(cfg.out)
        identity = checksum(rows)

        step = saved_step(cfg)
        if step:
            old = env.read_json(f"{cfg.out}/config.json", {})
            if old.get("rows", identity) != identity:
                raise UserError(f"{cfg.out} has learned from other rows than those of {cfg.data} now; give "
                                "another --out")
            text = f"{cfg.out}: going on from step {step} of {cfg.steps}"
            if old.get("steps", cfg.steps) != cfg.steps:
                text += f"; it was planned for {old['steps']} steps; the rate is now that of {cfg.steps}"
            print(text, flush=True)

        settings = {**asdict(cfg), **provenance(), "rows": identity}
        env.write_text(f"{cfg.out}/config.json", json.dumps(settings, indent=1))
        kept = [json.dumps(entry) + "\n" for entry in read_log(cfg.out) if entry["step"] < step]
        env.write_text(f"{cfg.out}/log.jsonl", "".join(kept))
    return gather_objects(step)[0]


def cli(main, cls, real):
    """The command line of a stage: main(cfg) on every rank."""
    try:
        env.command(main, cls, real)
    except torch.OutOfMemoryError as e:
        raise UserError(f"out of GPU memory ({str(e).splitlines()[0]}); use more GPUs with "
                        "--shard=true; lower --micro_batch (updates), --in_flight (rollouts), --max_tokens")
    leave()


# --- Imitation ------------------------------------------------------------------------------------------
def render_batches(proc, rows, cfg):
    """Rows as micro-batches of conversations of like length, and three numbers for the log. left_out:
    conversations that are not trained, as they do not answer in the turn that may only answer. cut: those
    that outgrow turn_tokens or max_tokens, and are trained as far as they go. refused: turns whose call
    failed, or that had neither call nor answer, as when rows are written in another dialect."""
    left_out = cut = refused = 0
    trajs = []
    for row in rows:
        traj = env.render(proc, row, row["turns"], cfg)
        if traj.status == "over_turns":      # it stays, as ranks must have equal numbers of batches
            traj.mask = [0] * len(traj.mask)
            left_out += 1
        cut += traj.status == "over_tokens"
        refused += sum(turn.error is not None for turn in traj.turns)
        trajs.append(traj)

    trajs.sort(key=lambda traj: len(traj.ids))
    batches = []
    for i in range(0, len(trajs), cfg.micro_batch):
        batches.append(collate(trajs[i:i + cfg.micro_batch], proc))
    return batches, left_out, cut, refused


def train_step(policy, optimizers, batches, step, cfg):
    """One step on this rank's micro-batches. Returns its log entry."""
    [n_tokens] = all_sum(sum(int(batch["mask"].sum()) for batch in batches))
    loss_sum = 0.0
    for batch in batches:
        with policy.autocast():
            logp, _ = policy(batch)                        # (n,) the micro-batch's trained tokens
        loss = -logp.sum() / max(n_tokens, 1)              # mean of -log p over the tokens of all ranks
        loss.backward()
        loss_sum += loss.item()

    lr = set_lr(optimizers, step, cfg)
    loss_sum, norm, skipped = optimizer_step(policy, optimizers, loss_sum, cfg)
    return dict(step=step, loss=loss_sum, tokens=n_tokens, grad_norm=norm, skipped=skipped, lr=lr)


def spent(folder):
    """Seconds of a run's steps so far, of all processes that made them."""
    log = read_log(folder)
    return log[-1]["seconds"] if log else 0.0


def eta(entry, cfg):
    """Time that is left, as minutes:seconds, at the run's mean pace."""
    left = round(entry["seconds"] / (entry["step"] + 1) * (cfg.steps - entry["step"] - 1))
    return f"eta {left // 60:3}:{left % 60:02}"


def print_step(entry, cfg):
    text = f"step {entry['step']} loss {entry['loss']:.4f} norm {entry['grad_norm']:.3f}"
    for name in ("left_out", "cut", "refused", "skipped"):
        text += f" {name} {entry[name]}"
    with tqdm.external_write_mode():       # above the bar
        print(text, eta(entry, cfg), flush=True)


def train(policy, optimizers, rows, first, preset, cfg, rank, world_size):
    """The steps from `first` on, over the rows in the order of their file. After a signal, or when an image
    cannot be read any more, what has been learned is saved before it ends. preset: saved with checkpoints."""
    def prepare(step):
        mine = range(step * cfg.batch + rank, (step + 1) * cfg.batch, world_size)
        return render_batches(policy.proc, [rows[i % len(rows)] for i in mine], cfg)

    def save(done):
        save_checkpoint(done, policy, optimizers, cfg, preset)
        if rank == 0:
            prune(cfg, done)

    policy.train()
    newest = first               # the step of the newest checkpoint
    saved = time.time()          # when it was written
    started = saved - spent(cfg.out)
    with deferred_signals() as signals, ThreadPoolExecutor(1) as pool:
        pending = pool.submit(prepare, first)
        for step in tqdm(range(first, cfg.steps), "sft", disable=rank > 0 or None, leave=False):
            # 1. batch; the next one is rendered while this step computes
            try:
                batches, left_out, cut, refused = together(pending.result)
            except UserError:            # an image that cannot be read any more
                if step > newest:
                    save(step)
                raise
            pending = pool.submit(prepare, step + 1)

            # 2. loss, gradient and step
            entry = train_step(policy, optimizers, batches, step, cfg)

            # 3. log
            left_out, cut, refused = all_sum(left_out, cut, refused)
            entry.update(left_out=left_out, cut=cut, refused=refused, seconds=time.time() - started)
            if rank == 0:
                append_log(cfg.out, entry)
                if step % cfg.log_every == 0 or step + 1 == cfg.steps or entry["skipped"]:
                    print_step(entry, cfg)

            # 4. save
            stopped, is_due = due(step + 1, signals, saved, cfg)
            if is_due:
                save(step + 1)
                newest = step + 1
                saved = time.time()
            if stopped:
                stop(step + 1, rank)


def load_demonstrations(cfg):
    """The rows of sft.jsonl, checked. Raises UserError."""
    path = data.split_path(cfg.data, "sft")
    rows = data.load_rows(path, cfg.image_root)
    for i, row in enumerate(rows):
        if not row.get("turns"):
            raise UserError(f"{path}: row {i} has no `turns` (the assistant's texts); remove it")
    return rows


def check_flags(cfg, world_size):
    """UserError for settings that no imitation can have."""
    if cfg.batch % world_size:
        raise UserError(f"--batch={cfg.batch} of sft.py is not a multiple of the {world_size} ranks")
    if not cfg.max_crops:
        raise UserError("--max_crops=0: there would be no call to imitate; leave it, or set it above 0")
    if cfg.tiny not in ("tiny", "tiny3_5"):
        raise UserError(f"--tiny={cfg.tiny}: give tiny or tiny3_5")


def main(cfg):
    """Imitation as cfg says; all ranks call it."""
    rank, world_size, device = setup()
    check_flags(cfg, world_size)

    # 1. rows, run folder
    rows = load_demonstrations(cfg)
    start = cfg.model or f"{cfg.data}/{cfg.tiny}"
    if rank == 0 and not cfg.model and not os.path.exists(start):
        save_tiny(cfg.data, cfg.seed, cfg.tiny)
    barrier()
    first = open_run(cfg, rank, rows)                 # the step to go on from, or 0

    # 2. policy
    muon_lr = 0.0 if cfg.lora or cfg.shard else cfg.muon_lr
    if muon_lr != cfg.muon_lr and rank == 0:
        print("--muon_lr: AdamW trains all, as Muon needs whole matrices and --lora or --shard is given")
    policy, optimizers, preset = load_trainable(cfg, start, first, device, (0.9, 0.98), muon_lr)
    together(data.check_rows, rows, rank, world_size, policy.proc, cfg)

    # 3. training
    train(policy, optimizers, rows, first, preset, cfg, rank, world_size)


if __name__ == "__main__":
    cli(main, Config, REAL)
