"""The stages end to end: chained mains, flags and presets, reuse and resuming, and two ranks against one process.

Run by torchrun this file is the worker of the last part: every rank trains and evaluates, and leaves a record.
"""
import ast
import contextlib
import io
import json
import os
import re
import subprocess
import sys
import zlib
from dataclasses import asdict, fields
from functools import partial

import pytest
import torch
from PIL import Image

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)  # torchrun knows no conftest
import data  # noqa: E402
import env  # noqa: E402
import eval as evaluation  # noqa: E402
import rppo  # noqa: E402
import sft  # noqa: E402
from conftest import amplify  # noqa: E402
from test_rppo import acting  # noqa: E402

STAGES = {"data": (data, {}), "sft": (sft, sft.REAL), "rppo": (rppo, rppo.REAL), "eval": (evaluation, evaluation.REAL)}
SHORT = dict(max_crops=2, turn_tokens=6)            # a trajectory of a random policy stays short
METRICS = ("accuracy", "crops_right", "crops_wrong", "redundancy_wrong", "repeat_rate", "invalid_call_rate", "unanswered_rate",
           "guess_rate", "evidence_coverage")       # as method and issue name them; eval.py and the log may hold more
TIMINGS = ("seconds", "rollout_s", "update_s")
SFT = dict(SHORT, steps=3, batch=4, micro_batch=3, warmup=1, save_every=1, log_every=1)
# A format weight, as chance seldom gives six samples of one prompt the same number of mistakes, but often no right answer.
RPPO = dict(SHORT, steps=3, prompts=2, samples=6, micro_batch=3, warmup=1, lr=1e-3, save_every=1, show_every=1, eval_every=2,
            eval_rows=4, n_score=0, format_weight=0.5)


@pytest.fixture(scope="module", autouse=True)
def cpu():
    """Bits are compared here, so a GPU is left alone; and the policies are random, so that gibberish counts as an action."""
    with pytest.MonkeyPatch.context() as m:
        m.setattr(torch.cuda, "is_available", lambda: False)
        m.setattr(env, "parse_action", acting)
        yield


def command(name, **flags):
    """A stage by its command line. Returns the config, what main returned and what it printed."""
    stage, real = STAGES[name]
    cfg = env.configure(stage.Config, real, [f"--{k}={v}" for k, v in flags.items()])
    with contextlib.redirect_stdout(io.StringIO()) as out:
        result = stage.main(cfg)
    return cfg, result, out.getvalue()


def read_log(out, timings=True):
    """The entries of a log; NaN and Infinity are not JSON."""
    with open(os.path.join(out, "log.jsonl")) as f:
        entries = [json.loads(x, parse_constant=lambda x: pytest.fail(f"{x} in {out}/log.jsonl")) for x in f]
    return [{k: v for k, v in e.items() if timings or k not in TIMINGS} for e in entries]


def weights(folder, name="model.safetensors"):
    from safetensors.torch import load_file
    return load_file(os.path.join(folder, name))


def flat(tensors):
    return torch.cat([tensors[k].flatten().double() for k in sorted(tensors)])


# ---------------------------------------------------------------------------------------------------------------
# 1. Two steps of every stage, one after the other.

@pytest.fixture(scope="module")
def chain(tmp_path_factory):
    """data -> sft -> rppo -> eval by their command lines: {stage: (config, result, printed)} and the folder."""
    top = tmp_path_factory.mktemp("chain")
    scenes, runs = f"{top}/data/scenes-0", f"{top}/runs"
    done = {"top": top, "data": command("data", out=scenes, n_sft=10, n_train=9, n_test=6)}
    done["sft"] = command("sft", **{**SFT, "steps": 2}, data=scenes, out=f"{runs}/sft")
    done["rppo"] = command("rppo", **{**RPPO, "steps": 2, "n_score": 4}, data=scenes, model=f"{runs}/sft", out=f"{runs}/rppo")
    done["eval"] = command("eval", data=scenes, model=f"{runs}/rppo", out=f"{runs}/eval/own", limit=5, k=2, seed=3)
    return done


def test_folders(chain):
    """Every file that the project promises is there, and nothing half-written is."""
    checkpoint = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "preprocessor_config.json",
                  "world.json", "optimizer.safetensors", "checksums.json")
    promised = [f"data/scenes-0/{x}" for x in ("sft.jsonl", "train.jsonl", "test.jsonl", "config.json", "test/0.png", "train/8.png")]
    for run in ("runs/sft", "runs/rppo"):
        promised += [f"{run}/{x}" for x in ("config.json", "log.jsonl", "last", *(f"checkpoints/2/{x}" for x in checkpoint))]
        assert (chain["top"] / run / "last").read_text() == "2"
    promised += ["runs/rppo/best.json", "runs/rppo/trajectory.png", "runs/summary.json"]
    promised += [f"runs/eval/{x}/{y}" for x in ("sft", "rppo", "own") for y in ("eval.json", "trajectory.png")]
    assert [x for x in promised if not (chain["top"] / x).is_file()] == []
    assert list(chain["top"].rglob("*.tmp")) == []
    for stage in ("data", "sft", "rppo"):
        assert json.loads(open(os.path.join(chain[stage][0].out, "config.json")).read()) == asdict(chain[stage][0])


