"""The policy (sft.py): it computes what transformers' own model computes, for all families, and its
checkpoints are plain folders that transformers and servers load.
"""
import copy
import json
import os
import shutil
from dataclasses import fields
from pathlib import Path

import pytest
from conftest import crop, gradient, plain, refusal, refused, stock
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, AutoTokenizer

import env
import rppo
import sft

close = torch.testing.assert_close
CFG = env.EpisodeConfig(max_pixels=150 * 150, max_crop_pixels=90 * 90, max_tokens=4000, turn_tokens=200)


@pytest.fixture
def trajs(family):
    """Images of two shapes; crops of crops, an error, an early answer."""
    first = crop(250, 0, 750, 1000)
    second = crop(0, 500, 900, 1000, img_idx=1)
    wrong = crop(0, 0, 500, 500, img_idx=9)
    answer = "<think>At A1 green.</think>\n<answer>green</answer>"
    out = []
    for size, turns in (((320, 200), [first, second, answer]), ((320, 200), [answer]),
                        ((150, 400), [wrong, first, "hm", answer])):
        image = Image.effect_noise(size, 90).convert("RGB")
        row = {"images": [image], "problem": "Which?", "solution": "green"}
        out.append(env.render(family.proc, row, turns, CFG))
    out[1].shown[0] = out[0].shown[0]            # as in a group, the two hold the same image
    return out


def test_forward_against_transformers(family, trajs, monkeypatch):
    """Log-probabilities, entropies and the gradient, with and without logits in recomputed pieces."""
    batch = sft.collate(trajs, family.proc)
    seen = []
    family.vlm.model.visual.register_forward_pre_hook(lambda _, args, kwargs: seen.append(len(kwargs["grid_thw"])),
                                                      with_kwargs=True)
    model = stock(family)
    expected, entropies = [], []
    for traj in trajs:
        sampled = torch.tensor(traj.mask[1:]) > 0
        logps = plain(model, family, traj, 0.8)[sampled]
        ids = torch.tensor(traj.ids[1:])[sampled]
        entropies.append(-(logps.exp() * logps).nansum(-1))
        expected.append(logps.gather(1, ids[:, None])[:, 0])
    torch.cat(expected).sum().backward()
    wanted = gradient(model)
    for _ in range(2):
        logp, entropy = family(batch, 0.8)
        close(logp, torch.cat(expected), atol=1e-4, rtol=0)
        close(entropy, torch.cat(entropies), atol=1e-4, rtol=0)
        family.zero_grad()
        logp.sum().backward()
        assert (gradient(family.vlm) - wanted).norm() < 1e-5 * wanted.norm()
        monkeypatch.setattr(sft, "max", lambda *_: 40, raising=False)      # the size of a piece
    assert seen == [5, 5]                         # of 6 images


