"""The page: what RL changed, of the runs that are given; hostile text stays text, files stay small."""
import json
import re
from html.parser import HTMLParser

import pytest
from conftest import refused
from PIL import Image

import eval as evaluation

HOSTILE = '</p><script>alert("1")</script><img src=x onerror=alert(1)>&lt;'


class Page(HTMLParser):
    """The elements of a page as (tag, attributes), its texts, and the rows of its tables."""
    def __init__(self, html):
        super().__init__()
        self.elements, self.texts = [], []
        self.feed(html)
        self.rows = {}
        for row in re.findall(r"<tr>(<td>.*?)(?=<tr>|</table>)", html):
            name, *cells = re.findall(r"<td>(.*?)</td>", row)
            self.rows.setdefault(name, cells)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.texts.append(data.strip())

    def find(self, tag):
        return [attrs for name, attrs in self.elements if name == tag]


@pytest.fixture
def image(tmp_path):
    path = tmp_path / "scene.png"
    Image.effect_noise((400, 200), 90).convert("RGB").save(path)
    return path


def record(image, index=0, right=True, boxes=([0, 0, 50, 50],), covered=True, **fields):
    turns = []
    for i, box in enumerate(boxes):
        text = f"<think>look {i}</think>\n<tool_call>{{}}</tool_call>"
        turns.append({"text": text, "error": None, "box": box, "frame": 0})
    turns.append({"text": "<answer>red</answer>", "error": None, "box": None})
    entry = dict(index=index, sample=0, problem=f"Which? {index}", solution="red", answer="red", right=right,
                 doc_id=f"test-{index}", images=[str(image)], status="answered", boxes=[[5, 5, 9, 9]], turns=turns,
                 metrics={"evidence_coverage": [covered, True]})
    return {**entry, **fields}


def keyed(*records):
    return {(entry["index"], entry["sample"]): entry for entry in records}


