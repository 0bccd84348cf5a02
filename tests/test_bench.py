"""The benchmark (tests/bench.py) at its smallest: both sides do the same work."""
import json

import pytest
import torch

import env
import bench


def run(tmp_path, **changes):
    given = dict(shape="main-job", prompts=2, samples=2, turns=2, turn_tokens=20, repeats=1, scaling="false")
    given.update(changes, out=tmp_path / "bench.json")
    argv = [f"--{name}={value}" for name, value in given.items()]
    bench.main(env.configure(bench.Config, {}, argv))
    return json.loads((tmp_path / "bench.json").read_text())


def test_bench(tmp_path, capsys):
    saved = run(tmp_path)
    for name in ("rollout_ratio", "update_ratio", "update_ratio_half_flat", "update_memory_ratio"):
        assert saved[name] > 0
    assert sum(saved["rollout"]["share"].values()) == pytest.approx(1)
    assert "rollout, sampled tokens/s" in capsys.readouterr().out


def test_two_sides_that_differ_are_seen(tmp_path, monkeypatch):
    """Tokens are forced, but attention to padding shows in the logits before that."""
    padded = bench.padded

    def other(trajs, policy, left):
        batch, mask = padded(trajs, policy, left)
        batch["attention_mask"] = torch.ones_like(batch["attention_mask"])
        return batch, mask

    monkeypatch.setattr(bench, "padded", other)
    with pytest.raises(AssertionError):
        run(tmp_path)