def test_sft_loss_is_that_of_labels(family, rows):
    """The loss and the gradient's norm of a step are those of labels, -100 where nothing is trained."""
    cfg = sft.Config(micro_batch=2, clip_norm=1e9)
    batches, left_out, *_ = sft.render_batches(family.proc, rows[:3], cfg)
    optimizer = torch.optim.SGD(family.parameters(), 0.0)
    entry = sft.train_step(family, [optimizer], batches, 0, cfg)
    model = stock(family)
    logps, labels = [], []
    for row in rows[:3]:
        traj = env.render(family.proc, row, row["turns"], cfg)
        logps.append(plain(model, family, traj))
        labels.append(torch.tensor(traj.ids).where(torch.tensor(traj.mask) > 0, -100)[1:])
    loss = torch.nn.functional.nll_loss(torch.cat(logps), torch.cat(labels), ignore_index=-100)
    loss.backward()
    assert left_out == 0 and entry["tokens"] == (torch.cat(labels) >= 0).sum()
    assert entry["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert entry["grad_norm"] == pytest.approx(gradient(model).norm().item(), rel=1e-5)


def test_sft_leaves_out_what_ends_in_a_call(policy, rows):
    """A call in the turn that may only answer trains nothing, and its conversation is counted; so is a call that was
    refused, as one in another dialect is."""
    cfg = sft.Config(max_crops=1)
    rows = sorted(rows, key=lambda row: len(row["turns"]))[::40]
    long = [row for row in rows if len(row["turns"]) > 2]
    rows[0] = {**rows[0], "turns": ["<tool_call>zoom(1, 2)</tool_call>", rows[0]["turns"][-1]]}
    [batch], left_out, cut, refused = sft.render_batches(policy.proc, rows, cfg)
    assert 0 < left_out == len(long) < len(rows)
    assert len(rows) == (batch["mask"].sum(1) > 0).sum() + len(long) and refused == 1 and cut == 0


def test_copies_in_bf16_are_kept_in_rollouts_alone(policy):
    """In an update autocast's copies of all weights would take a quarter of what the weights do."""
    assert not policy.autocast()._cache_enabled
    with torch.no_grad():
        assert policy.autocast()._cache_enabled


def test_a_turn_that_no_rollout_could_sample_is_not_trained(policy, rows):
    first, *_ = rows[0]["turns"]
    most = len(policy.proc.encode_data(first, keep=env.TAGS)) + 1
    for turn_tokens, trained in ((most, True), (most - 1, False)):
        cfg = sft.Config(turn_tokens=turn_tokens)
        [batch], _, cut, _ = sft.render_batches(policy.proc, [{**rows[0], "turns": [first]}], cfg)
        assert (batch["mask"].sum() > 0) == trained and cut == (not trained)


def test_wiring_of_imitation(scenes, tmp_path, monkeypatch):
    """The numbers of the flags reach optimizers, schedule and clipping."""
    seen, clip = [], torch.nn.utils.clip_grad_norm_
    make = sft.make_optimizers

    def made(*args):
        seen.extend(make(*args))
        return seen[:2]
    monkeypatch.setattr(sft, "make_optimizers", made)
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda p, most: seen.append(most) or clip(p, most))
    sft.main(sft.Config(data=scenes, out=str(tmp_path), steps=2, warmup=4, batch=4, lr=0.02, weight_decay=0.07,
                        clip_norm=0.3, muon_lr=0.05, decay=0.0))
    adamw, muon = [optimizer.param_groups[0] for optimizer in seen[:2]]
    assert (adamw["betas"], adamw["weight_decay"]) == ((0.9, 0.98), 0.07)
    assert (adamw["lr"], muon["lr"]) == (0.01, 0.025)
    assert seen[2:] == [0.3, 0.3] and [entry["lr"] for entry in sft.read_log(tmp_path)] == [0.005, 0.01]


def test_presets():
    """The numbers that imitation runs with, without a model and with one."""
    names = "steps batch micro_batch lr lora_lr muon_lr warmup decay weight_decay clip_norm save_every save_minutes"
    numbers = [[450, 24, 12, 4e-3, 2.5e-3, 0.03, 50, 0.3, 0.01, 1.0, 150, 0.0],
               [1000, 32, 1, 1e-5, 1e-4, 0.0, 50, 0.3, 0.01, 1.0, 200, 30.0]]
    for argv, expected in (([], numbers[0]), (["--model=some/name"], numbers[1])):
        cfg = env.configure(sft.Config, sft.REAL, argv)
        assert [getattr(cfg, name) for name in names.split()] == expected
        assert cfg.shard == cfg.recompute == bool(argv) != cfg.train_vision


def test_muon_is_torchs_in_fp32():
    generator = torch.Generator().manual_seed(0)
    for shape in ((48, 20), (20, 48), (32, 32)):
        ours, theirs = (torch.nn.Parameter(torch.zeros(shape)) for _ in range(2))
        optimizers = (sft.Muon([ours], dict(lr=0.03)), torch.optim.Muon([theirs], 0.03, weight_decay=0.0, momentum=0.95))
        for _ in range(3):
            ours.grad = theirs.grad = torch.randn(shape, generator=generator)
            for optimizer in optimizers:
                optimizer.step()
            assert (ours - theirs).norm() < 0.02 * theirs.norm()        # bf16


def test_muon_has_the_matrices(policy25):
    """All that are no embeddings; AdamW has the rest."""
    adamw, muon = sft.make_optimizers(policy25, sft.Config(), (0.9, 0.98), 0.03)
    for optimizer, matrices in ((adamw, False), (muon, True)):
        chosen = {id(weight) for weight in optimizer.param_groups[0]["params"]}
        for name, weight in policy25.named_parameters():
            is_matrix = weight.ndim == 2 and "embed" not in name
            assert (id(weight) in chosen) == (is_matrix == matrices), name


