"""A report as markdown: a table of what was timed, lists of everything else."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from benchmarks.gpu_report.sections import Facts

_COLUMNS = {
    "seconds": "s",
    "x_bus": "x bus",
    "peak_device_x": "device peak",
    "peak_reserved_x": "reserved peak",
    "peak_anonymous_x": "host peak, anonymous",
    "peak_host_x": "host peak, resident",
}


def markdown(title: str, sections: Mapping[str, Facts]) -> str:
    """All sections, one heading each.

    Args:
        title: of the page.
        sections: what was found, by name.
    """
    lines = [f"# {title}", ""]
    lines += ["Peaks are multiples of the parameters' bytes, x bus of the file's time on the bus."]
    for name, found in sections.items():
        lines += ["", f"## {name}", ""]
        timed = {step: fact for step, fact in found.items() if _is_timed(fact)}
        lines += [
            f"- {key}: {text}"
            for key, value in found.items()
            if key not in timed
            for text in [_text(value)]
        ]
        if timed:
            lines += ["", *_table(timed)]
    return "\n".join(lines) + "\n"


def _is_timed(fact: Any) -> bool:
    return isinstance(fact, dict) and "seconds" in fact


def _table(timed: Mapping[str, Facts]) -> Iterator[str]:
    columns = [key for key in _COLUMNS if any(fact.get(key) for fact in timed.values())]
    yield "| " + " | ".join(["", *(_COLUMNS[key] for key in columns)]) + " |"
    yield "|---" * (len(columns) + 1) + "|"
    for step, fact in timed.items():
        cells = (_text(fact[key]) if fact.get(key) is not None else "-" for key in columns)
        yield "| " + " | ".join([step, *cells]) + " |"


def _text(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_text(one)}" for key, one in value.items())
    if isinstance(value, float):
        return f"{value:.4g}"
    return str(value).replace("\n", " ").replace("|", "/")