def test_checkpoint(chain):
    """The last checkpoint holds the final weights bit for bit and loads into plain transformers; the run moved them."""
    from transformers import AutoModelForImageTextToText, AutoTokenizer
    cfg, policy, _ = chain["rppo"]
    folder = env.newest(cfg.out)
    vlm = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(vlm.state_dict().values(), policy.vlm.state_dict().values(), strict=True))
    assert len(AutoTokenizer.from_pretrained(folder)) == len(policy.proc.tok)
    assert (flat(weights(folder)) - flat(weights(cfg.model))).norm() > 0


def test_logs(chain):
    """log.jsonl has one line a step with every field that the issue names, and the numbers make sense."""
    log = read_log(chain["sft"][0].out)
    assert [e["step"] for e in log] == [0, 1]
    assert all({"loss", "tokens", "grad_norm", "lr", "seconds"} <= e.keys() for e in log)
    assert all(0 < e["loss"] < 10 and e["tokens"] > 0 and e["grad_norm"] > 0 for e in log)

    log, cfg = read_log(chain["rppo"][0].out), chain["rppo"][0]
    assert [e["step"] for e in log] == [0, 1]
    wanted = {"reward", "parts", *METRICS, "tokens", "entropy", "grad_norm", "clip_share", "log_ratio", "log_ratio_max", "lr",
              "norm_std", "flat_groups", "rollout_s", "update_s"}
    for e in log:
        assert wanted <= e.keys()
        assert set(e["parts"]) == {"accuracy", "redundancy", "tool", "format", "total"}
        assert e["reward"] == pytest.approx(e["parts"]["total"]) and e["accuracy"] == pytest.approx(e["parts"]["accuracy"])
        assert e["parts"]["total"] == pytest.approx(sum(v for k, v in e["parts"].items() if k != "total"))
        assert e["log_ratio"] <= e["log_ratio_max"] < 1e-4 and e["clip_share"] == 0
        assert 0 < e["tokens"] <= cfg.prompts * cfg.samples * (cfg.max_crops + 1) * cfg.turn_tokens
    assert any(0 < e["entropy"] < 10 and 0 < e["log_ratio"] and 0 < e["grad_norm"] and e["flat_groups"] < 1 for e in log)
    assert "held_out" not in log[0] and set(METRICS) <= log[1]["held_out"].keys()
    best = json.loads(open(os.path.join(cfg.out, "best.json")).read())
    assert best == {"step": 2, "accuracy": log[1]["held_out"]["accuracy"]}


def test_scores(chain):
    """eval.json has every metric, sampled and greedy, with n, seed and accuracy by candidates; summary.json has both of
    the main job's scores and the seconds of each part."""
    def check(scores, n, seed, k):
        assert set(METRICS) <= scores.keys() and set(METRICS) <= scores["greedy"].keys()
        assert (scores["n"], scores["seed"], scores["k"], scores["temperature"]) == (n, seed, k, 1.0)
        assert scores["accuracy_greedy"] == scores["greedy"]["accuracy"] and scores["seconds"] > 0
        by = scores["accuracy_by_candidates"]
        assert sum(x["n"] for x in by.values()) == n * k and all(int(c) >= 2 for c in by)
        assert sum(x["n"] * x["accuracy"] for x in by.values()) / (n * k) == pytest.approx(scores["accuracy"])

    cfg, result, printed = chain["eval"]
    scores = json.loads((chain["top"] / "runs/eval/own/eval.json").read_text())
    check(scores, 5, 3, 2)
    assert scores.pop("config") == asdict(cfg) and scores == json.loads(json.dumps(result))
    assert re.search(r"^sampled +[\d.]+ ", printed, re.M) and re.search(r"^greedy +[\d.]+ ", printed, re.M)

    summary = json.loads((chain["top"] / "runs/summary.json").read_text())
    assert set(summary) == {"sft", "rppo", "seconds"} and {"rppo", "eval_sft", "eval_rppo", "total"} <= summary["seconds"].keys()
    for name in ("sft", "rppo"):
        check(summary[name], 4, 0, 1)
        scores = json.loads((chain["top"] / f"runs/eval/{name}/eval.json").read_text())
        assert scores.pop("config")["turn_tokens"] == 6 and scores == summary[name]


def test_pictures(chain):
    """The pictures of a trajectory open, and show more than the scene: the crops and the text beside it."""
    for x in ("runs/rppo", "runs/eval/own"):
        with Image.open(chain["top"] / x / "trajectory.png") as im:
            im.load()
            assert im.format == "PNG" and im.width > 1000 and len(im.convert("RGB").getcolors(2 ** 24)) > 100


def ends(line):
    """Where the words of a line end."""
    return [m.end() for m in re.finditer(r"\S+", line)]


