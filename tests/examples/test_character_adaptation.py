"""The transformer that adapts to texts: the texts and their splits, the network, its meta-gradient, what is learned."""

from __future__ import annotations

import statistics
from dataclasses import replace

import character_adaptation
import pytest
import torch
from character_adaptation import MAML_SGD, PRE, Setting
from character_transformer import Transformer, next_character
from library_texts import CHARACTERS, SPLITS, Passages, characters, library, tokens

import memmeta as mm
from memmeta.errors import InputError

TINY = Setting(
    rows=2,
    length=16,
    layers=1,
    width=16,
    steps=3,
    pretraining=30,
    outer_steps=8,
    meta_batch=2,
    tested_on=1,
    rates=(0.1, 0.3),
    adam_rates=(1e-3,),
)


def test_tokens_are_the_text_again() -> None:
    text = "def f(x):\n    return x  # ~\n"
    assert characters(tokens(text)) == text
    assert characters(tokens("\tf\r\nü")) == "    f\n?"
    assert len(CHARACTERS) == 96


def test_splits_share_no_source_and_have_enough() -> None:
    names = [set(library(split)) for split in SPLITS]
    assert all(len(found) >= 5 for found in names)
    assert sum(map(len, names)) == len(set.union(*names))
    assert all(len(text) >= 16_000 for split in SPLITS for text in library(split).values())
    with pytest.raises(InputError, match="split='all'"):
        library("all")


def test_the_query_follows_the_support_in_one_source() -> None:
    task = Passages("test", rows=4, length=32).task(0, 1, 2)
    (given, wanted), (later, last) = task.support, task.query
    piece = torch.cat([given.flatten(), later.flatten(), last[-1, -1:]])
    assert given.shape == wanted.shape == later.shape == last.shape == (4, 32)
    assert torch.equal(torch.cat([wanted.flatten(), last.flatten()]), piece[1:])
    assert any(characters(piece) in characters(text) for text in library("test").values())


def test_tasks_depend_on_their_address_alone() -> None:
    source = Passages("train", rows=2, length=8)
    again, other = source.task(0, 5, 1), source.task(0, 5, 2)
    assert torch.equal(source.batch(5, 2)[1].support[0], again.support[0])
    assert not torch.equal(other.support[0], again.support[0])


def test_each_gives_every_source_as_often() -> None:
    found = list(Passages("validation", rows=2, length=8).each(2))
    assert [name for name, _ in found] == [name for name in library("validation") for _ in range(2)]
    assert not torch.equal(found[0][1].support[0], found[1][1].support[0])


def test_no_character_sees_a_later_one() -> None:
    net = Transformer(96, 12, layers=2, width=16, heads=2).double()
    text = torch.randint(96, (1, 12), generator=torch.Generator().manual_seed(0))
    other = text.clone()
    other[0, 7] = (other[0, 7] + 1) % 96
    before, after = net(text), net(other)
    torch.testing.assert_close(before[:, :7], after[:, :7], rtol=0, atol=1e-12)
    assert (before[:, 7:] - after[:, 7:]).abs().amax(-1).min() > 1e-6


@pytest.mark.slow
def test_the_meta_gradient_of_weights_and_rates_is_exact() -> None:
    setting = replace(TINY, steps=2)

    def gradient(adjoint: mm.Adjoint | None) -> dict[str, torch.Tensor]:
        net = TINY.network().double()
        rates = {name: torch.tensor(0.2, dtype=torch.float64, requires_grad=True) for name, _ in net.named_parameters()}
        learner = character_adaptation.learner_of(net, mm.SGD(lr=rates), setting)
        if adjoint is not None:
            learner = mm.maml(net, loss=next_character, optimizer=mm.SGD(lr=rates), steps=2, adjoint=adjoint)
        return learner.meta_gradient(TINY.source("train").batch(0, 1)).sums

    wanted, found = gradient(mm.Unrolled()), gradient(None)
    assert wanted.keys() == found.keys()
    assert len(found) == 2 * len(list(TINY.network().parameters()))
    error = sum((found[name] - value).square().sum() for name, value in wanted.items())
    assert error <= 1e-20 * sum(value.square().sum() for value in wanted.values())


@pytest.mark.slow
def test_the_rate_that_is_chosen_adapts_best() -> None:
    net = TINY.network()
    found = character_adaptation.tuned(net, character_adaptation.sgd, (0.3, 30.0), replace(TINY, steps=1))
    assert found == 0.3


@pytest.mark.slow
def test_maml_adapts_better_than_the_weights_that_it_starts_from() -> None:
    study = character_adaptation.trained(TINY)
    source = TINY.source("test")
    start = f"{PRE}; SGD"
    found = {name: character_adaptation.adaptation(study.learners[name], source, 1) for name in (start, MAML_SGD)}
    gain, margin = found[MAML_SGD].gain(found[start])
    assert gain > margin > 0
    for one in found.values():
        assert one.interval(TINY.steps)[0] < one.interval(0)[0]
    assert len(study.training[MAML_SGD]) == TINY.outer_steps
    assert statistics.fmean(study.training[PRE][-5:]) < statistics.fmean(study.training[PRE][:5])
