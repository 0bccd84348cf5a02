"""The page: it shows what the logs and records hold, hostile text stays text, files stay small."""
import json
from html.parser import HTMLParser

import pytest
from PIL import Image

import eval as evaluation

RECORD = """{"sample": 0, "problem": "Which?", "solution": "red", "answer": "red", "status": "answered",
"boxes": [[5, 5, 9, 9]], "metrics": {"evidence_coverage": [true, true]}}"""
ROW = """{"images": ["scene.png"], "doc_id": "photo-0", "problem": "Which?", "solution": "A",
"boxes": [[9, 9, 20, 20]], "chain": [[0, 0, 90, 90], [9, 9, 20, 20]], "solve_rate": 0.375}"""
HOSTILE = '</p><script>alert("1")</script><img src=x onerror=alert(1)>&lt;'


class Page(HTMLParser):
    """The elements of a page as (tag, attributes), and its texts."""
    def __init__(self, html):
        super().__init__()
        self.elements, self.texts = [], []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.texts.append(data.strip())

    def find(self, tag, kind=None):
        return [a for name, a in self.elements if name == tag and kind in (None, a.get("class"))]


@pytest.fixture
def image(tmp_path):
    path = tmp_path / "scene.png"
    Image.effect_noise((400, 200), 90).convert("RGB").save(path)
    return path


def record(image, index=0, right=True, boxes=([0, 0, 50, 50],), **fields):
    turns = []
    for i, box in enumerate(boxes):
        text = f"<think>look {i}</think>\n<tool_call>{{}}</tool_call>"
        turns.append({"text": text, "error": None, "tool": "crop", "box": box})
    turns.append({"text": "<answer>red</answer>", "error": None, "tool": None, "box": None})
    changed = {"doc_id": f"test-{index}", "images": [str(image)], "turns": turns, "right": right}
    return {**json.loads(RECORD), **changed, "index": index, **fields}


def test_curves():
    """They end at the last value of every run; a long log stays small and keeps its spikes."""
    rppo = json.loads('[{"step": 0, "reward": 0.5, "grad_norm": null}, {"step": 1, "reward": 0.75}]')
    grpo = json.loads('[{"step": 0, "reward": 0.25, "held_out_accuracy": 0.625}]')
    found = Page(evaluation.curves({"rppo": rppo, "grpo": grpo}))
    assert {"0.75", "0.25", "0.625", "rppo, step 1: 0.75"} <= set(found.texts)
    log = [{"step": step, "entropy": step % 7} for step in range(100_000)]
    log[77777]["entropy"] = 1e6
    html = evaluation.curves({"rppo": log})
    assert len(html) < 50_000 and "77777,166666.6667" in html


def test_crops_are_the_executed_boxes(image):
    boxes = [[0, 0, 50, 50], [4, 0, 54, 50], [100, 20, 380, 190]]
    found = Page(evaluation.trajectory_html(record(image, boxes=boxes), 100))
    drawn = []
    for rect in found.find("rect", "crop"):
        drawn.append([int(rect[name]) for name in ("x", "y", "width", "height")])
    assert drawn == [[0, 0, 50, 50], [4, 0, 50, 50], [100, 20, 280, 170]]
    assert len(found.find("rect", "evidence")) == 1 and {"3", "look 1", "repeats crop 1"} <= set(found.texts)
    assert found.find("img")[2]["alt"] == "crop 3: [100, 20, 380, 190]"


def test_before_and_after_by_outcome(image):
    before, after = {}, {}
    for i in range(6):
        before[i, 0] = record(image, i, right=i > 1)             # 0 fixed, 1 wrong, 2 broken, 3 to 5 right
        after[i, 0] = record(image, i, right=i not in (1, 2))
    after[5, 0]["turns"] *= 2                      # the most crops: shown first
    found = Page(evaluation.comparison(before, after, 2))
    for heading in ("1 wrong with the cold start, right now", "1 right with the cold start, wrong now",
                    "1 wrong with the cold start, wrong now", "3 right with the cold start, right now"):
        assert heading in found.texts
    assert len(found.find("article")) == 2 * (1 + 1 + 1 + 2)
    assert found.texts.index("test-5") < found.texts.index("test-3")


def test_hostile_text_stays_text(image, tmp_path):
    (tmp_path / "<b>a").mkdir()
    (tmp_path / "<b>a/log.jsonl").write_text('{"step": 0, "reward": 1}\n{"step": 1, "rew')
    bad = record(image, problem=HOSTILE, solution=HOSTILE, answer=HOSTILE, doc_id=HOSTILE)
    bad["turns"][0] = {"text": HOSTILE, "error": HOSTILE, "tool": None, "box": None}
    lines = json.dumps(bad) + "\n" + json.dumps(record(HOSTILE, 1)) + '\n{"half'
    (tmp_path / "results-<b>.jsonl").write_text(lines)
    (tmp_path / "eval.json").write_text(json.dumps({HOSTILE: {"accuracy": 1}}))
    evaluation.refresh_report(tmp_path)
    html = (tmp_path / "report.html").read_text()
    assert not Page(html).find("script") and Page(html).texts.count(HOSTILE) > 4
    assert HOSTILE not in html and "http" not in html


def test_a_large_benchmark_and_constructed_questions(image, tmp_path, capsys):
    """The page stays small. What goes wrong with it is said in a line, and nothing is raised."""
    (tmp_path / "train.jsonl").write_text(ROW.replace("\n", " ") + "\n")
    (tmp_path / "data_card.json").write_text('{"proposals": {"kept": 1, "read_question: too long": 8}}')
    with open(tmp_path / "results-bench-tool_on.jsonl", "w") as f:
        for i in range(9000):
            f.write(json.dumps(record(image, i, boxes=())) + "\n")
    evaluation.refresh_report(tmp_path)
    html = (tmp_path / "report.html").read_text()
    assert len(Page(html).find("rect", "crop")) == 2 and "too long" in html and "0.375" in html
    assert "9000 right" in Page(html).texts and len(html) < 500_000
    (tmp_path / "eval.json").write_text("{")
    evaluation.refresh_report(tmp_path)
    assert "was not written" in capsys.readouterr().out
