"""Published benchmarks in their exact layouts, as our rows."""
import base64
import csv
import io
import json
import os
import re

import pytest
from conftest import picture, refusal

import data
import env


def base64_of(image):
    out = io.BytesIO()
    image.resize((90, 70)).save(out, "PNG")
    return base64.b64encode(out.getvalue()).decode()


def write_tsv(path, lines):
    with open(path, "w", newline="", encoding="utf-8") as f:
        writer = csv.DictWriter(f, list(lines[0]), delimiter="\t")
        writer.writeheader()
        writer.writerows(lines)
    return str(path)


def read(path, image_root="", limit=0, bench="bench"):
    """The rows of a benchmark of which none is left out."""
    benches, left_out = data.read_benches(f"{bench}:{path}", image_root, limit)
    assert not any(left_out.values())
    return benches[bench]


LINE = {"question": "Which?", "A": "red", "B": "blue", "answer": "B", "image": base64_of(picture())}
MME = ["red", "blue", "a, b", 'the "sign"', "The image does not feature the text."]
MME_TEXT = ["(A) red", "(B) blue", "(C) a, b", '(D) the "sign"', "(E) The image does not feature the text."]
TIR = {"id": 1, "task": "refcoco", "answer": "B", "prompt": "How much?\nA: 65%\nB: 73%", "image_1": "a.png",
       "image_2": None, "meta_data": {"difficulty": 3}}
ZOOM = {"images": ["a.png"], "response": "A", "question_type": "mcq", "bbox": [1, 2, 30, 40],
        "query": "<image>Which?\nA. red\nB. blue\nC. green"}


@pytest.mark.parametrize("item, expected", [
    (LINE, dict(problem="Which?\nA. red\nB. blue\nAnswer with the letter of the right option.", category="")),
    ({**LINE, "question": "Gate (A) is open.", "A": "red\nA. or so"}, dict(choices=["red A. or so", "blue"])),
    ({**LINE, "hint": "Look up."}, dict(problem="Hint: Look up.\nWhich?\nA. red\nB. blue\nAnswer with the "
                                        "letter of the right option.")),
    ({**LINE, "image": "", "image_path": "a.png"}, dict(solution="B")),              # a _local.tsv
    ({**LINE, **dict(zip("ABCDE", MME)), "answer": "E",
      "category": "Perception/OCR", "l2-category": "Text/Sign",
      "multi-choice options": "The choices are listed below:\n" + "\n".join(MME_TEXT)},
     dict(choices=MME, solution="E", category="Perception/OCR/text/sign")),
    ({**LINE, "A": "", "B": "", "multi-choice options": str(MME_TEXT)}, dict(choices=MME)),      # Lite
    ({**LINE, **dict(zip("CDEFGHIJK", "cdefghijk")), "answer": "K", "target_instances": "[[1, 2, 30, 40]]",
      "category": "Perception/OCR", "l2-category": "Perception/OCR"},                # TreeBench
     dict(choices=["red", "blue", *"cdefghijk"], boxes=[[1, 2, 30, 40]], category="Perception/OCR")),
    ({**LINE, "A": "", "B": "", "answer": "7"}, dict(choices=[], problem="Which?")),
    ({**LINE, "B": "", "C": "green", "answer": "C"}, "its options are not A, B .*A. red.*C. green"),
    ({**LINE, "A": "", "B": "", "multi-choice options": "['(A) ', '(B) blue']"}, "its options are not A, B"),
    ({**LINE, "A": "", "B": ""}, "its options are not A, B"),
    ({**LINE, "image": "['" + "a" * 90 + "', '" + "b" * 90 + "']"}, "several images are not supported"),
    (TIR, dict(choices=["65%", "73%"], solution="B", category="refcoco")),
    ({**TIR, "prompt": "Which piece?", "answer": "[2, 1]"}, dict(choices=[], solution="[2, 1]")),
    ({**TIR, "image_2": "a.png"}, "several images"),
    (ZOOM, dict(choices=["red", "blue", "green"], boxes=[[1, 2, 30, 40]], category="mcq")),
    ({**ZOOM, "query": "Which?", "options": ["red", "blue"], "response": "B"},
     dict(choices=["red", "blue"], solution="B", problem="Which?\nA. red\nB. blue\nAnswer with the letter of the right"
          " option.")),
    ({**ZOOM, "query": "Which?", "choices": {"x": "red"}}, "its options are not A, B"),
    ({**ZOOM, "query": "Which? (A) red (B) blue"}, "its options are not A, B"),
    ({**ZOOM, "query": "What?", "response": ["cat", "kitty"]}, dict(choices=[], solution=["cat", "kitty"])),
    ({**ZOOM, "query": "Which?\nB. red\nC. blue", "response": "red"}, dict(choices=[], solution="red")),
    ({**ZOOM, "query": "哪个？\n（A）红\n（B）蓝"}, dict(choices=["红", "蓝"])),
    ({"problem": "Which?", "images": ["b.png"], "solution": "7"}, "no image .*b.png"),     # one of our rows
    ({**ZOOM, "response": ""}, "no `solution`")])
def test_columns(tmp_path, item, expected):
    """A TSV or JSON is read by its columns. What cannot be asked is left out with its row and cause; letters
    keep their place, and no option is guessed."""
    picture().save(tmp_path / "a.png")
    path = tmp_path / "x.tsv"
    if "image" in item:
        write_tsv(path, [{**dict.fromkeys(item, ""), **LINE}, item])
    else:
        path = tmp_path / "x.json"
        path.write_text(json.dumps([TIR, item]))
    benches, left_out = data.read_benches(f"x:{path}", "", 0)
    if isinstance(expected, str):
        assert re.search(f"{path}: row 1:? .*{expected}", *left_out["x"]) and len(benches["x"]) == 1
    else:
        assert not left_out["x"] and expected.items() <= benches["x"][1].items()


def test_what_is_refused(tmp_path):
    """One line that names the path, and why."""
    (tmp_path / "y.json").write_text(json.dumps([TIR]))
    for spec, reason in ((f"x:{tmp_path}", "test_questions"), ("x:/no", "NAME:PATH"),
                         (f"a/b:{tmp_path}", "a word"), (f"x:{tmp_path}/y.json", "no questions .*a.png")):
        assert re.search(spec.split(":")[1] + ".*" + reason, refusal(data.read_benches, spec, "", 0))


def test_hrbench(tmp_path):
    """A question in four rotations: its first line has the image, the others its index. Images are unpacked
    once and shared."""
    lines, options = [], ["red", "blue", "green", "grey"]
    for i in range(8):
        turned = options[i % 4:] + options[:i % 4]
        image = i - i % 4 if i % 4 else base64_of(picture(i))
        line = {"index": i, "image": image, "question": f"Which, {i // 4}?", "cycle_category": i % 4}
        line.update(zip("ABCD", turned))
        line.update({"answer": "ABCD"[turned.index("red")], "category": "cross" if i < 4 else "single"})
        lines.append(line)
    tsv = write_tsv(tmp_path / "hr_bench_4k.tsv", lines[::-1])    # the image after the lines that refer to it
    rows = read(tsv)
    assert len(rows) == 8 and rows[0]["images"] == rows[3]["images"] != rows[4]["images"]
    assert rows[7]["category"] == "cross"
    assert env.open_image(rows[3]["images"][0]).getpixel((0, 0)) == (80, 90, 160)
    before = os.stat(rows[0]["images"][0])
    assert read(tsv, limit=5) == rows[:5]
    assert os.stat(rows[0]["images"][0]) == before and len(os.listdir(tsv + ".images")) == 2


def test_visualprobe(tmp_path):
    """BASE/VisualProbe_Hard/val.json, images relative to BASE: three levels, each under its own name,
    and one alone."""
    for level in ("Easy", "Medium", "Hard"):
        image = f"VisualProbe_{level}/images/0.jpg"
        os.makedirs((tmp_path / image).parent)
        picture().save(tmp_path / image)
        row = {"problem": "<image>\nWhat?", "images": [image], "solution": level}
        (tmp_path / f"VisualProbe_{level}/val.json").write_text(json.dumps([row, row]))
    benches, _ = data.read_benches(f"visualprobe:{tmp_path}", "", 1)
    assert set(benches) == {"visualprobe_easy", "visualprobe_medium", "visualprobe_hard"}
    [row] = benches["visualprobe_hard"]
    assert [row] == read(tmp_path / "VisualProbe_Hard", limit=1, bench="visualprobe_hard")
    assert row["solution"] == "Hard" and row["problem"] == "What?"
    assert row["images"] == [str(tmp_path / image)]


def test_vstar(tmp_path):
    """The folder's questions without OCR and GPT4V-hard, with the letters and boxes."""
    options = ["The cap is (dark) grey.", "The cap is red."]
    lines = []
    for category in ("direct_attributes", "relative_position", "OCR", "GPT4V-hard"):
        os.makedirs(tmp_path / category)
        picture().save(tmp_path / category / "sa_1.jpg")
        item = {"target_object": ["cap"], "bbox": [[10, 20, 5, 6]], "options": options[::-1]}
        (tmp_path / category / "sa_1.json").write_text(json.dumps(item))
        text = f"Which?\n(A) {options[0]}\n(B) {options[1]}\nAnswer with the option's letter from the ..."
        line = {"image": f"{category}/sa_1.jpg", "text": text, "label": "B", "category": category}
        lines.append(json.dumps(line))
    (tmp_path / "test_questions.jsonl").write_text("\n".join(lines))
    rows = read(tmp_path)
    assert [row["category"] for row in rows] == ["direct_attributes", "relative_position"]
    expected = dict(choices=options, solution="B", boxes=[[10, 20, 15, 26]],
                    images=[str(tmp_path / "direct_attributes/sa_1.jpg")])
    assert expected.items() <= rows[0].items()