def test_printed_lines(chain):
    """One line a step: it starts with `step`, has an ETA, and its columns stand under their headings."""
    lines = [x for x in chain["sft"][2].splitlines() if x.startswith("step")]
    pattern = r"step +\d+ loss +\d+\.\d{4} norm +\d+\.\d{3} tokens +\d+ +\d+\.\ds eta +\d+:\d\d"
    assert len(lines) == 2 and all(re.fullmatch(pattern, x) for x in lines) and ends(lines[0]) == ends(lines[1])

    printed = chain["rppo"][2].splitlines()
    lines = [x for x in printed if x.startswith("step ")]
    heading = next(x for x in printed if x.split()[:1] == ["reward"])
    assert len(lines) == 2 and heading.split()[-1] == "eta"
    for x in lines:
        assert re.fullmatch(r"step +\d+ +-?\d+\.\d{3} .* +\d+:\d\d", x) and ends(x)[2:] == ends(heading)


def test_held_out_line(chain):
    """The line of a held-out evaluation stands under the same headings."""
    heading = next(x for x in chain["rppo"][2].splitlines() if x.split()[:1] == ["reward"])
    held_out = next(x for x in chain["rppo"][2].splitlines() if x.startswith("held-out"))
    assert ends(held_out)[1:] == ends(heading)[1:1 + len(evaluation.COLUMNS)]


def test_shown_trajectory(chain):
    """A printed trajectory tells what was sampled from what was given, piece by piece and in order."""
    policy = chain["rppo"][1]
    row = data.load_rows(f"{chain['top']}/data/scenes-0/sft.jsonl")[0]
    traj = env.render(policy.proc, row, row["turns"], env.World())
    lines = evaluation.show(traj, policy.proc).split("\n")
    kinds, texts = zip(*(re.fullmatch(r"  (sampled|given  ) \| (.*)", x).groups() for x in lines))
    sampled = "\n".join(ast.literal_eval(t) for k, t in zip(kinds, texts) if k == "sampled")
    assert sampled == "\n".join(text + "<|im_end|>" for text, _, _ in traj.turns)
    assert [k for i, k in enumerate(kinds) if i == 0 or k != kinds[i - 1]] == ["given  ", "sampled"] * len(traj.turns)
    shown = [int(n) for n in re.findall(r"\[(\d+) image tokens\]", "".join(texts))]
    assert shown == [h * w for h, w in map(policy.proc.grid, traj.views)] and len(shown) > 1
    assert sum("  sampled | " in x for x in chain["rppo"][2].splitlines()) >= 2     # and the run printed some


def test_main_job_from_nothing(tmp_path, monkeypatch, capsys):
    """With no model rppo.py makes scenes and cold start beside its own folder, hands on its seed, and scores both; a
    second call makes nothing anew."""
    monkeypatch.setattr(data, "Config", partial(data.Config, n_sft=10, n_train=9, n_test=4))    # what prepare() asks for,
    monkeypatch.setattr(sft, "Config", partial(sft.Config, **{**SFT, "steps": 2}))              # but small
    cfg = rppo.Config(**{**RPPO, "steps": 2, "n_score": 4}, seed=3, data=f"{tmp_path}/scenes", out=f"{tmp_path}/runs/rppo")
    rppo.main(cfg)
    assert "sft rows" in capsys.readouterr().out
    runs = tmp_path / "runs"
    assert {x.name for x in runs.iterdir()} == {"sft", "rppo", "eval", "summary.json"}
    assert {json.loads((x / "config.json").read_text())["seed"] for x in (tmp_path / "scenes", runs / "sft", runs / "rppo")} == {3}
    summary = json.loads((runs / "summary.json").read_text())
    assert set(summary["seconds"]) == {"data", "sft", "rppo", "eval_sft", "eval_rppo", "total"}
    assert 0 < summary["seconds"]["sft"] <= summary["seconds"]["total"]
    logs = read_log(runs / "sft"), read_log(runs / "rppo")
    weight = [(x, x.stat().st_mtime_ns) for x in runs.rglob("*.safetensors")]
    monkeypatch.setattr(sft, "append_log", lambda *_: pytest.fail("a finished run made a step"))
    rppo.main(cfg)
    assert (read_log(runs / "sft"), read_log(runs / "rppo")) == logs        # to the last digit of the timings
    assert [(x, x.stat().st_mtime_ns) for x in runs.rglob("*.safetensors")] == weight


# ---------------------------------------------------------------------------------------------------------------
# 2. Flags and presets.

def refusal(name, *argv):
    """The message with which a stage refuses its flags: one line."""
    stage, real = STAGES[name]
    with pytest.raises(env.UserError) as e:
        env.configure(stage.Config, real, list(argv))
    assert isinstance(e.value, SystemExit) and "\n" not in str(e.value)
    return str(e.value)


@pytest.mark.parametrize("name", STAGES)
@pytest.mark.parametrize("flag", ["--nonsense=1", "--seed", "seed=1", "-seed=1", "seed", "--=1", "--Seed=1", "--s=1", ""])
def test_unknown_flags(name, flag):
    """What is no --key=value of the stage is refused with one line that lists every key."""
    message = refusal(name, flag)
    assert message.startswith(f"{flag}:")
    assert re.search(r"the keys are (.*)$", message)[1].split(", ") == [f.name for f in fields(STAGES[name][0].Config)]


