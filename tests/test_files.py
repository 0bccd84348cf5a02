"""What env.py reads: images, image paths, rows. And what no file of the project runs."""
import ast
import json
import math
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import data
import env
from conftest import ROOT


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
                         ("grey-1.tiff", np.full((40, 60), 200.4 / 255, np.float32)),
                         ("grey-255.tiff", np.full((40, 60), 200.4, np.float32))):
        Image.fromarray(pixels).save(tmp_path / name)
    for path in tmp_path.iterdir():
        image = env.open_image(path)
        size = (40, 60) if path.stem == "turned" else (60, 40)
        colour = dict(white=(255, 255, 255), grey=(200, 200, 200)).get(path.stem.split("-")[0], (200, 0, 0))
        assert (image.mode, image.size) == ("RGB", size), path
        assert np.abs(np.subtract(image.getpixel((3, 3)), colour)).max() <= 6, path


def test_unreadable_images(tmp_path):
    """One line that names the file. All but a file that is cut short are refused by their header alone."""
    Image.new("1", (14_000, 14_000)).save(tmp_path / "bomb", "png")
    Image.new("1", (1, 101)).save(tmp_path / "thin", "png")
    Image.effect_noise((60, 40), 90).save(tmp_path / "half", "png")
    (tmp_path / "half").write_bytes((tmp_path / "half").read_bytes()[:900])
    (tmp_path / "empty").touch()
    Image.new("RGB", (60, 40)).save(tmp_path / "photo.jpg", "eps")        # Ghostscript would run it
    Image.fromarray(np.full((40, 60), np.nan, np.float32)).save(tmp_path / "half-nan", "tiff")
    for path in tmp_path.iterdir():
        with pytest.raises(env.UserError, match=f"{path.name}: not a readable image.*remove its row"):
            env.open_image(path, header_only="half" not in path.name)


def test_image_root(tmp_path):
    """With a root a path cannot leave it: not by .., not absolutely, not by a link, not into a like name."""
    root = tmp_path / "root"
    for folder in (root, tmp_path / "root2"):
        folder.mkdir()
        (folder / "x.png").touch()
    (root / "link").symlink_to(tmp_path)
    for path in ("x.png", "a/../x.png", str(root / "x.png"), "link/root/x.png"):
        assert data.find_image(str(root), path, "row 5", True) == str(root / "x.png")
    for path in ("../root2/x.png", "link/root2/x.png", "/etc/passwd", "..", "x\0/../../y\ud800"):
        with pytest.raises(env.UserError, match="row 5: .*outside"):
            data.find_image(str(root), path, "row 5", True)


ROW = {"images": ["a.png"], "problem": "<image>a\u2028b", "solution": "red", "extra": "é"}


def load(folder, text, image_root=""):
    """Read a text as the rows of a file beside a.png."""
    (folder / "a.png").touch()
    (folder / "x.json").write_text(text, encoding="utf-8")
    return data.load_rows(f"{folder}/x.json", image_root)


def test_rows(tmp_path):
    """A JSON list and JSON Lines give the same rows: absolute paths, unknown fields, no <image>."""
    line = json.dumps(ROW, ensure_ascii=False)
    expected = [{**ROW, "images": [f"{tmp_path}/a.png"], "problem": "a\u2028b"}] * 2
    assert load(tmp_path, f"[{line},\n{line}]") == expected
    assert load(tmp_path, f"\ufeff{line}\n\n{line}\n", str(tmp_path)) == expected
    for text, message in (("[" * 100_000, "not JSON"), ("", "no rows"), ("5", "row 0 has no")):
        with pytest.raises(env.UserError, match=f"x.json: {message}"):
            load(tmp_path, text)


@pytest.mark.parametrize("line", """{"solution": null} -> has no `solution`
{"images": ["b.png"]} -> : no image
{"images": ["a.png", "a.png"]} -> : .*several images are not supported
{"choices": ["blue"]} -> : its solution 'red' is none of its choices
{"choices": "red"} -> : .*not a list
{"turns": [5]} -> : .*`turns` not texts
{"boxes": [[1, 2, 3]]} -> : `boxes` are not four numbers each""".splitlines())
def test_bad_rows(line, tmp_path):
    """What is wrong is one line that names file and row."""
    change, message = line.split(" -> ")
    with pytest.raises(env.UserError, match="x.json: row 0 ?" + message):
        load(tmp_path, json.dumps({**ROW, **json.loads(change)}))


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
    source = Path(ROOT, f"{name}.py").read_text()
    assert "import pickle" not in source and "from pickle" not in source
    for node in ast.walk(ast.parse(source)):
        called = ast.unparse(node.func) if isinstance(node, ast.Call) else None
        assert called not in ("eval", "exec", "compile", "__import__", "os.system", "torch.load", "np.load")
