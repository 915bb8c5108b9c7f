"""Pictures: drawn without a display, with what was measured in them, written whole or not."""

from __future__ import annotations

import builtins
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import tl_fastload
from tests.support.comparison import lean_model
from tl_fastload import plots
from tl_fastload.cli.bench.process import Measurement
from tl_fastload.errors import ArgumentError, MissingPackageError
from tl_fastload.memory_map import memory_map
from tl_fastload.report.timeline import Phase, Timeline

MIB = 1 << 20
STOCK = Timeline(
    (0.0, 1.0, 2.0), (0, 30 * MIB, 20 * MIB), (0, 30 * MIB, 20 * MIB), (), (Phase("processing", 0),)
)


def texts(figure: Any) -> str:
    """Everything that is written in a picture."""
    figure.draw_without_rendering()
    legends = [*figure.legends, *(a.get_legend() for a in figure.axes if a.get_legend())]
    found = [text.get_text() for legend in legends for text in legend.get_texts()]
    for axes in figure.axes:
        found += [axes.get_title(loc="left"), axes.get_xlabel(), axes.get_ylabel()]
        found += [text.get_text() for text in (*axes.texts, *axes.get_yticklabels())]
        found += [text.get_text() for text in axes.get_xticklabels()]
    return "\n".join(found)


def test_a_report_draws_its_load_and_a_stock_load(zoo: Any) -> None:
    report = lean_model(zoo("llama-gqa")).load_report
    alone = texts(report.plot())
    assert "lean: peak" in alone
    assert "stock" not in alone
    assert "seconds" in alone
    assert "parameters:" in alone
    both = texts(report.plot(STOCK))
    assert "stock: peak 30.00 MiB" in both
    assert "(MiB)" in both
    assert {"configuration", "recording", "placing", "processing"} <= set(both.splitlines())


def test_what_is_no_stock_load_is_refused(zoo: Any) -> None:
    report = lean_model(zoo("llama-gqa")).load_report
    with pytest.raises(ArgumentError, match="watch_memory"):
        report.plot(stock=3)


def test_no_timeline_is_an_error() -> None:
    with pytest.raises(ArgumentError, match="no memory over time"):
        plots.plot_timelines([plots.Series("lean", Timeline(), 1)], "nothing")


def test_the_watched_memory_of_a_stock_load_is_drawn(zoo: Any) -> None:
    with tl_fastload.watch_memory() as stock:
        torch.zeros(MIB).add_(1)
    assert "stock: peak" in texts(lean_model(zoo("gpt2")).load_report.plot(stock))


@pytest.mark.parametrize("ending", ["png", "pdf", "svg"])
def test_it_is_written_whole(ending: str, zoo: Any, tmp_path: Path) -> None:
    path = tmp_path / f"memory.{ending}"
    lean_model(zoo("gpt2")).load_report.plot(path=path)
    assert path.stat().st_size > 1000
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("name", ["memory", "memory.xyz", "no/such/folder/memory.png"])
def test_where_it_cannot_be_written(name: str, zoo: Any, tmp_path: Path) -> None:
    report = lean_model(zoo("gpt2")).load_report
    with pytest.raises(ArgumentError, match="memory"):
        report.plot(path=tmp_path / name)
    assert list(tmp_path.iterdir()) == []


def test_a_notebook_gets_a_png_of_its_width(zoo: Any) -> None:
    png = lean_model(zoo("gpt2")).load_report.plot()._repr_png_()
    assert png.startswith(b"\x89PNG")
    assert int.from_bytes(png[16:20], "big") == 800


def test_drawing_leaves_no_state_behind(zoo: Any) -> None:
    import matplotlib

    before = dict(matplotlib.rcParams)
    lean_model(zoo("gpt2")).load_report.plot()._repr_png_()
    assert dict(matplotlib.rcParams) == before


def test_without_matplotlib_it_says_what_to_install(
    zoo: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = builtins.__import__

    def missing(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.split(".")[0] == "matplotlib":
            raise ImportError("No module named 'matplotlib'")
        return real(name, *args, **kwargs)

    report = lean_model(zoo("gpt2")).load_report
    monkeypatch.delitem(sys.modules, "tl_fastload.report.pictures.canvas", raising=False)
    monkeypatch.delattr(tl_fastload.report.pictures, "canvas", raising=False)
    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(MissingPackageError, match=r'pip install "matplotlib>=3\.7"'):
        report.plot()


def test_peaks_as_bars() -> None:
    good = Measurement(
        "lean float32", (1.5,), 20 * MIB, 30 * MIB, facts={"parameter_bytes": 10 * MIB}
    )
    written = texts(plots.plot_peaks([good, Measurement("stock", error="failed: x")], "Peaks"))
    assert "lean float32" in written
    assert "2.00x" in written
    assert "stock" not in written
    with pytest.raises(ArgumentError, match="nothing to draw"):
        plots.plot_peaks([Measurement("stock", error="failed: x")], "Peaks")


def test_figures_stand_behind_the_bar_and_the_mark() -> None:
    mapped = Measurement("lean", (1.5,), MIB, 2 * MIB, facts={"parameter_bytes": 10 * MIB})
    held = Measurement("stock", (1.5,), 30 * MIB, 30 * MIB, facts={"parameter_bytes": 10 * MIB})
    axes = plots.plot_peaks([mapped, held], "Peaks").axes[0]
    assert [text.xy[0] for text in axes.texts] == [10, 30]


def test_the_memory_map_counts_every_byte_once(zoo: Any) -> None:
    model = lean_model(zoo("llama-gqa"))
    parts = memory_map(model)
    tensors = [*model.parameters(), *model.buffers()]
    unique = {t.data_ptr(): t.numel() * t.element_size() for t in tensors if t.numel()}
    assert sum(part.size_bytes for part in parts) == sum(unique.values())
    layers = list(dict.fromkeys(part.layer for part in parts))
    assert layers == ["embed", *map(str, range(model.cfg.n_layers)), "unembed"]


def test_the_memory_map_tells_mapped_and_quantized(zoo: Any) -> None:
    folder = zoo("llama-gqa")
    flags = dict.fromkeys(
        ("fold_ln", "center_writing_weights", "center_unembed", "fold_value_biases"), False
    )
    mapped = lean_model(folder, mmap=True, **flags)
    of_states = {part.state for part in memory_map(mapped) if part.component != "buffers"}
    if sys.platform.startswith("linux"):
        size = sum(part.size_bytes for part in memory_map(mapped) if part.state == "mapped")
        assert size == mapped.load_report.mapped_bytes > 0
        assert of_states <= {"mapped", "dense"}
    read = lean_model(folder, mmap=False, **flags)
    assert {part.state for part in memory_map(read)} == {"dense"}
    quantized = lean_model(folder, mmap=False, quantize="8bit")
    found = {(part.component, part.state) for part in memory_map(quantized)}
    assert {("attention", "quantized"), ("MLP", "quantized"), ("embedding", "dense")} <= found


def test_the_memory_map_is_drawn(zoo: Any) -> None:
    model = lean_model(zoo("llama-gqa"), quantize="8bit", mmap=False)
    written = texts(plots.plot_memory_map(model))
    assert "quantized:" in written
    assert "dense:" in written
    assert "unembed" in written
    assert "mapped" not in written


def test_a_plan_is_drawn(zoo: Any) -> None:
    written = texts(tl_fastload.plan(zoo("llama-gqa"), device="cpu").plot())
    for part in ("lean, host", "stock, host", "the model", "attention:", "fits"):
        assert part in written
