"""Omniglot by address, from the real small sets where they are, and from tiny made-up ones."""

from __future__ import annotations

import io
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from memmeta.errors import InputError
from memmeta.tasks import Omniglot
from memmeta.tasks.omniglot import SMALL1_ALPHABETS, VALIDATION_ALPHABETS

images = pytest.importorskip("PIL.Image")
DATA = Path(__file__).resolve().parents[2] / "../shared/data/omniglot"
real = pytest.mark.skipif(
    not (DATA / "images_background_small1.zip").is_file(), reason="needs Omniglot's small sets in ../shared/data"
)


def _same(one: Any, other: Any) -> bool:
    pairs = zip((*one.support, *one.query), (*other.support, *other.query), strict=True)
    return all(torch.equal(left, right) for left, right in pairs)


def _drawing(number: int, side: int = 105) -> bytes:
    """A PNG, black on white: a bar in the left half at a height that ``number`` says."""
    pixels = np.full((side, side), 255, dtype=np.uint8)
    pixels[number % side, : side // 2] = 0
    buffer = io.BytesIO()
    images.fromarray(pixels).convert("1").save(buffer, "PNG")
    return buffer.getvalue()


def _write(folder: Path, name: str, alphabets: tuple[str, ...], count: int = 4, drawings: int = 5) -> Path:
    """``name`` as a zip in ``folder``: ``count`` characters in each alphabet, each with ``drawings`` drawings."""
    path = folder / f"{name}.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for number, alphabet in enumerate(alphabets):
            for character in range(count):
                for drawing in range(drawings):
                    member = f"{name}/{alphabet}/character{character:02}/{number:04}_{drawing:02}.png"
                    archive.writestr(member, _drawing(20 * number + 5 * character + drawing))
    return path


def _small(data_dir: Path | str, **settings: Any) -> Omniglot:
    return Omniglot(data_dir, **{"ways": 2, "shots": 1, "query": 2, **settings})


@real
def test_the_real_small_sets_are_split_as_published() -> None:
    train, test = Omniglot(DATA, split="train"), Omniglot(DATA, split="test")
    assert train.class_count == 4 * 136
    assert Omniglot(DATA, rotations=False).class_count == 136
    assert train.alphabet_names == ("Balinese", "Early_Aramaic", "Greek", "Korean", "Latin") == SMALL1_ALPHABETS
    assert test.alphabet_names == ("Japanese_(katakana)", "Sanskrit", "Tagalog")
    assert test.class_count == 47 + 42 + 17
    assert test.describe() == "omniglot: 5-way 1-shot, test split of 106 classes, 3 alphabets"


@real
def test_real_tasks_have_the_promised_form() -> None:
    task = Omniglot(DATA, ways=5, shots=2, query=18).task(0, 0, 0)
    for (inputs, targets), each in ((task.support, 2), (task.query, 18)):
        assert inputs.shape == (5 * each, 1, 28, 28)
        assert (inputs.dtype, targets.dtype) == (torch.float32, torch.int64)
        assert targets.tolist() == list(range(5)) * each
        assert 0 <= float(inputs.min()) <= float(inputs.max()) <= 1
        assert 0.02 < float(inputs.mean()) < 0.25
    drawn = torch.cat([task.support[0], task.query[0]])
    assert len({image.numpy().tobytes() for image in drawn}) == 100


@real
def test_zip_and_folder_give_equal_tasks(tmp_path: Path) -> None:
    for name in ("images_background_small1", "images_background_small2"):
        with zipfile.ZipFile(DATA / f"{name}.zip") as archive:
            archive.extractall(tmp_path)
    for split in ("train", "test"):
        zipped, folder = Omniglot(DATA, split=split), Omniglot(tmp_path, split=split)
        assert zipped.class_count == folder.class_count
        assert all(_same(zipped.task(1, 2, index), folder.task(1, 2, index)) for index in range(5))
    itself = Omniglot(tmp_path / "images_background_small1")
    assert _same(itself.task(0, 0, 0), Omniglot(DATA).task(0, 0, 0))


@real
def test_a_character_that_both_small_sets_have_counts_once() -> None:
    both = ("images_background_small1", "images_background_small2")
    assert Omniglot(DATA, sets=both, rotations=False).class_count == 136 + 47 + 42 + 17
    assert Omniglot(DATA, sets=both, alphabets=("Greek",), rotations=False).class_count == 24


def test_drawings_are_inverted_averaged_and_upright(tmp_path: Path) -> None:
    path = _write(tmp_path, "images_background_small1", ("Greek",))
    inputs = _small(path, size=21, rotations=False).task(0, 0, 0).query[0]
    assert torch.equal(inputs.sum((1, 2, 3)), inputs[:, 0, :, :11].sum((1, 2)))
    # One black row of five in the area of a pixel.
    assert inputs.amax((1, 2, 3)).tolist() == pytest.approx([0.2] * 4)
    assert float(inputs[:, 0, 15:].max()) == 0


def test_rotations_are_classes_of_the_training_split_only(tmp_path: Path) -> None:
    path = _write(tmp_path, "images_background_small1", ("Greek",), count=1)
    source = _small(path, ways=4)
    assert source.class_count == 4
    support = source.task(0, 0, 0).query[0][:4, 0]
    sides = {(int(image[:, :14].sum() > image[:, 14:].sum()), int(image[14:].sum() > 0)) for image in support}
    assert len(sides) > 2
    _write(tmp_path, "images_background_small2", ("Tagalog",))
    assert _small(tmp_path, split="test").class_count == 4
    assert _small(path, ways=2, alphabets=("Greek",), split="train").class_count == 4


def test_full_sets_hold_out_alphabets_and_the_evaluation_set(tmp_path: Path) -> None:
    _write(tmp_path, "images_background", ("Greek", "Latin", *VALIDATION_ALPHABETS), count=2)
    _write(tmp_path, "images_evaluation", ("Avesta", "Tibetan"))
    _write(tmp_path, "images_background_small1", SMALL1_ALPHABETS)
    names = {split: _small(tmp_path, split=split).alphabet_names for split in ("train", "validation", "test")}
    assert names["train"] == ("Greek", "Latin")
    assert names["validation"] == tuple(sorted(VALIDATION_ALPHABETS))
    assert names["test"] == ("Avesta", "Tibetan")
    assert _small(tmp_path, split="validation", alphabets=("Hebrew",)).class_count == 2


def test_a_clone_of_the_repository_and_nested_folders_are_found(tmp_path: Path) -> None:
    (tmp_path / "python").mkdir()
    path = _write(tmp_path / "python", "images_background", ("Greek", "Latin"))
    assert _small(tmp_path).class_count == 32
    nested = tmp_path / "images_background"
    with zipfile.ZipFile(path) as archive:
        archive.extractall(nested)
    assert _same(_small(nested).task(0, 0, 0), _small(path).task(0, 0, 0))


def test_foreign_entries_of_a_zip_are_left_out(tmp_path: Path) -> None:
    path = _write(tmp_path, "images_background", ("Greek",))
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("__MACOSX/images_background/Greek/character00/._0000_00.png", b"not a picture")
        archive.writestr("images_background/README.txt", b"hello")
    assert _small(path).task(0, 0, 0).support[0].shape == (2, 1, 28, 28)


def test_same_address_same_bits_in_any_order(tmp_path: Path) -> None:
    _write(tmp_path, "images_background", ("Greek", "Latin"))
    source = _small(tmp_path)
    forward = [source.task(5, 1, index) for index in range(4)]
    again = pickle.loads(pickle.dumps(source))
    backward = [again.task(5, 1, index) for index in reversed(range(4))][::-1]
    assert all(_same(one, other) for one, other in zip(forward, backward, strict=True))
    assert len(pickle.dumps(source)) < 600
    addresses = [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)]
    assert len({source.task(*address).query[0].numpy().tobytes() for address in addresses}) == 4


