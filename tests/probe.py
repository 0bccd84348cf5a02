"""Does a built-in task need the tool? A slow test on its own: python tests/probe.py tiny (or large).

Claim: the whole view, as the policy sees it, tells neither the answer nor which look-alike is the target,
and a crop tells the answer. A CNN is trained on the whole views of 8,192 scenes, and another one on crops of
the target; both are tested on 2,048 fresh scenes. The claim is refuted for target or answer if the CNN is
more than 3 points above chance from the whole view (a standard deviation is about 1 point). If it is more
than 3 points below chance, or reads less than 97 % from the crop, it is too weak: the test shows nothing, and
fails as well. Chance for the target is one look-alike at random: to be there, the CNN must have found them.
An answer is told by its first letter: of a code, too, no letter may be readable.

tiny: the whole view and the question go in; the target's cell and the answer come out.
large: the CNN is given what a policy has to find, the labels of the look-alikes, cut out of the whole view
and put one below the other. Nothing else in the view depends on target and answer, so this bounds what 2
megapixels can tell. To save time the scenes have 1280 pixels, shrunken by the same factor as 4096 pixels are.

With a number of scenes, python tests/probe.py large 256 only shows that the script works.
"""
import os
import sys
import time
from dataclasses import replace

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), ".."))
import env  # noqa: E402, before torch: see there
import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F

import data

SEED = 9
ASKED = [f"One {colour} box" for colour in data.COLOURS] + ["dots", "sign", "bars", "code"]


class Probe(torch.nn.Module):
    """images uint8 (B, H, W, 3), asked (B, 10) -> logits of cells (B, rows * columns) and letters (B, 128).

    An image has rows x columns cells, each pooled to parts x parts. stride: of the first layer."""

    def __init__(self, rows, columns, parts, stride):
        super().__init__()
        self.pooled = rows * parts, columns * parts
        self.parts = parts
        self.first = torch.nn.Conv2d(3 + len(ASKED), 32, stride + 2, stride, padding=1)
        self.second = torch.nn.Conv2d(32, 64, 3, padding=1)
        self.third = torch.nn.Conv2d(64, 64, 3, padding=1)
        self.cell = torch.nn.Linear(64 * parts ** 2, 1)
        self.letter = torch.nn.Linear(64 * parts ** 2, 128)

    def forward(self, images, asked):
        x = images.permute(0, 3, 1, 2).float() / 64 - 2.5
        asked = asked[..., None, None].expand(-1, -1, *x.shape[2:])
        x = torch.cat([x, asked], 1)
        x = self.first(x).relu()
        x = self.second(x).relu()
        x = F.max_pool2d(x, 2)
        x = self.third(x).relu()
        x = F.adaptive_max_pool2d(x, self.pooled)
        x = F.unfold(x, self.parts, stride=self.parts).mT          # (B, cells, features)
        cell = self.cell(x)[..., 0]
        letter = self.letter(x) * cell.softmax(1)[..., None]
        return cell, letter.sum(1)


def seen(shown, factor):
    """An image as the policy sees it: uint8 (H, W, 3)."""
    return np.array(shown.resized(factor))


