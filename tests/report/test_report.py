"""The load report: true, readable, and safe to show."""

from __future__ import annotations

import dataclasses
import html
import json
import time
from html.parser import HTMLParser
from typing import Any

import pytest
import torch

from tests.support import reference
from tests.support.comparison import lean_model
from tl_fastload import LoadReport
from tl_fastload.ground import compat
from tl_fastload.ground.words import against, format_bytes
from tl_fastload.report.memory import unique_bytes


def make_report(**fields: Any) -> LoadReport:
    """A report of a small load, but for `fields`."""
    values: dict[str, Any] = {
        "strategy": "assign",
        "reason": "torch can",
        "torch_version": "2.13",
        "transformers_version": "5.23",
        "transformer_lens_version": "3.9",
        "source": "gpt2@main",
        "dtype": torch.bfloat16,
        "device": "cpu",
        "seconds": 1.25,
        "parameter_bytes": 1 << 20,
        "peak_host_bytes": 3 << 19,
        "peak_anonymous_bytes": 1 << 20,
        "mapped_bytes": 0,
        "peak_device_bytes": None,
        "processing": {"fold_ln": "done", "center_unembed": "skipped: not asked for"},
        "notes": ("One note.",),
    }
    return LoadReport(**{**values, **fields})


def test_the_fields_that_are_promised() -> None:
    names = """strategy reason torch_version transformers_version transformer_lens_version source
        dtype device seconds parameter_bytes peak_host_bytes peak_anonymous_bytes mapped_bytes
        peak_device_bytes processing notes"""
    assert {field.name for field in dataclasses.fields(LoadReport)} >= set(names.split())


def test_it_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        make_report().seconds = 0.0  # type: ignore[misc]


@pytest.mark.parametrize("flags", [{}, reference.NO_PROCESSING], ids=["processed", "unprocessed"])
def test_it_tells_what_happened(flags: dict[str, bool], zoo: Any) -> None:
    folder, started = zoo("llama-gqa"), time.perf_counter()
    lean = lean_model(folder, dtype="bfloat16", **flags)
    wall, report = time.perf_counter() - started, lean.load_report
    assert report.torch_version == str(compat.TORCH)
    assert report.transformers_version == str(compat.TRANSFORMERS)
    assert report.transformer_lens_version == str(compat.TRANSFORMER_LENS)
    assert report.source == str(folder)
    assert (report.dtype, report.device) == (torch.bfloat16, "cpu")
    assert 0 < report.seconds <= wall
    assert report.parameter_bytes == sum(2 * p.numel() for p in lean.parameters())
    assert report.peak_host_bytes >= 0
    assert report.peak_anonymous_bytes >= 0
    assert report.mapped_bytes == 0  # the file is in float32
    assert report.peak_device_bytes is None or torch.cuda.is_available()
    wanted = "skipped: not asked for" if flags else "done"
    assert report.processing["fold_ln"] == wanted
    assert report.notes == ()


def test_parameters_on_the_same_memory_count_once() -> None:
    weight = torch.zeros(5, 7)
    assert unique_bytes([weight, weight, torch.zeros(3)]) == 4 * (35 + 3)
    assert unique_bytes([weight, weight.T]) == 4 * 35
    assert unique_bytes([]) == 0


def test_text_has_every_row() -> None:
    text = str(make_report(peak_device_bytes=1 << 20))
    assert text.startswith("LoadReport\n")
    for part in (
        "gpt2@main",
        "assign (torch can)",
        "bfloat16, cpu",
        "1.25 s",
        "1.50 MiB (mostly fixed costs)",
        "peak device memory",
        "fold_ln",
        "skipped: not asked for",
        "torch 2.13, transformers 5.23, transformer_lens 3.9",
        "One note.",
    ):
        assert part in text
    assert "peak device memory" not in str(make_report())


class _Texts(HTMLParser):
    """Collects the texts of a page, and refuses what does not belong into a table."""

    def __init__(self) -> None:
        super().__init__()
        self.texts: list[str] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: object) -> None:
        assert tag in ("table", "caption", "tr", "th", "td"), tag
        self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def test_html_shows_the_same_rows_and_escapes_them() -> None:
    evil = "<script>alert('&')</script>"
    report = make_report(source=evil, notes=(evil,), processing={evil: evil})
    page = report._repr_html_()
    assert "<script>" not in page
    assert html.escape(evil) in page
    reader = _Texts()
    reader.feed(page)
    assert reader.open == []
    assert reader.texts == ["LoadReport", *(text for row in report.rows() for text in row)]


def test_json(zoo: Any) -> None:
    for report in (make_report(), lean_model(zoo("gpt2")).load_report):
        values = json.loads(json.dumps(report.to_dict()))
        assert set(values) == {field.name for field in dataclasses.fields(LoadReport)}
        assert values["dtype"] == str(report.dtype).removeprefix("torch.")
        assert values["processing"] == report.processing
        assert values["notes"] == list(report.notes)
        assert values["parameter_bytes"] == report.parameter_bytes


def test_a_report_cannot_be_changed_through_its_dictionary() -> None:
    report = make_report()
    report.to_dict()["processing"]["fold_ln"] = "never"
    assert report.processing["fold_ln"] == "done"


@pytest.mark.parametrize(
    ("size", "whole", "text"),
    [
        (30 << 20, 3 << 20, "30.00 MiB (mostly fixed costs)"),
        (2 << 20, 4 << 20, "2.00 MiB (0.50x of it)"),
        (3 << 30, 2 << 30, "3.00 GiB (1.50x of it)"),
        (0, 0, "0 B (0.00x of it)"),
    ],
)
def test_a_peak_is_compared_where_the_model_is_a_measure(size: int, whole: int, text: str) -> None:
    assert against(size, whole, " of it") == text


@pytest.mark.parametrize(
    ("size_bytes", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.00 KiB"),
        (1536, "1.50 KiB"),
        (1 << 20, "1.00 MiB"),
        (5 << 30, "5.00 GiB"),
        (3 << 40, "3.00 TiB"),
        (5000 << 40, "5000.00 TiB"),
    ],
)
def test_sizes(size_bytes: int, text: str) -> None:
    assert format_bytes(size_bytes) == text


def test_a_model_without_parameters_divides_by_nothing() -> None:
    assert "0 B" in str(make_report(parameter_bytes=0, peak_host_bytes=0))
