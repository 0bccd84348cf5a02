"""Does a built-in task need the tool? A slow test on its own: python tests/probe.py tiny (or large).

Claim: the whole view, as the policy sees it, tells neither the answer nor which look-alike is the target.
A CNN is trained on whole views, and the same network on crops of the target. The claim is refuted if on fresh
scenes it is more than 3 points above chance from the whole view, for answer or target. If it reads less than
97 % from the crop, the network is too weak and shows nothing. Chance for the target is one look-alike at
random: to be there, the network must have found them.

tiny: the whole view and the asked colour go in; the target's cell and the answer come out.
large: the network is given what a policy has to find. Of each look-alike it is shown the label alone, cut out
of the whole view, and says whether that is the target's; what the target's label says is asked separately.
Nothing else in the view depends on them, so this bounds what 2 megapixels can tell. The labels are drawn in
scenes of 1280 pixels, shrunken by the same factor as 4096 pixels are.
"""
import os
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), ".."))
import env
import scenes

TRAIN, TEST = 8192, 2048
COLOURS, KINDS = list(scenes.COLOURS), list(scenes.KINDS)
CLASSES = [a for k in KINDS[:3] for a in scenes.KINDS[k][2]] + sorted({c[0] for c in scenes.CODES})


class Probe(torch.nn.Module):
    """images (B, H, W, 3), asked (B, 10) -> logits of cells (B, grid ** 2) and answers (B, 3, classes).

    The answer is a code of three letters, or three times the same word. parts: features are pooled to
    parts x parts in each cell. stride: of the first layer."""

    def __init__(self, grid, parts, stride):
        super().__init__()
        self.grid = grid
        self.parts = parts
        self.first = torch.nn.Conv2d(13, 32, stride + 2, stride, padding=1)
        self.second = torch.nn.Conv2d(32, 64, 3, padding=1)
        self.third = torch.nn.Conv2d(64, 64, 3, padding=1)
        self.cell = torch.nn.Linear(64 * parts ** 2, 1)
        self.answer = torch.nn.Linear(64 * parts ** 2, 3 * len(CLASSES))

    def forward(self, images, asked):
        x = images.permute(0, 3, 1, 2).float() / 64 - 2.5
        asked = asked[..., None, None].expand(-1, -1, *x.shape[2:])
        x = F.relu(self.first(torch.cat([x, asked], 1)))
        x = F.max_pool2d(F.relu(self.second(x)), 2)
        x = F.adaptive_max_pool2d(F.relu(self.third(x)), self.grid * self.parts)
        x = x.unflatten(3, (self.grid, self.parts)).unflatten(2, (self.grid, self.parts))
        x = x.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)                # (B, grid ** 2, features)
        cell = self.cell(x)[..., 0]
        answer = (self.answer(x) * cell.softmax(1)[..., None]).sum(1)
        return cell, answer.unflatten(1, (3, len(CLASSES)))


def trained(images, asked, cells, answers, epochs, **shape):
    """A probe trained on all examples; a target of None is not trained."""
    torch.manual_seed(0)
    model = Probe(**shape)
    steps = len(images) // 64
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, epochs=epochs, steps_per_epoch=steps)
    for _ in range(epochs):
        for at in torch.randperm(len(images))[:steps * 64].split(64):
            cell, answer = model(images[at], asked[at])
            loss = 0
            if answers is not None:
                loss = loss + F.cross_entropy(answer.mT, answers[at])
            if cells is not None and cells.is_floating_point():
                loss = loss + F.binary_cross_entropy_with_logits(cell[:, 0], cells[at])
            elif cells is not None:
                loss = loss + F.cross_entropy(cell, cells[at])
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
    return model


def outputs(model, images, asked):
    """Logits of the cells and of the answers of all examples."""
    with torch.no_grad():
        parts = [model(*x) for x in zip(images.split(256), asked.split(256))]
    return torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts])


def share_right(answers, logits):
    """Share of examples with all three letters right; where the answer is no code, the three say the same."""
    word = (answers == answers[:, :1]).all(1)
    logits[word] = logits[word].mean(1, keepdim=True)
    return (logits.argmax(2) == answers).all(1).float().mean().item()


def seen(image, box, least, most, patch):
    """A region as the policy sees it: uint8 (H, W, 3)."""
    geometry = SimpleNamespace(patch=patch, merge=2)
    return env.Processor.view(geometry, image, box, least, most)


def coded(question):
    """What is asked as (10,), and the answer as classes (3,)."""
    asked = torch.zeros(10)
    asked[COLOURS.index(question["colour"])] = 1
    asked[6 + KINDS.index(question["kind"])] = 1
    answer = question["answer"]
    letters = answer if question["kind"] == "text" else [answer] * 3
    return asked, torch.tensor([CLASSES.index(x) for x in letters])