@pytest.mark.parametrize("name", STAGES)
def test_bad_values(name):
    """A value of the wrong type is refused with one line that names the flag, the key and the type; for every field."""
    bad = {"int": ["x", "", "1.5", "nan", "inf", "1e400", "true", "1,000"], "float": ["x", "", "1/2", "true"],
           "bool": ["x", "", "yes", "1", "0", "none"]}
    for f in fields(STAGES[name][0].Config):
        kind = f.type if isinstance(f.type, str) else f.type.__name__
        for value in bad.get(kind, []):
            message = refusal(name, "--seed=1", f"--{f.name}={value}")
            assert message.startswith(f"--{f.name}={value}:") and message.endswith(f"{f.name} takes a value of type {kind}")


@pytest.mark.parametrize("name", STAGES)
def test_good_values(name):
    """Every field can be set from the command line and keeps its type; an = in a value is part of it."""
    stage, real = STAGES[name]
    for f in fields(stage.Config):
        kind = f.type if isinstance(f.type, str) else f.type.__name__
        for text, value in {"int": [("7", 7), ("2e3", 2000)], "float": [("7", 7.0), ("1e-6", 1e-6), (".5", 0.5)],
                            "bool": [("true", True), ("False", False)], "str": [("a=b c", "a=b c")]}[kind]:
            got = getattr(env.configure(stage.Config, real, [f"--{f.name}={text}"]), f.name)
            assert got == value and type(got) is type(value)


def test_values_out_of_range():
    """A value that could only fail later is refused at once, with its bound."""
    for name, flag, bound in (("rppo", "--temperature=0", "greedily"), ("sft", "--seed=-1", "at least 0"), ("rppo", "--samples=0", "at least 1"),
                              ("sft", "--save_every=0", "at least 1")):
        assert bound in refusal(name, flag)
    with pytest.raises(env.UserError, match="the levels are 0, 1, 2, 3"):
        data.main(data.Config(level=4))


def test_rows_of_others_are_not_overwritten(tmp_path):
    """Scenes are never written over a folder of rows that this program did not make."""
    (tmp_path / "train.jsonl").write_text("{}")
    with pytest.raises(env.UserError, match="holds rows"):
        data.main(data.Config(out=str(tmp_path), n_sft=1, n_train=1, n_test=1))
    assert (tmp_path / "train.jsonl").read_text() == "{}"


@pytest.mark.parametrize("name", ["sft", "rppo", "eval"])
def test_presets(name, chain):
    """No model: the tiny defaults. A checkpoint or run of a tiny stage: the settings it was trained under, the rest tiny. A
    name without world.json: the real values. A flag of the command line wins over each."""
    stage, real = STAGES[name]
    configure = partial(env.configure, stage.Config, real)
    world = {f.name for f in fields(env.World)}
    tiny = {**asdict(stage.Config()), "data": "data/scenes-0"}
    for argv in ([], ["--model="]):
        assert asdict(configure(argv)) == tiny

    run = chain["sft"][0].out
    for model in (run, f"{run}/checkpoints/2"):
        assert asdict(configure([f"--model={model}"])) == {**tiny, **SHORT, "model": f"{run}/checkpoints/2"}
    assert configure([f"--model={run}", "--turn_tokens=9"]).turn_tokens == 9

    cfg = asdict(configure(["--model=some/hub-like-name"]))
    assert cfg == {**tiny, **env.REAL_WORLD, **real, "model": "some/hub-like-name"}
    assert set(env.REAL_WORLD) <= world and set(real) <= set(tiny) - world and not set(real) & {"seed", "data", "out", "model"}
    assert name == "eval" or cfg["lr"] == real["lr"] < tiny["lr"]
    explicit = [f"--{k}={tiny[k]}" for k in (*env.REAL_WORLD, *real)]
    for argv in (["--model=some/hub-like-name", *explicit], [*explicit, "--model=some/hub-like-name"]):
        assert asdict(configure(argv)) == {**tiny, "model": "some/hub-like-name"}


@pytest.mark.parametrize("name", ["sft", "rppo"])
def test_a_tiny_model_stays_tiny(name, finished, chain):
    """Going on from the run of a tiny model does not take it for a real one, whatever stages lie between."""
    out = finished.out if name == "sft" else chain["rppo"][0].out
    cfg = env.configure(rppo.Config, rppo.REAL, [f"--model={out}"])
    assert cfg.lr == rppo.Config.lr and cfg.turn_tokens == 6 and cfg.model == env.newest(out)


def test_seed_in_names():
    """{seed} in a path is the run's seed, wherever it comes from."""
    for stage, real in STAGES.values():
        assert env.configure(stage.Config, real, ["--seed=7", "--out=a/{seed}/b-{seed}"]).out == "a/7/b-7"
    assert env.configure(sft.Config, sft.REAL, ["--seed=7"]).data == "data/scenes-7" == env.configure(data.Config, {}, ["--seed=7"]).out
    assert env.configure(rppo.Config, rppo.REAL, []).data == "data/scenes-0"
    assert env.configure(rppo.Config, rppo.REAL, [], seed=5).data == "data/scenes-5"


