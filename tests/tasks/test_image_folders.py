"""Colour images in folders or tables, by address."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from memmeta.errors import InputError
from memmeta.tasks import ImageFolders, image_folders

images = pytest.importorskip("PIL.Image")


def _image(path: Path, colour: int, number: int, side: int = 12) -> None:
    """An image whose red says its class and whose green its number."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.full((side, side + 4, 3), (20 * colour, 10 * number, 128), dtype=np.uint8)
    images.fromarray(pixels).save(path)


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    for split, classes in (("train", range(4)), ("val", range(4, 7)), ("test", range(7, 10))):
        for colour in classes:
            for number in range(5):
                _image(tmp_path / "folders" / split / f"n{colour:02}" / f"{number}.png", colour, number)
    (tmp_path / "folders" / "train" / "README").write_text("no class")
    (tmp_path / "folders" / "train" / "n00" / ".hidden.png").write_text("no image")
    return tmp_path / "folders"


@pytest.fixture
def tables(tmp_path: Path) -> Path:
    root = tmp_path / "tables"
    for split, classes in (("train", range(4)), ("val", range(4, 7)), ("test", range(7, 10))):
        lines = ["filename,label"]
        for colour in classes:
            for number in range(5):
                _image(root / "images" / f"{colour}{number}.png", colour, number)
                lines.append(f"{colour}{number}.png,n{colour:02}")
        (root / f"{split}.csv").write_text("\n".join(lines) + "\n")
    return root


def _source(root: Path, **settings: Any) -> ImageFolders:
    return ImageFolders(root, **{"ways": 3, "shots": 2, "query": 3, "size": 8, **settings})


def _same(one: Any, other: Any) -> bool:
    return all(
        torch.equal(a, b) for a, b in zip((*one.support, *one.query), (*other.support, *other.query), strict=True)
    )


@pytest.mark.parametrize(("split", "least"), [("train", 0), ("validation", 4), ("test", 7)])
def test_a_task_has_the_promised_form(folders: Path, split: str, least: int) -> None:
    source = _source(folders, split=split)
    task = source.task(0, 3, 1)
    classes = []
    for (inputs, targets), each in ((task.support, 2), (task.query, 3)):
        assert inputs.shape == (3 * each, 3, 8, 8)
        assert (inputs.dtype, targets.dtype) == (torch.float32, torch.int64)
        assert inputs.is_contiguous()
        assert targets.tolist() == [0, 1, 2] * each
        assert torch.allclose(inputs[:, 2], torch.tensor(128 / 255))
        reds = (inputs[:, 0, 0, 0] * 255 / 20).round().int().view(each, 3)
        assert (reds == reds[0]).all()
        classes.append(reds[0].tolist())
    assert classes[0] == classes[1]
    assert len(set(classes[0])) == 3
    assert all(least <= colour < least + source.class_count for colour in classes[0])
    greens = torch.cat([task.support[0], task.query[0]])[:, 1, 0, 0].mul(255 / 10).round().int().view(5, 3)
    assert all(sorted(column) == [0, 1, 2, 3, 4] for column in greens.T.tolist())


def test_folders_and_tables_give_equal_tasks(folders: Path, tables: Path) -> None:
    for split in ("train", "validation", "test"):
        one, other = _source(folders, split=split), _source(tables, split=split)
        assert one.describe() == other.describe()
        assert all(_same(one.task(1, 2, i), other.task(1, 2, i)) for i in range(4))


def test_a_relative_root_is_that_of_the_working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    means = []
    for name, shade in (("one", 0), ("other", 5)):
        for colour in range(3):
            for number in range(5):
                _image(tmp_path / name / "data" / "train" / f"n{colour}" / f"{number}.png", colour + shade, number)
        monkeypatch.chdir(tmp_path / name)
        means.append(_source(Path("data")).task(0, 0, 0).support[0].mean().item())
    assert means[0] != means[1]


def test_same_address_same_bits(folders: Path, random_state: Callable[[], Any]) -> None:
    source, before = _source(folders), random_state()
    forward = [source.task(5, 1, i) for i in range(4)]
    again = pickle.loads(pickle.dumps(source))
    assert all(_same(again.task(5, 1, i), forward[i]) for i in (3, 1, 0, 2))
    addresses = [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)]
    assert len({_source(folders).task(*a).query[0].numpy().tobytes() for a in addresses}) == 4
    assert random_state() == before


def test_normalised_channels(folders: Path) -> None:
    plain, scaled = (_source(folders, normalized=on).task(0, 0, 0).query[0] for on in (False, True))
    mean, deviation = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    expected = (plain - mean[:, None, None]) / deviation[:, None, None]
    assert torch.allclose(scaled, expected)


def test_chance_and_class_count(folders: Path) -> None:
    assert _source(folders).class_count == 4
    assert _source(folders, ways=4).chance == 0.25
    assert _source(folders).describe() == "images: 3-way 2-shot, train split of 4 classes"


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"ways": 5}, "ways=5 but the train split has 4 classes: use at most 4"),
        ({"ways": 1}, "ways must be an integer of at least 2"),
        ({"query": 4}, "shots=2 and query=4 need 6 images but class 'n00' has 5: use at most 5 in all"),
        ({"shots": 0}, "shots must be an integer of at least 1"),
        ({"split": "val"}, "split must be one of 'train', 'validation', 'test'"),
        ({"seed": -1}, "seed must be an integer of at least 0"),
        ({"root": 3}, "root must be the path"),
    ],
)
def test_bad_arguments_are_refused(folders: Path, wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        ImageFolders(**{"root": folders, "ways": 3, "shots": 2, "query": 3, "size": 8, **wrong})


def test_missing_parts_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nowhere' does not exist: make ROOT/\{train,val,test\}/CLASS"):
        _source(tmp_path / "nowhere")
    _image(tmp_path / "train" / "n00" / "0.png", 0, 0)
    with pytest.raises(InputError, match="has no test split: make ROOT"):
        _source(tmp_path, split="test")
    (tmp_path / "test").mkdir()
    with pytest.raises(InputError, match="has no classes"):
        _source(tmp_path, split="test")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a,b\n1,2\n", "no table with the columns"),
        ("filename,label\n", "names no"),
        ("filename,label\na.png,x\nb.png\n", "line 3 of .* has no filename or no label"),
        ("filename,label\na.png,x\nb.png,\n", "line 3 of .* has no filename or no label"),
        ("filename,label\na.png,x\na.png,y\n", "gives 'a.png' the labels 'x' and 'y'"),
    ],
)
def test_tables_that_are_none(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "train.csv").write_text(text)
    with pytest.raises(InputError, match=message):
        _source(tmp_path)


def test_tables_of_spreadsheets_and_with_a_row_twice(tables: Path) -> None:
    wanted = _source(tables).task(0, 0, 0)
    table = tables / "train.csv"
    lines = table.read_text().splitlines()
    table.write_text("\n".join([*lines, *lines[1:]]) + "\n", encoding="utf-8-sig")
    image_folders._listed.cache_clear()
    assert _same(_source(tables).task(0, 0, 0), wanted)


def test_a_damaged_image_is_named(folders: Path) -> None:
    for path in (folders / "test").glob("n08/*.png"):
        path.write_bytes(b"not an image")
    source = _source(folders, split="test")
    with pytest.raises(InputError, match=r"n08.*\.png is not an image that can be read"):
        source.task(0, 0, 0)


def test_without_pillow_it_says_how_to_get_it(folders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("memmeta.tasks.checks.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"needs PIL: pip install memmeta\[plots\]"):
        _source(folders)
