"""The stages end to end: chained, by their command lines, and what exists is reused, refused or named.

    python -m pytest tests/test_stages.py

In this process, with a random policy that is rewarded by chance. See also test_resume.py and test_ranks.py.
"""
import contextlib
import fcntl
import inspect
import io
import itertools
import json
import os
import re
import shutil
import sys
from dataclasses import asdict, fields, replace
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import ROOT, by_chance, refused

import data
import env
import eval as evaluation
import rppo
import sft

FILES = ("env", "data", "sft", "eval", "rppo")
STAGES = {"sft": sft, "data": data, "eval": evaluation, "rppo": rppo}
DEFAULTS = {"sft": sft.REAL, "data": {}, "eval": evaluation.REAL, "rppo": rppo.REAL}
SHORT = dict(max_crops=1, turn_tokens=4)
EPISODE = dict(max_crops=1, turn_tokens=47)      # the demonstrations' turns are shorter
SFT = dict(EPISODE, steps=2, batch=4, micro_batch=3, warmup=1, save_every=1, log_every=1)
RPPO = dict(SHORT, steps=2, prompts=2, samples=4, micro_batch=3, warmup=1, lr=1e-3, save_every=1,
            show_every=1, eval_every=2, eval_rows=2, n_score=3)
SCENES = dict(n_sft=4, n_train=7, n_test=4)


def configure(name, *argv):
    return env.configure(STAGES[name].Config, DEFAULTS[name], list(argv))


@pytest.fixture(scope="module")
def chain(tmp_path_factory):
    """data -> sft -> rppo, with its scores, by command lines: configs, what was printed, and the folder."""
    top = tmp_path_factory.mktemp("chain")
    rows, runs = f"{top}/rows", f"{top}/runs"
    stages = {"top": top}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(env, "rewards", by_chance)
        for name, values in (
                ("data", dict(out=rows, **SCENES)),
                ("sft", dict(SFT, data=rows, out=f"{runs}/sft")),
                ("rppo", dict(RPPO, data=rows, model=f"{runs}/sft", out=f"{runs}/rppo"))):
            cfg = configure(name, *[f"--{flag}={value}" for flag, value in values.items()])
            with contextlib.redirect_stdout(io.StringIO()) as printed:
                STAGES[name].main(cfg)
            stages[name] = cfg, printed.getvalue()
    return stages


def test_folders(chain):
    """Every promised file is there, nothing half-written is; the page shows both runs and their answers."""
    promised = "rows/sft.jsonl rows/train.jsonl rows/test.jsonl rows/test/0.png rows/tiny/model.safetensors "
    promised += "runs/summary.json runs/report.html "
    for run in ("runs/sft", "runs/rppo"):
        for file in ("model.safetensors", "tokenizer.json", "episode.json", "training/optimizer.safetensors"):
            promised += f"{run}/checkpoints/2/{file} "
    assert not [path for path in promised.split() if not (chain["top"] / path).is_file()]
    assert not [*chain["top"].rglob("*.tmp"), *chain["top"].rglob("unfinished")]
    page = (chain["top"] / "runs/report.html").read_text()
    assert page.count("<figure>") > 4 and "<article>" in page and "<script" not in page
    assert "runs/sft" in page and f"runs/eval/rppo after {chain['top']}/runs/eval/sft" in page
    for name in ("data", "sft", "rppo"):
        cfg = chain[name][0]
        assert asdict(cfg).items() <= json.loads(Path(cfg.out, "config.json").read_text()).items()