@pytest.mark.parametrize("name", STAGES)
def test_every_field_is_read(name):
    """No dead knobs: env.py reads each field of World as cfg.<field>, and each field of a stage's own is read in its file, in
    env.py, or for rppo.py in a function that it calls from sft.py."""
    def attributes(of, *nodes):
        return {n.attr for node in nodes for n in ast.walk(node) if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Load)
                and isinstance(n.value, ast.Name) and n.value.id == of}
    trees = {x: ast.parse(open(os.path.join(ROOT, f"{x}.py")).read()) for x in ("env", *STAGES)}
    borrowed = attributes("sft", trees["rppo"]) - {"main"} if name == "rppo" else set()
    helpers = [n for n in trees["sft"].body if isinstance(n, ast.FunctionDef) and n.name in borrowed]
    world = {f.name for f in fields(env.World)}
    own = {f.name for f in fields(STAGES[name][0].Config)} - (set() if name == "data" else world)
    assert world - attributes("cfg", trees["env"]) == set() and own - attributes("cfg", trees[name], trees["env"], *helpers) == set()


def test_one_definition_of_everything():
    """Training and evaluation share env.py's functions: no other file defines a name that env.py defines, or takes a copy
    of one; and both call env.rollout."""
    trees = {name: ast.parse(open(os.path.join(ROOT, f"{name}.py")).read()) for name in ("env", *STAGES)}
    kinds = (ast.FunctionDef, ast.ClassDef)
    mine = {n.name for n in trees["env"].body if isinstance(n, kinds)}
    assert {"parse_action", "resolve_box", "render", "rollout", "match", "reward", "redundancy", "iou", "covers"} <= mine
    for name in STAGES:
        defined = {n.name for n in ast.walk(trees[name]) if isinstance(n, kinds)}
        defined |= {t.id for n in ast.walk(trees[name]) if isinstance(n, ast.Assign) and isinstance(n.value, ast.Lambda)
                    for t in n.targets}
        imported = {a.name for n in ast.walk(trees[name]) if isinstance(n, ast.ImportFrom) and n.module == "env" for a in n.names}
        assert defined & mine == set() and imported <= {"UserError"}, name
        assert STAGES[name][0].env is env
        if name in ("rppo", "eval"):
            assert any(isinstance(n, ast.Attribute) and n.attr == "rollout" and n.value.id == "env" for n in ast.walk(trees[name])
                       if isinstance(n, ast.Attribute) and isinstance(n.value, ast.Name))
    assert evaluation.Config.__mro__[1] is rppo.Config.__mro__[1] is sft.Config.__mro__[1] is env.World


# ---------------------------------------------------------------------------------------------------------------
# 3. What exists is reused, refused or gone on from.

@pytest.fixture(scope="module")
def base(policy, tmp_path_factory):
    """A checkpoint of the tiny policy, with weights large enough that its choices differ."""
    import copy
    out = str(tmp_path_factory.mktemp("base"))
    big = copy.deepcopy(policy)
    amplify(big.vlm, 3.0)
    sft.save_checkpoint(out, 0, big, sft.Config(**SHORT), "tiny", [])
    return env.newest(out)


def config(name, scenes, base, out, **more):
    return STAGES[name][0].Config(**{**(SFT if name == "sft" else RPPO), "data": scenes, "model": base, "out": str(out), **more})


@pytest.fixture(scope="module")
def finished(scenes, base, tmp_path_factory):
    """A finished sft run of three steps. Shared: tests copy it before they change it."""
    cfg = config("sft", scenes, base, tmp_path_factory.mktemp("finished") / "run")
    sft.main(cfg)
    return cfg


@pytest.fixture
def copied(finished, tmp_path):
    """The config of a copy of the finished run."""
    import shutil
    shutil.copytree(finished.out, tmp_path / "run")
    return sft.Config(**{**asdict(finished), "out": str(tmp_path / "run")})


def test_a_finished_run_is_reused(copied, monkeypatch):
    """The same command once more makes no step and leaves log and checkpoints as they are."""
    monkeypatch.setattr(sft, "append_log", lambda *_: pytest.fail("a finished run made a step"))
    before = {x: open(os.path.join(copied.out, x), "rb").read() for x in ("log.jsonl", "last", "checkpoints/3/model.safetensors")}
    sft.main(copied)
    assert {x: open(os.path.join(copied.out, x), "rb").read() for x in before} == before


def test_other_settings_are_refused(copied):
    """Another learning rate in the same folder: one line that names the difference, old and new; the run stays."""
    before = read_log(copied.out)
    with pytest.raises(env.UserError) as e:
        sft.main(sft.Config(**{**asdict(copied), "lr": 0.125, "batch": 2}))
    message = str(e.value)
    assert "\n" not in message and copied.out in message and "lr: 0.004 -> 0.125" in message and "batch: 4 -> 2" in message
    assert "steps" not in message and "--out" in message and "--resume=false" in message
    assert read_log(copied.out) == before and json.loads(open(f"{copied.out}/config.json").read())["lr"] == 0.004


