"""The network of MAML++ (Antoniou, Edwards and Storkey 2019, section 5.3), and the tasks that it is trained on."""

from __future__ import annotations

from typing import NamedTuple

from torch import nn

import memmeta as mm
from memmeta.tasks.omniglot_files import BACKGROUND, find_sets

HELD_OUT = "Korean"  # the alphabet of Omniglot's first small set that validates there


def convolutional(
    ways: int, filters: int = 64, *, channels: int = 1, size: int = 28, strided: bool = False
) -> nn.Sequential:
    """Four blocks of 3x3 convolution, batch norm, LeakyReLU and max pooling, and a linear layer.

    Weights are Xavier-uniform, biases zero. ``strided``: convolutions of stride 2 instead of the pooling, and the mean
    over all places before the linear layer.

    Args:
        ways: classes.
        filters: 64 for Omniglot, 48 for mini-ImageNet.
        channels: of the images (n, channels, size, size).
        size: of an image's side: 28, 84 for mini-ImageNet.
        strided: which of the two.
    """
    layers: list[nn.Module] = []
    for inputs in (channels, filters, filters, filters):
        layers += [nn.Conv2d(inputs, filters, 3, 2 if strided else 1, 1), nn.BatchNorm2d(filters), nn.LeakyReLU(0.01)]
        if not strided:
            layers.append(nn.MaxPool2d(2))
    if strided:
        layers.append(nn.AdaptiveAvgPool2d(1))
    features = filters if strided else filters * (size // 16) ** 2
    net = nn.Sequential(*layers, nn.Flatten(), nn.Linear(features, ways))
    for module in net:
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            nn.init.xavier_uniform_(module.weight)
            assert module.bias is not None
            nn.init.zeros_(module.bias)
    return net


class Sources(NamedTuple):
    """Tasks of three splits that share no class."""

    train: mm.TaskSource
    validation: mm.TaskSource
    test: mm.TaskSource


def sources(data_dir: str | None, ways: int, shots: int, query: int, scored: int = 15) -> Sources:
    """Tasks from Omniglot's files, or of printed letters where there are none.

    Args:
        data_dir: folder with Omniglot's sets; None for ``mm.tasks.Glyphs``, which need no files.
        ways: classes of a task.
        shots: support images of each class.
        query: query images of each class in training.
        scored: query images of each class in validation and test.
    """
    if data_dir is None:
        glyphs = mm.tasks.Glyphs
        return Sources(
            glyphs(ways, shots, query),
            glyphs(ways, shots, scored, split="validation"),
            glyphs(ways, shots, scored, split="test"),
        )
    omniglot = mm.tasks.Omniglot
    test = omniglot(data_dir, ways, shots, scored, split="test")
    if BACKGROUND in find_sets(data_dir):
        validation = omniglot(data_dir, ways, shots, scored, split="validation")
        return Sources(omniglot(data_dir, ways, shots, query), validation, test)
    names = omniglot(data_dir, ways, shots, query).alphabet_names
    train = omniglot(data_dir, ways, shots, query, alphabets=tuple(name for name in names if name != HELD_OUT))
    validation = omniglot(data_dir, ways, shots, scored, rotations=False, alphabets=(HELD_OUT,))
    return Sources(train, validation, test)
