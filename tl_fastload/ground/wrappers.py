"""Taking wrappers' prefixes off the keys of a state dict, where that makes the keys match.

`torch.compile` puts `_orig_mod.` into names, `DataParallel` and `DistributedDataParallel` put
`module.`, and a model that is an attribute of another one (`self.lens = model`) gets that name in
front. A key that fits as it is stays as it is. Another one loses what is in front of it, and the
wrappers' parts anywhere in it, if the rest fits; never when two keys would then be the same, when
keys stand under two different attributes, or when the key is an attribute's and what it would fill
is tied to a weight that is there: an auxiliary head is not the model's own.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Hashable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from torch import nn

Value = TypeVar("Value")
Fits = Callable[[str], Hashable | None]


@dataclass(frozen=True)
class Renaming:
    """Keys and what they are without a prefix.

    Attributes:
        names: key -> the rest of it, for the keys that change.
        notes: what was taken off, one sentence each.
        ambiguous: why nothing was taken off keys that would fit, or None.
    """

    names: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    ambiguous: str | None = None

    def apply(self, values: Mapping[str, Value]) -> dict[str, Value]:
        """The same values under the new keys."""
        return {self.names.get(key, key): value for key, value in values.items()}


def without_prefixes(
    keys: Collection[str], fits: Fits, tied: Collection[Collection[Hashable]] = ()
) -> Renaming:
    """Find prefixes whose removal makes keys match.

    Args:
        keys: of a state dict.
        fits: what a key stands for in the model, or None if it fits nowhere. Keys that stand for
            the same thing would collide.
        tied: groups of what keys stand for that are one weight: one of each is enough.
    """
    as_they_are = {key: fits(key) for key in keys}
    taken = set(as_they_are.values())
    filled = {home for group in tied if not taken.isdisjoint(group) for home in group}
    found: dict[str, str] = {}
    homes: dict[Hashable, list[str]] = defaultdict(list)
    for key in (key for key, home in as_they_are.items() if home is None):
        rest, home = _first_fit(key, fits)
        if home is None or home in taken:
            continue
        if home not in filled or not _attribute(key, rest):
            found[key] = rest
            homes[home].append(key)
    twice = next((several for several in homes.values() if len(several) > 1), None)
    if twice is not None:
        return Renaming(
            ambiguous=f"{twice[0]!r} and {twice[1]!r} would both be {found[twice[0]]!r}"
        )
    attributes = sorted({_attribute(key, rest) for key, rest in found.items()} - {""})
    if len(attributes) > 1:
        return Renaming(
            ambiguous="keys that fit stand under " + " and ".join(map(repr, attributes[:3]))
        )
    return Renaming(found, _notes(found))


def without_wrappers(keys: Collection[str]) -> Renaming:
    """What `without_prefixes` does where nobody knows the model's names: only wrappers' parts in
    front of every key are taken off.
    """
    found = {key: key for key in keys}
    while found and all(rest.partition(".")[0] in WRAPPER_PARTS for rest in found.values()):
        found = {key: rest.partition(".")[2] for key, rest in found.items()}
    changed = {key: rest for key, rest in found.items() if key != rest}
    return Renaming(changed, _notes(changed))


def own_names(model: nn.Module) -> dict[str, str]:
    """Every name of a model's state dict by its name without wrappers' parts, which compiled
    submodules bring in.
    """
    return {without_wrapper_parts(name): name for name in model.state_dict(keep_vars=True)}


def named_as(
    model: nn.Module, state_dict: Mapping[str, Value], others: Iterable[str] = ()
) -> tuple[dict[str, Value], Renaming]:
    """A state dict in a model's naming, without any wrapper's part in its keys.

    Args:
        model: the model.
        state_dict: any values by name.
        others: names that would fit the model as well, such as those of norms that it has folded
            away.
    """
    own = own_names(model)
    own.update({name: name for name in own.values()})
    own.update({without_wrapper_parts(name): name for name in others})
    renaming = without_prefixes(state_dict, own.get)
    named = {
        without_wrapper_parts(key) if key in own else key: value
        for key, value in renaming.apply(state_dict).items()
    }
    return named, renaming


def _first_fit(key: str, fits: Fits) -> tuple[str, Hashable | None]:
    """The longest rest of a key that fits, and what it stands for."""
    parts, bare = key.split("."), without_wrapper_parts(key).split(".")
    rests = [parts[start:] for start in range(1, len(parts))]
    rests += [bare[start:] for start in range(len(bare)) if len(bare) < len(parts)]
    for rest in map(".".join, rests):
        home = fits(rest)
        if home is not None:
            return rest, home
    return key, None


def without_wrapper_parts(name: str) -> str:
    """A name without what compiled and parallel models put into it."""
    return ".".join(part for part in name.split(".") if part not in WRAPPER_PARTS)


def _attribute(key: str, rest: str) -> str:
    """What of a key is neither the rest of it nor a wrapper's part."""
    bare_key, bare_rest = without_wrapper_parts(key), without_wrapper_parts(rest)
    return bare_key[: len(bare_key) - len(bare_rest)]


def _removed(key: str, rest: str) -> str:
    if key.endswith(rest):
        return key[: -len(rest)]
    inside = [part for part in WRAPPER_PARTS if part in key.split(".")]
    return _attribute(key, rest) + ".".join(inside) + "."


def _notes(names: Mapping[str, str]) -> tuple[str, ...]:
    counts = Counter(_removed(key, rest) for key, rest in names.items())
    return tuple(
        f"{prefix!r} was taken off {count} key{'s' if count > 1 else ''} of the weights, which fit "
        "without."
        for prefix, count in counts.items()
    )


# Where each wrapper keeps what it wraps; torch.compile's class is told by its attribute, as
# importing torch._dynamo is slow.
_COMPILED = "_orig_mod"
_PARALLEL = (nn.DataParallel, nn.parallel.DistributedDataParallel)

WRAPPER_PARTS = (_COMPILED, "module")
"""What these wrappers put into the names of a state dict."""


def unwrapped(model: Any) -> Any:
    """The original of a model that is compiled (`torch.compile`) or parallel (`DataParallel`,
    `DistributedDataParallel`), one in the other in any order; any other object as it is.
    """
    while isinstance(model, nn.Module):
        if _COMPILED in model._modules:
            model = model._modules[_COMPILED]
        elif isinstance(model, _PARALLEL):
            model = model.module
        else:
            break
    return model


def plain_name(name: str) -> str:
    """The name that a module, parameter or buffer has when nothing around it is compiled."""
    return ".".join(part for part in name.split(".") if part != _COMPILED)
