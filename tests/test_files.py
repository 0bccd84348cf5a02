"""What env.py reads: images, image paths, rows. And what no file of the project runs."""
import ast
import json
import math
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

import data
import env
from conftest import ROOT, picture, refused


def test_readable_images(tmp_path):
    """RGB of 8 bits, upright, an animation's first frame, what is transparent on white."""
    red = Image.new("RGB", (60, 40), (200, 0, 0))
    clear = red.convert("RGBA")
    clear.paste((0, 0, 0, 0), (0, 0, 30, 40))
    exif = red.getexif()
    exif[274] = 6                        # stored lying on its side
    red.save(tmp_path / "turned.jpg", exif=exif, quality=95)
    red.convert("CMYK").save(tmp_path / "cmyk.jpg", quality=95)
    red.save(tmp_path / "animated.webp", save_all=True, append_images=[red.rotate(9)], lossless=True)
    clear.save(tmp_path / "white.png")
    palette = clear.quantize(8)
    palette.save(tmp_path / "white.gif", transparency=palette.getpixel((0, 0)))
    for name, pixels in (("grey.png", np.full((40, 60), 51400, np.uint16)),          # 200 of 255
                         ("grey.tiff", np.full((40, 60), 3212, np.uint16)),          # of 12 bits
                         ("grey-i.tiff", np.full((40, 60), 51400, np.int32)),
                         ("grey-1.tiff", np.full((40, 60), 200.4 / 255, np.float32)),
                         ("grey-255.tiff", np.full((40, 60), 200.4, np.float32))):
        Image.fromarray(pixels).save(tmp_path / name)
    for path in tmp_path.iterdir():
        image = env.open_image(path)
        size = (40, 60) if path.stem == "turned" else (60, 40)
        colour = dict(white=(255, 255, 255), grey=(200, 200, 200)).get(path.stem.split("-")[0], (200, 0, 0))
        assert (image.mode, image.size) == ("RGB", size), path
        assert np.abs(np.subtract(image.getpixel((3, 3)), colour)).max() <= 6, path
    floats = Image.fromarray(np.full((2, 2), 0.7, np.float32))
    assert env.to_rgb(floats).getpixel((0, 0)) == (178, 178, 178)                  # 0.7 * 255 = 178.5


def test_unreadable_images(tmp_path, monkeypatch):
    """One line that names the file. What its header tells is refused before its pixels are read."""
    Image.new("1", (14_000, 14_000)).save(tmp_path / "bomb", "png")
    Image.new("1", (1, 101)).save(tmp_path / "thin", "png")
    Image.effect_noise((60, 40), 90).save(tmp_path / "half", "png")
    (tmp_path / "half").write_bytes((tmp_path / "half").read_bytes()[:900])
    (tmp_path / "empty").touch()
    Image.new("RGB", (60, 40)).save(tmp_path / "photo.jpg", "eps")        # Ghostscript would run it
    Image.fromarray(np.full((40, 60), np.nan, np.float32)).save(tmp_path / "half-nan", "tiff")
    to_rgb, opened = env.to_rgb, []
    monkeypatch.setattr(env, "to_rgb", lambda image: opened.append(image) or to_rgb(image))
    for path in tmp_path.iterdir():
        refused(f"{path.name}: not a readable image.*remove its row", env.open_image, path)
    assert len(opened) == 2                      # half, half-nan


def test_image_root(tmp_path):
    """With a root a path cannot lead out of it: not by .., not absolutely, not into a like name. A link
    counts as what it is in: the files of the Hugging Face hub's cache are links to ../../blobs."""
    root = tmp_path / "root"
    for folder in (root, tmp_path / "root2", tmp_path / "blobs"):
        folder.mkdir()
        (folder / "x.png").touch()
    (root / "blob.png").symlink_to("../blobs/x.png")
    (root / "link").symlink_to(tmp_path / "blobs")
    for path in ("x.png", "a/../x.png", str(root / "x.png"), "blob.png", "link/x.png"):
        expected = str(root / path).replace("a/../", "")
        assert data.find_image(str(root), path, "row 5", True) == expected
    for path in ("../root2/x.png", "link/../../root2/x.png", "/etc/passwd", "..", "x\0/../../y\ud800"):
        refused("row 5: .*outside", data.find_image, str(root), path, "row 5", True)


ROW = {"images": ["a.png"], "problem": "<image>a\u2028b", "solution": "red", "extra": "é"}


def load(folder, text, image_root=""):
    """Read a text as the rows of a file beside a.png."""
    (folder / "a.png").touch()
    (folder / "x.json").write_text(text, encoding="utf-8")
    return data.load_rows(f"{folder}/x.json", image_root)