def switch_off(policy):
    """A reference: the policy without its adapters."""
    for module in policy.modules():
        if hasattr(module, "lora_A"):
            module.lora_scale = 0.0


@pytest.mark.parametrize("any_policy", ["qwen2_5_vl", "qwen3_5"], indirect=True)
def test_lora_of_bf16_weights(family, trajs, tmp_path, monkeypatch):
    """Updates below half a step of bf16: what is read back is the live policy to the bit, and trained on. Rounded to
    bf16 with the weights they would be lost."""
    monkeypatch.setitem(sft.DTYPE, "cpu", torch.bfloat16)
    start = str(tmp_path / "start")
    sft.save_model(start, family, family.vlm.state_dict(), CFG, "real")
    cfg = rppo.Config(lora=4, lora_alpha=4.0, out=str(tmp_path / "run"))
    live, optimizers, _ = sft.load_trainable(cfg, start, 0, "cpu", (0.9, 0.95))
    for name, p in live.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=1e-3)
    sft.save_checkpoint(1, live, optimizers, cfg, "real")
    out = env.newest(cfg.out)
    rounded = sft.load_policy(out, "cpu", train=True).bfloat16()
    again, _, _ = sft.load_trainable(cfg, out, 0, "cpu", (0.9, 0.95))
    policies = live, sft.load_policy(out, "cpu"), again, rounded
    batch, found = sft.collate(trajs[:1], family.proc), []
    with torch.no_grad(), live.autocast():
        for policy in policies:
            found.append(policy(batch)[0])
        switch_off(live)
        base = live(batch)[0]
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
    assert (found[3] - found[0]).norm() > 0.3 * (found[0] - base).norm() > 0
    with pytest.raises(env.UserError, match="rank 4, multiplied by 1.0; give --lora and --lora_alpha"):
        sft.load_trainable(rppo.Config(lora=2), out, 0, "cpu", (0.9, 0.95))


def test_lora(family, trajs, tmp_path):
    """With B = 0 nothing changes. Gradients of A and B are those of weights summed explicitly. Only text blocks have
    adapters, only adapters are trained. What is saved is a plain model that computes the same, with them beside it."""
    cfg = rppo.Config(lora=3, lora_alpha=6.0, out=str(tmp_path))
    batch = sft.collate(trajs, family.proc)
    base = copy.deepcopy(family)
    sft.add_lora(family, 3, 2.0)
    with torch.no_grad():
        assert torch.equal(family(batch)[0], base(batch)[0])
    [optimizer] = sft.make_optimizers(family, cfg, (0.9, 0.98))
    trained = optimizer.param_groups[0]["params"]
    vector = torch.nn.utils.parameters_to_vector
    summed = {}
    for name, module in base.named_modules():
        if isinstance(module, torch.nn.Linear) and "language_model.layers" in name:
            A, B = family.get_parameter(f"{name}.lora_A"), family.get_parameter(f"{name}.lora_B")
            torch.nn.init.normal_(B, std=0.02)
            summed[f"{name}.weight"] = module.weight + 2.0 * B @ A
    logp = family(batch)[0]
    logp.sum().backward()
    expected = torch.func.functional_call(base, summed, (batch,))[0]
    wanted = vector(torch.autograd.grad(expected.sum(), trained))
    assert (vector([p.grad for p in trained]) - wanted).norm() < 5e-5 * wanted.norm()
    linear_maps = {"qwen3_vl": 3 * 7, "qwen2_5_vl": 3 * 7, "qwen3_5": 2 * 7 + 2 * 8}
    assert len(trained) == 2 * len(summed) == 2 * linear_maps[base.vlm.config.model_type]
    sft.save_checkpoint(1, family, [optimizer], cfg, "real")
    out = env.newest(cfg.out)
    for train in (False, True):
        with torch.no_grad():
            close(sft.load_policy(out, "cpu", train=train)(batch)[0], logp, atol=1e-5, rtol=1e-5)
    switch_off(family)
    close(family(batch)[0], base(batch)[0], atol=0, rtol=0)
    for file in ("model", "training/adapters", "training/optimizer"):
        for name in load_file(f"{out}/{file}.safetensors"):
            assert ("lora_" in name) == ("training" in file)


