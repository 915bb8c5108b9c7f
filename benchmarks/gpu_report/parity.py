"""The same numbers on the device: against a load onto the CPU, and against transformers there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers

from benchmarks.gpu_report.sections import Facts, Run
from benchmarks.loading import dtype_argument
from tl_fastload.cli.bench.loads import lean_load
from tl_fastload.quantized import quantize

# In float32, where processing sums in another order than the CPU.
_MOST = {
    "processed_difference": 1e-4,
    "log_probs_to_transformers": 2e-3,
    "log_probs_to_the_cpu": 1e-3,
}
_DTYPES = ("float32", "bfloat16")
_VOCAB = 128
_SIZES = {
    "vocab_size": _VOCAB,
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
_GATED = {**_SIZES, "intermediate_size": 80, "num_key_value_heads": 2}
_PLAIN = {**_SIZES, "intermediate_size": 96}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "gpt2": {"n_embd": 48, "n_layer": 3, "n_head": 4, "vocab_size": _VOCAB, "n_positions": 64},
    "gpt_neox": {**_PLAIN, "rotary_pct": 0.5},
    "llama": _GATED,
    "mixtral": {**_GATED, "num_local_experts": 4, "num_experts_per_tok": 2},
    "bloom": {"hidden_size": 48, "n_layer": 2, "n_head": 4, "vocab_size": _VOCAB},
    "qwen3": {**_GATED, "head_dim": 16},
    "phi": {**_PLAIN, "partial_rotary_factor": 0.5},
    "gemma2": {**_GATED, "head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 16},
}


def measure(run: Run) -> Facts:
    """Differences of every tiny architecture, in both dtypes, raw and processed; and bytes."""
    found: Facts = {}
    for name in ARCHITECTURES:
        for dtype in _DTYPES:
            run.attempt(found, f"{name} {dtype}", lambda n=name, d=dtype: _differences(run, n, d))
    for kind in ("int8", "nf4", "fp4"):
        run.attempt(found, f"bytes of {kind}", lambda k=kind: _quantized_bytes(run, k))
    return found


def tiny_model(run: Run, name: str) -> Path:
    """The folder of a tiny model, float32, with norms and biases that matter."""
    folder = run.work / "tiny" / name
    if (folder / "config.json").exists():
        return folder
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(name, **ARCHITECTURES[name])
    model = transformers.AutoModelForCausalLM.from_config(config).float()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() == 1:
                weight.add_(torch.randn_like(weight) * 0.2)
            else:
                weight.mul_(4)
    model.save_pretrained(folder)
    if name == "gpt2":  # transformers 5 no longer writes what TransformerLens needs
        fields = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**fields, "n_ctx": fields["n_positions"]}))
    return folder


def state(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and buffers, on the CPU."""
    return {name: tensor.detach().cpu() for name, tensor in model.state_dict().items()}


def largest_difference(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """Between two states, over what is finite in both (masks are not)."""
    return max(
        float((a[name].float() - b[name].float()).nan_to_num(posinf=0.0, neginf=0.0).abs().max())
        for name in a
        if a[name].numel()
    )


def log_probs(logits: torch.Tensor) -> torch.Tensor:
    """In float32, on the CPU."""
    return torch.log_softmax(logits.float(), dim=-1).cpu()


def _differences(run: Run, name: str, dtype: str) -> Facts:
    folder = tiny_model(run, name)

    def lean(device: object, processed: bool) -> Any:
        return lean_load(folder, dtype, processed, device=str(device), progress=False)()

    raw_there, raw_here = (state(lean(device, False)) for device in (run.device, "cpu"))
    unequal = [key for key in raw_here if not torch.equal(raw_here[key], raw_there[key])]
    there, here = lean(run.device, True), lean("cpu", True)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        folder, **dtype_argument(dtype), attn_implementation="eager"
    )
    theirs = theirs.to(run.device).eval()
    tokens = torch.arange(3, 35)[None]
    with torch.inference_mode():
        found = log_probs(there(tokens.to(run.device)))
        expected = log_probs(theirs(tokens.to(run.device)).logits)
        on_cpu = log_probs(here(tokens))
    facts = {
        "unprocessed_unequal": unequal,
        "processed_difference": largest_difference(state(here), state(there)),
        "log_probs_to_transformers": float((found - expected).abs().max()),
        "log_probs_to_the_cpu": float((found - on_cpu).abs().max()),
    }
    far = [name for name, most in _MOST.items() if dtype == "float32" and not facts[name] <= most]
    if unequal:
        facts["error"] = f"unprocessed weights are not those on the CPU: {unequal[:3]}"
    elif far:
        facts["error"] = f"farther apart than sums round: {', '.join(far)}"
    return facts


def _quantized_bytes(run: Run, kind: str) -> Facts:
    """Whether a matrix is quantized there to the bytes that bitsandbytes' own layer has."""
    import bitsandbytes  # whose failure is a finding

    dense = torch.randn(768, 512, generator=torch.Generator().manual_seed(0)).to(run.device)
    layer: Any
    if kind == "int8":
        layer = bitsandbytes.nn.Int8Params(dense.cpu(), requires_grad=False).to(run.device)
        theirs = [layer.data, layer.SCB]
    else:
        layer = bitsandbytes.nn.Params4bit(
            dense.cpu(), requires_grad=False, quant_type=kind, compress_statistics=False
        ).to(run.device)
        theirs = [layer.data, layer.quant_state.absmax]
    ours = list(quantize(dense, kind).content.stored.tensors().values())
    wrong = [n for n, (a, b) in enumerate(zip(theirs, ours, strict=False)) if not _equal(a, b)]
    return {"error": f"other bytes or scales: {wrong}"} if wrong else {"equal": True}


def _equal(one: torch.Tensor, other: torch.Tensor) -> bool:
    return torch.equal(one.detach().cpu().reshape(-1), other.cpu().reshape(-1))