def test_resume_false_puts_the_old_run_aside(copied, capsys):
    """resume=False keeps the old run under another name and starts at step 0, also a second time."""
    old = read_log(copied.out)
    for aside in (f"{copied.out}.1", f"{copied.out}.2"):
        sft.main(sft.Config(**{**asdict(copied), "resume": False, "steps": 1}))
        assert aside in capsys.readouterr().out
        assert [e["step"] for e in read_log(copied.out)] == [0] and os.listdir(f"{copied.out}/checkpoints") == ["1"]
    assert read_log(f"{copied.out}.1") == old and os.path.exists(f"{copied.out}.1/checkpoints/3/model.safetensors")
    assert [e["step"] for e in read_log(f"{copied.out}.2")] == [0]


def test_old_checkpoints_are_pruned(finished):
    """keep=2: of three checkpoints the newest two are left."""
    assert sorted(os.listdir(f"{finished.out}/checkpoints")) == ["2", "3"]


def test_the_best_checkpoint_is_kept(tmp_path):
    """Pruning spares the best checkpoint, however old."""
    for step in (1, 2, 5, 10, 20):
        os.makedirs(tmp_path / "checkpoints" / str(step))
    sft.prune(str(tmp_path), keep=2, best=2)
    assert sorted(map(int, os.listdir(tmp_path / "checkpoints"))) == [2, 10, 20]


def test_scenes_are_reused_or_refused(scenes, tmp_path):
    """data.py makes nothing that is there already; another setting is refused with the difference."""
    cfg = data.Config(out=str(tmp_path / "s"), n_sft=2, n_train=2, n_test=2)
    data.main(cfg)
    before = {x: x.stat().st_mtime_ns for x in (tmp_path / "s").rglob("*")}
    data.main(cfg)
    assert {x: x.stat().st_mtime_ns for x in (tmp_path / "s").rglob("*")} == before
    with pytest.raises(env.UserError, match=r"n_test: 2 -> 3") as e:
        data.main(data.Config(**{**asdict(cfg), "n_test": 3}))
    assert "\n" not in str(e.value)
    assert {x: x.stat().st_mtime_ns for x in (tmp_path / "s").rglob("*")} == before


@pytest.mark.parametrize("name", ["sft", "rppo"])
def test_resuming_changes_nothing(name, scenes, base, tmp_path, monkeypatch, capsys):
    """A run that dies while it writes the checkpoint of step 2 of 3 (sft), or when all but its name is written (rppo), and is
    started again, ends with the weights, optimizer and log of a run that was left alone, bit for bit; and makes only the
    steps that were missing."""
    import safetensors.torch
    main, runs = STAGES[name][0].main, [config(name, scenes, base, tmp_path / x) for x in ("whole", "broken")]
    main(runs[0])
    made, append = [], sft.append_log
    where, function, fatal = ((safetensors.torch, "save_file", "/2.tmp/optimizer.safetensors") if name == "sft" else
                              (os, "replace", "/checkpoints/2"))
    works = getattr(where, function)

    def dies(source, target):
        if str(target).endswith(fatal):
            raise KeyboardInterrupt
        works(source, target)
    monkeypatch.setattr(sft, "append_log", lambda out, entry: made.append(entry["step"]) or append(out, entry))
    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
        m.setattr(where, function, dies)
        main(runs[1])
    assert made == [0, 1] and open(f"{runs[1].out}/last").read() == "1"
    capsys.readouterr()
    main(runs[1])
    assert made == [0, 1, 1, 2] and "going on from step 1 of 3" in capsys.readouterr().out
    assert read_log(runs[1].out, timings=False) == read_log(runs[0].out, timings=False)
    assert [e["step"] for e in read_log(runs[1].out)] == [0, 1, 2] and any(e["grad_norm"] > 0 for e in read_log(runs[1].out)[1:])
    for file in ("model.safetensors", "optimizer.safetensors"):
        a, b = (weights(f"{r.out}/checkpoints/3", file) for r in runs)
        assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    assert sorted(os.listdir(f"{runs[1].out}/checkpoints")) == sorted(os.listdir(f"{runs[0].out}/checkpoints"))


def test_missing_inputs_are_named(scenes, base, tmp_path):
    """Every stage says in one line which input is missing and what to do about it."""
    for name, cfg, words in (
            ("sft", config("sft", "nowhere", base, tmp_path / "a"), ["nowhere/sft.jsonl", "python data.py", "--data"]),
            ("rppo", config("rppo", "nowhere", base, tmp_path / "b"), ["nowhere/train.jsonl", "--data"]),
            ("rppo", config("rppo", scenes, base, tmp_path / "c", eval_rows=24), ["24 rows", "--eval_rows"]),
            ("eval", evaluation.Config(data=scenes, out=str(tmp_path / "d")), ["--model", "rppo.py"]),
            ("eval", evaluation.Config(data="nowhere", model=base, out=str(tmp_path / "e")), ["nowhere/test.jsonl"])):
        with pytest.raises(env.UserError) as e:
            STAGES[name][0].main(cfg)
        assert "\n" not in str(e.value) and all(w in str(e.value) for w in words)
    assert os.listdir(tmp_path) == []


