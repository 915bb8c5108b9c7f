"""A format is one module: one that is written and registered here does what bitsandbytes' does."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from safetensors.torch import load_file, save_file

import tl_fastload
from tests.support import quantized_zoo as qz
from tests.support.comparison import lean_model
from tests.support.quantized_kinds import dense_matrix, save_and_load
from tl_fastload.errors import QuantizationError, UnsupportedArchitectureError
from tl_fastload.huggingface.lora.merge import requantized
from tl_fastload.quantized import formats, views
from tl_fastload.quantized.assemble import combine
from tl_fastload.quantized.formats.base import Format, QuantizedBytes, runs_of, take
from tl_fastload.quantized.recipes import follow
from tl_fastload.quantized.spec import Spec
from tl_fastload.recipes.nodes import MemorySource
from tl_fastload.recipes.promise import Promise


@dataclass(frozen=True, eq=False)
class ToyBytes(QuantizedBytes):
    """int8 rows: the matrix is `codes * scales[:, None]`."""

    codes: torch.Tensor
    scales: torch.Tensor

    tag = kind = "toy"

    @property
    def shape(self) -> tuple[int, int]:  # type: ignore[override]
        return (self.codes.shape[0], self.codes.shape[1])

    def rows(self, index: torch.Tensor) -> ToyBytes:
        runs = runs_of(index)
        return replace(self, codes=take(self.codes, runs), scales=take(self.scales, runs))

    def dense(self, dtype: torch.dtype) -> torch.Tensor:
        return self.codes.to(dtype) * self.scales.to(dtype)[:, None]


class Toy(Format):
    name = "toy"
    kinds = ("toy",)
    stores = (ToyBytes,)
    pieces: ClassVar[Mapping[str, str]] = {".row_scale": ".weight"}
    codes = frozenset({torch.int8})
    offered: ClassVar[Mapping[str, str]] = {"toy": "toy"}

    def declared(self, fields: Mapping[str, Any]) -> Spec | None:
        return Spec("toy") if fields.get("quant_method") == "toy" else None

    def assemble(self, pieces: Mapping[str, torch.Tensor], spec: Spec) -> ToyBytes:
        if pieces.keys() != {"weight", "row_scale"}:
            raise QuantizationError(f"a toy weight is not made of {sorted(pieces)}.")
        return ToyBytes(pieces["weight"], pieces["row_scale"])

    def quantize(self, dense: torch.Tensor, spec: Spec) -> ToyBytes:
        scales = dense.abs().amax(1).clamp_min(1e-9) / 127
        return ToyBytes((dense / scales[:, None]).round().to(torch.int8), scales.float())


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    monkeypatch.setattr(formats, "FORMATS", (*formats.FORMATS, Toy()))
    return monkeypatch


def _checkpoints(dense: Path, target: Path) -> tuple[Path, Path]:
    """A checkpoint in the toy format, and one of the numbers that it stands for."""
    quantized, plain = target / "quantized", target / "plain"
    shutil.copytree(dense, quantized)
    shutil.copytree(dense, plain)
    tensors = load_file(dense / "model.safetensors")
    values = dict(tensors)
    for name, tensor in list(tensors.items()):
        is_conv1d = ".c_" in name
        if (is_conv1d or "_proj." in name) and tensor.dim() == 2:
            # As transformers does it, quantized weights are [out, in] also of a Conv1D.
            matrix = tensor.T if is_conv1d else tensor
            made = Toy().quantize(matrix.contiguous(), Spec("toy"))
            tensors[name], tensors[f"{name[:-6]}row_scale"] = made.codes, made.scales
            value = made.dense(torch.float32)
            values[name] = value.T.contiguous() if is_conv1d else value
    for folder, table in ((quantized, tensors), (plain, values)):
        (folder / "model.safetensors").unlink()
        save_file(table, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((quantized / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "toy"}
    (quantized / "config.json").write_text(json.dumps(config))
    return quantized, plain


@pytest.mark.parametrize(("case_id", "count"), [("gpt2", 12), ("llama-gqa", 21)])
def test_a_format_is_one_module(
    case_id: str, count: int, zoo: Any, registered: Any, tmp_path: Path
) -> None:
    folder, plain = _checkpoints(zoo(case_id), tmp_path)
    model, reference = lean_model(folder), lean_model(plain)
    assert model.load_report.quantization == "toy, as in the checkpoint"
    held = qz.quantized_parameters(model)
    assert len(held) == count
    assert [value.why_dense() for value in held.values()] == [None] * count
    expected = qz.log_probs(reference, case_id)
    assert qz.gap(qz.log_probs(model, case_id), expected) < 1e-4  # folded and centred exactly
    for name, value in qz.dense_values(reference).items():
        assert qz.relative_gap(qz.dense_values(model)[name], value) < 1e-5, name

    plan = tl_fastload.plan(folder, device="cpu")
    assert plan.quantization == "toy, as in the checkpoint"
    assert plan.parameter_bytes["quantized"] == sum(v.nbytes_stored() for v in held.values())

    model.save_lean(tmp_path / "copy")
    again = lean_model(tmp_path / "copy")
    assert again.load_report.quantization == "toy, as saved"
    assert again.load_report.mapped_bytes == again.load_report.parameter_bytes
    assert torch.equal(qz.log_probs(again, case_id), qz.log_probs(model, case_id))
    state = save_and_load(dict(held), weights_only=True)
    assert all(torch.equal(state[name].dequantize(), held[name].dequantize()) for name in held)

    made = lean_model(zoo(case_id), quantize="toy")
    assert len(qz.quantized_parameters(made)) == count
    assert qz.gap(qz.log_probs(made, case_id), qz.log_probs(lean_model(zoo(case_id)), case_id)) < 1

    registered.undo()
    with pytest.raises(UnsupportedArchitectureError, match="quantized with toy"):
        lean_model(folder)
    with pytest.raises(QuantizationError, match="'toy', which a newer"):
        lean_model(tmp_path / "copy")
    assert "toy" not in [format.name for format in formats.FORMATS]


def test_a_broken_checkpoint_names_the_weight(registered: Any) -> None:
    del registered
    codes = Promise.of(MemorySource(torch.zeros(2, 4, dtype=torch.int8), "codes"))
    with pytest.raises(QuantizationError, match=r"^h\.0\.up: a toy weight is not made of \['wei"):
        combine({"h.0.up.weight": codes, "norm.weight": codes.float()}, Spec("toy"), torch.float32)
    with pytest.raises(QuantizationError, match="has none that are"):
        combine({"norm.weight": codes.float()}, Spec("toy"), torch.float32)


def test_an_adapter_on_bytes_that_are_only_read(registered: Any) -> None:
    del registered
    made = Toy().quantize(dense_matrix(4, 8), Spec("toy"))
    stored = {"up.weight": made.codes, "up.row_scale": made.scales}
    promises = {name: Promise.of(MemorySource(part, name)) for name, part in stored.items()}
    weight = combine(promises, Spec("toy"), torch.float32)["up.weight"]
    with pytest.raises(QuantizationError, match="cannot be quantized again"):  # nothing read yet
        requantized(weight, lambda dense: dense)


class Stacked(Toy):
    """Experts in one tensor [expert, in, out], stored as blocks and scales under other names."""

    pieces: ClassVar[Mapping[str, str]] = {"_blocks": "", "_scales": ""}

    def assemble(self, pieces: Mapping[str, torch.Tensor], spec: Spec) -> ToyBytes:
        experts, rows, *_ = pieces["blocks"].shape
        codes = pieces["blocks"].reshape(experts * rows, -1)
        return ToyBytes(codes, pieces["scales"].reshape(-1))

    def as_parameter(self, matrix: Any, pieces: Mapping[str, torch.Tensor]) -> Any:
        experts, rows, *_ = pieces["blocks"].shape
        return matrix.view(experts, rows, -1).transpose(1, 2)


def test_stacked_experts_under_other_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(formats, "FORMATS", (Stacked(),))
    made = Toy().quantize(dense_matrix(3 * 8, 32), Spec("toy"))
    stored = {"blocks": made.codes.view(3, 8, 4, 8), "scales": made.scales.view(3, 8)}
    promises = {f"up_{k}": Promise.of(MemorySource(v, k)) for k, v in stored.items()}
    (name, promise), *others = combine(
        {**promises, "up_bias": promises["up_scales"]}, Spec("toy"), torch.float32
    ).items()
    assert (name, [other for other, _ in others]) == ("up_bias", ["up"])
    promise = others[0][1]
    assert promise.shape == (3, 32, 8)
    expert: Any = promise[1]
    bytes_ = follow(expert.node, torch.device("cpu")).compact()
    assert bytes_.content.stored.shape == (8, 32)
    assert torch.equal(bytes_.dequantize(), made.dense(torch.float32)[8:16].T)


def test_row_numbers_equally_far_apart_are_a_range() -> None:
    """Columns 1, 3, 5 ... of stacked experts, as gpt-oss's gates are, and rows in other orders."""
    stored = formats.of_kind("mxfp4").sample("mxfp4", torch.device("cpu"))
    whole = views.whole(stored.shape)
    for geometry in (whole, whole.view(2, 32, -1)[1, 1::2], whole[7], whole[3:9].t()):
        view = views.row_view(geometry, stored.shape[1])
        assert view is not None
        assert view.run is not None
        assert torch.equal(torch.tensor(view.run), view.index())
        some = stored.run(view.run)
        assert torch.equal(
            some.dense(torch.float32), stored.rows(view.index()).dense(torch.float32)
        )
        assert torch.equal(QuantizedBytes.run(stored, view.run).packed, some.packed)
    apart = views.row_view(whole.view(4, 16, -1)[:, :3], stored.shape[1])
    assert apart is not None
    assert apart.run is None
