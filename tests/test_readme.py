"""The README says what is: paths exist, commands parse, line counts are true.    python -m pytest tests/test_readme.py"""
import importlib
import re
import shlex
from pathlib import Path

import pytest

import env
import eval as evaluation

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
FILES = ("env.py", "data.py", "sft.py", "rppo.py", "eval.py")
COMMANDS = [line.split("#")[0] for block in re.findall(r"```bash\n(.*?)```", README, re.S) for line in block.splitlines()]


def test_line_counts():
    """Each file's line count in the table, and their sum at the top, are exact."""
    count = {f: len((ROOT / f).read_text().splitlines()) for f in FILES}
    assert dict(re.findall(r"\| `(\w+\.py)` \| (\d+) \|", README)) == {f: str(n) for f, n in count.items()}
    assert re.search(r"Five files,\n([\d,]+) lines", README)[1].replace(",", "") == str(sum(count.values()))


def test_paths():
    """Pictures and source files that the README names exist."""
    for path in re.findall(r"\]\((?!http)([^)#]+)\)", README) + re.findall(r"`((?:tests/)?\w+\.(?:py|txt))`", README):
        assert (ROOT / path).exists(), path


def test_promises():
    """Every test that the README names exists."""
    names = re.findall(r"`(test_\w+)`", README)
    tests = "".join(p.read_text() for p in (ROOT / "tests").glob("test_*.py"))
    assert len(names) > 20 and not [n for n in names if f"def {n}(" not in tests]


@pytest.mark.parametrize("command", [c for c in COMMANDS if re.search(r"\w+\.py", c)])
def test_commands(command):
    """Every command runs a stage that exists, with flags of its Config."""
    words = shlex.split(command.split("&&")[-1])
    script = next(i for i, w in enumerate(words) if w.endswith(".py"))
    stage = importlib.import_module(words[script].removesuffix(".py"))
    env.configure(stage.Config, getattr(stage, "REAL", {}), words[script + 1:])


def test_error_lines():
    """Every error line that the FAQ is keyed by is one that the sources (or torchrun) can print."""
    sources = "".join((ROOT / f).read_text() for f in FILES)
    for key in re.findall(r"^- `([^`]+)`:", README, re.M):
        parts = [p.strip() for p in key.split("...") if p.strip()]
        assert key.startswith("torchrun") or all(p in sources for p in parts), key


def test_metrics_are_explained():
    """Every metric has an entry in the glossary."""
    glossary = README[README.index("## Glossary"):README.index("## Published")]
    assert not [m for m in evaluation.metrics([]) if m not in glossary]


def test_flags_do_not_collide_with_torchrun():
    """torchrun takes any flag that shortens one of its own for itself, even behind the script's name."""
    from torch.distributed.run import get_args_parser
    options = [o.lstrip("-").replace("-", "_") for a in get_args_parser()._actions for o in a.option_strings if o.startswith("--")]
    for stage in ("data", "sft", "rppo", "eval"):
        clash = [f for f in vars(importlib.import_module(stage).Config()) if any(o.startswith(f) for o in options)]
        assert not clash, f"{stage}: {clash}"


def test_top_level():
    """Nothing at the top level but what the design names."""
    import subprocess
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.split()
    assert {p.split("/")[0] for p in tracked} <= {*FILES, "tests", "requirements.txt", "README.md", ".ci", ".gitignore", "LICENSE"}