def test_rollout_of_no_rows(policy):
    """A rank that has no row to evaluate has no trajectories, and is no error."""
    assert env.rollout(policy, [], env.World()) == []


def test_no_held_out_rows(scenes, base, tmp_path):
    """eval_rows=0 trains on all rows and evaluates on none."""
    cfg = config("rppo", scenes, base, tmp_path / "run", steps=1, eval_rows=0)
    rppo.main(cfg)
    assert "held_out" not in read_log(cfg.out)[0] and os.path.exists(f"{cfg.out}/checkpoints/1")


# ---------------------------------------------------------------------------------------------------------------
# 4. Two ranks are one process. The same function runs here, and below in each rank that torchrun starts.

def work(scenes, base, out, *flags):
    """Three steps of sft.py and of rppo.py, and eval.py, in `out`; this rank's record goes to out/<rank>.*: the ids of every
    rollout, and the gradient of the first step as it is after the sum over the ranks. flags: "adam" leaves Muon out, "shard" is
    FSDP2 with recomputation."""
    from safetensors.torch import save_file
    rank = int(os.environ.get("RANK", 0))
    ids, gradients, ready = {}, {}, []
    rollout, sync, update = env.rollout, sft.sync_gradients, rppo.update
    whole = lambda t: (t.full_tensor() if hasattr(t, "full_tensor") else t).detach().clone()
    how = dict(shard="shard" in flags, recompute="shard" in flags)

    def recording_rollout(policy, rows, cfg, *args, **given):
        trajs = rollout(policy, rows, cfg, *args, **given)
        step, samples = given["seed"][1], len(trajs) // len(rows)
        for i, t in enumerate(trajs):
            t.at = step, given["prompt_ids"][i // samples]
            ids.setdefault("{}/{}".format(*t.at), []).append(t.ids)
        return trajs

    def reward(traj, row, cfg):
        """Any number that differs from sample to sample; but in the third step rank 0 has nothing to learn."""
        total = 0.5 if traj.at[0] == 2 and traj.at[1] % 2 == 0 else zlib.crc32(str(traj.ids).encode()) % 101 / 101
        return {"total": total}

    def recording_sync(policy, world, sums):
        sums = sync(policy, world, sums)
        if stage not in gradients:
            gradients[stage] = torch.cat([whole(p.grad).flatten() for p in policy.parameters()])
        return sums

    def marked_update(*args):
        n_tokens, stats = update(*args)
        stats["gap_max"] = rank + 1 # stands for the largest |log-ratio| of this rank
        return n_tokens, stats

    with pytest.MonkeyPatch.context() as m:
        for module, name, new in ((torch.cuda, "is_available", lambda: False), (env, "parse_action", acting), (env, "reward", reward),
                                  (env, "rollout", recording_rollout), (sft, "sync_gradients", recording_sync)):
            m.setattr(module, name, new)
        stage = "sft"
        sft.main(config("sft", scenes, base, f"{out}/sft", batch=8, **how, **(dict(muon_lr=0.0) if "adam" in flags else {})))
        stage = "rppo"
        m.setattr(rppo, "update", marked_update)
        policy = rppo.main(config("rppo", scenes, base, f"{out}/rppo", prompts=4, samples=4, eval_every=3, eval_rows=5, in_flight=2, **how))
        evaluation.main(evaluation.Config(**SHORT, data=scenes, model=base, out=f"{out}/eval", limit=7, k=3))
        # a batch without an image on the second rank
        stage, cpu, ranks = "no image", torch.device("cpu"), int(os.environ.get("WORLD_SIZE", 1))
        reader = env.make_trainable(env.load_policy(base, cpu, train=True), config("sft", scenes, base, out, **how), cpu).train()
        row = data.load_rows(f"{scenes}/sft.jsonl")[0]
        blind = env.Trajectory(row, None)
        blind.add(reader.proc, reader.proc.encode("what is it?"))
        blind.add(reader.proc, reader.proc.encode("nothing"), sampled=True)
        for traj in [env.render(reader.proc, row, row["turns"], env.World()), blind][rank::ranks]:
            (-reader(env.collate([traj], reader.proc))[0].sum() / 50).backward()
        sft.sync_gradients(reader, ranks, [0.0])
        # a flat step after a step with a gradient
        cfg = config("rppo", scenes, base, out)
        optimizer = torch.optim.AdamW(policy.parameters(), weight_decay=0.0)
        trajs = rollout(policy, data.load_rows(f"{scenes}/test.jsonl")[:2], cfg)
        for advantages in ([1.0, -1.0], [0.0, 0.0]):
            before = [whole(p) for p in policy.parameters()]
            update(policy, optimizer, trajs, advantages, cfg, int(os.environ.get("WORLD_SIZE", 1)))
    moved = not all(torch.equal(a, whole(b)) for a, b in zip(before, policy.parameters()))
    save_file(gradients, f"{out}/{rank}.safetensors")
    env.write_text(f"{out}/{rank}.json", json.dumps({"ids": ids, "flat_step_moved": moved}))


@pytest.fixture(scope="module", params=[pytest.param(x, id=i, marks=pytest.mark.slow) for x, i in (((), "copied"), (("adam", "shard"), "sharded"))])
def ranks(request, scenes, base, tmp_path_factory):
    """The folders of the same work by one process and by two ranks of torchrun, one thread each: with a copy of the weights on
    each rank, and sharded over them."""
    one, two = (str(tmp_path_factory.mktemp(x)) for x in ("one", "two"))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    work(scenes, base, one, *request.param[:1])
    torch.set_num_threads(threads)
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", __file__, scenes,
                           base, two, *request.param], env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-3000:]
    return one, two


