"""The scheduler that serve/cpu/platform.py names: blocks of key-value memory are cleared before use.

serve/cpu/runner.py clears them, once the scheduler reports which blocks are new.
"""

import copy
from typing import Any

from vllm.v1.kv_cache_interface import KVCacheConfig

from serve.scheduler import TurnsScheduler


class CleanBlocksScheduler(TurnsScheduler):
    """The turns scheduler, which also reports every new block to the model runner."""

    def __init__(self, *args: Any, kv_cache_config: KVCacheConfig, **kwargs: Any) -> None:
        config = copy.copy(kv_cache_config)
        config.__class__ = _ClearedConfig
        super().__init__(*args, kv_cache_config=config, **kwargs)


class _ClearedConfig(KVCacheConfig):
    # vLLM's own property is true for models with a recurrent state, and false for attention alone.
    needs_kv_cache_zeroing = True
