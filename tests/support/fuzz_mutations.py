"""Ways to break a file of a checkpoint at random, and what a load may make of the broken one.

Each function takes a random number generator and a file, changes it, and says what it did and what
must follow: "same" (an error, or the unbroken model), "free" (or a model of the same shapes),
"told" (or a model with the numbers of transformers on the same folder).
"""

from __future__ import annotations

import io
import json
import os
import pickle
import zipfile
from pathlib import Path
from random import Random
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tl_fastload.copies.manifest import MANIFEST, _checksum
from tl_fastload.source.gguf import read_gguf

Outcome = tuple[str, str]

ODD: list[Any] = [
    *(None, "", [], {}, -1, 0, 1, 7, True, False, 0.5, 1e-30, 10**30, 2**31, 2**63, -(2**63)),
    *(float("inf"), float("nan"), "x" * 5000, "\u202e\x00\x1b[31m", "../outside", "/etc/passwd"),
    *([1], [None], [[1, 2]], {"a": 1}, ["x"] * 3, "NaN", "(a+)+$", "(", "gelu"),
]
_KEYS = (
    "auto_map quantization_config rope_scaling text_config torch_dtype dtype architectures "
    "pruned_heads tie_word_embeddings layer_types is_encoder_decoder sliding_window"
).split()


def json_values(random: Random, path: Path) -> Outcome:
    """One value of a JSON file is another one, or is gone, or is one too many."""
    body = json.loads(path.read_text())
    holder, key = random.choice(list(_places(body)))
    how = random.choice(["value", "value", "value", "number", "gone", "extra"])
    if how == "gone":
        del holder[key]
    elif how == "extra":
        key = random.choice(_KEYS)
        body[key] = random.choice(ODD)
    elif how == "number" and type(holder[key]) in (int, float):
        old = holder[key]
        holder[key] = random.choice([old * 2, old + 1, -old, str(old), float(old), 10**9])
    else:
        holder[key] = random.choice(ODD)
    if path.name == MANIFEST:  # whoever alters a copy can write its checksum, too
        body.pop("checksum", None)
        body["checksum"] = _checksum(body)
    path.write_text(json.dumps(body))
    return f"{path.name}, {how} at {key!r}", "told"


def _places(body: Any) -> Any:
    keys: Any = range(min(len(body), 4)) if isinstance(body, list) else list(body)
    for key in keys:
        yield body, key
        if isinstance(body[key], (dict, list)):
            yield from _places(body[key])


def json_text(random: Random, path: Path) -> Outcome:
    """The text of a JSON file is none, or nested too deeply."""
    text = path.read_bytes()
    depth = random.choice([2000, 100_000])
    new = {
        "cut": text[: random.randrange(len(text))],
        "byte order mark": b"\xef\xbb\xbf" + text,
        "utf-16": text.decode().encode("utf-16"),
        "no utf-8": text[:-1] + b"\xff\xfe}",
        "empty": b"",
        "list": b"[]",
        "deep": b"[" * depth + b"]" * depth,
        "deep inside": text.rstrip()[:-1]
        + b', "z": '
        + b'{"a":' * depth
        + b"1"
        + b"}" * depth
        + b"}",
    }
    how = random.choice(list(new))
    path.write_bytes(new[how])
    return f"{path.name}: {how}", "told"


def header(random: Random, path: Path) -> Outcome:
    """The header of a safetensors file says something else than what is in it."""
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    table = json.loads(data[8:start])
    name, other = random.sample([key for key in table if key != "__metadata__"], 2)
    entry, shape = table[name], table[name]["shape"]
    begin, end = entry["data_offsets"]
    changes: dict[str, Any] = {
        "dtype": random.choice(["F16", "I32", "F64", "BOOL", "f32", "", 3, None, [], "X" * 999]),
        "shape": random.choice(
            [shape[::-1], shape[1:], [*shape, 1], [-1], [2**63], [1] * 100_000, None]
        ),
        "data_offsets": random.choice(
            [[end, begin], [begin + 1, end + 1], [0, 2**63], [None, end], []]
        ),
    }
    how = random.choice([*changes, "swapped", "renamed", "deep", "many", "doubled"])
    expected = "same"
    if how in changes:
        entry[how] = changes[how]
    elif how == "swapped":
        table[name], table[other] = table[other], table[name]
        alike = [table[other][key] == table[name][key] for key in ("dtype", "shape")]
        expected = "free" if all(alike) else "same"
    elif how == "renamed":
        new = random.choice(["", "a" * 100_000, name + ".", "\x00", "../" + name, "__class__"])
        table[new] = table.pop(name)
    text = json.dumps(table)
    if how == "deep":
        text = "[" * 100_000 + "]" * 100_000
    if how == "many":
        size = len(data) - start
        empty = f'{{"dtype":"F32","shape":[0],"data_offsets":[{size},{size}]}}'
        text = text[:-1] + "".join(f',"z{i}":{empty}' for i in range(100_000)) + "}"
    if how == "doubled":
        text = text[:-1] + f",{json.dumps(name)}:{json.dumps(table[other])}}}"
    path.write_bytes(len(text.encode()).to_bytes(8, "little") + text.encode() + data[start:])
    return f"{path.name}: {how} of {name[:40]!r}", expected