def test_fingerprint(policy):
    """It is that of the weights, in whatever type they are read; another value, shape or name is another one."""
    weights = policy.vlm.state_dict()
    name, first = next(iter(weights.items()))
    others = [{**weights, name: first + 0.01}, {**weights, name: first[:, :-1]}, {**weights, "new": weights[name]}]
    half = {name: value.bfloat16() for name, value in weights.items()}
    assert policy.fingerprint == sft.fingerprint(weights) == sft.fingerprint(half)
    assert len({policy.fingerprint, *map(sft.fingerprint, others)}) == 4


def save(policy, out, step=1):
    cfg = rppo.Config(out=out, judge_url="https://judge", judge_name="j", image_root="https://images")
    optimizers = sft.make_optimizers(policy, cfg, (0.9, 0.98))
    sft.save_checkpoint(step, policy, optimizers, cfg, "real")
    return env.newest(out)


def test_hub_folders_and_ours(family, trajs, tmp_path):
    """A folder of the hub (shards, an old preprocessor file) loads, and what we save of it is one again:
    transformers alone loads it, and every weight file in it, which servers take, belongs to the model."""
    hub = str(tmp_path / "hub")
    family.vlm.generation_config.eos_token_id = [family.proc.end, 0]
    family.vlm.save_pretrained(hub, max_shard_size="300KB")
    family.proc.tokenizer.save_pretrained(hub)
    old = dict(min_pixels=3136, max_pixels=12845056, image_processor_type="Qwen2VLImageProcessor")
    Path(hub, "preprocessor_config.json").write_text(json.dumps(old))
    loaded = sft.load_policy(hub, "cpu", train=True).eval()
    assert loaded.proc.ends == {family.proc.end, 0}
    out = save(loaded, str(tmp_path / "run"))
    [weights] = Path(out).glob("*.safetensors")
    index = json.loads(Path(hub, "model.safetensors.index.json").read_text())
    assert load_file(weights).keys() == index["weight_map"].keys()
    copies = {name: value.clone() for name, value in loaded.vlm.state_dict().items()}    # as ranks give them
    sft.save_model(f"{out}.copies", loaded, copies, CFG, "real")
    assert load_file(f"{out}.copies/model.safetensors").keys() == index["weight_map"].keys()
    for folder, longest in ((out, 49 * 49), (f"{out}.copies", 150 * 150)):      # of crops, of originals
        images = json.loads(Path(folder, "preprocessor_config.json").read_text())
        assert images["size"] == dict(shortest_edge=32 * 32, longest_edge=longest)
    files = [path for path in Path(out).rglob("*") if path.is_file()]
    assert {path.stat().st_mode & 0o777 for path in files} == {0o644}
    is_new = family.vlm.config.model_type != "qwen2_5_vl"                 # their servers ask for that file
    assert Path(out, "video_preprocessor_config.json").exists() == is_new
    theirs = AutoModelForImageTextToText.from_pretrained(out, dtype=torch.float32).eval()
    batch = sft.collate(trajs, family.proc)
    with torch.no_grad():
        assert torch.equal(family(batch)[0], loaded(batch)[0])
        expected = plain(stock(family), family, trajs[0])
        assert torch.equal(plain(theirs, family, trajs[0]), expected)
    assert AutoTokenizer.from_pretrained(out).chat_template == env.CHAT_TEMPLATE
    episode = json.loads(Path(out, "episode.json").read_text())
    assert set(episode) == {"preset", *(f.name for f in fields(env.EpisodeConfig))}
    for path in Path(out).glob("*.json"):
        assert "tokenizer" in path.name or "https://" not in path.read_text()


def test_damaged_checkpoints(policy, tmp_path):
    """Weights or training state that end early: one line says how to go back to an older checkpoint."""
    run = str(tmp_path)
    save(policy, run, 1)
    last = save(policy, run, 2)
    cfg = sft.Config(out=run)
    for file, load in (("training/optimizer", lambda: sft.load_trainable(cfg, last, 2, "cpu", (0.9, 0.98))),
                       ("model", lambda: sft.load_policy(run, "cpu"))):
        load()                                   # nothing is wrong with it yet
        os.truncate(f"{last}/{file}.safetensors", 40)
        said = refusal(load)
        assert said.startswith(f"{last!r} does not load")
        assert said.endswith(f"write another step into {run}/last: [1]")


