"""Characters of matplotlib's fonts by address."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import pickle
import re
import subprocess
import sys
import unicodedata
from collections import defaultdict
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from memmeta.errors import InputError
from memmeta.tasks import Glyphs
from memmeta.tasks.alphabets import MATPLOTLIB
from memmeta.tasks.drawing import FACES, PARAMETERS, SIDE, master, render
from memmeta.tasks.glyphs import _letters

pytest.importorskip("matplotlib")
PINNED = (MATPLOTLIB, "13.0.0", "2.4.6")
SPLITS = ("train", "validation", "test")
ROOT = Path(__file__).resolve().parents[2]


def _same(one: Any, other: Any) -> bool:
    pairs = zip((*one.support, *one.query), (*other.support, *other.query), strict=True)
    return all(torch.equal(left, right) for left, right in pairs)


def _python(script: str) -> str:
    """What a fresh interpreter prints."""
    command = [sys.executable, "-c", script]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True, text=True).stdout.strip()


@pytest.mark.parametrize("split", SPLITS)
def test_images_and_targets(split: str) -> None:
    source = Glyphs(ways=4, shots=2, query=3, split=split, size=20)
    task = source.task(0, 0, 0)
    for (images, targets), each in ((task.support, 2), (task.query, 3)):
        assert images.shape == (4 * each, 1, 20, 20)
        assert (images.dtype, targets.dtype) == (torch.float32, torch.int64)
        assert images.is_contiguous()
        assert targets.tolist() == list(range(4)) * each
        assert float(images.min()) == 0
        assert 0.5 < float(images.max()) <= 1
    assert source.chance == 0.25


def test_ink_is_one_on_a_blank_border_and_centred() -> None:
    images = torch.cat([Glyphs(ways=20).task(0, 0, index).query[0] for index in range(5)])[:, 0]
    share = images.mean((1, 2))
    assert float(share.min()) > 0.02
    assert float(share.max()) < 0.6
    border = torch.cat([images[:, 0], images[:, -1], images[:, :, 0], images[:, :, -1]])
    assert float(border.mean()) < 0.01
    place = torch.arange(28.0) - 13.5
    centre = torch.stack([(images.sum(axis) * place).sum(1) / images.sum((1, 2)) for axis in (1, 2)])
    assert float(centre.mean(1).abs().max()) < 1
    assert float(centre.abs().max()) < 9


def test_letters_stand_upright() -> None:
    letter = master(FACES.index("DejaVuSans"), ord("L"))
    rows, columns = letter.sum(1, dtype=np.int64), letter.sum(0, dtype=np.int64)
    assert rows.argmax() > SIDE * 0.7
    assert columns.argmax() < SIDE * 0.45


def test_no_two_images_of_a_task_are_equal() -> None:
    task = Glyphs(ways=10, shots=5, query=15).task(0, 0, 0)
    images = torch.cat([task.support[0], task.query[0]])
    assert len({image.numpy().tobytes() for image in images}) == len(images)


def test_same_address_same_bits_in_any_order_and_process() -> None:
    source = Glyphs(query=3)
    forward = [source.task(5, 1, index) for index in range(4)]
    again = pickle.loads(pickle.dumps(source))
    backward = [again.task(5, 1, index) for index in reversed(range(4))][::-1]
    assert all(_same(one, other) for one, other in zip(forward, backward, strict=True))
    script = "from memmeta.tasks import Glyphs; import hashlib; " + (
        "print(hashlib.sha256(Glyphs(query=3).task(5, 1, 2).query[0].numpy().tobytes()).hexdigest())"
    )
    here = hashlib.sha256(forward[2].query[0].numpy().tobytes()).hexdigest()
    assert _python(script) == here


def test_seed_step_index_and_split_each_change_the_task() -> None:
    addresses = [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)]
    tasks = [Glyphs(query=1).task(*address) for address in addresses] + [Glyphs(query=1, split="test").task(0, 0, 0)]
    assert len({task.support[0].numpy().tobytes() for task in tasks}) == 5


def test_an_image_depends_on_its_own_letter_and_numbers_alone() -> None:
    letters = [(face, code) for face in (0, 4) for code in map(ord, "aBc")]
    units = np.random.default_rng(0).random((PARAMETERS, len(letters)))
    together = render(letters, units, 28)
    for number, letter in enumerate(letters):
        alone = render([letter], units[:, number : number + 1], 28)
        assert np.array_equal(alone[0], together[number])


def test_splits_share_no_character_and_no_script() -> None:
    characters = [set(Glyphs(split=split).characters) for split in SPLITS]
    scripts = [{unicodedata.name(character).split()[0] for character in own} for own in characters]
    for groups in (characters, scripts):
        assert sum(map(len, groups)) == len(set().union(*groups))
    assert [len(own) for own in characters] == [801, 65, 324]
    assert {"LATIN", "GREEK", "CYRILLIC"} <= scripts[0]


def test_no_raster_is_in_two_splits_or_two_classes_or_blank() -> None:
    owners: dict[bytes, set[tuple[str, int]]] = defaultdict(set)
    for split in SPLITS:
        for code, faces in _letters(split):
            assert faces
            for face in faces:
                raster = master(face, code)
                assert int(raster.max()) == 255
                owners[raster.tobytes()].add((split, code))
    assert len(owners) > 8500
    assert all(len(own) == 1 for own in owners.values())


def test_the_fingerprint_names_the_drawing() -> None:
    assert re.fullmatch("[0-9a-f]{16}", Glyphs().fingerprint)
    assert Glyphs().fingerprint == Glyphs(ways=2, split="test").fingerprint


def test_the_pinned_versions_draw_the_same_bits_as_ever() -> None:
    versions = tuple(version(name) for name in ("matplotlib", "pillow", "numpy"))
    if versions != PINNED:
        pytest.skip(f"drawn with matplotlib, pillow, numpy {PINNED}, here are {versions}")
    inputs, targets = Glyphs(split="test").task(1, 2, 3).query
    bits = hashlib.sha256(inputs.numpy().tobytes() + targets.numpy().tobytes()).hexdigest()[:16]
    assert (Glyphs().fingerprint, bits) == ("fc3af3f26c5ca3b7", "4907080f47e08b51")


def test_global_random_state_is_untouched(random_state: Callable[[], Any]) -> None:
    before = random_state()
    Glyphs().task(0, 0, 0)
    assert random_state() == before


def test_the_pickle_holds_no_images() -> None:
    source = Glyphs(split="test")
    source.task(0, 0, 0)
    assert len(pickle.dumps(source)) < 500
    assert source.describe() == "glyphs: 5-way 1-shot, test split of 324 characters"


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"ways": 1}, "ways must be an integer of at least 2, got 1"),
        ({"ways": 5000}, "ways=5000 but the train split has 801 classes: use at most 801"),
        ({"shots": 0}, "shots must be an integer of at least 1"),
        ({"query": -1}, "query must be an integer of at least 1"),
        ({"size": 0}, "size must be an integer of at least 1"),
        ({"seed": -1}, "seed must be an integer of at least 0"),
        ({"shots": "1"}, "shots must be an integer"),
        ({"split": "valid"}, "split must be one of 'train', 'validation', 'test', got 'valid'"),
    ],
)
def test_bad_arguments_are_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Glyphs(**wrong)


def test_without_the_plots_extra_the_recipe_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr("memmeta.tasks.checks.find_spec", lambda name: None if name == "matplotlib" else find(name))
    with pytest.raises(InputError, match=re.escape("needs matplotlib: pip install memmeta[plots]")):
        Glyphs()


def test_importing_the_sources_imports_no_optional_package() -> None:
    script = (
        "import sys, memmeta.tasks; print(sorted({'matplotlib', 'PIL', 'learn2learn', 'scipy'} & set(sys.modules)))"
    )
    assert _python(script) == "[]"


@pytest.mark.slow
def test_the_table_is_what_the_tool_selects() -> None:
    matplotlib = pytest.importorskip("matplotlib")
    if matplotlib.__version__ != MATPLOTLIB:
        pytest.skip(f"the table was made with matplotlib {MATPLOTLIB}")
    script = "import runpy; print(runpy.run_path('tools/select_glyphs.py')['table']())"
    lines = [line.rstrip() for line in Path(ROOT, "memmeta/tasks/alphabets.py").read_text().splitlines()]
    assert _python(script).splitlines() == lines