_PIECES = (
    *("weight_scale_inv", "weight_scale", "weight_zero_point", "weight_packed", "weight_shape"),
    *("weight_g_idx", "qweight", "qzeros", "scales", "g_idx", "weight", "SCB", "weight_format"),
    *("_weight_qdata", "_weight_scale", "_weight_zero_point", "input_scale"),
)
_DTYPES = (torch.float32, torch.float16, torch.int32, torch.int8, torch.uint8, torch.int64)


def pieces(random: Random, path: Path) -> Outcome:
    """A piece of a quantized weight is missing, misshapen, of another dtype, in the place of
    another one, or beside one of another format.
    """
    tensors = load_file(path)
    layers = sorted({name.rpartition(".")[0] for name in tensors if "_proj." in name})
    layer = random.choice(layers)
    name = random.choice(sorted(name for name in tensors if name.startswith(f"{layer}.")))
    other, old = f"{layer}.{random.choice(_PIECES)}", tensors[name]
    how, expected = random.choice("gone shape dtype renamed added foreign".split()), "same"
    if how in ("gone", "renamed"):
        value = tensors.pop(name)
        if how == "renamed":
            tensors[other] = value
    elif how == "shape":
        ways = [old[None], old[:0]]
        if old.dim() == 2:
            ways += [old.T, old.flatten(), old[:-1], old[..., :1], old.repeat(2, 1)]
        tensors[name] = random.choice(ways)
        # The transpose of a square matrix: nobody can see that it is one.
        expected = "free" if tensors[name].shape == old.shape else "same"
    elif how == "dtype":
        dtype = random.choice(_DTYPES)
        tensors[name] = old.view(torch.uint8) if dtype == torch.uint8 else old.to(dtype)
        expected = "free" if old.is_floating_point() and dtype.is_floating_point else "same"
    elif how == "added":
        tensors[other] = random.choice((torch.ones(()), torch.zeros(1), torch.ones(64, 64), old))
        expected = "same" if other != name else "free"
    else:
        theirs = random.choice(layers)
        tensors[name] = tensors[f"{theirs}.{name.rpartition('.')[2]}"]
        expected = "free" if tensors[name].shape == old.shape else "same"
    contiguous = {key: value.contiguous().clone() for key, value in tensors.items()}
    save_file(contiguous, path, metadata={"format": "pt"})
    return f"{path.name}: {how} {name}, {other if how in ('renamed', 'added') else ''}", expected