def test_logs_and_scores(chain):
    """One line a step, in the log with the documented fields and printed. The numbers make sense."""
    for name in ("sft", "rppo"):
        assert re.findall(r"(?m)^step +(\d+) ", chain[name][1]) == ["0", "1"]
    assert re.search(r" reward +acc .*\nstep +0 ", chain["rppo"][1])
    for entry in sft.read_log(chain["sft"][0].out):
        assert {"step", "skipped", "lr", "seconds"} <= entry.keys()
        assert 0 < entry["loss"] < 10 and entry["tokens"] > 0 and entry["grad_norm"] > 0
    log = sft.read_log(chain["rppo"][0].out)
    for entry in log:
        named = "flat_groups clip_share log_ratio entropy grad_norm skipped lr rollout_s update_s"
        assert {*evaluation.METRICS, *named.split()} <= entry.keys()
        assert entry["reward"] == entry["parts"]["total"]
        assert entry["tokens"] > 0 and 0 < entry["entropy"] < 10 and entry["grad_norm"] > 0
        assert entry["clip_share"] == entry["flat_groups"] == 0 and entry["log_ratio"] < 1e-4
    best = json.loads(Path(chain["rppo"][0].out, "best.json").read_text())
    assert best == {"step": 2, "accuracy": log[1]["held_out"]["accuracy"]}
    runs = chain["top"] / "runs"
    summary = json.loads((runs / "summary.json").read_text())
    assert summary["rppo"] == json.loads((runs / "eval/rppo/eval.json").read_text())
    assert summary["sft"]["n"] == summary["rppo"]["n"] == 3
    assert {"command", "commit", "threads", "seconds"} <= summary["rppo"]["config"].keys()


@pytest.fixture
def small(monkeypatch):
    """The defaults with which the main job makes rows and cold start, made small."""
    monkeypatch.setattr(data, "Config", partial(data.Config, **SCENES))
    monkeypatch.setattr(sft, "Config", partial(sft.Config, **dict(SFT, steps=1)))
    return monkeypatch


def made(folder):
    """When each file of weights or rows was made, and the logs."""
    found = {}
    for path in folder.rglob("*"):
        if path.suffix in (".safetensors", ".jsonl") and "results-" not in path.name:
            found[path] = path.stat().st_mtime_ns if path.suffix == ".safetensors" else path.read_text()
    return found


def test_main_job(small, tmp_path, capsys):
    """Without a model it makes scenes and cold start, hands on its seed, scores both; then nothing anew."""
    cfg = rppo.Config(**RPPO, seed=3, data=f"{tmp_path}/rows", out=f"{tmp_path}/runs/rppo")
    rppo.main(cfg)
    assert set(os.listdir(tmp_path / "runs")) == {"sft", "rppo", "eval", "summary.json", "report.html"}
    assert "<td>Accuracy</td><td>3</td>" in (tmp_path / "runs/report.html").read_text()
    assert "cold_start" in sft.read_log(tmp_path / "runs/rppo")[0]
    for folder in ("rows", "runs/sft", "runs/rppo"):
        assert json.loads((tmp_path / folder / "config.json").read_text())["seed"] == 3
    for entry in sft.read_log(tmp_path / "runs/sft"):
        assert entry["left_out"] == 0              # the demonstrations were planned with the run's max_crops
    before = made(tmp_path)
    rppo.main(cfg)
    assert made(tmp_path) == before
    with pytest.raises(env.UserError, match="runs/sft was made .*seed: 3 -> 1.*--out=.*/runs/s1/rppo"):
        rppo.main(replace(cfg, seed=1, data=f"{tmp_path}/others", out=f"{tmp_path}/runs/s1"))
    assert not (tmp_path / "others").exists()      # refused before anything is drawn
    other = replace(cfg, lam=0.0, out=f"{tmp_path}/runs/grpo")
    refused("eval/rppo has the scores of .*/runs/rppo/checkpoints/2; .*give .*/runs/grpo/rppo", rppo.main, other)
    printed = capsys.readouterr().out
    lines = re.findall(r"(?m)^(?:step|cold|held|RPPO| {10}).*", printed)
    assert max(map(len, lines)) <= 100
    assert re.findall(r"(?m)^(\d) of 4: ", printed) == list("12341234")


