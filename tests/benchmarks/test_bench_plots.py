"""Tables and pictures of made-up rows: nothing is left unsaid, and the same rows give the same files."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bench_rows import CAP, MIB, SETTINGS, memory_rows, row, scaling_rows, speed_rows
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from rich.console import Console

from memmeta.errors import InputError
from memmeta_bench import plot_memory, plot_scaling, plot_speed, plots, tables
from memmeta_bench.forecast import lines, saturated, told
from memmeta_bench.plot_style import bytes_text, styles
from memmeta_bench.summaries import merged, panels, timings, title_of
from memmeta_bench.tables import Sheet

KINDS = ("memory", "speed", "scaling")
BARS = [one for one in speed_rows() if one["axis"] != "chunk"]


def cells(sheet: Sheet, name: str) -> tuple[str, ...]:
    """The line of a method."""
    return next(line for line in sheet.lines if line[0].startswith(name))


def xy(line: Line2D) -> tuple[list[float], list[float]]:
    """The points of a curve."""
    return np.asarray(line.get_xdata(), float).tolist(), np.asarray(line.get_ydata(), float).tolist()


def drawn(figure: Figure) -> list[str]:
    """All that is written in a figure."""
    words = [text.get_text() for axes in figure.axes for text in (*axes.texts, *axes.get_xticklabels(), axes.title)]
    return words + [text.get_text() for legend in figure.legends for text in legend.get_texts()]


@pytest.mark.parametrize("rows", [memory_rows(("tasks",)), speed_rows(), scaling_rows()], ids=KINDS)
def test_one_call_writes_png_and_svg(rows: list[dict[str, Any]], tmp_path: Path) -> None:
    first = plots.draw(rows, SETTINGS, tmp_path / "a")
    assert [path.name for path in first] == ["a.png", "a.svg"]
    assert first[0].read_bytes().startswith(b"\x89PNG")
    assert b"<svg" in first[1].read_bytes()
    assert {path.name for path in tmp_path.iterdir()} == {"a.png", "a.svg"}


def test_the_same_rows_give_the_same_picture(tmp_path: Path) -> None:
    first, again = (plots.draw(BARS, SETTINGS, tmp_path / name)[1] for name in ("a.png", "b.svg"))
    assert first.read_bytes() == again.read_bytes()


def test_a_picture_of_another_format_or_of_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"written as PNG and SVG; name it .*a\.png"):
        plots.draw(memory_rows(), SETTINGS, tmp_path / "a.pdf")
    with pytest.raises(InputError, match="nothing to draw"):
        plots.draw([], {}, tmp_path / "a.png")
    (tmp_path / "b.png").mkdir()
    with pytest.raises(InputError, match=r"b\.png can't be written .* name another file"):
        plots.draw(speed_rows(), {}, tmp_path / "b.png")


def test_a_curve_that_runs_into_the_cap_ends_in_a_cross_on_its_line() -> None:
    figure = plot_memory.figure(memory_rows(("tasks",)), SETTINGS)
    counted, resident = figure.axes
    crosses = [line for line in counted.lines if line.get_marker() == "x"]
    assert [xy(line) for line in crosses] == [([8], [CAP])] * 2
    assert any(xy(line)[1] == [CAP, CAP] for line in counted.lines)
    ends = [xy(line)[1][-1] for line in resident.lines if line.get_marker() == "x"]
    assert max(ends) == 480 * MIB  # what the process held before, not the cap, which is on counted bytes
    assert counted.get_ylim() == resident.get_ylim()
    widths = [[line.get_linewidth() for line in axes.lines if len(xy(line)[0]) > 2] for axes in figure.axes]
    assert max(widths[1]) < min(widths[0])
    assert any("above the cap of 256.0 MiB" in text for text in drawn(figure))


def test_a_curve_that_failed_ends_in_a_ring() -> None:
    rows = [row("memmeta-stepwise", "memmeta Stepwise", "tasks", sizes={"tasks": 1, "steps": 5}, counted_bytes=MIB)]
    rows.append(row("memmeta-stepwise", "memmeta Stepwise", "tasks", sizes={"tasks": 2, "steps": 5}, status="timeout"))
    figure = plot_memory.figure(rows, {})
    rings = [line for line in figure.axes[0].lines if line.get_markersize() == 9]
    assert [xy(line) for line in rings] == [([1], [MIB])]
    assert any("failed or took too long" in text for text in drawn(figure))


def test_every_method_has_a_look_of_its_own_and_floors_are_grey_and_dotted() -> None:
    names = [*(f"peer-{i}" for i in range(8)), *(f"memmeta-{i}" for i in range(8)), "floor-a", "floor-b"]
    look = styles([row(name, name, "tasks") for name in names])
    assert len({(one.colour, one.mark) for one in look.values()}) == len(names)
    assert {one.dash for name, one in look.items() if name.startswith("floor")} == {":"}
    assert all(one.dash != ":" for name, one in look.items() if not name.startswith("floor"))


def test_bytes_on_an_axis() -> None:
    assert [bytes_text(2**power) for power in (0, 10, 24, 39, 50)] == ["1 B", "1 KiB", "16 MiB", "512 GiB", "1024 TiB"]


def test_the_memory_table_has_every_point_and_what_became_of_it() -> None:
    counted, resident, left_out = tables.sheets(memory_rows(("tasks",)))
    assert counted.header == ("tasks", "1", "2", "4", "8", "16", "last/first")
    assert cells(counted, "learn2learn MAML, batched")[1:] == (
        "60.0 MiB",
        "120.0 MiB",
        "240.0 MiB",
        "> cap",
        "",
        "4.00x",
    )
    assert cells(counted, "memmeta Stepwise")[-1] == "1.00x"
    assert cells(resident, "memmeta Stepwise")[1] == "40.0 MiB"
    assert "learn2learn MAML, batched takes 12.0x memmeta's least at tasks = 4" in counted.notes
    assert left_out.lines == (("higher, batched", "higher is not installed: pip install higher"),)


def test_another_gradient_is_marked_with_the_difference_and_is_no_peer_to_be_beaten() -> None:
    rows = memory_rows(("tasks",))
    assert title_of([one for one in rows if one["method"].startswith("torchopt")]).endswith("(gradient differs by 0.3)")
    assert not any("TorchOpt" in note for note in tables.sheets(rows)[0].notes)
    assert any("gradient differs by 0.3" in text for text in drawn(plot_memory.figure(rows, SETTINGS)))
    times = {one.method: one for one in timings(merged(panels(BARS))[0].methods)}
    assert times["torchopt-batched"].error == 0.31
    assert times["learn2learn-per-task"].ratio == 1  # though TorchOpt took less
    assert any("gradient differs by 0.3" in text for text in drawn(plot_speed.figure(speed_rows(), {})))


def test_a_gradient_that_is_not_a_number_is_marked() -> None:
    assert title_of([row("higher-batched", "higher", "tasks", relative_error=float("nan"))]) == (
        "higher (gradient differs by nan)"
    )


def test_a_peer_that_is_better_is_said_to_be() -> None:
    rows = memory_rows(("tasks",))
    for one in rows:
        if one["method"] == "learn2learn-per-task":
            one["counted_bytes"] = 15 * MIB
    notes = tables.sheets(rows)[0].notes
    expected = "a peer is better at tasks = 4: learn2learn MAML, per task takes 15.0 MiB, memmeta at least 20.0 MiB"
    assert expected in notes
    slow = [one for one in speed_rows() if one["method"] != "memmeta-compiled"]
    for one in slow:
        if one["method"] == "memmeta-stepwise":
            one["seconds"] = 2 * one["seconds"]
    notes = tables.sheets(slow)[0].notes
    assert notes[0].startswith("a peer is better: learn2learn MAML, per task is 1.67x as fast as memmeta's fastest")


def test_ratios_are_of_the_same_round_and_compiling_pays_after_so_many() -> None:
    """In the second round all was twice as slow: the ratio is not touched."""
    times = timings(merged(panels(BARS))[0].methods)
    assert [one.method for one in times][:2] == ["memmeta-compiled", "floor-training"]
    compiled = times[0]
    assert compiled.seconds == 0.01
    assert compiled.ratio == pytest.approx(12)
    assert compiled.pays in (500, 501)  # 45 s at 90 ms each
    sheet = tables.sheets(speed_rows())[0]
    assert cells(sheet, "memmeta Stepwise")[1:3] == ("100 ms", "1.20x")
    assert sheet.notes[0].startswith("memmeta-compiled is 12.00x as fast as the fastest peer")


def test_what_compiling_costs_is_the_first_rounds() -> None:
    rows = [row("memmeta-compiled", "c", "steps", seconds=0.1, round=n, compile_seconds=40.0 / (n + 1)) for n in (0, 1)]
    assert timings({"memmeta-compiled": rows})[0].compiling == 40


def test_rows_with_chunks_are_methods_of_their_own_among_the_bars() -> None:
    rows = [
        row("memmeta-stepwise", "memmeta Stepwise", "steps", sizes={"tasks": 4, "steps": 5, "chunk": size}, seconds=0.1)
        for size in (1, 4)
    ]
    (panel,) = merged(panels(rows))
    assert list(panel.methods) == ["memmeta-stepwise", "memmeta-stepwise, chunk 4"]


def test_the_scaling_tables_have_the_model_and_say_where_there_is_none() -> None:
    sheets = {sheet.title.split(",")[0]: sheet for sheet in tables.sheets(scaling_rows())}
    assert cells(sheets["tasks per second"], "2")[3] == "98%"
    assert "more workers than cores (2) from 4 on" in sheets["tasks per second"].notes
    assert any("killed by signal 9" in line for line in sheets["parts of a step"].lines)
    assert len(sheets["the model of a step"].lines) == 4
    assert any("extrapolated" in title for title in sheets)
    few = tables.sheets([one for one in scaling_rows() if one["axis"] == "workers"])
    assert any("no model of the step" in note for sheet in few for note in sheet.notes)


def test_the_extrapolation_is_for_the_cluster_that_was_given() -> None:
    shown = lines(told(scaling_rows(), {"cluster": {"bandwidth": 2.5e9}}))
    assert {line["inputs"]["bandwidth"] for line in shown} == {2.5e9}
    assert {(line["broadcast"], line["reduce"]) for line in shown} == {("star", "server"), ("binomial", "tree")}
    star = saturated(shown[0])
    assert star is not None
    assert shown[0]["steps"][0]["tasks_per_second"] < star[1] < shown[0]["steps"][-1]["tasks_per_second"]


def test_the_scaling_picture_says_what_it_lacks() -> None:
    failed = [one for one in scaling_rows() if one["status"] == "failed"]
    texts = " ".join(drawn(plot_scaling.figure(failed, {})))
    assert "no point against workers" in texts
    assert "no point by size" in texts
    assert "no extrapolation" in texts


@pytest.mark.parametrize("terminal", [True, False])
def test_tables_are_shown_whole_in_a_terminal_and_elsewhere(terminal: bool) -> None:
    text = io.StringIO()
    where = Console(file=text, force_terminal=terminal, width=160, _environ={"TERM": "xterm"})
    tables.show(tables.sheets(memory_rows(("tasks",))), where)
    assert "> cap" in text.getvalue()
    assert ("\x1b[" in text.getvalue()) == terminal
    assert "…" not in text.getvalue()
