"""TransformerLens' names, aliases, and what resembles them."""

from __future__ import annotations

from tl_fastload.hooked.official_names import aliases, official_name


def test_official_names_and_aliases_in_any_case() -> None:
    assert official_name("GPT2-Small") == "gpt2"
    assert official_name("gpt2") == "gpt2"
    assert official_name("eleutherai/PYTHIA-70m") == "EleutherAI/pythia-70m"
    assert official_name("org/fine-tune") is None


def test_nearest_names_are_spelled_as_they_can_be_typed() -> None:
    nearest_names = aliases().nearest
    assert "gpt2-small" in nearest_names("gpt2-smal")
    assert nearest_names("EleutherAI/pythia-70n", 1) == ["EleutherAI/pythia-70m"]
    assert nearest_names("xqzw") == []
    assert len(nearest_names("pythia", 2)) == 2
