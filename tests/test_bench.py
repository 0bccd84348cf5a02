"""The benchmark (tests/bench.py) at its smallest: both sides do the same work, and its file has what it promises."""
import json

import pytest
import torch

import bench
import env
import sft


def run(tmp_path, **changes):
    """The benchmark's file, of 2 x 2 trajectories of two turns."""
    given = dict(shape="main-job", prompts=2, samples=2, turns=2, repeats=1, scaling="false", out=tmp_path / "bench.json")
    argv = [f"--{name}={value}" for name, value in {**given, **changes}.items()]
    bench.main(sft.configure(bench.Config, {}, argv))
    return json.loads((tmp_path / "bench.json").read_text())


def test_bench(tmp_path, capsys):
    """The file holds the ratios, and shares that add up."""
    saved = run(tmp_path)
    for name in ("rollout_ratio", "update_ratio", "update_ratio_half_flat", "update_memory_ratio"):
        assert saved[name] > 0
    assert set(saved["rollout"]["share"]) == {"prefill", "decode", "vision", "python"}
    assert sum(saved["rollout"]["share"].values()) == pytest.approx(1)
    assert saved["sampled_tokens"] < saved["tokens"] and saved["update"]["ours_peak"] > 2 ** 20
    assert "rollout, sampled tokens/s" in capsys.readouterr().out


@pytest.mark.parametrize("name, wrong", [("pixel_values", torch.zeros_like), ("attention_mask", torch.ones_like)])
def test_two_sides_that_differ_are_seen(tmp_path, monkeypatch, name, wrong):
    """Tokens are forced, but other images or attention to padding show in the logits before that."""
    padded = bench.padded

    def other(trajs, policy, left):
        batch, mask = padded(trajs, policy, left)
        return {**batch, name: wrong(batch[name])}, mask

    monkeypatch.setattr(bench, "padded", other)
    with pytest.raises(AssertionError):
        run(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("shape", ["qwen3-vl-8b", "qwen2.5-vl-3b", "tiny"])
def test_other_shapes(tmp_path, shape):
    """The code of the CUDA shapes, shrunk, for both families, and the default: the two sides agree."""
    saved = run(tmp_path, shape=shape, shrink=32, turns=3)
    assert saved["shape"] == shape and saved["rollout_ratio"] > 0 and saved["limits"]["update_operations"] > 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_true_shapes_need_a_gpu(tmp_path):
    with pytest.raises(env.UserError, match="needs a CUDA device"):
        run(tmp_path, shape="qwen3-vl-4b")
