"""Small, awkward random checkpoints of every decoder architecture that HookedTransformer has.

`build("llama-gqa", folder)` writes one as it would lie on the hub. Head counts are odd, windows are
shorter than the sequence, no norm weight is one and no bias is zero, so that a mistake shows.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
import os
import shutil
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file

from tests.support import zoo_hf, zoo_raw

Tensors = dict[str, torch.Tensor]
SEQUENCE_LENGTH = 11


@dataclass(frozen=True)
class Case:
    """One checkpoint of the zoo.

    architecture: as in `config.json` ("neel", "neel-solu-old" and "mingpt" for the .pth models).
    kind: "hf" (built by transformers), "raw" (tensors by name, no code in transformers) or "pth".
    config: the keywords of the Hugging Face config class, or the content of `config.json`.
    repo: a hub name for `hub_cache`; an official name where loading depends on the name.
    d_vocab: number of token ids.
    hub_style: names, stale buffers and `config.json` as old hub repositories have them.
    """

    architecture: str
    kind: str
    config: Mapping[str, Any]
    repo: str
    d_vocab: int
    hub_style: bool = False


def _cases() -> dict[str, Case]:
    cases = {}
    for case_id, (architecture, config) in zoo_hf.CONFIGS.items():
        d_vocab = config.get("vocab_size") or config["text_config"]["vocab_size"]
        hub_style = case_id in zoo_hf.HUB_STYLE
        repo = f"somebody/tiny-{case_id}"
        cases[case_id] = Case(architecture, "hf", config, repo, d_vocab, hub_style)
    for case_id, (architecture, config) in zoo_raw.CONFIGS.items():
        repo = f"somebody/tiny-{case_id}"
        cases[case_id] = Case(architecture, "raw", config, repo, config["vocab_size"])
    for case_id, (architecture, repo, config) in zoo_raw.PTH_CONFIGS.items():
        cases[case_id] = Case(architecture, "pth", config, repo, config["d_vocab"])
    return cases


CASES: dict[str, Case] = _cases()


def tokens(case: str | Case) -> torch.Tensor:
    """Token ids `[2, 11]` of a case, the same on every call."""
    d_vocab = (CASES[case] if isinstance(case, str) else case).d_vocab
    generator = torch.Generator().manual_seed(d_vocab)
    return torch.randint(d_vocab, (2, SEQUENCE_LENGTH), generator=generator)


def seed(case_id: str) -> int:
    """The seed of a case: the same in every process, another one for every case."""
    return zlib.crc32(case_id.encode())


def build(
    case_id: str,
    folder: Path,
    *,
    dtype: torch.dtype = torch.float32,
    shards: bool = False,
    bin: bool = False,
    **config_overrides: Any,
) -> Path:
    """Write the checkpoint of `case_id` into `folder` (created; must not hold one) and return it.

    shards: three or more weight files with an index, where one file would do.
    bin: `torch.save` files with tied weights stored under both names, as old repositories have.
    config_overrides: other values for keywords of the configuration.
    The .pth models ignore `shards` and `bin`: they have one layout, with training checkpoints.
    """
    return build_case(
        CASES[case_id], case_id, folder, dtype=dtype, shards=shards, bin=bin, **config_overrides
    )


def build_case(
    case: Case,
    case_id: str,
    folder: Path,
    *,
    dtype: torch.dtype = torch.float32,
    shards: bool = False,
    bin: bool = False,
    **config_overrides: Any,
) -> Path:
    """`build` for a case that need not be in CASES."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(seed(case_id))
    if case.kind == "pth":
        config = {**case.config, **config_overrides}
        zoo_raw.write_pth(case.architecture, config, folder, generator, dtype)
        return folder
    aliases: dict[str, str] = {}
    if case.kind == "hf":
        tensors, aliases = _build_hf(case, case_id, folder, generator, dtype, config_overrides)
    else:
        config = {**case.config, **config_overrides}
        tensors = zoo_raw.TENSORS[case.architecture](config, generator)
        tensors = {name: value.to(dtype) for name, value in tensors.items()}
        config["torch_dtype"] = str(dtype).removeprefix("torch.")
        (folder / "config.json").write_text(json.dumps(config, indent=2))
    if bin:
        tensors.update({alias: tensors[name] for alias, name in aliases.items()})
    write_weights(folder, tensors, shards=3 if shards else 1, bin=bin)
    return folder