def test_main_job_on_foreign_rows(small, scenes, tmp_path):
    """A folder of somebody's rows with their own sft.jsonl takes no scenes. The same command goes on. The model is
    the other tiny one."""
    for split, n in (("sft", 20), ("train", 6), ("test", 3)):
        rows = data.load_rows(f"{scenes}/{split}.jsonl")
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:n]))
    small.setattr(data, "write_scenes", lambda cfg: pytest.fail("scenes were drawn"))
    cfg = rppo.Config(**dict(RPPO, steps=1), tiny="tiny3_5", data=str(tmp_path), out=f"{tmp_path}/runs/rppo")
    rppo.main(cfg)
    rppo.main(replace(cfg, n_score=0))
    saved = json.loads(Path(env.newest(cfg.out), "config.json").read_text())
    assert saved["model_type"] == "qwen3_5"
    assert json.loads((tmp_path / "runs/summary.json").read_text())["rppo"]["n"] == 3


def refusal(capsys, name, *argv):
    """The line with which a stage refuses its flags."""
    with pytest.raises(SystemExit) as error:
        configure(name, *argv)
    lines = str(error.value).splitlines()
    if error.value.code == 2:            # argparse's: after a line with the usage
        lines = capsys.readouterr().err.splitlines()[1:]
    assert len(lines) == 1
    return lines[0]


def test_bad_flags(capsys):
    """What is no flag of the stage, shortened ones among it, and values of another type are named."""
    for argv in ("--nonsense=1", "seed=1", "--Seed=1", "--see=1", "--seed", "-s 1", "seed"):
        assert re.match(r"[\w-]+", argv)[0] in refusal(capsys, "rppo", *argv.split())
    bad = {int: ("x", "", "1.5"), float: ("x", "nan", "inf"), bool: ("x", "yes", "1")}
    one_of_each = {f.type: f.name for f in fields(rppo.Config)}
    for kind, field in one_of_each.items():
        for value in bad.get(kind, ()):
            assert field in refusal(capsys, "rppo", f"--{field}={value}")


def test_ranges(capsys):
    """What could only fail later is refused at once; budgets are compared with each other."""
    assert "samples is 1; it has to be finite and at least 2" in refusal(capsys, "rppo", "--samples=1")
    for flag in ("temperature=0", "seed=-1", f"seed={2 ** 63}", "lam=-3", "samples=0", "save_every=0"):
        assert re.match(r"flags: (\w+) is .* at least", refusal(capsys, "rppo", f"--{flag}"))[1] in flag
    assert "--min_crop_pixels" in refusal(capsys, "sft", "--max_crop_pixels=500")


@pytest.mark.parametrize("name", STAGES)
def test_help(name, monkeypatch):
    """--help is the file's docstring and every field: with default, preset and comment."""
    monkeypatch.setenv("COLUMNS", "1000")
    stage = STAGES[name]
    text = env.make_parser(stage.Config, DEFAULTS[name]).format_help()
    assert stage.__doc__.strip() in text
    for f in fields(stage.Config):
        default = re.escape(f"(default: {f.default})")
        shown = re.search(rf"(?m)^  --{f.name} [A-Z_]+\s.*{default}(.*)$", text)
        preset = DEFAULTS[name].get(f.name, f.default)
        assert shown[1] == ("" if preset == f.default else f" [{preset}]")
    for field, comment in re.findall(r"(?m)^    (\w+): [^#\n]*# (.*)$", inspect.getsource(stage.Config)):
        assert re.search(rf"(?m)^  --{field} [A-Z_]+\s+{re.escape(comment)} ", text)


def test_values_and_presets(chain):
    """No model: tiny. Ours: what it was trained with, the rest tiny. Another one: real. Flags win."""
    assert configure("sft", "--train_vision", "false").train_vision is False
    assert all(configure("sft", f"--shard={text}").shard is True for text in ("True", "true", "TRUE"))
    assert configure("data", f"--seed={2 ** 63 - 1}").seed == 2 ** 63 - 1
    run = chain["sft"][0].out
    for name in ("sft", "rppo", "eval"):
        plain = {**asdict(STAGES[name].Config()), "data": "data/scenes-0"}
        assert asdict(configure(name)) == plain
        ours = configure(name, f"--model={run}")
        assert asdict(ours) == {**plain, **EPISODE, "model": env.newest(run)}
        real = configure(name, "--model=some/name")
        assert asdict(real) == {**plain, **DEFAULTS[name], "model": "some/name"}
        assert configure(name, f"--model={run}", "--turn_tokens=9").turn_tokens == 9
    assert configure("rppo", "--seed=7", "--out=a/{seed}/b-{seed}").out == "a/7/b-7"
    assert configure("sft", "--seed=7").data == configure("data", "--seed=7").out == "data/scenes-7"


