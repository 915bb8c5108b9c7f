"""What every road shares runs where TransformerLens cannot be imported."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.support import quantized_zoo
from tests.support.forks import asked_afresh
from tests.whole.test_house import MODULES, ROADS, ROOMS, room_of

HIDE = """
import json, sys

class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "transformer_lens":
            raise ModuleNotFoundError(f"{name} is hidden", name=name)

sys.meta_path.insert(0, Hidden())
import torch, transformers
"""
IMPORTS = """
from importlib import import_module

for name in sys.argv[1:]:
    import_module(f"tl_fastload.{name}")
try:
    import tl_fastload
    tl_fastload.LeanHookedTransformer
except ImportError as error:
    print(error)
"""
PLACES = """
from tl_fastload.ground.geometry import strides_of_order
from tl_fastload.ground.own_defaults import own_defaults
from tl_fastload.ground.role import Role
from tl_fastload.huggingface.config import Supported
from tl_fastload.huggingface.empty import empty_model
from tl_fastload.huggingface.pretrained import find, locate
from tl_fastload.placement.placer import Placer
from tl_fastload.quantized import QuantizedTensor
from tl_fastload.quantized.quantizer import Quantizer
from tl_fastload.report.progress import Progress
from tl_fastload.request.keywords import Keywords
from tl_fastload.request.options import Options
from tl_fastload.source.aliases import NO_ALIASES
from tl_fastload.source.reader import FileReader

folder, architecture, target = sys.argv[1:]
reader, options = FileReader(), Options(progress=False)
supported = Supported((architecture,), lambda name, model_type, is_seq2seq: "is not wanted here.")
with own_defaults():
    located = locate(folder, in_memory=False, adapters=(), hub={}, aliases=NO_ALIASES)
    found = find(located, options, Keywords(), supported, reader, dtype=torch.float32)
    root = found.tree(torch.float32)
    model = empty_model(getattr(transformers, architecture), found.config, torch.float32)
    Placer(
        model,
        lambda name: torch.device("cpu"),
        assign=True,
        maps=reader.maps,
        map_any_layout=True,
        progress=Progress(False),
        strides_of=lambda order, module, name, shape: strides_of_order(shape, range(len(shape))),
        quantizer=None if found.spec is None else Quantizer(None, lambda name: Role(kind="matrix")),
    ).place(dict(root.named_parameters()))
values = dict(model.named_parameters())
kept = [name for name, value in values.items() if isinstance(value, QuantizedTensor)]
torch.save({n: v.dequantize() if n in kept else v.detach() for n, v in values.items()}, target)
print(len(kept))
"""


KINDS = {"dense": None, "nf4": "nf4"}


@pytest.fixture(scope="module")
def answers(zoo: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What code says in processes from which TransformerLens is hidden, and the folder with the
    values that it placed.
    """
    target = tmp_path_factory.mktemp("hidden")
    last = ROOMS.index("cache")
    rooms = {room for room in ROOMS[: last + 1] if room not in ROADS}
    assert {"roads", "copies", "loading", "planning"} <= rooms
    questions: dict[str, Any] = {
        "imports": (IMPORTS, [name for name in MODULES if room_of(name) in rooms])
    }
    for name, kind in KINDS.items():
        folder = quantized_zoo.build(zoo, "llama-gqa")
        folder = folder if kind is None else quantized_zoo.saved(folder, kind)
        architecture = json.loads((folder / "config.json").read_text())["architectures"][0]
        questions[name] = (PLACES, (folder, architecture, target / f"{name}.pt"))
    told = asked_afresh(HIDE, [*questions.values()], target)
    return {**dict(zip(questions, told, strict=True)), "folder": target}


def test_every_room_but_the_roads_is_imported(answers: dict[str, Any]) -> None:
    assert "transformer_lens is hidden" in answers["imports"]


@pytest.mark.parametrize("name", KINDS)
def test_a_checkpoint_becomes_transformers_own_model(
    name: str, zoo: Any, answers: dict[str, Any]
) -> None:
    folder, kind = quantized_zoo.build(zoo, "llama-gqa"), KINDS[name]
    theirs: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    expected = dict(theirs.named_parameters())
    layers: dict[str, Any] = {}
    if kind is not None:
        hf = quantized_zoo.hf_model(folder, kind)
        layers = dict(quantized_zoo.layers(hf))
        expected |= {f"{n}.weight": quantized_zoo.dequantized(m) for n, m in layers.items()}
    assert answers[name] == str(len(layers))
    found = torch.load(answers["folder"] / f"{name}.pt")
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert torch.equal(found[key], value), key
