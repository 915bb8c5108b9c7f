"""Loads checkpoints that are broken at random: each ends in an error of the family, or in a right
model.

    python -m tests.support.fuzzing --cases 300 --seed 1 [--only NAME] [--first N]

The same seed gives the same cases. Each batch runs in a process of its own, with limits of time and
memory. Exit code 1 if any case ended otherwise; each of these is printed, with its number.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import logging
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from random import Random
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import peft
import torch
import transformers
from tokenizers import Tokenizer, models
from transformer_lens import HookedTransformer, HookedTransformerConfig

import tl_fastload
from tests.support import fuzz_mutations as mutations
from tests.support import gguf_files, quantized_packed
from tl_fastload import InternalError, LeanHookedTransformer, LeanLoadError
from tl_fastload.cli.console import end_on_sigterm

TOKENS = torch.tensor([[3, 9, 4, 17, 5, 30]])
BATCH = 50
SECONDS = 30
MEMORY_BYTES = 3 << 30
_PLAIN = dict.fromkeys(
    ("fold_ln", "center_writing_weights", "center_unembed", "fold_value_biases"), False
)
_SIZES = {"vocab_size": 64, "num_hidden_layers": 2, "max_position_embeddings": 32}
_LLAMA = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, **_SIZES}
CONFIGS: dict[str, Callable[[], Any]] = {
    "gpt2": lambda: transformers.GPT2Config(
        n_embd=32, n_layer=2, n_head=4, vocab_size=64, n_positions=32
    ),
    "llama": lambda: transformers.LlamaConfig(**_LLAMA, num_key_value_heads=2),
    "neox": lambda: transformers.GPTNeoXConfig(**_LLAMA, rotary_pct=0.5),
}

PACKED = (
    *("fp8", "ct-rows", "ct-int-groups", "gptq", "gptq-reordered", "awq", "packed"),
    *("packed-zeros", "torchao", "torchao-groups"),
)
"""Formats that are only read."""
Mutation = Callable[[Random, Path], mutations.Outcome]
# What is broken -> how often, the unbroken folders, the file's pattern, and the ways to break it.
KINDS: dict[str, tuple[int, tuple[str, ...], str, tuple[Mutation, ...]]] = {
    "header": (5, ("gpt2", "llama", "neox"), "model*.safetensors", (mutations.header,)),
    "bytes": (2, ("gpt2", "llama-shards"), "model*.safetensors", (mutations.some_bytes,)),
    "config": (6, ("gpt2", "llama", "neox"), "config.json", (mutations.json_values,) * 3),
    "text": (1, ("gpt2", "llama", "toy"), "config.json", (mutations.json_text,)),
    "index": (2, ("llama-shards",), "*.index.json", (mutations.json_values, mutations.json_text)),
    "torch": (4, ("gpt2-bin",), "*.bin", (mutations.torch_file, mutations.some_bytes)),
    "pickle": (1, ("gpt2-bin", "toy"), "*.[bp][it][nh]", (mutations.plain_pickle,)),
    "toy": (2, ("toy",), "config.json", (mutations.json_values,)),
    "copy": (5, ("copy", "copy-nf4"), "tl_fastload.json", (mutations.json_values,) * 3),
    "copy text": (1, ("copy",), "tl_fastload.json", (mutations.json_text,)),
    "copy file": (2, ("copy", "copy-nf4"), "*.safetensors", (mutations.header,)),
    "adapter": (4, ("adapter",), "adapter_config.json", (mutations.json_values,) * 3),
    "adapter text": (1, ("adapter",), "adapter_config.json", (mutations.json_text,)),
    "adapter file": (2, ("adapter",), "*.safetensors", (mutations.header, mutations.some_bytes)),
    "tokenizer": (
        3,
        ("llama",),
        "tokenizer*.json",
        (mutations.json_values, mutations.json_text, mutations.some_bytes),
    ),
    "gguf": (4, ("gguf",), "*.gguf", (mutations.gguf_header,) * 3 + (mutations.some_bytes,)),
    "pieces": (6, PACKED, "model.safetensors", (mutations.pieces,)),
    "declared": (6, PACKED, "config.json", (mutations.quantization_config,)),
    "no file": (3, ("gpt2", "llama-shards", "copy", "adapter", "toy"), "*", (mutations.no_file,)),
}


def quietly(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call a function without its warnings and what it prints."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        return function(*args, **kwargs)


def lean(folder: Path, **options: Any) -> Any:
    """A lean load onto the CPU."""
    load = LeanHookedTransformer.from_pretrained_lean
    return quietly(load, str(folder), device="cpu", progress=False, **options)


def build(home: Path) -> None:
    """Make the unbroken folders."""
    words = {f"t{number}": number for number in range(64)}
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="t0")),
        **{"bos_token": "t1", "eos_token": "t2", "pad_token": "t2", "unk_token": "t0"},
    )
    hf = {}
    for seed, (name, config) in enumerate(CONFIGS.items()):
        torch.manual_seed(seed)
        hf[name] = transformers.AutoModelForCausalLM.from_config(config()).float()
        hf[name].save_pretrained(home / name)
        tokenizer.save_pretrained(home / name)
    hf["llama"].save_pretrained(home / "llama-shards", max_shard_size="20KB")
    hf["gpt2"].config.save_pretrained(home / "gpt2-bin")
    torch.save(hf["gpt2"].state_dict(), home / "gpt2-bin" / "pytorch_model.bin")
    lean(home / "gpt2").save_lean(home / "copy")
    lean(home / "llama", quantize="nf4").save_lean(home / "copy-nf4")
    wide = {**_LLAMA, "hidden_size": 64, "intermediate_size": 128}
    torch.manual_seed(len(CONFIGS))
    config = transformers.LlamaConfig(**wide, num_key_value_heads=2)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(home / "wide")
    tokenizer.save_pretrained(home / "wide")
    for name in PACKED:
        quantized_packed.folders(home / "wide", name)[0].rename(home / name)
    toy = {"n_layers": 1, "d_model": 16, "n_heads": 2, "d_head": 8, "d_mlp": 32, "n_ctx": 32}
    toy["d_vocab"] = 64
    cfg = HookedTransformerConfig(**toy, act_fn="gelu", normalization_type="LN", device="cpu")
    (home / "toy").mkdir()
    torch.save(quietly(HookedTransformer, cfg).state_dict(), home / "toy" / "model_final.pth")
    named = {**toy, "act_fn": "gelu", "attn_only": False, "normalization": "LN"}
    (home / "toy" / "config.json").write_text(json.dumps({**named, "tokenizer_name": None}))
    (home / "gguf").mkdir()
    sizes = {"vocab_size": 280, "num_hidden_layers": 1}
    gguf_files.write("llama", home / "gguf" / "m.gguf", None, gguf_files.sentencepiece, **sizes)
    pattern = r".*\.(q|v)_proj"
    options = peft.LoraConfig(r=2, target_modules=pattern, init_lora_weights=False)
    quietly(peft.get_peft_model, hf["llama"], options).save_pretrained(home / "adapter")


class Fuzzer:
    """Breaks and loads.

    Args:
        home: the unbroken folders.
        work: where broken ones are made.
        seed: of the cases.
    """

    def __init__(self, home: Path, work: Path, seed: str) -> None:
        self.home, self.work, self.seed = home, work, seed
        self._unbroken: dict[tuple[str, bool], torch.Tensor] = {}

    def case(self, number: int) -> tuple[Random, str, str]:
        """The random numbers, the kind and the unbroken folder of a case."""
        random = Random(f"{self.seed}-{number}")
        kind = random.choices(list(KINDS), [often for often, *_ in KINDS.values()])[0]
        return random, kind, random.choice(KINDS[kind][1])

    def run(self, number: int) -> tuple[str, str]:
        """Run a case.

        Returns:
            What it was, and "refused", "right", "planned", or what is wrong.
        """
        random, kind, base = self.case(number)
        _, _, pattern, ways = KINDS[kind]
        folder = self.work / f"case-{number}"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(self.home / base, folder)
        try:
            path = random.choice(sorted(p for p in folder.glob(pattern) if p.is_file()))
            what, expected = random.choice(ways)(random, path)
            action = random.choice(["load", "load", "plain", "plan", "into"])
            is_whole = base.startswith(("copy", "adapter", "toy", "gguf"))
            if is_whole and action in ("plain", "into"):
                action = "load"
            told = f"{kind}, {base}, {action}: {what}"
            return told, self._judged(folder, base, action, expected)
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def _judged(self, folder: Path, base: str, action: str, expected: str) -> str:
        model = lean(self.home / base) if action == "into" else None
        before = None if model is None else [p.clone() for p in model.parameters()]
        try:
            model = self._act(folder, base, action, model)
        except InternalError as error:
            return f"a fault of ours: {error.__cause__!r}"
        except LeanLoadError:
            alike = before is None or all(map(torch.equal, before, model.parameters()))
            return "refused" if alike else "refused, and the model has changed"
        except Exception as error:
            return f"a foreign error: {error!r}"
        if Path("payload-ran").exists():
            return "code of the checkpoint ran"
        return "planned" if action == "plan" else self._right(folder, base, action, expected, model)

    def _act(self, folder: Path, base: str, action: str, model: Any) -> Any:
        options: dict[str, Any] = dict(_PLAIN) if action == "plain" else {}
        place = folder
        if base == "adapter":
            place, options = self.home / "llama", {"adapter": str(folder)}
        if action == "plan":
            return quietly(tl_fastload.plan, str(place), device="cpu", **options)
        if action == "into":
            quietly(tl_fastload.load_weights_, model, folder)
            return model
        return lean(place, **options)

    def _right(self, folder: Path, base: str, action: str, expected: str, model: Any) -> str:
        """Whether a model that was loaded may be what it is."""
        try:
            found = log_probs(model)
        except Exception as error:
            return f"a model that cannot run: {error!r}"
        key = (base, action == "plain")
        if key not in self._unbroken:
            self._unbroken[key] = log_probs(self._act(self.home / base, base, "load", None))
        wanted = self._unbroken[key]
        if expected == "free" or torch.allclose(found, wanted, atol=1e-3):
            return "right"
        if expected == "told" and base in (*CONFIGS, "llama-shards"):
            try:
                load = transformers.AutoModelForCausalLM.from_pretrained
                theirs = log_probs(quietly(load, folder, attn_implementation="eager").float())
            except Exception as error:
                return f"a model that transformers refuses: {error!r}"
            if torch.allclose(found, theirs, atol=2e-3):
                return "right"
        return f"other numbers, by {(found - wanted).abs().max():.2g}"


@torch.no_grad()
def log_probs(model: Any) -> torch.Tensor:
    """Log-probabilities of some tokens."""
    made = model(TOKENS)
    return getattr(made, "logits", made).float().log_softmax(-1)


def watched(fuzzer: Fuzzer, numbers: Iterable[int]) -> Iterator[tuple[int, str, str]]:
    """Run cases in a process of its own; what it died of is the outcome of the last one."""
    left = list(numbers)
    while left:
        batch, left = left[:BATCH], left[BATCH:]
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(reading)
            _run_batch(fuzzer, batch, os.fdopen(writing, "w"))
        os.close(writing)
        with os.fdopen(reading) as lines:
            done = [tuple(json.loads(line)) for line in lines]
        _, status = os.waitpid(child, 0)
        yield from ((number, what, end) for number, what, end in done)
        rest = batch[len(done) :]
        if rest:
            signals = {signal.SIGALRM: f"no end within {SECONDS} s"}
            died = signals.get(os.WTERMSIG(status), f"the process ended with status {status}")
            _, kind, base = fuzzer.case(rest[0])
            yield rest[0], f"{kind}, {base}", died
            left = rest[1:] + left


def _run_batch(fuzzer: Fuzzer, batch: list[int], out: Any) -> None:
    # Of the shell's tables, so that a load that asks for much is told that there is none.
    used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY_BYTES, used + MEMORY_BYTES))
    for number in batch:
        signal.alarm(SECONDS)
        what, end = fuzzer.run(number)
        signal.alarm(0)
        out.write(json.dumps([number, what, end]) + "\n")
        out.flush()
    os._exit(0)


def main() -> int:
    """Run the cases that the command line names; 1 if one of them ended as it must not."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--cases", type=int, default=300)
    parser.add_argument("--seed", default="1")
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--only", default="", help="kinds with this in their names alone")
    asked = parser.parse_args()
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as work:
        os.chdir(work)
        tempfile.tempdir = work  # also of processes that are killed
        home = Path(work) / "unbroken"
        build(home)
        fuzzer = Fuzzer(home, Path(work), asked.seed)
        numbers = range(asked.first, asked.first + asked.cases)
        wanted = [number for number in numbers if asked.only in fuzzer.case(number)[1]]
        ends: Counter[str] = Counter()
        for number, what, end in watched(fuzzer, wanted):
            is_right = end in ("refused", "right", "planned")
            ends[end if is_right else "wrong"] += 1
            if not is_right:
                print(f"case {number}: {what}\n    {end}")
    seconds = time.monotonic() - started
    print(f"{len(wanted)} cases of seed {asked.seed} in {seconds:.0f} s: {dict(ends)}")
    return int(ends["wrong"] > 0)


if __name__ == "__main__":
    end_on_sigterm()
    sys.exit(main())