@pytest.fixture
def copied(chain, tmp_path):
    """The config of a copy of the finished cold start."""
    cfg = chain["sft"][0]
    shutil.copytree(cfg.out, tmp_path / "run")
    return replace(cfg, out=str(tmp_path / "run"))


def test_a_run_is_reused_or_refused(copied, monkeypatch):
    """The same settings: no step. Others: one line with old and new. A key that is missing is its default."""
    monkeypatch.setattr(sft, "append_log", lambda *_: pytest.fail("a finished run made a step"))
    config = Path(copied.out, "config.json")
    before = made(Path(copied.out))
    sft.main(copied)
    settings = json.loads(config.read_text())
    for name in ("muon_lr", "shard"):              # as if they were new
        del settings[name]
    config.write_text(json.dumps(settings))
    sft.main(copied)
    for name, value, words in (("lr", 0.1, "lr: 0.004 -> 0.1"), ("shard", True, "shard: False -> True")):
        refused(words, sft.main, replace(copied, **{name: value}))
    sft.main(replace(copied, keep=9, log_every=7))           # these do not change results
    assert made(Path(copied.out)) == before


def test_a_run_goes_on_longer_but_not_elsewhere(copied, monkeypatch, capsys):
    """More steps prolong a finished run, fewer are refused; so are other rows than those it has learned from."""
    sft.main(replace(copied, steps=3))
    printed = capsys.readouterr().out
    assert "going on from step 2 of 3" in printed and "planned for 2 steps; the rate is now that of 3" in printed
    assert [entry["step"] for entry in sft.read_log(copied.out)] == [0, 1, 2]
    refused("has made 3 steps, more than 2; raise --steps", sft.main, copied)
    rows = data.load_rows(f"{copied.data}/sft.jsonl")
    moved = [{**row, "images": ["/elsewhere/" + os.path.basename(row["images"][0])]} for row in rows]
    assert sft.checksum(moved) == sft.checksum(rows) != sft.checksum([{**rows[0], "solution": "x"}, *rows[1:]])
    monkeypatch.setattr(data, "load_rows", lambda *_: rows[1:])
    refused("has learned from other rows than those of .*rows now", sft.main, replace(copied, steps=3))


def test_lora_stays_on_its_base(chain, tmp_path, capsys):
    """Adapters go on with the weights that they were trained on, no others. What is off is said in a line."""
    base = tmp_path / "rows"
    shutil.copytree(chain["sft"][0].data, base)
    cfg = replace(chain["sft"][0], data=str(base), out=str(tmp_path / "run"), lora=2, shard=True)
    sft.main(cfg)
    printed = capsys.readouterr().out
    assert "--muon_lr: AdamW trains all" in printed and "--shard is off without torchrun" in printed
    sft.main(cfg)
    again = replace(cfg, model=cfg.out, out=str(tmp_path / "again"), shard=False)       # also of adapters that go on
    policy = sft.load_trainable(again, cfg.out, 0, torch.device("cpu"), (0.9, 0.95))[0]
    assert again.train_vision and all("lora_" in name for name, p in policy.named_parameters() if p.requires_grad)
    shutil.rmtree(base / "tiny")
    sft.save_tiny(str(base), 9)
    refused("tiny: not the weights that .* was trained on; give another --out", sft.main, cfg)