def tiny(n):
    """Whole views, crops of the target's cell, what is asked, cells, answers, chances of n fresh scenes."""
    world, task = env.World(), scenes.TASKS["tiny"]
    side = task.size // scenes.GRID
    columns = [], [], [], [], [], []
    for i in range(n):
        image, questions = scenes.make_scene(np.random.default_rng([9, i]), task)
        q = questions[0]
        x, y = q["target"] % scenes.GRID * side, q["target"] // scenes.GRID * side
        view = seen(image, (0, 0, task.size, task.size), world.min_crop_pixels, world.max_pixels, 8)
        crop = seen(image, (x, y, x + side, y + side), world.min_crop_pixels, world.max_crop_pixels, 8)
        asked, answer = coded(q)
        cell, chance = torch.tensor(q["target"]), torch.tensor(1 / len(q["cells"]))
        for column, value in zip(columns, (view, crop, asked, cell, answer, chance)):
            column.append(value)
    return [torch.stack(column) for column in columns]


def probe_tiny():
    """Accuracies and chances of the tiny task."""
    views, crops, asked, cells, answers, chance = tiny(TRAIN + TEST)
    old = slice(TRAIN)
    shape = dict(grid=4, parts=1, stride=1)
    model = trained(views[old], asked[old], cells[old], answers[old], 10, **shape)
    cell, answer = outputs(model, views[TRAIN:], asked[TRAIN:])
    shape = dict(grid=1, parts=4, stride=1)
    model = trained(crops[old], asked[old], None, answers[old], 3, **shape)
    read = share_right(answers[TRAIN:], outputs(model, crops[TRAIN:], asked[TRAIN:])[1])
    found = (cell.argmax(1) == cells[TRAIN:]).float().mean().item()
    return found, chance[TRAIN:].mean().item(), share_right(answers[TRAIN:], answer), 1 / 5, read


def large(n):
    """Labels of n fresh scenes: as seen in the whole view, in a crop of the label (the target's only), what
    is asked, whether it is the target's, the answer, the number of the question, chance of its answer."""
    task = replace(scenes.TASKS["large"], size=1280)
    shrink = 1408 / 4096                                  # sides of the whole view and of the scene
    columns = [], [], [], [], [], [], []
    number = 0
    for i in range(n):
        image, questions = scenes.make_scene(np.random.default_rng([9, i]), task)
        whole = image.resize((round(1280 * shrink),) * 2, Image.BICUBIC, reducing_gap=3.0)
        for q in questions:
            asked, answer = coded(q)
            chance = torch.tensor(1 / len(scenes.answers_of(q["kind"], q["colour"])))
            for cell, (x, y, x1, y1) in q["tiles"].items():
                at = round(x * shrink) + 1, round(y * shrink) + 1
                view = torch.from_numpy(np.array(whole.crop((*at, at[0] + 64, at[1] + 64))))
                target, crop = cell == q["target"], torch.zeros(0)
                if target:
                    crop = seen(image, (x, y, x1, y1), 65_536, 524_288, 16)
                values = view, crop, asked, torch.tensor(float(target)), answer, torch.tensor(number), chance
                for column, value in zip(columns, values):
                    column.append(value)
            number += 1
    return columns


def probe_large():
    """Accuracies and chances of the large task."""
    views, crops, asked, is_target, answers, number, chance = large((TRAIN + TEST) // 2)
    views, asked, is_target = torch.stack(views), torch.stack(asked), torch.stack(is_target)
    answers, number, chance = torch.stack(answers), torch.stack(number), torch.stack(chance)
    fresh = number >= TRAIN
    model = trained(views[~fresh], asked[~fresh], is_target[~fresh], None, 4, grid=1, parts=4, stride=2)
    logits = outputs(model, views[fresh], asked[fresh])[0][:, 0]
    found, by_chance = 0, 0
    for q in number[fresh].unique():
        mine = number[fresh] == q
        found += is_target[fresh][mine][logits[mine].argmax()].item()
        by_chance += 1 / mine.sum().item()

    target = is_target > 0
    shape = dict(grid=1, parts=8, stride=2)
    old, new = target & ~fresh, target & fresh
    model = trained(views[old], asked[old], None, answers[old], 10, **shape)
    told = share_right(answers[new], outputs(model, views[new], asked[new])[1])

    crops = torch.stack([crop for crop in crops if len(crop)])
    shape = dict(grid=1, parts=16, stride=4)
    n = len(crops) * 4 // 5
    asked, answers = asked[target], answers[target]
    model = trained(crops[:n], asked[:n], None, answers[:n], 12, **shape)
    read = share_right(answers[n:], outputs(model, crops[n:], asked[n:])[1])
    return found / TEST, by_chance / TEST, told, chance[new].mean().item(), read


if __name__ == "__main__":
    probe = {"tiny": probe_tiny, "large": probe_large}[sys.argv[1]]
    found, by_chance, told, guess, read = probe()
    print(f"{sys.argv[1]}: from the whole view target {found:.3f} (chance {by_chance:.3f}), "
          f"answer {told:.3f} (chance {guess:.3f}); from the crop answer {read:.3f}")
    assert found < by_chance + 0.03, "the whole view tells the target"
    assert told < guess + 0.03, "the whole view tells the answer"
    assert read > 0.97, "the network is too weak to show anything"