_METHODS: list[dict[str, Any]] = [
    {"quant_method": "fp8", "weight_block_size": [32, 32]},
    {"quant_method": "gptq", "bits": 4, "group_size": 32},
    {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm"},
    {"quant_method": "mxfp4"},
    {"quant_method": "hqq"},
    {"quant_method": "modelopt", "quant_algo": "FP8"},
    {"quant_method": "bitsandbytes", "load_in_8bit": True},
    {"load_in_4bit": True},
]
# What changes numbers and no shape: nobody can see that it is wrong.
_MEANINGS = ("checkpoint_format", "format")


def quantization_config(random: Random, path: Path) -> Outcome:
    """The quantization_config contradicts the weights, or says what nobody knows."""
    body = json.loads(path.read_text())
    declared = body["quantization_config"]
    how = random.choice("value value value gone other mixed".split())
    holder, key = random.choice(list(_places(declared)))
    if how == "value":
        old = holder[key]
        holder[key] = random.choice([*ODD, "v3", old * 2 if type(old) is int else not old])
    elif how == "gone":
        del holder[key]
    else:
        new = random.choice(_METHODS)
        body["quantization_config"] = new if how == "other" else {**declared, **new}
        key = new
    path.write_text(json.dumps(body))
    return f"{path.name}, {how} at {key!r}", "free" if key in _MEANINGS else "same"


def some_bytes(random: Random, path: Path) -> Outcome:
    """Bytes of a file are others, or missing, or too many."""
    data = bytearray(path.read_bytes())
    how = random.choice(["flipped", "flipped", "cut", "longer", "zeros", "noise"])
    at = random.randrange(len(data))
    if how == "flipped":
        data[at] ^= 1 << random.randrange(8)
    elif how == "zeros":
        data[at : at + 100] = bytes(len(data[at : at + 100]))
    new = {"cut": data[:at], "longer": data + bytes(64), "noise": random.randbytes(1000)}
    path.write_bytes(new.get(how, data))
    return f"{path.name}: {how} at {at}", "free"


def gguf_header(random: Random, path: Path) -> Outcome:
    """What a GGUF file says in front of its data is something else."""
    data = bytearray(path.read_bytes())
    end = min(entry.offset for entry in read_gguf(path).entries.values())
    how = random.choice(["flipped", "flipped", "number", "number", "short", "moved", "version"])
    at = 4 if how == "version" else random.randrange(end)
    if how == "flipped":
        data[at] ^= 1 << random.randrange(8)
    elif how in ("number", "version"):
        size = random.choice([4, 8])
        number = random.choice([0, 1, 2, 255, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1, 2**64 - 1])
        data[at : at + size] = number.to_bytes(8, "little")[:size]
    elif how == "short":
        del data[at:]
    elif how == "moved":
        del data[at : at + random.choice([1, 4, 8])]
    path.write_bytes(data)
    return f"{path.name}: {how} at {at} of {end}", "free"


class Payload:
    """Runs code where it is unpickled."""

    def __reduce__(self) -> Any:
        return os.mkdir, ("payload-ran",)


def torch_file(random: Random, path: Path) -> Outcome:
    """The records of a torch file are others, or its pickle is."""
    with zipfile.ZipFile(path) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    pickled = next(name for name in records if name.endswith("data.pkl"))
    one = random.choice([name for name in records if "/data/" in name])
    how = random.choice(["short", "long", "bomb", "missing", "twice", "pickle", "payload", "odd"])
    if how in ("payload", "odd"):
        state = torch.load(path, weights_only=True)
        key = random.choice(sorted(state))
        odd = [state[key].to_sparse(), state[key].to("meta"), state[key] > 0, None, [1], Payload()]
        state[key] = odd[-1] if how == "payload" else random.choice(odd[:-1])
        torch.save(state, path)
        return f"{path.name}: {how} {key}", "same"
    if how == "short":
        records[one] = records[one][: len(records[one]) // 2]
    elif how == "long":
        records[one] += bytes(64)
    elif how == "bomb":
        records[one] = bytes(500 << 20)
    elif how == "missing":
        del records[one]
    elif how == "pickle":
        text = bytearray(records[pickled])
        text[random.randrange(len(text))] = random.randrange(256)
        records[pickled] = bytes(text)
    kind = zipfile.ZIP_DEFLATED if how == "bomb" else random.choice([zipfile.ZIP_STORED, 8])
    written = io.BytesIO()
    with zipfile.ZipFile(written, "w", kind) as archive:
        for name, content in records.items():
            archive.writestr(name, content)
        if how == "twice":
            archive.writestr(one, bytes(len(records[one])))
    path.write_bytes(written.getvalue())
    return f"{path.name}: {how} {one}", "free" if how in ("pickle", "twice") else "same"


def plain_pickle(random: Random, path: Path) -> Outcome:
    """A torch file is a pickle that runs code."""
    path.write_bytes(pickle.dumps(random.choice([Payload(), {"a": Payload()}, {"a": 1}])))
    return f"{path.name}: a pickle", "same"


def no_file(random: Random, path: Path) -> Outcome:
    """Something else lies where a file was."""
    data = path.read_bytes()
    path.unlink()
    how = random.choice(["gone", "folder", "pipe", "link to itself", "device", "empty"])
    if how == "folder":
        path.mkdir()
    elif how == "pipe":
        os.mkfifo(path)
    elif how == "link to itself":
        path.symlink_to(path.name)
    elif how == "device":
        path.symlink_to("/dev/zero")
    elif how == "empty":
        path.touch()
    elif len(data) % 2:
        path.write_bytes(data)
        path.chmod(0)
    return f"{path.name}: {how}", "told"
