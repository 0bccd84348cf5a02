"""The benchmark (tests/bench.py) at its smallest: both sides do the same work, and runs/bench.json has what it promises."""
import json

import pytest
import torch

import bench
import env


def run(tmp_path, **given):
    threads = torch.get_num_threads()
    out = str(tmp_path / "bench.json")
    result = bench.main(bench.Config(prompts=2, samples=2, turns=2, repeats=1, scaling=False, out=out, **given))
    assert torch.get_num_threads() == threads
    with open(out) as f:
        return result, json.load(f)


def test_bench(tmp_path, monkeypatch, capsys):
    """The file holds the three ratios and shares that add up; and a side that skips work, or draws something else, is seen."""
    _, saved = run(tmp_path)
    assert all(saved[k] > 0 for k in ("rollout_ratio", "update_ratio", "update_memory_ratio"))
    assert set(saved["rollout"]["share"]) == {"prefill", "decode", "vision", "python"}
    assert sum(saved["rollout"]["share"].values()) == pytest.approx(1)
    assert saved["sampled_tokens"] < saved["tokens"] and saved["update"]["ours_peak"] > 2 ** 20
    assert "rollout, sampled tokens/s" in capsys.readouterr().out
    # images that differ, positions that are wrong: the logits before the hook show it though every token is forced
    for name, wrong in (("pixel_values", torch.zeros_like), ("mm_token_type_ids", torch.zeros_like)):
        padded = bench.padded
        with monkeypatch.context() as m:
            m.setattr(bench, "padded", lambda *a, **k: (lambda b, mask: ({**b, name: wrong(b[name])}, mask))(*padded(*a, **k)))
            with pytest.raises((AssertionError, ValueError)):
                run(tmp_path)
    with monkeypatch.context() as m:  # a hook that no longer decides what is drawn
        m.setattr(bench.Script, "__call__", lambda self, _, logits: self.raw[-1].append(logits[:, :1]) or logits)
        with pytest.raises((AssertionError, ValueError)):
            run(tmp_path)


@pytest.mark.parametrize("shape", ["qwen3-vl-8b", "qwen2.5-vl-3b"])
def test_bench_of_a_true_shape(tmp_path, shape):
    """The code of the CUDA shapes, shrunk: both families make a model whose two sides agree."""
    with pytest.raises(env.UserError, match="needs a CUDA device") if not torch.cuda.is_available() else pytest.raises(ZeroDivisionError):
        run(tmp_path, shape=shape, shrink=1 if not torch.cuda.is_available() else 0)
    _, saved = run(tmp_path, shape=shape, shrink=32)
    assert saved["rollout_ratio"] > 0 and saved["limits"]["update_operations"] > 0


def test_true_shapes_have_their_size():
    """Parameters of every shape in billions, as published (the head counted once when it is tied)."""
    cfg = lambda s: bench.Config(shape=s)
    for shape, billions in {"qwen3-vl-2b": 2.13, "qwen3-vl-4b": 4.44, "qwen3-vl-8b": 8.77, "qwen2.5-vl-3b": 3.75, "qwen2.5-vl-7b": 8.29}.items():
        pass