def test_a_changed_file_is_read_again(tmp_path: Path) -> None:
    path = _write(tmp_path, "images_background", ("Greek",))
    before = _small(path).task(0, 0, 0)
    _write(tmp_path, "images_background", ("Greek", "Latin"))
    os.utime(path, ns=(1, 1))
    assert _small(path).class_count == 32
    assert not _same(_small(path).task(0, 0, 0), before)


def test_global_random_state_is_untouched(tmp_path: Path, random_state: Callable[[], Any]) -> None:
    path = _write(tmp_path, "images_background", ("Greek",))
    before = random_state()
    _small(path).task(0, 0, 0)
    assert random_state() == before


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"ways": 500, "rotations": False}, "ways=500 but the train split has 20 classes: use at most 20"),
        ({"shots": 3, "query": 3}, "shots=3 and query=3 need 6 drawings but Balinese/character00 has 5: use at most 5"),
        ({"split": "validation"}, "small sets have no validation split"),
        ({"split": "dev"}, "split must be one of"),
        ({"query": 0}, "query must be an integer of at least 1"),
        ({"seed": -3}, "seed must be an integer of at least 0"),
        ({"rotations": 1}, "rotations must be True or False"),
        ({"alphabets": "Greek"}, r"alphabets must be a sequence of one or more names, such as alphabets=\('A', 'B'\)"),
        ({"alphabets": ()}, "alphabets must be a sequence"),
        ({"alphabets": ("Klingon",)}, "no alphabet 'Klingon' in images_background_small1: use some of Balinese"),
        ({"sets": ("small1",)}, "each of sets must be one of 'images_background', 'images_evaluation'"),
        ({"sets": ("images_evaluation",)}, "needs images_evaluation, found only images_background_small1: get"),
        ({"split": "test"}, "needs images_background_small2, found only images_background_small1: get"),
    ],
)
def test_bad_arguments_are_refused(tmp_path: Path, wrong: dict[str, Any], message: str) -> None:
    _write(tmp_path, "images_background_small1", SMALL1_ALPHABETS)
    with pytest.raises(InputError, match=message) as caught:
        _small(tmp_path, **wrong)
    assert "\n" not in str(caught.value)


