"""The policy (sft.py): it computes what transformers' own model computes, for both families, and its
checkpoints are plain folders that transformers and servers load.

The stock model reads whole sequences one by one. Weights are random and enlarged: a wrong position, mask or
image changes log-probabilities by far more than the tolerances. Hostile folders end in one line.
"""
import copy
import json
import os
import shutil
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, AutoTokenizer
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

import bench
import data
import env
import rppo
import sft
from conftest import amplify

close = torch.testing.assert_close
CFG = env.EpisodeConfig(max_pixels=150 * 150, max_crop_pixels=90 * 90, max_tokens=4000, turn_tokens=200)


@pytest.fixture(params=["qwen3_vl", "qwen2_5_vl"])
def family(request, policy, policy25):
    """A policy of each family that a test may change."""
    if request.param == "qwen2_5_vl":
        return copy.deepcopy(policy25)
    family = copy.deepcopy(policy)
    amplify(family.vlm)
    return family


@pytest.fixture
def trajs(family):
    """Images of two shapes; crops of crops, an error, an early answer."""
    call = '<tool_call>{"name": "image_zoom_in_tool", "arguments": {"bbox_2d": %s, "img_idx": %d}}</tool_call>'
    first = call % ([250, 0, 750, 1000], 0)
    second = call % ([0, 500, 900, 1000], 1)
    wrong = call % ([0, 0, 500, 500], 9)
    answer = "<think>At A1 green.</think>\n<answer>green</answer>"
    out = []
    for size, turns in (((320, 200), [first, second, answer]), ((320, 200), [answer]),
                        ((150, 400), [wrong, first, "hm", answer])):
        image = Image.effect_noise(size, 90).convert("RGB")
        row = {"images": [image], "problem": "Which?", "solution": "green"}
        out.append(env.render(family.proc, row, turns, CFG))
    out[1].shown[0] = out[0].shown[0]            # as in a group, the two hold the same image
    return out


def stock(policy):
    """transformers' own model with the policy's weights."""
    model = type(policy.vlm)(policy.vlm.config)
    model.load_state_dict(policy.vlm.state_dict())
    return model.eval()


def plain(model, policy, traj, temperature=1.0):
    """Log-probabilities (T-1, V) of one whole trajectory, without banned ids."""
    vision = model.config.vision_config
    mean, std = sft.PIXELS[model.config.model_type]
    patches = Qwen2VLImageProcessorPil(patch_size=vision.patch_size, merge_size=vision.spatial_merge_size,
                                       image_mean=mean, image_std=std, do_resize=False)
    views = [Image.fromarray(shown.view.numpy()) for shown in traj.shown]
    ids = torch.tensor([traj.ids])
    logits = model(input_ids=ids, mm_token_type_ids=(ids == policy.proc.image).int(), use_cache=False,
                   **patches(views, return_tensors="pt")).logits[0, :-1]
    return (logits / temperature).masked_fill(policy.banned, -torch.inf).log_softmax(-1)


def gradient(model):
    return torch.cat([p.grad.flatten() for p in model.parameters()]).double()


def same_gradient(a, b):
    return (a - b).norm() < 1e-5 * b.norm()


# --- The forward pass -----------------------------------------------------------------------------------

@pytest.mark.parametrize("chunk", [None, 40])
def test_forward_against_transformers(family, trajs, chunk, monkeypatch):
    """Log-probabilities, entropies and the gradient, with and without logits in recomputed pieces."""
    batch = sft.collate(trajs, family.proc)
    assert len(batch["views"]) == 5              # of 6 images
    if chunk:
        monkeypatch.setattr(sft, "max", lambda *_: chunk, raising=False)   # the size of a piece
    logp, entropy = family(batch, 0.8)
    model = stock(family)
    expected, entropies = [], []
    for traj in trajs:
        logps = plain(model, family, traj, 0.8)[torch.tensor(traj.mask[1:]) > 0]
        entropies.append(-(logps.exp() * logps).nansum(-1))
        expected.append(logps.gather(1, torch.tensor(traj.ids)[torch.tensor(traj.mask) > 0][:, None])[:, 0])
    close(logp, torch.cat(expected), atol=1e-4, rtol=0)
    close(entropy, torch.cat(entropies), atol=1e-4, rtol=0)
    assert logp.std() > 1 and len(logp) > 60
    logp.sum().backward()
    torch.cat(expected).sum().backward()
    assert same_gradient(gradient(family.vlm), gradient(model))


