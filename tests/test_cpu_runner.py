"""What our CPU runner adds to vLLM's: it clears blocks, and finds rows of scores without a finite maximum."""

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("vllm")

from serve.cpu.runner import CounselCpuModelRunner, rows_not_finite  # noqa: E402

NAN, INF = float("nan"), float("inf")


def test_a_block_is_cleared_in_every_layer_and_nowhere_else():
    """Whatever attention a layer has, and if two layers share memory; caches that are not tensors are skipped."""
    shared, own = (torch.full((6, 1, 32, 64), NAN, dtype=torch.bfloat16) for _ in range(2))
    runner = CounselCpuModelRunner.__new__(CounselCpuModelRunner)
    runner.kv_caches = [shared, shared, own, [torch.full((6, 2), NAN)]]
    runner._zero_block_ids([1, 4])
    for cache in (shared, own):
        assert [bool((block == 0).all()) for block in cache] == [False, True, False, False, True, False]
        assert cache[[0, 2, 3, 5]].isnan().all()
    assert runner.kv_caches[3][0].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("at", [0, 7, 1000])
def test_rows_without_a_finite_best_score_are_found(dtype, at):
    """A NaN or an infinity anywhere. A row in which a grammar masks all but one token is fine."""
    scores = torch.zeros(5, 1001, dtype=dtype)
    scores[1, at], scores[2, at] = NAN, INF
    scores[3] = -INF
    scores[4] = -INF
    scores[4, at] = 3.0
    assert rows_not_finite(scores) == [1, 2, 3]
