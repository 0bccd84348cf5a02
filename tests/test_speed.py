"""The benchmark (tests/bench.py) at its smallest: both sides do the same work, and runs/bench.json has what it promises."""
import json

import pytest
import torch

import bench
import env


def run(tmp_path, **given):
    """The benchmark's file, of 2 x 2 trajectories of two turns."""
    out = str(tmp_path / "bench.json")
    given = {**dict(shape="main-job", prompts=2, samples=2, turns=2, repeats=1, scaling="false", out=out), **given}
    bench.main(env.configure(bench.Config, {}, [f"--{k}={v}" for k, v in given.items()]))
    with open(out) as f:
        return json.load(f)


def test_bench(tmp_path, monkeypatch, capsys):
    """The file holds the ratios, and shares that add up; two sides that do not compute the same are seen."""
    saved = run(tmp_path)
    assert all(saved[k] > 0 for k in ("rollout_ratio", "update_ratio", "update_ratio_half_flat", "update_memory_ratio"))
    assert set(saved["rollout"]["share"]) == {"prefill", "decode", "vision", "python"}
    assert sum(saved["rollout"]["share"].values()) == pytest.approx(1)
    assert saved["sampled_tokens"] < saved["tokens"] and saved["update"]["ours_peak"] > 2 ** 20
    assert "rollout, sampled tokens/s" in capsys.readouterr().out
    # every token is forced, but the logits before the hook show other images, and attention to padding
    padded = bench.padded
    for name, wrong in (("pixel_values", torch.zeros_like), ("attention_mask", torch.ones_like)):
        def other(trajs, policy, left):
            batch, mask = padded(trajs, policy, left)
            return {**batch, name: wrong(batch[name])}, mask
        monkeypatch.setattr(bench, "padded", other)
        with pytest.raises(AssertionError):
            run(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("shape", ["qwen3-vl-8b", "qwen2.5-vl-3b", "tiny"])
def test_bench_of_other_shapes(tmp_path, shape):
    """The code of the CUDA shapes, shrunk, for both families, and the default: the two sides agree."""
    saved = run(tmp_path, shape=shape, shrink=32)
    assert saved["shape"] == shape and saved["rollout_ratio"] > 0 and saved["limits"]["update_operations"] > 0


def test_true_shapes(rows, tmp_path):
    """The shapes have the published numbers of parameters (a tied head counts once), and need a GPU or --shrink."""
    for shape, billions in {"qwen3-vl-2b": 2.13, "qwen3-vl-4b": 4.44, "qwen3-vl-8b": 8.77, "qwen2.5-vl-3b": 3.75,
                            "qwen2.5-vl-7b": 8.29}.items():
        policy = bench.make_policy(bench.Config(shape=shape), rows, torch.device("meta"))
        assert sum(p.numel() for p in policy.parameters()) / 1e9 == pytest.approx(billions, abs=0.005), shape
    if not torch.cuda.is_available():
        with pytest.raises(env.UserError, match="needs a CUDA device"):
            run(tmp_path, shape="qwen3-vl-4b")