def record(out, rank):
    return json.loads(open(f"{out}/{rank}.json").read())


def test_two_ranks_make_the_same_rollouts(ranks):
    """Prompt by prompt, the two ranks together sample exactly the ids of one process; each rank its own share."""
    one, parts = record(ranks[0], 0)["ids"], [record(ranks[1], r)["ids"] for r in (0, 1)]
    first = {k for k in one if k.startswith("0/")}
    assert len(first) == 4 and all(len(one[k]) == 4 for k in first) and len({str(x) for k in first for x in one[k]}) == 16
    assert not parts[0].keys() & parts[1].keys()
    assert {k: v for p in parts for k, v in p.items() if k in first} == {k: one[k] for k in first}
    assert all(sum(k in p for k in first) == 2 for p in parts)


@pytest.mark.parametrize("name", ["sft", "rppo", "no image"])
def test_two_ranks_make_the_same_gradient(ranks, name):
    """The gradient of the first step, and of a batch of which one rank's part has no image, summed over two ranks, is that of one process with the whole batch; on both ranks."""
    one, first, second = (weights(out, f"{r}.safetensors")[name].double() for out, r in ((ranks[0], 0), (ranks[1], 0), (ranks[1], 1)))
    assert torch.equal(first, second) and one.norm() > 1e-3
    assert (first - one).norm() / one.norm() <= 1e-5


@pytest.mark.parametrize("name", ["sft", "rppo"])
def test_two_ranks_reach_the_same_weights(ranks, base, name):
    """After three steps the weights differ by less than 1 % of the way they went; logged losses and norms agree."""
    start, one, two = (flat(weights(x)) for x in (base, *(f"{out}/{name}/checkpoints/3" for out in ranks)))
    assert (one - two).norm() < 0.01 * (one - start).norm() and (one - start).norm() > 0
    for a, b in zip(*(read_log(f"{out}/{name}") for out in ranks), strict=True):
        assert a["tokens"] == b["tokens"] and a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-3) and a["grad_norm"] > 0
        if name == "sft":
            assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)
        else:
            assert (a["reward"], a["flat_groups"]) == pytest.approx((b["reward"], b["flat_groups"]))
            assert a["entropy"] == pytest.approx(b["entropy"], rel=1e-4) and a["clip_share"] == b["clip_share"] == 0


def flatten(metrics, name=""):
    """Nested metrics as {path: number}, -1 for None."""
    if not isinstance(metrics, dict):
        return {name: -1 if metrics is None else metrics}
    return {path: v for k, part in metrics.items() for path, v in flatten(part, f"{name}.{k}").items()}


def test_two_ranks_give_the_same_scores(ranks):
    """Seven rows shared out over two ranks: the metrics of one process; the held-out scores of rppo.py too."""
    one, two = ({k: v for k, v in json.loads(open(f"{out}/eval/eval.json").read()).items() if k not in ("seconds", "config")}
                for out in ranks)
    held_out = [read_log(f"{out}/rppo")[2]["held_out"] for out in ranks]
    assert one["n"] == 7 and one["crops_wrong"] and 0 < one["unanswered_rate"] < 1
    for a, b in ((one, two), held_out):
        assert flatten(a) == pytest.approx(flatten(b), rel=1e-12)


def test_two_ranks_rest_in_a_flat_step(ranks):
    """All advantages 0 on all ranks: the weights stay, as they do in one process."""
    assert not record(ranks[0], 0)["flat_step_moved"]
    assert not record(ranks[1], 0)["flat_step_moved"] and not record(ranks[1], 1)["flat_step_moved"]


def test_two_ranks_log_the_largest_ratio(ranks):
    """log_ratio_max is the largest of all ranks."""
    assert [e["log_ratio_max"] for e in read_log(f"{ranks[0]}/rppo")] == [1, 1, 1]
    assert [e["log_ratio_max"] for e in read_log(f"{ranks[1]}/rppo")] == [2, 2, 2]


if __name__ == "__main__":
    work(*sys.argv[1:])
    torch.distributed.destroy_process_group()
