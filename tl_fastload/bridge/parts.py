"""The parts of a bridge, for a device map: its blocks, and the components beside them."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace
from importlib import import_module
from typing import Any

from tl_fastload.bridge.placing import Shelf
from tl_fastload.placement.spread import Parts

_FACTORY = "transformer_lens.factories.architecture_adapter_factory"


def parts_of(shelf: Shelf) -> Parts:
    """As `tl_fastload.roads.road.Road.parts`: a part goes by the bridge's name, or by the one that
    it has in transformers' model.
    """
    factory = import_module(_FACTORY).ArchitectureAdapterFactory
    # An adapter changes the configuration that it is made of.
    adapter = factory.select_architecture_adapter(copy.deepcopy(shelf.cfg))
    aliases = shelf.aliases()
    names = [name for same in aliases.values() for name in same]
    components = adapter.component_mapping
    parts = Parts(dict(_places(components, names)))
    tied = set()
    for same in aliases.values():
        owners = {part for name in same if (part := parts.part_of(name)) is not None}
        if len(owners) > 1:
            tied.add(frozenset(owners))
    known = {name for part, one in components.items() for name in (part, str(one.name))}
    is_recurrent = getattr(shelf.cfg, "is_stateful", False)
    return replace(
        parts,
        tied=tuple(sorted(tied, key=sorted)),
        tables=frozenset(known - parts.places.keys() - set(parts.places.values())),
        why_one_device="a recurrent state is kept on one device" if is_recurrent else None,
    )


def _places(components: Any, names: list[str]) -> Iterator[tuple[str, str]]:
    """Part -> what its parameters' names begin with, for those that have any."""
    ats = {part: str(component.name) for part, component in components.items()}
    for part, at in ats.items():
        inside = [name[len(at) + 1 :].split(".") for name in names if name.startswith(f"{at}.")]
        if getattr(components[part], "is_list_item", False):
            for index in sorted({int(path[0]) for path in inside if path[0].isdigit()}):
                yield f"{part}.{index}", f"{at}.{index}"
        # What lies inside of a block belongs to it, and what holds other components is none itself.
        elif inside and not any(
            other.startswith(f"{at}.") or at.startswith(f"{other}.") for other in ats.values()
        ):
            yield part, at