def write_run(folder, *records, name="sampled-tool_on", log=()):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text('{"command": "rppo.py --lam=0", "commit": "c0ffee", "threads": 3}')
    (folder / "log.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in log))
    lines = "".join(json.dumps(entry) + "\n" for entry in records)
    (folder / f"results-{name}.jsonl").write_text(lines)
    return str(folder)


def charts(**logs):
    return "".join(evaluation.chart(title, key, logs) for title, key in evaluation.CHARTS)


def test_curves(tmp_path):
    """They end at the last value of every run; accuracy begins at the cold start's; long logs stay small."""
    entry = dict(step=0, seconds=1.0, cold_start={"accuracy": 0.5}, held_out={"accuracy": 0.625}, reward=0.25)
    run = write_run(tmp_path / "a", log=[entry, dict(step=1, seconds=2.4, reward=0.75)])
    facts, log, _ = evaluation.read_run(run)
    assert facts["seconds"] == 2
    found = Page(charts(rppo=log, grpo=[dict(step=0, reward=0.375)]))
    assert {"0.75", "0.375", "0.625", "0.5; steps 0 to 1"} <= set(found.texts) and len(found.find("figure")) == 2
    points = [line["points"] for line in found.find("polyline")]
    assert points == ["0,0.125 1,0 1,0", "0,0.5 1,0 1,0", "0,0.375 0,0.375"]
    log = [{"step": step, "entropy": step % 7} for step in range(100_000)]
    assert len(charts(rppo=log)) < 10_000


def test_crops_are_the_executed_boxes(image):
    """A box of another frame (of an image that a tool turned, say) is not drawn on the original."""
    shown = record(image, boxes=[[0, 0, 50, 50], [1, 2, 3, 4], [100, 20, 380, 190]])
    shown["turns"][1].update(frame=2, error="Error: no.")
    found = Page(evaluation.trajectory_html(shown, "After:", "right"))
    drawn = []
    for rect in found.find("rect"):
        drawn.append([int(rect[name]) for name in ("x", "y", "width", "height")])
    assert drawn == [[5, 5, 4, 4], [0, 0, 50, 50], [100, 20, 280, 170]]      # the first is the evidence
    assert len(found.find("img")) == 2 and {"2", "look 1", "Error: no.", "right"} <= set(found.texts)


def test_what_changed(image):
    """Accuracy, with intervals worked out by hand, and the fates of the same questions."""
    before, after = [], []
    for i in range(4):                         # 0 repaired, 1 wrong, 2 broken, 3 right
        common = dict(difficulty=3 + i % 2, data_source="tiny")
        before.append(record(image, i, right=i > 1, covered=i > 2, **common))
        after.append(record(image, i, right=i in (0, 3), status="over_turns" if i == 2 else "answered", **common))
    html = evaluation.section("x", ("a", keyed(*before)), ("b", keyed(*after, record(image, 9))), 1)
    assert Page(html).rows == {
        "Accuracy": ["4", "50.0 %", "50.0 %", "+0.0 \u00b1 80.0"],           # 1.96 * sqrt((1 + 1) / 4 / 3)
        "Accuracy, 3 boxes": ["2", "50.0 %", "50.0 %", "+0.0 \u00b1 196.0"],
        "Accuracy, 4 boxes": ["2", "50.0 %", "50.0 %", "+0.0 \u00b1 0.0"],
        "Out of turns or tokens": ["", "0", "1", "+1"],
        "Right by a guess": ["", "1", "0", "-1"],
        "Right, evidence seen": ["", "1", "2", "+1"],
        "Wrong though evidence was seen": ["", "0", "1", "+1"],
        "Wrong without the evidence": ["", "2", "0", "-2"]}
    assert list(Page(html).rows)[0] == "Accuracy"
    summaries = [text for text in Page(html).texts if "examples" in text]
    assert summaries == ["1 repaired: examples", "1 broken: examples", "1 wrong: examples"]
    assert html.count("<article>") == 6 and html.count("<details>") == 3
    for other in (dict(problem="another"), dict(solution="another"), dict(images=["another.png"])):
        other = keyed(record(image, **other))
        assert Page(evaluation.section("x", ("a", other), ("b", keyed(before[0])), 1)).rows["Accuracy"] == ["1", "0.0 %"]


def test_samples_of_a_question_are_one():
    answers = [[(False, True), (False, True)], [(False, False), (True, True)]]
    assert evaluation.change_row("x", answers) == ["x", 2, "25.0 %", "75.0 %", "+50.0 \u00b1 98.0"]


def test_only_given_runs_and_a_damaged_one(image, tmp_path):
    """What lies beside them is not read, what is damaged is named; a page of somebody else stays."""
    runs = tmp_path / "runs"
    write_run(runs / "eval/sft", record(image, right=False))
    write_run(runs / "eval/rppo", record(image))
    write_run(runs / "old", record(image), name="old")
    write_run(runs / "sft", log=[dict(step=0, seconds=1.0, loss=2.0)])
    evaluation.report([str(runs)])
    page = (runs / "report.html").read_text()
    assert Page(page).rows["Accuracy"][1:3] == ["0.0 %", "100.0 %"] and "old" not in Page(page).texts
    assert "threads: 3, commit c0ffee: rppo.py --lam=0" in page and "Imitation" in page

    (runs / "sft/config.json").write_text("{")
    evaluation.report([str(runs)])
    page = (runs / "report.html").read_text()
    assert "sft is damaged" in page and Page(page).rows["Accuracy"][1:3] == ["0.0 %", "100.0 %"]

    (runs / "report.html").write_text("mine")
    refused("report.html is another file", evaluation.report, [str(runs)])
    refused("no run in nowhere", evaluation.main, evaluation.Config(report="nowhere"))


def test_equal_answers_are_shown_once(image, tmp_path):
    """The scores of one cold start in two folders are no change; what has no examples has no heading for them."""
    runs = [write_run(tmp_path / name, record(image, right=name == "c")) for name in "abc"]
    evaluation.write_report(runs, str(tmp_path / "report.html"))
    html = (tmp_path / "report.html").read_text()
    assert html.count("<table>") == html.count("<details>") == 1 and f"{runs[2]} after {runs[0]}" in html
    evaluation.write_report(runs[:2], str(tmp_path / "report.html"))
    assert Page((tmp_path / "report.html").read_text()).rows["Accuracy"] == ["1", "0.0 %"]


def test_hostile_text_stays_text(image, tmp_path):
    bad = record(image, problem=HOSTILE, solution=HOSTILE, answer=HOSTILE + "\ud800", category=HOSTILE, right=False)
    bad["turns"][0].update(text=HOSTILE, error=HOSTILE, box=None)
    run = write_run(tmp_path / "<b>a", bad, record(HOSTILE, 1), log=[dict(step=0, seconds=1.0, reward=1.0)])
    evaluation.refresh_report(tmp_path, run)
    html = (tmp_path / "report.html").read_text()
    assert not Page(html).find("script") and len([text for text in Page(html).texts if HOSTILE in text]) > 4
    assert HOSTILE not in html and "http" not in html and "<b>a" not in html


def test_size(image, tmp_path):
    """Four runs with many answers stay small."""
    many = [record(image, i, right=i % 2 == 0, boxes=[[0, 0, 399, 199]] * 4) for i in range(800)]
    runs = [write_run(tmp_path / name, *many) for name in "abcd"]
    evaluation.refresh_report(tmp_path, *runs)
    assert (tmp_path / "report.html").stat().st_size < 2_000_000
