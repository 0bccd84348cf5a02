"""Is an answer right? The rules of the reward and of every benchmark, without a judge."""
import random
import time

import pytest

from env import choice, match

# Answers between bars, under the letter that they name.
OPTIONS = ["red", "dark green", "blue", "A.M.", "a big car"]
ANSWERS = {
    "A": "A | The answer is A | A is correct | A red | A. red | A: red | The color is red. | Answer: red"
         " | It's red | The car is red in the picture | A\n\nThe crop shows it",
    "B": "B | b | (B) | (B). | B. | **B** | `B` | 'B' | B: | B. dark green | (B) dark green | B) dark green"
         " | B: dark green | B.dark green | b) dark green | B. green | B. Because I saw it"
         " | B, dark green | B dark green | dark green | Dark Green. | dark\n green | the dark green | \"dark green\""
         " | The answer is B | the answer is b | Answer: (B). | Answer:B | **Answer:** B"
         " | So, the best answer is: B | Option B is correct | Option “B” | \\boxed{B}"
         " | The answer is $\\boxed{\\text{B}}$. | \\boxed{A} or \\boxed{B} | I choose B."
         " | the answer is dark green | It is dark green, not red | B. Dark green, not red",
    "D": "A.M. | It was 5 A.M.",
    "E": "a big car | A big car | big car | A big car is there | I see a big car there",
    None: "A red car | A red car is there | A truck is on the left | A Nissan | A) or B) | A. B. C. D."
          " | A.B.C.D. | B or C | B/C | A\nB | A B | ABCD | red or blue | \\boxed{A or B} | B. red"
          " | B is right, A is not | green | answer | F |  | ... | The answer is not B | not red"
          " | It isn't red | reddish | infra-red | vitamin B-12 | I cannot say | E. coli bacteria",
}


@pytest.mark.parametrize("named", ANSWERS)
def test_choice(named):
    """Letters and words of options, alone or in a sentence. What names none or several is no answer."""
    for answer in ANSWERS[named].split(" | "):
        for i, letter in enumerate("ABCDE"):
            right = letter == named
            assert match(answer, {"solution": letter, "choices": OPTIONS}) is right, answer
            assert match(answer, {"solution": OPTIONS[i], "choices": OPTIONS}) is right, answer


@pytest.mark.parametrize("options, answer, named", [
    ("B | A | C", "A", 0),  # the letter, not the text
    ("green | dark green", "It is dark green", 1),
    ("green | dark green", "green, or dark green", None),
    ("5 | 3.5", "It says 3.5", 1),
    ("not visible | on the left", "The dog is not visible", 0),
])
def test_options(options, answer, named):
    assert choice(answer, options.split(" | ")) == named


@pytest.mark.parametrize("solution, accepted, refused", [
    ("red", 'red |  The RED.  | "red" | **red** | Answer: red | \\boxed{\\text{red}} | The answer is red.',
     "reddish |  | not red"),
    ("Apple\n  pie", "an apple pie | The apple pie", "pie | theapple pie"),
    (["crimson", "red"], "red | crimson", "blue"),
    ("*", "*", "? | ** |  | ( | ..."),
    ("3", "3 | 3.0 | 3. | three | Three. | \\boxed{3} | The answer is 3 | It is $\\boxed{3}$. | 3 dots",
     "-3 | 4 | four | nan | 3.00001 | 3-5 | 3–5 | 3 or 4 | \\boxed{4} | \\boxed{\\frac{3}{4}} | 3 or more"),
    ("2", "2 cats | two black cats | There are 2 cats.", "3 cats | 2 million | 2 cats and a dog | 1e999"),
    ("3-5", "3–5 | 3 – 5 | 3−5", "3 | 5 | -2"),
    ("12%", "12 % | 12 percent | 12", "$12 | 12 dollars"),
    ("3000.5", "3,000.5 | $3,000.50", "300,0.5 | 3000"),
    ("3.1416", "3.14159", "3.15"),
    ("-3", "−3", "3"),
    ("$5", "5", "5% | 5 %"),
    ("1e998", "1e998", "1e999"),
    ("9" * 15, "9" * 15, "9" * 14 + "8"),
])
def test_open_answers(solution, accepted, refused):
    """Numbers by value, a count with its noun, the rest as normalised text, lists by any entry."""
    for answer in accepted.split(" | "):
        assert match(answer, {"solution": solution}), answer
    for answer in refused.split(" | "):
        assert not match(answer, {"solution": solution}), answer


PIECES = list("ABEabe019 .,;:!?()[]{}$%€*'\"\\|^+-−–\n\0²٣İ\ud800🙂")
PIECES += "\\boxed{ | \\text{ | The answer is  |  not  | a  | 1e | red | ,000 | A. a  | A) ".split(" | ")


def test_hostile_texts():
    """50,000 texts: none raises an exception, as answer, option or solution."""
    draw = random.Random(0)
    for _ in range(50_000):
        text = "".join(draw.choices(PIECES, k=draw.randrange(1, 14)))
        match(text, {"solution": "B", "choices": OPTIONS})
        match("B", {"solution": text, "choices": [text, "red"]})
        assert match(text, {"solution": text})


def test_linear_time():
    """A text of 100,000 characters takes a fraction of a second."""
    start = time.time()
    for piece in PIECES[-10:] + list(" .1A(*-"):
        text = (piece * 100_000)[:100_000] + "!"
        match(text, {"solution": "B", "choices": OPTIONS})
        match(text, {"solution": "3"})
    assert time.time() - start < 60
