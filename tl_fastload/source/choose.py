"""Which of a model's files hold its weights, and what an index says about its shards."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath

from tl_fastload.errors import CheckpointError
from tl_fastload.source.file_states import unreadable
from tl_fastload.source.gguf import first_of_splits
from tl_fastload.source.json_files import read_object
from tl_fastload.source.safetensors import AGAIN

SAFETENSORS = ".safetensors"
TORCH_SUFFIXES = (".bin", ".pth", ".pt")

# What trainers leave beside the weights.
_NOT_WEIGHTS = (
    "training_args",
    "optimizer",
    "scheduler",
    "rng_state",
    "scaler",
    "adapter_",
)
_OTHER_FORMATS = {
    ".h5": "TensorFlow",
    ".msgpack": "Flax",
    ".onnx": "ONNX",
    ".ckpt": "Lightning or TensorFlow",
    ".index": "TensorFlow 1",
}


@dataclass(frozen=True)
class Choice:
    """The weight file to read, or the index that names several.

    Attributes:
        name: relative to the model's folder, with forward slashes.
        note: why it was taken, when the name is not a standard one.
    """

    name: str
    note: str | None = None

    @property
    def is_index(self) -> bool:
        return ".index." in self.name

    @property
    def is_safetensors(self) -> bool:
        return SAFETENSORS in PurePosixPath(self.name).suffixes


def standard_names(variant: str | None, use_safetensors: bool | None) -> list[str]:
    """The names that transformers gives to weights, in the order in which it looks for them.

    Args:
        variant: "fp16" for `model.fp16.safetensors`, and so on.
        use_safetensors: None looks for safetensors first, then for torch files.
    """
    middle = f".{variant}" if variant else ""
    safetensors = [f"model{middle}.safetensors", f"model.safetensors.index{middle}.json"]
    torch_files = [f"pytorch_model{middle}.bin", f"pytorch_model.bin.index{middle}.json"]
    if use_safetensors is None:
        return safetensors + torch_files
    return safetensors if use_safetensors else torch_files


def choose(
    names: Collection[str], *, variant: str | None = None, use_safetensors: bool | None = None
) -> Choice | None:
    """Choose the weights among the `names` of a folder's files, or return None.

    A standard name wins. Else a lone safetensors file is taken; else a `*final.pth`, as in
    TransformerLens' own toy models; else a lone torch file.
    """
    for name in standard_names(variant, use_safetensors):
        if name in names:
            return Choice(name)
    if variant:
        return None
    candidates = [
        name for name in sorted(names) if "/" not in name and not name.startswith(_NOT_WEIGHTS)
    ]
    safetensors = [name for name in candidates if name.endswith(SAFETENSORS)]
    torch_files = [name for name in candidates if name.endswith(TORCH_SUFFIXES)]
    final = [name for name in torch_files if name.endswith("final.pth")]
    if use_safetensors is not False and safetensors:
        return _lone(safetensors)
    if use_safetensors:
        return None
    return Choice(final[0], f"weights from {final[0]}") if final else _lone(torch_files)


def _lone(names: list[str]) -> Choice | None:
    if len(names) != 1:
        return None
    return Choice(names[0], f"no standard name; weights from the only candidate, {names[0]}")


def is_bare(names: Collection[str]) -> bool:
    """Whether no file looks like weights, whole or cut off, nor like a part of them."""
    ends = (SAFETENSORS, *TORCH_SUFFIXES, *_OTHER_FORMATS, ".gguf", ".incomplete")
    return not any(name.endswith(ends) or ".index." in name for name in names)


def no_weights_message(label: str, names: Collection[str], looked_for: Collection[str]) -> str:
    """Say that a model has no weights, what was looked for, and what lies there instead."""
    message = (
        f"{label} holds no weights that can be read. Looked for: {', '.join(looked_for)}, or a "
        "single file of another name. "
    )
    several = [name for name in names if name.endswith((SAFETENSORS, *TORCH_SUFFIXES))]
    weights = [name for name in sorted(several) if not name.startswith(_NOT_WEIGHTS)]
    unfinished = sorted({name for name in names if name.endswith(".incomplete")})
    suffixes = {PurePosixPath(name).suffix for name in names}
    others = sorted(kind for suffix, kind in _OTHER_FORMATS.items() if suffix in suffixes)
    if unfinished:
        message += f"A download was cut off ({', '.join(unfinished[:5])}): start it again."
    elif weights:
        message += (
            f"It has {', '.join(weights[:10])}, and no index that ties them together: fetch the "
            "index, or pass weights_file= to read one of them."
        )
    elif any(name.startswith("adapter_") for name in names):
        message += "It holds an adapter (LoRA): load its base model with adapter= this."
    elif ggufs := first_of_splits(names):
        message += f"It has GGUF files: pass gguf_file= with one of {', '.join(ggufs[:10])}."
    elif others:
        message += (
            f"Its weights are in another format ({', '.join(others)}): fetch the safetensors "
            "version, or convert it with transformers."
        )
    else:
        message += "Save the model there with `save_pretrained`, or finish the download."
    return message


def read_index(path: Path) -> dict[str, str]:
    """Return an index file's map from tensor names to shard names.

    Raises:
        CheckpointError: the index cannot be read, is corrupt, or names a shard by an absolute path
            or one that leaves the folder.
    """
    index = read_object(path, f"{AGAIN}.", cannot_read=lambda error: unreadable(path, error))
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path} has no 'weight_map' from tensors to shards. {AGAIN}.")
    for tensor, shard in weight_map.items():
        if not isinstance(shard, str) or not shard or not stays_inside(shard):
            raise CheckpointError(
                f"{path} says that tensor {tensor!r} lies in {shard!r}, which is not inside the "
                "model's folder. Nothing was read from there. Correct the index, or download the "
                "model again from a source that you trust."
            )
    return weight_map


def stays_inside(name: str) -> bool:
    """Whether a relative file name cannot lead out of its folder, on any system."""
    windows, posix = PureWindowsPath(name), PurePosixPath(name)
    rooted = posix.is_absolute() or bool(windows.drive or windows.root)
    return not rooted and ".." not in (*windows.parts, *posix.parts) and "\0" not in name