def test_other_models_are_refused(scenes, tmp_path):
    """A tensor is missing (it would be random numbers); only pickle reads the weights; another family."""
    folder = tmp_path / "tiny"
    shutil.copytree(f"{scenes}/tiny", folder)
    weights = load_file(folder / "model.safetensors")
    torch.save(weights, folder / "pytorch_model.bin")
    weights.pop("model.language_model.layers.1.mlp.up_proj.weight")
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    for _ in range(2):
        refused("does not load", sft.load_policy, str(folder), "cpu")
        (folder / "model.safetensors").unlink(missing_ok=True)
    for family in ("llama", "qwen3_5_moe"):
        (folder / "config.json").write_text(json.dumps({"model_type": family}))
        refused(f"a {family} model; --model takes Qwen3-VL", sft.load_policy, str(folder), "cpu")


def edit(path, part="", **values):
    """Set keys of a JSON file, or of a part of it."""
    content = json.loads(Path(path).read_text())
    (content[part] if part else content).update(values)
    Path(path).write_text(json.dumps(content))


REFUSED = [("", dict(quantization_config={"quant_method": "fp8"}), "quantized"),
           ("", dict(sliding_window=8, use_sliding_window=True), "sliding"),
           ("text_config", dict(layer_types=["sliding_attention"] * 3), "sliding"),
           ("text_config", dict(rope_parameters={"rope_type": "dynamic", "factor": 2.0}), "dynamic rope"),
           ("text_config", dict(rope_scaling={"type": "longrope"}), "dynamic rope"),
           ("text_config", dict(num_hidden_layers=10 ** 9), "200 layers"),
           ("vision_config", dict(depth=2 ** 70), "200 layers")]


def test_configs_choose_no_code(family, trajs, tmp_path):
    """Attention, fused kernels, dropouts and sampling of a checkpoint's files are not ours; what would be computed
    in two ways, or hangs a load, is refused. A server samples what is saved again as it is."""
    run = str(tmp_path / "run")
    eager = dict(_attn_implementation="eager", attn_implementation="eager", attention_dropout=0.5)
    family.vlm.save_pretrained(run)
    family.proc.tokenizer.save_pretrained(run)
    for part in ("", "text_config", "vision_config"):
        edit(f"{run}/config.json", part, **eager, fusion_config={"patch_embeddings": True})
    sampling = dict(temperature=0.1, top_k=1, top_p=0.001, repetition_penalty=1.05, do_sample=False)
    edit(f"{run}/generation_config.json", **sampling)
    loaded = sft.load_policy(run, "cpu", train=True).train()
    batch = sft.collate(trajs, family.proc)
    with torch.no_grad():
        assert torch.equal(loaded(batch)[0], family.eval()(batch)[0])
    config = loaded.vlm.config
    for part in (config, config.text_config, config.vision_config):
        assert part._attn_implementation == "sdpa"
    out = save(loaded, str(tmp_path / "again"))
    saved = json.loads(Path(out, "generation_config.json").read_text())
    assert not sampling.keys() & saved.keys() and saved["eos_token_id"] == sorted(loaded.proc.ends)
    assert saved["pad_token_id"] == loaded.proc.tokenizer.pad_token_id
    for part, values, words in REFUSED:
        shutil.copy(f"{out}/config.json", f"{run}/config.json")
        edit(f"{run}/config.json", part, **values)
        assert words in refusal(sft.load_policy, run, "cpu")


def test_hostile_episode_files(tmp_path):
    """What no flag could say, and what is no JSON object, is refused in one line. No address is read."""
    path = tmp_path / "episode.json"
    for value in (None, "9", -1, 0.5, True):
        path.write_text(json.dumps({"max_crops": value}))
        refused("episode.json: max_crops", env.load_episode, tmp_path)
    for text in (b"", b"3", b"{", b"\xff", b"[" * 100_000, b'{"max_crops": ' + b"9" * 9999 + b"}"):
        path.write_bytes(text)
        refused("episode.json: not a JSON object", env.load_episode, tmp_path)
    path.write_text('{"preset": ["tiny"], "max_crops": 3, "judge_url": "https://evil", "seed": 7}')
    cfg = env.configure(rppo.Config, rppo.REAL, [f"--model={tmp_path}"])
    assert (cfg.max_crops, cfg.judge_url) == (3, "")
