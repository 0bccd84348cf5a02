"""Real checkpoints: the hub's folder layout in and out, both families, tied and untied; what training them needs.

Weights are random and small; the layout (sharded safetensors, an old preprocessor file) is that of the published ones.
FSDP2 over two ranks is tested in test_stages.py, beside the plain two ranks.
"""
import copy
import json
import os

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoTokenizer

import data
import env
import rppo
import sft
from conftest import amplify

FAMILIES = ["qwen3_vl tied", "qwen3_vl untied", "qwen2_5_vl tied", "qwen2_5_vl untied"]


def build(name, policy, policy25):
    """A copy of the session's policy of that family, its head tied to the embeddings or not."""
    family, tied = name.split()
    p = policy if family == "qwen3_vl" else policy25
    config = copy.deepcopy(p.vlm.config)
    for c in (config, config.text_config):
        c.tie_word_embeddings = tied == "tied"
    torch.manual_seed(3)
    return env.Policy(amplify(type(p.vlm)(config)), p.proc).eval()


@pytest.fixture(params=FAMILIES)
def hub(request, policy, policy25, tmp_path):
    """(policy, folder): the policy in the hub's layout, which knows nothing of this project."""
    made, folder = build(request.param, policy, policy25), str(tmp_path / "hub")
    made.vlm.save_pretrained(folder, max_shard_size="300KB")
    made.proc.tok.save_pretrained(folder)
    with open(f"{folder}/preprocessor_config.json", "w") as f:
        json.dump(dict(min_pixels=3136, max_pixels=12845056, patch_size=made.proc.patch, image_processor_type="Qwen2VLImageProcessor"), f)
    assert os.path.exists(f"{folder}/model.safetensors.index.json") and not os.path.exists(f"{folder}/model.safetensors")
    return made, folder


@pytest.fixture
def batch_of(rows):
    cfg = env.World()
    return lambda p: env.collate([env.render(p.proc, r, r["turns"], cfg) for r in rows[:3]], p.proc)


def same(a, b, batch):
    with torch.no_grad():
        (x, _), (y, _) = a(batch), b(batch)
    assert x.std() > 0.1
    return torch.equal(x, y)


def test_a_hub_folder_loads(hub, batch_of):
    """The same log-probabilities after the way through the hub's layout."""
    made, folder = hub
    loaded = env.load_policy(folder, torch.device("cpu")).eval()
    assert same(made, loaded, batch_of(made))
    tied = loaded.vlm.lm_head.weight is loaded.vlm.get_input_embeddings().weight
    assert tied == made.vlm.config.text_config.tie_word_embeddings


def test_what_we_save_is_a_plain_folder(hub, batch_of, tmp_path):
    """transformers alone loads a checkpoint of ours, with the same logits, and finds what a server needs beside it."""
    made, folder = hub
    policy = env.load_policy(folder, torch.device("cpu"), train=True)
    sft.save_checkpoint(str(tmp_path), 1, policy, sft.Config(), "real", [])
    out = str(tmp_path / "checkpoints/1")
    vlm = AutoModelForImageTextToText.from_pretrained(out, dtype=torch.float32)
    assert same(made, env.Policy(vlm, made.proc).eval(), batch_of(made))
    assert {"config.json", "generation_config.json", "preprocessor_config.json", "tokenizer.json", "model.safetensors"} <= {*os.listdir(out)}
    published = {k for f in os.listdir(folder) if f.endswith(".safetensors") for k in load_file(f"{folder}/{f}")}
    assert set(load_file(f"{out}/model.safetensors")) == published
    messages = [dict(role="user", content=[dict(type="image"), dict(type="text", text="What?")])]
    text = AutoTokenizer.from_pretrained(out).apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>What?<|im_end|>\n<|im_start|>assistant\n"


def test_pixel_budgets_are_ours(hub, rows):
    """Whatever the checkpoint's preprocessor file allows, the original and the crops keep to the config's budgets."""
    policy = env.load_policy(hub[1], torch.device("cpu"))
    cfg = env.World(max_pixels=60 * 60, min_crop_pixels=30 * 30, max_crop_pixels=90 * 90)
    first, *crops = env.render(policy.proc, rows[0], rows[0]["turns"], cfg).views
    assert first.shape[0] * first.shape[1] <= 60 * 60 and crops
    assert all(30 * 30 <= v.shape[0] * v.shape[1] <= 90 * 90 for v in crops)


