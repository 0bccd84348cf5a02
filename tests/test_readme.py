"""The README says what is: commands parse, paths exist, metrics are explained.

    python -m pytest tests/test_readme.py
"""
import importlib
import re
import shlex
from dataclasses import fields

import pytest
from conftest import ROOT

import env
import eval as evaluation

README = (ROOT / "README.md").read_text()
STAGES = ("sft", "data", "eval", "rppo")
BLOCKS = re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
LINES = "\n".join(BLOCKS).replace("\\\n", " ").splitlines()
COMMANDS = [line.split("#")[0] for line in LINES if re.search(r"(?:python|torchrun) .*\w\.py", line)]


@pytest.mark.parametrize("command", COMMANDS)
def test_commands(command, monkeypatch):
    """Each runs a file that exists; of a stage, with flags that exist and values that they take."""
    monkeypatch.setattr(env, "find_model", str)      # the runs that are named need not be there
    words = shlex.split(command)
    script = next(i for i, word in enumerate(words) if word.endswith(".py"))
    name = words[script].removesuffix(".py")
    assert (ROOT / words[script]).exists()
    if name in STAGES:
        stage = importlib.import_module(name)
        env.configure(stage.Config, getattr(stage, "REAL", env.REAL_EPISODE), words[script + 1:])


def test_paths_and_metrics():
    """Files and pictures that it names exist, and every metric is explained."""
    paths = re.findall(r"\]\((?!http|#)([^)#]+)\)", README)
    paths += re.findall(r"`((?:tests/)?\w+\.(?:py|txt))`", README)
    assert len(paths) > 5 and not [path for path in paths if not (ROOT / path).exists()]
    assert not [name for name in evaluation.METRICS if f"`{name}`" not in README]


def test_torchrun_takes_no_flag_of_ours():
    """torchrun takes a flag that shortens one of its own for itself, even behind the name of the script."""
    from torch.distributed.run import get_args_parser
    options = " ".join(get_args_parser()._option_string_actions).replace("-", "_")
    for name in STAGES:
        for f in fields(importlib.import_module(name).Config):
            assert f" __{f.name}" not in f" {options}"
