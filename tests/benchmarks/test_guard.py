"""The guard on memory: growth is found, and named."""

from __future__ import annotations

from pathlib import Path

import pytest

from memmeta.errors import InputError
from memmeta_bench import guard, peers, problems

SMALL = guard.Case("sinusoid_mlp", "memmeta-stepwise", {"tasks": 2, "steps": 2}, {"chunk": 2})


def test_every_case_is_a_problem_and_a_method_that_there_is() -> None:
    assert len({case.name() for case in guard.CASES}) == len(guard.CASES)
    for case in guard.CASES:
        assert set(case.sizes) <= set(problems.sizes_of(case.problem))
        method = peers.find(case.method)
        assert not method.compiled  # what a compiled program allocates isn't counted on the CPU
        assert set(case.options) <= set(method.options)


def test_a_count_is_the_same_on_every_run() -> None:
    first, again = guard.counted(SMALL), guard.counted(SMALL)
    assert first == again > 0


def test_growth_names_the_problem_before_and_after() -> None:
    before = {"conv4 memmeta-stepwise tasks=4": 100 * 2**20, "gone": 1, "same": 5}
    now = {"conv4 memmeta-stepwise tasks=4": 104 * 2**20, "new": 1, "same": 5}
    lines = guard.grown(before, now)
    assert lines[0] == (
        "conv4 memmeta-stepwise tasks=4: memory has grown: 100.0 MiB before, 104.0 MiB now, 1.040x (at most 1.03x)"
    )
    assert lines[1:] == [
        "new: not in the file; renew it with --write",
        "gone: in the file, but no longer measured; renew it with --write",
    ]
    assert guard.grown({"a": 100}, {"a": 103}) == []
    assert guard.grown({"a": 100}, {"a": 10}) == []


def test_the_command_writes_compares_and_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "guard.json"
    monkeypatch.setattr(guard, "CASES", (SMALL,))
    assert guard.main(["--write", "--against", str(file)]) == 0
    assert guard.main(["--against", str(file)]) == 0
    assert "1.000x" in capsys.readouterr().out
    counts = guard.read(file)
    guard.write(file, {name: size // 2 for name, size in counts.items()})
    assert guard.main(["--against", str(file)]) == 1
    assert f"memmeta_bench.guard: {SMALL.name()}: memory has grown" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["guard.json"]


def test_a_missing_or_broken_file_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert guard.main(["--against", str(tmp_path / "none.json")]) == 2
    assert "write it with --write" in capsys.readouterr().err
    (tmp_path / "broken.json").write_text('{"counted_bytes": [1]}')
    with pytest.raises(InputError, match="not a file of counted bytes"):
        guard.read(tmp_path / "broken.json")
    with pytest.raises(InputError, match="can't be written"):
        guard.write(tmp_path / "missing" / "guard.json", {})


@pytest.mark.slow
def test_no_key_problem_takes_more_memory_than_what_is_committed() -> None:
    assert guard.grown(guard.read(guard.COMMITTED), guard.measured()) == []