def test_a_batch_without_an_image(policy, rows):
    """On a sharded policy such a rank must still compute the vision tower: its weights get a gradient, of exactly 0."""
    p = copy.deepcopy(policy)
    traj = env.Trajectory(rows[0], None)
    traj.add(p.proc, p.proc.encode("what is it?"))
    traj.add(p.proc, p.proc.encode("nothing"), sampled=True)
    logp, _ = p(env.collate([traj], p.proc))
    logp.sum().backward()
    assert torch.isfinite(logp).all() and len(logp) == sum(traj.mask)
    assert all((w.grad == 0).all() for w in p.vlm.model.visual.parameters() if w.grad is not None)
    assert p.vlm.model.visual.blocks[0].attn.qkv.weight.grad is not None and p.vlm.lm_head.weight.grad.norm() > 0


def test_a_frozen_tower_stays(scenes, policy, tmp_path):
    """train_vision=false: two steps of each stage move the language model alone, and the optimizer holds nothing else."""
    sft.save_checkpoint(str(tmp_path / "base"), 1, policy, sft.Config(), "tiny", [])
    base = f"{tmp_path}/base/checkpoints/1"
    common = dict(data=scenes, model=base, steps=2, train_vision=False, recompute=True)
    sft.main(sft.Config(**common, out=f"{tmp_path}/sft", batch=4, micro_batch=4))
    rppo.main(rppo.Config(**common, out=f"{tmp_path}/rppo", prompts=2, samples=2, eval_rows=0, n_score=0, format_weight=0.5, max_crops=1))
    start = load_file(f"{base}/model.safetensors")
    for stage in ("sft", "rppo"):
        end, moments = (load_file(f"{tmp_path}/{stage}/checkpoints/2/{f}.safetensors") for f in ("model", "optimizer"))
        moved = {k for k in start if not torch.equal(start[k], end[k])}
        assert (moved or stage == "rppo") and not any("visual" in k for k in moved | set(moments))


def test_moments_in_bf16():
    """AdamW16 follows AdamW closely, keeps its moments in bf16, and goes on after its state was saved and loaded."""
    torch.manual_seed(0)
    start, target, cfg = torch.randn(64, 32), torch.randn(64, 32), sft.Config(lr=1e-2, weight_decay=0.1)
    ends = {}
    for half in (False, True):
        cfg.bf16_moments = half
        w = torch.nn.Parameter(start.clone())
        optimizer = sft.adamw([w], cfg, (0.9, 0.98))
        for _ in range(60):
            optimizer.zero_grad()
            ((w - target) ** 2).sum().backward()
            w.grad += torch.randn_like(w)
            optimizer.step()
        ends[half] = w.detach()
        kinds = {v.dtype for k, v in optimizer.state[w].items() if k != "step"}
        assert kinds == {torch.bfloat16 if half else torch.float32}
    way = (ends[False] - start).norm()
    assert way > 10 and (ends[True] - ends[False]).norm() < 0.1 * way


def test_memory_estimate(policy):
    """Weights, gradients and moments are what the parameters need; each knob does what its message promises."""
    cfg = rppo.Config(**{**env.REAL_WORLD, **rppo.REAL})
    n = sum(p.numel() for p in policy.vlm.parameters())
    tower = sum(p.numel() for p in policy.vlm.model.visual.parameters())
    part = {k: v * 2 ** 30 for k, v in sft.estimate(policy.vlm, cfg, 1).items()}
    assert (part["weights"], part["gradients"], part["adam"]) == pytest.approx((4 * n, 4 * (n - tower), 8 * (n - tower)))
    assert part["cache"] == 4 * cfg.in_flight * cfg.max_tokens * 3 * 96        # keys and values, 3 layers of 3 heads of 32, bf16
    peak = lambda ranks=1, **change: sft.estimate(policy.vlm, rppo.Config(**{**vars(cfg), **change}), ranks)["peak"]
    assert peak(8) < peak() and peak(8, shard=False) == peak(1) and peak(bf16_moments=True) < peak() < peak(train_vision=True)
    assert peak(micro_batch=4) > peak(micro_batch=4, max_tokens=6000) > peak() and peak(recompute=False) > peak() < peak(in_flight=160)


def test_shard_and_muon_do_not_mix(policy):
    with pytest.raises(env.UserError, match="muon_lr=0"):
        sft.make_optimizers(policy, sft.Config(shard=True))


@pytest.mark.parametrize("name", ["real", "tiny"])
def test_presets(hub, name):
    """A checkpoint from elsewhere gets the real preset in every stage; the tiny one keeps its own."""
    for stage in (sft, rppo):
        cfg = env.configure(stage.Config, stage.REAL, [f"--model={hub[1]}"] if name == "real" else [])
        assert (cfg.lr <= 1e-5 and cfg.shard and cfg.recompute and not cfg.train_vision) == (name == "real")
        assert (cfg.max_pixels == env.REAL_WORLD["max_pixels"]) == (name == "real")
    assert data.LEVELS[0]["size"] ** 2 > env.World.max_pixels