def tiny_example(image, question):
    """Whole view, the target's cell in it, and the crop of that cell."""
    cfg = env.EpisodeConfig()
    shown = env.start_episode({"images": [image]}, cfg).shown
    for cell, box in question["tiles"].items():
        if box == question["evidence"]:
            target = cell
    corner = data.corner_of(target, 1000 // data.GRID)
    look = data.crop_call(np.append(corner, corner + 1000 // data.GRID))
    crop = env.crop(env.parse_action(look), shown, cfg)
    return seen(shown[0], 16), target, seen(crop, 16)


def large_example(image, question):
    """The labels as in the whole view, which of them is the target's, and the crop of that."""
    cfg = env.EpisodeConfig(**env.REAL_EPISODE)
    cfg.max_pixels = 440 ** 2                      # 1280 / 440 = 4096 / 1408
    [whole] = env.start_episode({"images": [image]}, cfg).shown
    view = seen(whole, 8)
    labels = np.zeros((6, 64, 64, 3), np.uint8)
    for i, box in enumerate(question["tiles"].values()):
        corner = np.multiply(box[:2], 440 / 1280)
        x, y = np.rint(corner).astype(int) + 1
        labels[i] = view[y:y + 64, x:x + 64]       # the label has 66 pixels
        if box == question["evidence"]:
            target = i
            crop = env.Shown(image, box, cfg.min_crop_pixels, cfg.max_crop_pixels)
    return labels.reshape(-1, 64, 3), target, seen(crop, 32)


# The scenes; and of the probes of whole views and of crops the epochs, rows, columns, parts and stride.
TINY = data.TASKS["tiny"], tiny_example, (10, 4, 4, 1, 2), (3, 1, 1, 4, 2)
LARGE = replace(data.TASKS["large"], size=1280), large_example, (10, 6, 1, 4, 2), (12, 1, 1, 16, 4)


def make_examples(task, example, n):
    """Tensors of n scenes: whole views, crops, what is asked, target, first letter, chances of these two."""
    columns = [], [], [], [], [], [], []
    for i in range(n):
        rng = np.random.default_rng([SEED, i])
        image, [question, _] = data.make_scene(rng, task)
        view, target, crop = example(image, question)
        asked = [float(words in question["problem"]) for words in ASKED]
        letter = ord(question["answer"][0])
        chance = 1 / len(question["tiles"])
        guess = 1 / len({answer[0] for answer in question["answers"]})
        values = view, crop, asked, target, letter, chance, guess
        for column, value in zip(columns, values):
            column.append(torch.as_tensor(value))
    return [torch.stack(column) for column in columns]


def trained(images, asked, target, letter, epochs, *shape):
    """A probe trained on all examples."""
    torch.manual_seed(SEED)
    model = Probe(*shape).to(memory_format=torch.channels_last)          # twice as fast on a CPU
    steps = len(images) // 64
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, epochs=epochs, steps_per_epoch=steps)
    for _ in range(epochs):
        for at in torch.randperm(len(images))[:steps * 64].split(64):
            cell_logits, letter_logits = model(images[at], asked[at])
            loss = F.cross_entropy(letter_logits, letter[at])
            if cell_logits.shape[1] > 1:
                loss = loss + F.cross_entropy(cell_logits, target[at])
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
    return model


@torch.no_grad()
def right(model, images, asked, target, letter):
    """Shares of examples with the right cell and with the right letter."""
    found = told = 0
    for at in torch.arange(len(images)).split(128):
        cell_logits, letter_logits = model(images[at], asked[at])
        cells, letters = cell_logits.argmax(1), letter_logits.argmax(1)
        found += (cells == target[at]).sum().item()
        told += (letters == letter[at]).sum().item()
    return found / len(images), told / len(images)


def main(name, train=8192):
    start = time.perf_counter()
    task, example, whole_shape, crop_shape = {"tiny": TINY, "large": LARGE}[name]
    columns = make_examples(task, example, train + train // 4)
    old = [column[:train] for column in columns]
    views, crops, *rest, chance, guess = [column[train:] for column in columns]
    model = trained(old[0], *old[2:5], *whole_shape)
    found, told = right(model, views, *rest)
    model = trained(old[1], *old[2:5], *crop_shape)
    _, read = right(model, crops, *rest)
    chance = chance.mean().item()
    guess = guess.mean().item()
    seconds = time.perf_counter() - start
    print(f"{name}, {train} scenes, seed {SEED}, {seconds:.0f} s: from the whole view target "
          f"{found:.3f} (chance {chance:.3f}), answer {told:.3f} (chance {guess:.3f}); "
          f"from the crop answer {read:.3f}")
    if train == 8192:
        assert abs(found - chance) < 0.03, "the whole view tells the target, or the CNN is too weak"
        assert abs(told - guess) < 0.03, "the whole view tells the answer, or the CNN is too weak"
        assert read > 0.97, "the CNN is too weak to show anything"


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