def _build_hf(
    case: Case,
    case_id: str,
    folder: Path,
    generator: torch.Generator,
    dtype: torch.dtype,
    overrides: Mapping[str, Any],
) -> tuple[Tensors, dict[str, str]]:
    """Let transformers write `config.json` and name the tensors; returns them and tied names."""
    keywords = {**case.config, **overrides}
    model_class = getattr(transformers, case.architecture)
    # transformers writes back what it is given in place, so every build gets its own copy.
    with torch.random.fork_rng(devices=[]):
        model = model_class(model_class.config_class(**copy.deepcopy(keywords)))
    zoo_hf.randomize(model, case.architecture, generator)
    model = model.to(dtype)
    model.save_pretrained(folder, safe_serialization=True)
    weights = folder / "model.safetensors"
    tensors = load_file(weights)
    # The file may still be mapped by `tensors`; unlinking it is safe, rewriting in place is not.
    weights.unlink()
    aliases = _tied_names(model, tensors)
    if case.hub_style:
        tensors, aliases = zoo_hf.as_on_the_hub(case_id, keywords, tensors, aliases)
        config = zoo_hf.hub_config(case.architecture, model.config.model_type, keywords)
        config["torch_dtype"] = str(dtype).removeprefix("torch.")
        (folder / "config.json").write_text(json.dumps(config, indent=2))
    return tensors, aliases


def _tied_names(model: torch.nn.Module, saved: Tensors) -> dict[str, str]:
    """Names that the file leaves out because another saved name has the same storage."""
    by_address = {}
    state = model.state_dict(keep_vars=True)
    for name, value in state.items():
        if name in saved:
            by_address[value.data_ptr()] = name
    return {
        name: by_address[value.data_ptr()]
        for name, value in state.items()
        if name not in saved and value.data_ptr() in by_address
    }


def write_weights(folder: Path, tensors: Tensors, *, shards: int = 1, bin: bool = False) -> None:
    """Write the weight files of a checkpoint, with an index when there are several shards."""
    stem, suffix = ("pytorch_model", ".bin") if bin else ("model", ".safetensors")
    if shards == 1:
        _save(folder / f"{stem}{suffix}", tensors, bin)
        return
    names = list(tensors)
    size = math.ceil(len(names) / shards)
    groups = [names[start : start + size] for start in range(0, len(names), size)]
    weight_map = {}
    for number, group in enumerate(groups, start=1):
        file = f"{stem}-{number:05d}-of-{len(groups):05d}{suffix}"
        _save(folder / file, {name: tensors[name] for name in group}, bin)
        weight_map.update(dict.fromkeys(group, file))
    total_size = sum(value.numel() * value.element_size() for value in tensors.values())
    index = {"metadata": {"total_size": total_size}, "weight_map": weight_map}
    (folder / f"{stem}{suffix}.index.json").write_text(json.dumps(index, indent=2))


def _save(path: Path, tensors: Tensors, bin: bool) -> None:
    if bin:
        torch.save(tensors, path)
    else:
        contiguous = {name: value.contiguous() for name, value in tensors.items()}
        save_file(contiguous, path, metadata={"format": "pt"})


def read_weights(folder: Path) -> Tensors:
    """Every tensor in the weight files of a checkpoint, under the names that the files have."""
    tensors: Tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors.update(load_file(path))
    for path in [*sorted(folder.glob("*.bin")), *sorted(folder.glob("*.pth"))]:
        tensors.update(torch.load(path, map_location="cpu", weights_only=True))
    return tensors


def add_tokenizer(folder: Path, d_vocab: int) -> Path:
    """Put a word-level tokenizer ("w0 w1 ...", bos and pad "w0") beside a checkpoint."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {f"w{number}": number for number in range(d_vocab)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = dict.fromkeys(("bos_token", "eos_token", "pad_token", "unk_token"), "w0")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    return folder


def hub_commit(source: str) -> str:
    """The commit that `hub_cache` gives to "repository@revision"."""
    return hashlib.sha1(source.encode()).hexdigest()


def hub_cache(
    root: Path,
    repo: str,
    source_folder: Path,
    revisions: Mapping[str, Path | None] | None = None,
) -> Path:
    """Lay `source_folder` out below `root` as huggingface_hub caches `repo`; returns `root`.

    revisions: branch or tag -> folder of its files (None: `source_folder`); only "main" by
    default. Use the result as `cache_dir=` or in `HF_HUB_CACHE`, with the network switched off.
    """
    repo_folder = root / ("models--" + repo.replace("/", "--"))
    for revision, other in (revisions or {"main": None}).items():
        commit = hub_commit(f"{repo}@{revision}")
        reference = repo_folder / "refs" / revision
        reference.parent.mkdir(parents=True, exist_ok=True)
        reference.write_text(commit)
        source = other or source_folder
        for path in sorted(item for item in source.rglob("*") if item.is_file()):
            blob = repo_folder / "blobs" / hashlib.sha256(path.read_bytes()).hexdigest()
            blob.parent.mkdir(parents=True, exist_ok=True)
            if not blob.exists():
                shutil.copyfile(path, blob)
            link = repo_folder / "snapshots" / commit / path.relative_to(source)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(os.path.relpath(blob, link.parent))
    return root