def test_padding_and_company_do_not_matter(family, trajs):
    """A trajectory has the same numbers alone and beside others, in any order."""
    with torch.no_grad():
        alone = [family(sft.collate([traj], family.proc))[0] for traj in trajs]
        close(family(sft.collate(trajs, family.proc))[0], torch.cat(alone), atol=1e-4, rtol=0)
        close(family(sft.collate(trajs[::-1], family.proc))[0], torch.cat(alone[::-1]), atol=1e-4, rtol=0)


def test_sft_loss_is_that_of_labels(family, rows):
    """The loss and the gradient's norm of a step are those of labels, -100 where nothing is trained."""
    cfg = sft.Config(micro_batch=2, clip_norm=1e9)
    batches, left_out = sft.render_batches(family.proc, rows[:5], cfg)
    optimizer = torch.optim.SGD(family.parameters(), 0.0)
    entry = sft.train_step(family, [optimizer], batches, 0, cfg)
    model = stock(family)
    logps, labels = [], []
    for row in rows[:5]:
        traj = env.render(family.proc, row, row["turns"], cfg)
        logps.append(plain(model, family, traj))
        labels.append(torch.tensor(traj.ids).where(torch.tensor(traj.mask) > 0, -100)[1:])
    loss = torch.nn.functional.nll_loss(torch.cat(logps), torch.cat(labels), ignore_index=-100)
    loss.backward()
    assert left_out == 0 and entry["tokens"] == (torch.cat(labels) >= 0).sum()
    assert entry["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert entry["grad_norm"] == pytest.approx(gradient(model).norm().item(), rel=1e-5)


def test_banned_ids(family):
    """Vision tokens and ids without a text have probability 0, however much the model wants them."""
    tokenizer = family.proc.tokenizer
    names = ["<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"]
    rows = family.vlm.lm_head.weight.shape[0]
    banned = {*tokenizer.convert_tokens_to_ids(names), *range(len(tokenizer), rows)}
    assert set(torch.nonzero(family.banned)[:, 0].tolist()) == banned
    h = torch.randn(20, family.vlm.lm_head.weight.shape[1])
    logps = family.logits(h, 0.5).log_softmax(-1)
    assert (logps[:, sorted(banned)] == -torch.inf).all()
    logp, entropy = family.score(h, torch.full((20,), family.proc.end), 0.5)
    close(logp, logps[:, family.proc.end])
    close(entropy, torch.distributions.Categorical(logits=logps).entropy())


def test_a_batch_without_an_image(family):
    """The tower takes part all the same, with gradients of 0: a sharded one must."""
    traj = env.Trajectory({})
    traj.extend(family.proc, family.proc.encode("what is it?"))
    traj.extend(family.proc, family.proc.encode("nothing"), sampled=True)
    logp, _ = family(sft.collate([traj], family.proc))
    logp.sum().backward()
    assert logp.isfinite().all() and len(logp) == sum(traj.mask)
    assert (family.vlm.model.visual.blocks[0].attn.qkv.weight.grad == 0).all()
    assert family.vlm.lm_head.weight.grad.norm() > 0


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable")
def test_recompute_and_a_frozen_tower(scenes, rows):
    """Recomputing gives the same gradient; a frozen tower gets none and is not given to the optimizers."""
    gradients = {}
    for name in ("recompute", "train_vision", ""):
        cfg = sft.Config(out="none", recompute=name == "recompute", train_vision=name != "train_vision")
        policy, _ = sft.load_trainable(cfg, f"{scenes}/tiny", 0, torch.device("cpu"))
        batches, _ = sft.render_batches(policy.proc, rows[:4], cfg)
        policy.train()
        policy(batches[0])[0].sum().backward()
        gradients[name] = {n: p.grad for n, p in policy.named_parameters() if p.grad is not None}
        trained = 0
        for optimizer in sft.make_optimizers(policy, cfg, (0.9, 0.98), 0.03):
            trained += sum(len(group["params"]) for group in optimizer.param_groups)
        assert trained == len(gradients[name])
    close(gradients["recompute"], gradients[""], rtol=1e-5, atol=1e-6)
    language = {n: g for n, g in gradients[""].items() if "visual" not in n}
    close(gradients["train_vision"], language, rtol=1e-5, atol=1e-6)


def test_muon_and_adamw(policy, policy25):
    """Muon has the matrices that are no embeddings; without its rate AdamW has all; shards refuse it."""
    for p in (policy, policy25):
        adamw, muon = sft.make_optimizers(p, sft.Config(), (0.9, 0.98), 0.03)
        names = {id(weight): name for name, weight in p.named_parameters()}
        for weight in muon.param_groups[0]["params"]:
            assert weight.ndim == 2 and "embed" not in names.pop(id(weight))
        for weight in adamw.param_groups[0]["params"]:
            assert weight.ndim != 2 or "embed" in names[id(weight)]
            names.pop(id(weight))
        assert not names
        [adamw] = sft.make_optimizers(p, sft.Config(), (0.9, 0.98))
        assert len(adamw.param_groups[0]["params"]) == len(list(p.parameters()))
    with pytest.raises(env.UserError, match="--muon_lr=0"):
        sft.make_optimizers(policy, sft.Config(shard=True), (0.9, 0.98), 0.03)


@pytest.mark.parametrize("shape, billions", [("qwen3-vl-4b", 4.44), ("qwen3-vl-8b", 8.77),
                                             ("qwen2.5-vl-3b", 3.75), ("qwen2.5-vl-7b", 8.29)])
def test_true_shapes(rows, shape, billions):
    """The published sizes make a Policy of the published number of parameters (a tied head counts once)."""
    policy = bench.make_policy(bench.Config(shape=shape), rows, torch.device("meta"))
    assert sum(p.numel() for p in policy.parameters()) / 1e9 == pytest.approx(billions, abs=0.005)
    assert policy.proc.factor == (32 if "qwen3" in shape else 28)


# --- Folders --------------------------------------------------------------------------------------------

@pytest.fixture
def hub(family, tmp_path):
    """The family's policy in the layout of the hub: shards, an old preprocessor file, nothing of ours."""
    folder = str(tmp_path / "hub")
    family.vlm.generation_config.eos_token_id = [family.proc.end, 0]
    family.vlm.save_pretrained(folder, max_shard_size="300KB")
    family.proc.tokenizer.save_pretrained(folder)
    old = dict(min_pixels=3136, max_pixels=12845056, image_processor_type="Qwen2VLImageProcessor")
    Path(folder, "preprocessor_config.json").write_text(json.dumps(old))
    assert not os.path.exists(f"{folder}/model.safetensors")
    return folder


def weights_of(folder):
    """What vLLM takes without an index: every *.safetensors of the folder itself."""
    weights = {}
    for path in Path(folder).glob("*.safetensors"):
        weights.update(load_file(path))
    return weights


def save(policy, out, step=1):
    cfg = rppo.Config(out=out, judge_url="https://judge", judge_name="j", image_root="https://images")
    optimizers = sft.make_optimizers(policy, cfg, (0.9, 0.98))
    sft.save_checkpoint(step, policy, optimizers, cfg, "real")
    return sft.newest(out)


def test_hub_folders_and_ours(hub, family, trajs, tmp_path):
    """A folder of the hub loads, and what we save of it is one again: transformers alone loads it with equal
    logits, and to a server every weight file in it belongs to the model."""
    loaded = sft.load_policy(hub, "cpu", train=True).eval()
    assert loaded.proc.ends == {family.proc.end, 0}
    assert (loaded.vlm.lm_head.weight is loaded.vlm.get_input_embeddings().weight) == (family.proc.factor == 16)
    os.umask(0o022)
    out = save(loaded, str(tmp_path / "run"))
    assert weights_of(out).keys() == weights_of(hub).keys()
    theirs = AutoModelForImageTextToText.from_pretrained(out, dtype=torch.float32).eval()
    batch = sft.collate(trajs, family.proc)
    with torch.no_grad():
        assert torch.equal(family(batch)[0], loaded(batch)[0])
        logits = plain(theirs, family, trajs[0])
        assert torch.equal(logits, plain(stock(family), family, trajs[0]))
    for path in Path(out).rglob("*"):
        assert path.is_dir() or path.stat().st_mode & 0o777 == 0o644, path
    assert os.path.exists(f"{out}/video_preprocessor_config.json") == (family.vlm.config.model_type == "qwen3_vl")
    assert AutoTokenizer.from_pretrained(out).chat_template == env.CHAT_TEMPLATE
    episode = json.loads(Path(out, "episode.json").read_text())
    assert set(episode) == {"preset", *(f.name for f in fields(env.EpisodeConfig))}
    assert not any("//" in path.read_text() for path in Path(out).glob("*.json") if "tokenizer" not in path.name)


def test_damaged_checkpoints_name_the_ones_left(policy, tmp_path):
    """Weights or training state that end early: one line names the checkpoints to go back to."""
    run = str(tmp_path)
    save(policy, run, 1)
    last = save(policy, run, 2)
    optimizers = sft.make_optimizers(policy, sft.Config(), (0.9, 0.98))
    for file, load in (("training/optimizer", lambda: sft.load_training_state(last, policy, optimizers)),
                       ("model", lambda: sft.load_policy(last, "cpu"))):
        load()                                   # nothing is wrong with it yet
        os.truncate(f"{last}/{file}.safetensors", 40)
        with pytest.raises(env.UserError) as e:
            load()
        assert str(e.value).startswith(f"{last}: does not load")
        assert "'1'" in str(e.value) and f"into {run}/last" in str(e.value)


def test_other_models_and_pickles_are_refused(scenes, tmp_path):
    """Another family, and weights that only pickle would read."""
    folder = str(tmp_path / "tiny")
    shutil.copytree(f"{scenes}/tiny", folder)
    weights = load_file(f"{folder}/model.safetensors")
    os.remove(f"{folder}/model.safetensors")
    torch.save(weights, f"{folder}/pytorch_model.bin")
    with pytest.raises(env.UserError, match="does not load"):
        sft.load_policy(folder, "cpu")
    Path(folder, "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(env.UserError, match="llama model; --model takes Qwen3-VL"):
        sft.load_policy(folder, "cpu")


def test_missing_weights_are_refused(scenes, tmp_path):
    """A checkpoint without one of its tensors would otherwise go on with random numbers."""
    folder = str(tmp_path / "tiny")
    shutil.copytree(f"{scenes}/tiny", folder)
    weights = load_file(f"{folder}/model.safetensors")
    weights.pop("model.language_model.layers.1.mlp.up_proj.weight")
    save_file(weights, f"{folder}/model.safetensors", {"format": "pt"})
    with pytest.raises(env.UserError, match="does not load"):
        sft.load_policy(folder, "cpu")


HOSTILE = [None, "9", "", -1, 0, 0.5, float("nan"), float("inf"), 2 ** 70, True, [], [3], {}, {"a": [1]}, "\x1b[2J"]


def one_line(act):
    """What act returns, or None after a UserError of one line."""
    try:
        return act()
    except env.UserError as e:
        assert str(e) and str(e).isprintable()


def test_hostile_episode_files(tmp_path):
    """A value is one that a flag could have, or one line refuses it. Nothing else is read, no address either."""
    path = tmp_path / "episode.json"
    for f in fields(env.EpisodeConfig):
        for value in HOSTILE:
            path.write_text(json.dumps({f.name: value, "judge_url": "https://evil", "seed": 7, "lam": -3}))
            legal = type(value) is int and (f.name != "max_crops") <= value < 2 ** 63
            assert one_line(lambda: sft.load_episode(tmp_path)) == (("real", {f.name: value}) if legal else None)
    path.write_text('{"preset": ["tiny"], "max_crops": 3, "judge_url": "https://evil", "seed": 7}')
    cfg = sft.configure(rppo.Config, rppo.REAL, [f"--model={tmp_path}"])
    assert (cfg.max_crops, cfg.judge_url, cfg.seed) == (3, "", 0)
    for text in (b"", b"[]", b"3", b"{", b"\xff", b"[" * 100_000, b'{"max_crops": ' + b"9" * 9999 + b"}"):
        path.write_bytes(text)
        assert one_line(lambda: sft.load_episode(tmp_path)) in (None, ("real", {}))


def test_hostile_config_files(scenes, tmp_path):
    """Whatever config.json, generation_config.json and the tokenizer say, a folder loads or one line says no."""
    folder = tmp_path / "tiny"
    shutil.copytree(f"{scenes}/tiny", folder)
    for file, *keys in (("config.json", "model_type", "vision_config", "text_config", "image_token_id"),
                        ("generation_config.json", "eos_token_id"), ("tokenizer_config.json", "tokenizer_class")):
        good = (folder / file).read_text()
        for key in keys:
            for value in HOSTILE:
                if key.endswith("_config") and (not value or type(value) is dict):
                    continue                     # means the default sizes, of 8B: takes long
                (folder / file).write_text(json.dumps({**json.loads(good), key: value}))
                one_line(lambda: sft.load_policy(str(folder), "cpu"))
        (folder / file).write_text(good)
    config = json.loads((folder / "config.json").read_text())
    for part, name in (("vision_config", "patch_size"), ("text_config", "hidden_size"),
                       ("text_config", "num_attention_heads"), ("text_config", "vocab_size")):
        for value in HOSTILE:
            changed = {**config, part: {**config[part], name: value}}
            (folder / "config.json").write_text(json.dumps(changed))
            one_line(lambda: sft.load_policy(str(folder), "cpu"))
