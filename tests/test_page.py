"""The page: it shows what the logs and records hold, hostile text stays text, files stay small."""
import base64
import io
import json
from collections import Counter
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
    """The elements of a page as (tag, attributes), and its texts. All that is opened must be closed."""
    def __init__(self, html):
        super().__init__()
        self.elements, self.texts, self.open = [], [], Counter()
        self.feed(html)
        for tag in ("section", "article", "svg", "g", "div", "p", "b", "ol", "li", "table", "td", "rect"):
            assert self.open[tag] == 0, tag

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        self.open[tag] += 1

    def handle_endtag(self, tag):
        self.open[tag] -= 1

    def handle_data(self, data):
        self.texts.append(data.strip())

    def find(self, tag, kind=None):
        """The attributes of the elements with a tag, and with a class."""
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
    changed.update(index=index, **fields)
    return {**json.loads(RECORD), **changed}


def write_run(folder, lines, **config):
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "log.jsonl").write_text("\n".join(lines) + "\n")


def report_of(folder):
    evaluation.write_report([folder], str(folder / "report.html"))
    return (folder / "report.html").read_text()


def test_curves_end_at_the_last_value_of_every_run():
    rppo = json.loads('[{"step": 0, "reward": 0.5, "grad_norm": null}, {"step": 1, "reward": 0.75}]')
    grpo = json.loads('[{"step": 0, "reward": 0.25, "held_out_accuracy": 0.625}]')
    sft = json.loads('[{"step": 0, "loss": 2.5, "lr": 1e-5}]')
    found = Page(evaluation.curves({"rppo": rppo, "grpo": grpo, "sft": sft}))
    steps = [line["d"].split()[-1].split(",")[0] for line in found.find("path", "curve ")]
    assert steps == ["0", "1", "0", "0", "0"]    # accuracy of grpo, rewards of both, loss and rate of sft
    assert {"0.75", "0.25", "0.625", "2.5", "1e-05", "rppo, step 1: 0.75"} <= set(found.texts)


def test_a_long_log_stays_small_and_keeps_its_spikes():
    log = [{"step": step, "entropy": step % 7} for step in range(100_000)]
    log[77777]["entropy"] = 1e6
    html = evaluation.curves({"rppo": log})
    assert len(html) < 50_000 and "77777,166666.6667" in html


@pytest.mark.parametrize("values", [[0.0], [1e-9, 1e-9], [5.0, 5.0], [-3.0, 1e12], [0.1, None, 0.1]])
def test_axes_hold_any_values(values):
    log = [{"step": step, "reward": value} for step, value in enumerate(values)]
    assert len(Page(evaluation.curves({"rppo": log})).find("svg")) == 2


def test_crops_are_the_executed_boxes(image):
    boxes = [[0, 0, 50, 50], [4, 0, 54, 50], [100, 20, 380, 190]]
    found = Page(evaluation.trajectory_html(record(image, boxes=boxes), 100))
    drawn = []
    for rect in found.find("rect", "crop"):
        x, y, width, height = [int(rect[name]) for name in ("x", "y", "width", "height")]
        drawn.append([x, y, x + width, y + height])
    assert drawn == boxes and len(found.find("rect", "evidence")) == 1
    assert {"1", "2", "3", "look 1", "repeats crop 1"} <= set(found.texts)
    for number, crop in enumerate(found.find("img")):
        assert crop["alt"] == f"crop {number + 1}: {boxes[number]}"
        data = base64.b64decode(crop["src"].removeprefix("data:image/jpeg;base64,"))
        assert max(Image.open(io.BytesIO(data)).size) <= 140


def test_before_and_after_by_outcome(image):
    before, after = {}, {}
    for i in range(10):
        before[i, 0] = record(image, i, right=i > 3)             # 0 to 2 fixed, 3 wrong, 4 and 5 broken
        after[i, 0] = record(image, i, right=i not in (3, 4, 5))
    after[9, 0]["turns"] *= 2                      # the most crops: shown first
    found = Page(evaluation.comparison(before, after, 2))
    for heading in ("3 wrong with the cold start, right now", "2 right with the cold start, wrong now",
                    "1 wrong with the cold start, wrong now", "4 right with the cold start, right now"):
        assert heading in found.texts
    assert len(found.find("article")) == 2 * (2 + 2 + 1 + 2)
    assert found.texts.index("test-9") < found.texts.index("test-6") and "Now" in found.texts
    assert len(Page(evaluation.comparison({}, after, 2)).find("article")) == 2 + 2


def test_hostile_text_stays_text(image, tmp_path):
    write_run(tmp_path / "<b>a/rppo", ['{"step": 0, "reward": 1}'], lam=HOSTILE)
    write_run(tmp_path / "<b>a/grpo", ['{"step": 0, "reward": 1}'], lam=0)
    bad = record(image, problem=HOSTILE, solution=HOSTILE, answer=HOSTILE, doc_id=HOSTILE)
    bad["turns"][0] = {"text": HOSTILE, "error": HOSTILE, "tool": None, "box": None}
    lines = [json.dumps(bad), json.dumps(record(HOSTILE, 1)), '{"half']
    (tmp_path / "results-<b>.jsonl").write_text("\n".join(lines))
    (tmp_path / "eval.json").write_text(json.dumps({HOSTILE: {"accuracy": 1}}))
    html = report_of(tmp_path)
    assert not Page(html).find("script") and Page(html).texts.count(HOSTILE) > 4
    assert HOSTILE not in html and "http" not in html


def test_constructed_questions_and_their_funnel(image, tmp_path):
    for side in ("train", "sft", "test"):
        (tmp_path / f"{side}.jsonl").write_text(ROW.replace("\n", " ") + "\n")
    card = '{"proposals": {"kept": 1, "ask: too long": 8}}'
    (tmp_path / "data_card.json").write_text(card)
    html = report_of(tmp_path)
    assert len(Page(html).find("rect", "crop")) == 2 and "too long" in html and "0.375" in html


def test_a_run_that_has_just_begun_and_broken_files(tmp_path, capsys):
    write_run(tmp_path / "new", [], seed=0)
    write_run(tmp_path / "old", ['{"step": 0, "reward": 0.25}', '{"step": 1, "rew'], seed=1)
    assert "0.25" in Page(report_of(tmp_path)).texts
    (tmp_path / "eval.json").write_text("{")
    evaluation.refresh_report(tmp_path)                # says so in a line and raises nothing
    assert "was not written" in capsys.readouterr().out


def test_a_large_benchmark_is_a_small_page(image, tmp_path):
    line = json.dumps(record(image)) + "\n"
    with open(tmp_path / "results-bench-tool_on.jsonl", "w") as f:
        for i in range(23_000):
            f.write(line.replace('"index": 0', f'"index": {i}'))
    html = report_of(tmp_path)
    assert "23000 right" in Page(html).texts and len(html) < 500_000
