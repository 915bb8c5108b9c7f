"""Regular expressions of adapters: what `re` says, in bounded time."""

from __future__ import annotations

import re
from random import Random

import pytest

from tl_fastload import AdapterError
from tl_fastload.huggingface.lora.patterns import matches

# As peft's examples, Unsloth and ms-swift write them.
REAL = (
    r".*\.(q|k|v)_proj",
    r"^(model\.language_model(?=\.).*\.(up_proj|q_proj))$",
    r"(?:.*?(?:language|text).*?(?:self_attn|mlp).*?(?:k_proj|q_proj).*?)|(?:\bmodel\.layers\.[\d]{1,}"
    r"\.(?:self_attn)\.(?:(?:k_proj|q_proj)))",
    r"^(?!.*vision).*q_proj$",
    r"([^.]+\.)*q_proj",
    r"(?i)Q_PROJ|.*\.Q_proj",
    r".*(?<!vision)\.q_proj",
)
NAMES = (
    "model.layers.0.self_attn.q_proj",
    "model.language_model.layers.3.mlp.up_proj",
    "vision.q_proj",
    "q_proj",
    "Q_proj",
    "model.layers.12.mlp.gate_proj",
    "",
)
_ATOMS = "a b . \\. [ab] [^a] \\w (a|ab) (?:b|) ^ $ \\b (?=a) (?!b) (?<=a) \\d [a-c.]".split()
_REPEATS = ("", "", "*", "+", "?", "{1,2}", "*?")


def test_the_answers_are_those_of_re() -> None:
    random, made = Random(1), []
    while len(made) < 300:
        parts = range(random.randint(1, 4))
        made.append("".join(random.choice(_ATOMS) + random.choice(_REPEATS) for _ in parts))
    compared = 0
    for pattern, names in (
        *((pattern, NAMES) for pattern in REAL),
        *((pattern, ("", "a", "ab", "ba.ab", "aab", "b.a")) for pattern in made),
    ):
        try:
            compiled = re.compile(pattern)
        except re.error:
            continue
        for name in names:
            for whole, method in ((True, compiled.fullmatch), (False, compiled.match)):
                assert matches(pattern, name, whole=whole) == bool(method(name)), (pattern, name)
                compared += 1
    assert compared > 1000


@pytest.mark.parametrize("pattern", ["(a+)+$", "(a|a)*$", "(.*)*(.*)*(.*)*x", "(a*)*(a*)*b"])
def test_every_answer_comes(pattern: str) -> None:
    assert not matches(pattern, "a" * 100 + "!", whole=True)  # `re` would take for ever


@pytest.mark.parametrize("pattern", ["(", r"(a)\1", "x" * 6000, "(" * 3000 + ")" * 3000, "(?L)a"])
def test_what_cannot_be_followed_is_refused(pattern: str) -> None:
    with pytest.raises(AdapterError, match="no regular expression that can be followed"):
        matches(pattern, "name", whole=True)
    with pytest.raises(AdapterError, match="characters long"):
        matches("a", "a" * 10_000, whole=True)