def test_rows(tmp_path):
    """A JSON list and JSON Lines give the same rows: absolute paths, unknown fields, no <image>, a name."""
    line = json.dumps(ROW, ensure_ascii=False)
    expected = {**ROW, "images": [f"{tmp_path}/a.png"], "problem": "a\u2028b"}
    for text, root in ((f"[{line},\n{line}]", ""), (f"\ufeff{line}\n\n{line}\n", str(tmp_path))):
        rows = load(tmp_path, text, root)
        assert rows == [{**expected, "doc_id": f"x.json: row {i}"} for i in range(2)]
    for text, message in (("[" * 100_000, ": not JSON"), ("", ": no rows"), ("5", ": row 0 has no"),
                          ("PAR1\0", " is Parquet.*README")):
        refused(f"x.json{message}", load, tmp_path, text)


def test_splits(tmp_path):
    """DRIM's train.json is read under its own name, and no scenes are drawn beside it."""
    assert data.split_path(tmp_path, "train") == f"{tmp_path}/train.jsonl" and not data.has_other_rows(tmp_path)
    (tmp_path / "train.json").touch()
    assert data.split_path(tmp_path, "train") == f"{tmp_path}/train.json" and data.has_other_rows(tmp_path)
    (tmp_path / "train.jsonl").touch()
    assert data.split_path(tmp_path, "train") == f"{tmp_path}/train.jsonl"


@pytest.mark.parametrize("line", r"""{"solution": null} -> has no `solution`
{"images": ["b.png"]} -> : no image
{"images": ["a.png", "a.png"]} -> : .*several images are not supported
{"solution": [null]} -> has no `solution`
{"choices": ["red", "blue"], "solution": ["red", "green"]} -> : its solution 'green' is none of its choices
{"choices": "red"} -> : `choices` is not a list of texts
{"choices": ["B", "red"], "solution": "B"} -> : its solution B is the letter of one .* write 'B. red'
{"turns": [5]} -> : `turns` is not a list of texts
{"boxes": [1, 2, 3, 4]} -> : `boxes` is not a list of boxes
{"boxes": [[1, 2, 3]]} -> : .1, 2, 3. in `boxes` is not .x0, y0, x1, y1. in pixels
{"boxes": [[1, 2, 3, HUGE]]} -> : .* in `boxes` is not
{"boxes": [[0.1, 0.2, 0.3, 0.4]]} -> : .* in `boxes` is not
{"boxes": [[9, 2, 3, 4]]} -> : .* in `boxes` is not
{"problem": "\ud83d"} -> has half a character""".splitlines())
def test_bad_rows(line, tmp_path):
    """What is wrong is one line that names file and row."""
    change, message = line.replace("HUGE", "1" + "0" * 400).split(" -> ")
    refused("x.json: row 0 ?" + message, load, tmp_path, json.dumps({**ROW, **json.loads(change)}))


def test_rows_are_checked_before_hours_are_spent(tmp_path, policy):
    """An image that is cut short, and a question that is too long, each on the rank whose question it is."""
    picture(0, (90, 70)).save(tmp_path / "a.png")
    cfg = env.EpisodeConfig(max_pixels=64 * 64)
    rows = []
    for i in range(3):
        rows.append({"images": [str(tmp_path / "a.png")], "problem": "Which box? " * i, "doc_id": i})
    n = len(env.reset(policy.proc, rows[2], cfg).ids) + 2

    def check(rank, world_size, **change):
        data.check_rows(rows, rank, world_size, policy.proc, replace(cfg, **change))

    check(0, 1, max_tokens=n)
    check(3, 4, max_tokens=1)                    # there are three questions: none is this rank's
    refused("row 2: its prompt of .*max_tokens", check, 0, 1, max_tokens=n - 1)
    (tmp_path / "a.png").write_bytes((tmp_path / "a.png").read_bytes()[:-30])
    refused("a.png: not a readable image", check, 0, 1)


@pytest.mark.parametrize("key", [*ROW, "choices", "boxes", "turns", "doc_id"])
def test_hostile_rows(key, tmp_path):
    """Any value in any field is a row or one printable line."""
    for value in (5, math.nan, "\x1b[2J\n", "\ud800", "a\0b", [None], ["\ud800"], [[]], {"a": 1}):
        try:
            load(tmp_path, json.dumps({**ROW, key: value}), str(tmp_path))
        except env.UserError as e:
            assert str(e).isprintable() and "x.json: row 0" in str(e)


@pytest.mark.parametrize("name", ["env", "sft", "eval", "data", "rppo"])
def test_nothing_evaluates_or_unpickles(name):
    """No file runs or unpickles what it reads."""
    source = (ROOT / f"{name}.py").read_text()
    assert "import pickle" not in source and "from pickle" not in source
    for node in ast.walk(ast.parse(source)):
        called = ast.unparse(node.func) if isinstance(node, ast.Call) else None
        assert called not in ("eval", "exec", "compile", "__import__", "os.system", "torch.load", "np.load")