def test_whatever_ends_a_run_saves_first(chain, tmp_path, monkeypatch):
    """A row that cannot be rendered in step 2 ends it with the steps 0 and 1 saved. Minutes save, too."""
    cfg = replace(chain["sft"][0], out=str(tmp_path / "run"), steps=4, save_every=9, keep=9)
    render, calls = env.render, itertools.count()

    def breaks(*args):
        if next(calls) == 2 * cfg.batch:
            raise env.UserError("x.png: not a readable image")
        return render(*args)
    monkeypatch.setattr(env, "render", breaks)
    saves, save = [], sft.save_checkpoint
    monkeypatch.setattr(sft, "save_checkpoint", lambda step, *args: saves.append(step) or save(step, *args))
    refused("x.png", sft.main, cfg)
    assert sft.checkpoint_steps(cfg.out) == saves == [2] and len(sft.read_log(cfg.out)) == 2
    calls = itertools.count()
    refused("x.png", sft.main, replace(cfg, out=str(tmp_path / "saved"), save_every=2))
    assert saves == [2, 2]                       # not again what has just been saved
    before = sft.read_log(cfg.out)[-1]["seconds"]
    sft.main(replace(cfg, save_minutes=1e-9))
    assert sft.checkpoint_steps(cfg.out) == [2, 3, 4]
    assert sft.read_log(cfg.out)[2]["seconds"] > before              # of all processes


@pytest.mark.parametrize("done, minutes, signals, age, expected", [
    (6, 0, (0, 0), 1e9, (False, True)), (7, 0, (0, 0), 1e9, (False, False)), (10, 0, (0, 0), 0, (False, True)),
    (7, 2, (0, 0), 119, (False, False)), (7, 2, (0, 0), 121, (False, True)), (7, 0, (0, 1), 0, (True, True))])
def test_when_a_run_is_saved(done, minutes, signals, age, expected, monkeypatch):
    """Every 3 steps, at the end, after so many minutes by rank 0's clock, at a signal to any rank."""
    monkeypatch.setattr(sft, "gather_objects", lambda mine: [(signals[0], age), (signals[1], 0)])
    assert sft.due(done, [], 0.0, sft.Config(steps=10, save_every=3, save_minutes=minutes)) == expected


def test_the_time_that_is_left():
    cfg = sft.Config(steps=10)
    for step, seconds, text in ((3, 80.0, "eta   2:00"), (3, 79.8, "eta   2:00"), (9, 5.0, "eta   0:00")):
        assert sft.eta(dict(step=step, seconds=seconds), cfg) == text


