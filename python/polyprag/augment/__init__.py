"""Augmentation: question-answer pairs and a rewrite of each document.

Written by the base model itself (``local``), by a model behind an OpenAI-compatible endpoint (``endpoint``),
or read from files. Only ``local`` needs torch.
"""

from polyprag.augment.base import Augmentation, Augmenter, AugmentSettings, Pair
from polyprag.augment.prompts import Prompts, prompts_as_toml, prompts_of, read_prompts
from polyprag.augment.run import (
    Summary,
    append_augmentations,
    augment,
    others_in,
    read_augmentations,
    read_pairs,
    summary,
)

__all__ = [
    "AugmentSettings",
    "Augmentation",
    "Augmenter",
    "Pair",
    "Prompts",
    "Summary",
    "append_augmentations",
    "augment",
    "others_in",
    "prompts_as_toml",
    "prompts_of",
    "read_augmentations",
    "read_pairs",
    "read_prompts",
    "summary",
]