def test_lists_of_names_become_tuples(tmp_path: Path) -> None:
    _write(tmp_path, "images_background_small1", SMALL1_ALPHABETS)
    source = _small(tmp_path, sets=["images_background_small1"], alphabets=["Greek"])
    assert (source.sets, source.alphabets) == (("images_background_small1",), ("Greek",))
    assert hash(source) == hash(pickle.loads(pickle.dumps(source)))


def test_a_split_without_an_alphabet_is_refused(tmp_path: Path) -> None:
    _write(tmp_path, "images_background_small2", ("Greek", "Latin"))
    with pytest.raises(InputError, match="images_background_small2 as found has no alphabet for the test split"):
        _small(tmp_path, split="test")


@pytest.mark.parametrize("missing", ["nowhere", "."])
def test_missing_files_name_the_official_address(tmp_path: Path, missing: str) -> None:
    with pytest.raises(InputError, match=r"https://github.com/brendenlake/omniglot, folder python") as caught:
        _small(tmp_path / missing)
    assert "images_background.zip" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_zip_that_is_not_one_is_named(tmp_path: Path) -> None:
    path = tmp_path / "images_background.zip"
    path.write_bytes(b"<html>not found</html>")
    with pytest.raises(InputError, match=r"images_background\.zip is not a readable zip"):
        _small(tmp_path)


def test_a_zip_of_something_else_is_named(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "images_background.zip", "w") as archive:
        archive.writestr("thesis/chapter1.txt", b"In the beginning")
    with pytest.raises(InputError, match=r"images_background\.zip holds no drawings"):
        _small(tmp_path)


@pytest.mark.parametrize("content", [b"not a picture", b"x" * (2 << 20)])
def test_a_damaged_drawing_is_named(tmp_path: Path, content: bytes) -> None:
    path = _write(tmp_path, "images_background", ("Greek",))
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("images_background/Greek/character09/0001_01.png", content)
        for number in range(2, 6):
            archive.writestr(f"images_background/Greek/character09/0001_{number:02}.png", _drawing(number))
    source = _small(path)
    with pytest.raises(InputError, match=r"images_background\.zip: images_background/Greek/character09/0001_01\.png"):
        source.task(0, 0, 0)


def test_a_truncated_zip_member_is_named(tmp_path: Path) -> None:
    path = _write(tmp_path, "images_background", ("Greek",))
    data = bytearray(path.read_bytes())
    data[100] ^= 0xFF
    path.write_bytes(bytes(data))
    source = _small(path)
    with pytest.raises(InputError, match=r"images_background\.zip: images_background/Greek/character00/0000_00\.png"):
        source.task(0, 0, 0)


def test_an_enormous_drawing_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "images_background.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for character in range(2):
            for number in range(3):
                member = f"images_background/Greek/character{character}/{number}.png"
                archive.writestr(member, _drawing(number, side=2000))
    with pytest.raises(InputError, match="2000 x 2000 pixels"):
        _small(path).task(0, 0, 0)