def test_a_folder_in_use(copied, monkeypatch):
    """Who comes second is told in one line who has the folder, and changes nothing in it."""
    monkeypatch.setattr(env, "locks", {})
    before = made(Path(copied.out))
    with open(f"{copied.out}/lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        print("process 7 on elsewhere", file=lock, flush=True)
        for _ in range(2):
            refused("run is in use by process 7 on elsewhere; .*--out", sft.main, copied)
    assert made(Path(copied.out)) == before
    cfg = rppo.Config(out=copied.out)
    os.makedirs(f"{Path(copied.out).parent}/eval/rppo")
    with open(f"{Path(copied.out).parent}/eval/rppo/lock", "w") as lock:       # another run will put scores there
        fcntl.flock(lock, fcntl.LOCK_EX)
        print("process 8", file=lock, flush=True)
        refused("eval/rppo is in use by process 8; .*--out=.*/run/rppo", rppo.check_scores, cfg)


def test_missing_inputs(chain, tmp_path):
    """Every stage names what is missing and the flag that helps, before it writes anything."""
    scenes, model, out = chain["data"][0].out, chain["rppo"][0].model, f"{tmp_path}/out"
    for stage, values, words in (
            (sft, dict(tiny="tiny4"), "--tiny=tiny4.*tiny3_5"),
            (sft, dict(data="nowhere"), "nowhere/sft.jsonl.*data.py.*--data"),
            (rppo, dict(data=scenes, model=model, eval_rows=9, steps=0), "train.jsonl.*--eval_rows=9"),
            (sft, dict(data=scenes, model=str(tmp_path)), f"{tmp_path}: no model.* checkpoint yet; .*--model"),
            (sft, dict(data=scenes, max_crops=0), "--max_crops=0"),
            (rppo, dict(data=f"{tmp_path}/new", max_crops=0), "--max_crops=0"),
            (data, dict(task="huge"), "--task=huge.*tiny")):
        refused(words, stage.main, stage.Config(**values, out=out))
        shutil.rmtree(out, ignore_errors=True)
    assert not (tmp_path / "new").exists()       # no scenes, which a command with other settings would refuse

    (tmp_path / "sft.jsonl").write_text('{"problem": 5}')
    refused("sft.jsonl: row 0 has no `images`", sft.main, sft.Config(data=str(tmp_path), out=out))
    assert not (tmp_path / "tiny").exists()


def test_pruning_and_the_best(tmp_path, monkeypatch, capsys):
    """Kept are the newest and the best: the first with the highest accuracy among those that are there; and what is
    no checkpoint of the run. A folder that cannot be removed is named."""
    text = '{"step": 3}\n'
    for step, accuracy in ((0, 0.9), (1, 0.5), (2, 0.7), (4, 0.7), (5, 0.1)):
        text += json.dumps(dict(step=step, held_out=dict(accuracy=accuracy))) + "\n"
    (tmp_path / "log.jsonl").write_text(text + '{"step": 6, "held_out": {"accu')     # half a line of a kill
    for name in ("2", "3", "4", "5", "6", "10"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    best = rppo.mark_best(str(tmp_path))
    assert best == 3 and json.loads((tmp_path / "best.json").read_text()) == {"step": 3, "accuracy": 0.7}
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (tmp_path / "checkpoints/8").symlink_to(elsewhere)
    for name in ("notes", "unfinished"):
        (tmp_path / "checkpoints" / name).mkdir()
    rmtree = shutil.rmtree
    monkeypatch.setattr(shutil, "rmtree", lambda path: rmtree(path) if path[-2:] != "/2" else os.rmdir("/no/where"))
    sft.prune(sft.Config(out=str(tmp_path), keep=2), 6, best)
    left = set(os.listdir(tmp_path / "checkpoints"))
    assert left == {"2", "3", "5", "6", "8", "notes", "unfinished"}
    assert re.search("checkpoints/2 could not be removed .*No such file", capsys.readouterr().out)


def test_imports():
    """A chain: each file imports only those before it, and at its top nothing heavy beside torch. env goes
    before torch, since OpenMP reads how many threads there are to be when torch loads it."""
    light = {*sys.stdlib_module_names, "numpy", "PIL", "torch", "tqdm"}
    paths = [ROOT / f"{name}.py" for name in FILES]
    paths += [ROOT / f"tests/{name}.py" for name in ("conftest", "bench", "gpu", "probe", "study")]
    for i, path in enumerate(paths):
        text = path.read_text()
        imported = re.findall(r"(?m)^(?:import|from) (\w+)", text)
        if i < len(FILES):
            assert {*imported} <= {*light, *FILES[:i]}
        if "torch" in imported and path.stem != "env":
            assert imported.index("env") < imported.index("torch")
    text = paths[0].read_text()
    assert 0 < text.index('"OMP_NUM_THREADS", "1"') < text.index("\nimport torch")


def test_two_threads_add_in_one_order(policy, monkeypatch):
    """Features that many samples share get the same bits of gradient each time. The kill tests are too small to see
    two threads add in changing order."""
    sft.setup()
    torch.set_num_threads(2)
    features = torch.randn(40, 96, requires_grad=True)
    images = []
    for _ in range(40):
        image = env.Shown(None, (), 0, 0)
        image.view = torch.zeros(16, 16, 3)
        images += [image] * 1000
    monkeypatch.setattr(policy, "run_tower", lambda images: features)
    noise, found = torch.randn(40_000, 96), set()
    for _ in range(4):
        loss = (policy.see(images) * noise).sum()
        found.add(torch.autograd.grad(loss, features)[0].numpy().tobytes())
    torch.set_num_threads(1)
    assert len(found) == 1
