# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Images of coloured shapes, questions about them, and a tokenizer of their words."""

import random
from dataclasses import dataclass

from PIL import Image, ImageDraw
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

SIDE = 32
SHAPES = ("circle", "square", "triangle")
COLORS = {
    "red": (220, 30, 30),
    "green": (30, 180, 30),
    "blue": (40, 40, 230),
    "yellow": (230, 220, 30),
}
COUNTS = ("one", "two", "three")
CORNERS = ((1, 1), (17, 1), (1, 17), (17, 17))
IMAGE_ID = 0
SPECIAL = ("<image>", "<user>", "<assistant>", "<end>")
WORDS = (*SHAPES, *COLORS, *COUNTS, "yes", "no")
ASKED = ("what", "shape", "color", "how", "many", "same", "?")

CHAT_TEMPLATE = (
    "{% for message in messages %}<{{ message.role }}> "
    "{% if message.content is string %}{{ message.content }} {% else %}"
    "{% for part in message.content %}"
    "{% if part.type == 'text' %}{{ part.text }}{% else %}<image>{% endif %} "
    "{% endfor %}{% endif %}"
    "{% if message.role == 'assistant' %}<end> {% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@dataclass(frozen=True)
class Drawing:
    """An image, and what is on it."""

    image: Image.Image
    shape: str
    color: str
    count: str

    def answer(self, question: str) -> str:
        """To one of `QUESTIONS`."""
        answers = {"shape": self.shape, "color": self.color, "many": self.count}
        return answers[question.split()[1]]


QUESTIONS = ("what shape ?", "what color ?", "how many ?")
QUESTION_OF_TWO = "same color ?"


def draw(random: random.Random) -> Drawing:
    """One to three shapes of one kind and color, each in a corner of its own."""
    shape, color = random.choice(SHAPES), random.choice(list(COLORS))
    count = random.randrange(1, 4)
    gray = random.randrange(90)
    image = Image.new("RGB", (SIDE, SIDE), (gray, gray, gray))
    pen = ImageDraw.Draw(image)
    for x, y in random.sample(CORNERS, count):
        size = random.randrange(10, 13)
        x, y = x + random.randrange(3), y + random.randrange(3)
        box = (x, y, x + size, y + size)
        if shape == "circle":
            pen.ellipse(box, fill=COLORS[color])
        elif shape == "square":
            pen.rectangle(box, fill=COLORS[color])
        else:
            corners = [(x + size // 2, y), (x, y + size), (x + size, y + size)]
            pen.polygon(corners, fill=COLORS[color])
    return Drawing(image, shape, color, COUNTS[count - 1])


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A token for each word."""
    vocab = {word: index for index, word in enumerate((*SPECIAL, *WORDS, *ASKED))}
    words = Tokenizer(models.WordLevel(vocab, unk_token="?"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words,
        eos_token="<end>",
        additional_special_tokens=list(SPECIAL),
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer
