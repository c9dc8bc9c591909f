"""The CPU LoRA arithmetic against plain float32, for any mix of ranks, adapters, base rows and slices."""

import shutil

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("vllm")

from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from vllm.lora.layers import LoRAMapping  # noqa: E402
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU  # noqa: E402

from serve import vllm_api  # noqa: E402
from serve.cpu import kernel  # noqa: E402
from serve.cpu.lora import GroupedPunicaWrapper  # noqa: E402

MAX_RANK = 64
# Relative: bfloat16 has 8 bits of mantissa, and the sum is rounded to it once.
TOLERANCE = {torch.bfloat16: 2**-8, torch.float32: 1e-5}


class Adapters:
    """Random adapters in vLLM's stacked layout, each with its own rank; rank 0 leaves a slot empty."""

    def __init__(self, ranks, n_in, n_out, dtype, seed=0):
        generator = torch.Generator().manual_seed(seed)
        self.n_out = tuple(n_out)
        self.a = tuple(torch.zeros(len(ranks), 1, MAX_RANK, n_in, dtype=dtype) for _ in n_out)
        self.b = tuple(torch.zeros(len(ranks), 1, n, MAX_RANK, dtype=dtype) for n in n_out)
        for slot, rank in enumerate(ranks):
            for a, b in zip(self.a, self.b, strict=True):
                a[slot, 0, :rank] = torch.randn(rank, n_in, generator=generator) / n_in**0.5
                b[slot, 0, :, :rank] = torch.randn(b.shape[2], rank, generator=generator) / max(rank, 1) ** 0.5

    def reference(self, y, x, slots):
        """y + x A B in float32, row by row; a slot below 0 is the base model."""
        out = y.float().clone()
        for row, slot in enumerate(slots):
            at = 0
            for a, b, n in zip(self.a, self.b, self.n_out, strict=True):
                if slot >= 0:
                    out[row, at : at + n] += b[slot, 0].float() @ (a[slot, 0].float() @ x[row].float())
                at += n
        return out


def wrapper_for(slots, n_slots, samples=None, cls=GroupedPunicaWrapper):
    """A wrapper for a step in which row i belongs to slot slots[i]. Adapter ids are slot + 1, and 0 is the base."""
    wrapper = cls(4096, 256, torch.device("cpu"))
    ids = tuple(slot + 1 if slot >= 0 else 0 for slot in slots)
    sampled = ids if samples is None else tuple(slot + 1 if slot >= 0 else 0 for slot in samples)
    wrapper.update_metadata(LoRAMapping(ids, sampled, is_prefill=True), list(range(1, n_slots + 1)), n_slots, 1000)
    return wrapper


def assert_near(found, expected, dtype):
    scale = expected.abs().amax(dim=-1, keepdim=True).clamp(min=1)
    assert ((found.float() - expected) / scale).abs().max() <= TOLERANCE[dtype]


@pytest.mark.parametrize("kernel", [True, False], ids=["compiled", "torch"])
@settings(max_examples=60, deadline=None)
@given(
    ranks=st.lists(st.sampled_from([0, 1, 5, 8, 16, 17, 64]), min_size=1, max_size=8),
    picks=st.lists(st.integers(-1, 7), min_size=1, max_size=40),
    n_in=st.sampled_from([1, 7, 64, 576]),
    n_out=st.lists(st.sampled_from([1, 15, 16, 40, 192]), min_size=1, max_size=3),
    dtype=st.sampled_from([torch.bfloat16, torch.float32]),
    seed=st.integers(0, 3),
)
def test_any_mix_equals_float32_row_by_row(kernel, ranks, picks, n_in, n_out, dtype, seed):
    """For any ranks, adapters, base rows and slices the result equals the float32 one within one rounding."""
    slots = [pick if pick < len(ranks) else -1 for pick in picks]
    adapters = Adapters(ranks, n_in, n_out, dtype, seed)
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(len(slots), n_in, generator=generator).to(dtype)
    y = torch.randn(len(slots), sum(n_out), generator=generator).to(dtype)
    expected = adapters.reference(y, x, slots)
    wrapper = wrapper_for(slots, len(ranks))
    if not kernel:
        wrapper.kernels = {}
    base = y.clone()
    wrapper.add_lora_linear(y, x, adapters.a, adapters.b, 1.0, tuple(n_out))
    assert_near(y, expected, dtype)
    base_rows = torch.tensor(slots) < 0
    assert torch.equal(y[base_rows], base[base_rows])


def test_stock_answers_base_rows_with_the_last_slot_until_0_32():
    """vLLM 0.32's own CPU path gives base rows the last slot's adapter; from 0.33 on it leaves them alone."""
    slots = [-1, 0, -1]
    adapters = Adapters([8, 8], 32, (16,), torch.float32)
    x = torch.randn(3, 32)
    stock, ours = torch.zeros(3, 16), torch.zeros(3, 16)
    wrapper_for(slots, 2, cls=PunicaWrapperCPU).add_lora_linear(stock, x, adapters.a, adapters.b, 1.0, (16,))
    wrapper_for(slots, 2).add_lora_linear(ours, x, adapters.a, adapters.b, 1.0, (16,))
    answered = [1, 0, 1] if vllm_api.release(vllm_api.vllm_version()) == "0.32" else slots
    torch.testing.assert_close(stock, adapters.reference(torch.zeros(3, 16), x, answered))
    torch.testing.assert_close(ours, adapters.reference(torch.zeros(3, 16), x, slots))


def test_a_rewritten_slot_is_served_at_once():
    """New weights in a slot, of another rank, are used from the next step on."""
    adapters = Adapters([8], 32, (16,), torch.float32)
    wrapper, x = wrapper_for([0], 1), torch.randn(1, 32)
    wrapper.add_lora_linear(torch.zeros(1, 16), x, adapters.a, adapters.b, 1.0, (16,))
    newer = Adapters([20], 32, (16,), torch.float32, seed=9)
    adapters.a[0][0].copy_(newer.a[0][0])
    adapters.b[0][0].copy_(newer.b[0][0])
    y = torch.zeros(1, 16)
    wrapper.add_lora_linear(y, x, adapters.a, adapters.b, 1.0, (16,))
    torch.testing.assert_close(y, newer.reference(torch.zeros(1, 16), x, [0]))


def test_adapters_change_places_and_are_replaced():
    """Each row gets the adapter that is in its slot now, also after one came back, changed or not."""
    first, second, third = (Adapters([rank], 32, (16,), torch.float32, seed=rank) for rank in (8, 20, 5))
    slots = Adapters([0, 0], 32, (16,), torch.float32)
    known = {1: first, 2: second}
    wrapper, x = wrapper_for([0, 1], 2), torch.randn(2, 32)
    wrapper.adapter_of = known.get

    def place(*numbers):
        for slot, number in enumerate(numbers):
            for into, source in zip((*slots.a, *slots.b), (*known[number].a, *known[number].b), strict=True):
                into[slot].zero_()
                into[slot].copy_(source[0])
        mapping = LoRAMapping(tuple(numbers), tuple(numbers), is_prefill=True)
        wrapper.update_metadata(mapping, list(numbers), 2, 1000)

    def right():
        y = torch.zeros(2, 16)
        wrapper.add_lora_linear(y, x, slots.a, slots.b, 1.0, (16,))
        torch.testing.assert_close(y, slots.reference(torch.zeros(2, 16), x, [0, 1]))

    for numbers in ((1, 2), (2, 1), (1, 2)):
        place(*numbers)
        right()
    known[1] = third  # under the same id: what vLLM calls loading in place
    place(1, 2)
    right()


def test_logits_of_sampled_rows_and_of_prompt_rows_take_their_own_adapters():
    """Sampled rows follow the sampler's order; a slice of the step's hidden states follows its tokens."""
    tokens, samples = [-1, -1, 1, 1, 1, 0, 0], [-1, 1, 0]
    adapters = Adapters([4, 8], 32, (50,), torch.float32)
    wrapper = wrapper_for(tokens, 2, samples)
    hidden = torch.randn(7, 32)
    rows_and_slots = [(hidden[torch.tensor([1, 4, 6])], samples), (hidden[2:5], [1, 1, 1]), (hidden[4:6], [1, 0])]
    for x, slots in rows_and_slots:
        y = torch.zeros(len(slots), 50)
        wrapper.add_lora_logits(y, x, adapters.a[0], adapters.b[0], 1.0)
        torch.testing.assert_close(y, adapters.reference(torch.zeros(len(slots), 50), x, slots))


def test_stock_fails_on_prompt_rows_of_several_requests():
    """vLLM's own path uses one index per request for one row per prompt token. If this fails, upstream has fixed it."""
    adapters = Adapters([4], 32, (50,), torch.float32)
    wrapper = wrapper_for([0, 0, 0, 0, 0, 0], 1, [0, 0, 0], cls=PunicaWrapperCPU)
    with pytest.raises(RuntimeError, match="broadcast"):
        wrapper.add_lora_logits(torch.zeros(4, 50), torch.randn(6, 32)[:4], adapters.a[0], adapters.b[0], 1.0)


def test_embedding_and_sharded_paths_leave_base_rows_alone():
    """add_lora_embedding, add_shrink and add_expand skip rows without an adapter too."""
    slots = [1, -1, 0, -1]
    adapters = Adapters([4, 8], 32, (50,), torch.float32)
    x = torch.randn(4, 32)
    wrapper = wrapper_for(slots, 2)
    h = torch.zeros(4, MAX_RANK)
    wrapper.add_shrink((h,), x, adapters.a, 1.0)
    y = torch.zeros(4, 50)
    wrapper.add_expand(y, (h,), adapters.b, (50,))
    expected = adapters.reference(torch.zeros(4, 50), x, slots)
    torch.testing.assert_close(y, expected)
    y = torch.zeros(4, 50)
    wrapper.add_lora_embedding(y, h, adapters.b[0], add_input=True)
    torch.testing.assert_close(y, expected)


@pytest.fixture
def kernels(tmp_path, monkeypatch):
    """An empty folder for compiled kernels. This process forgets the loaded kernel, and finds it again afterwards."""
    if shutil.which("g++") is None:
        pytest.skip("no g++ here")
    monkeypatch.setattr(kernel, "cache_dir", lambda: tmp_path)
    # The tests load it but do not run it, so it may compile quickly.
    monkeypatch.setattr(kernel, "FLAGS", tuple("-O0" if flag == "-O3" else flag for flag in kernel.FLAGS))
    kernel.library.cache_clear()
    yield tmp_path / "kernels"
    kernel.library.cache_clear()


@pytest.mark.parametrize("n_bytes", [0, 100, -1000], ids=["empty", "header", "tail"])
def test_a_broken_kernel_in_the_cache_is_compiled_again(kernels, n_bytes):
    """A file cut short anywhere is never loaded. It is replaced, and the new file is used from then on."""
    assert kernel.library() is not None
    (file,) = kernels.iterdir()
    content = file.read_bytes()
    # A new file takes the name, because the library stays mapped in this process.
    file.unlink()
    file.write_bytes(content[:n_bytes])
    kernel.library.cache_clear()
    assert kernel.library() is not None
    (again,) = kernels.iterdir()
    assert again.read_bytes()[-1000:] == content[-1000:]


def test_a_good_kernel_in_the_cache_is_not_compiled_again(kernels, monkeypatch):
    """The second start compiles nothing."""
    assert kernel.library() is not None
    kernel.library.cache_clear()
    monkeypatch.setattr(kernel, "_compile", lambda _compiler: pytest.fail("compiled"))
    assert kernel.library() is not None


def test_without_a_kernel_there_is_one_warning(kernels, monkeypatch, caplog):
    """A failing compiler, a library that does not load, a cache that is a file: torch operators and one warning."""
    broken = kernels.parent / "g++"
    broken.write_text("#!/bin/sh\necho 'out of luck' >&2\nexit 1\n")
    broken.chmod(0o755)
    a_file = kernel._compile("g++")
    for change in (
        {"which": lambda _name: str(broken)},
        {"_cached": lambda _compiler: kernels.parent / "absent.so"},
        {"cache_dir": lambda: a_file},
    ):
        kernel.library.cache_clear()
        caplog.clear()
        with monkeypatch.context() as changed, caplog.at_level("WARNING", logger="vllm.counsel"):
            for name, value in change.items():
                changed.setattr(kernel.shutil if name == "which" else kernel, name, value)
            assert kernel.library() is None
        assert [record.getMessage().count("correct but slower") for record in caplog.records] == [1]


@pytest.mark.parametrize("kernel", [True, False], ids=["compiled", "torch"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("poison", [float("nan"), float("inf"), 3e38])
def test_no_row_and_no_adapter_reaches_another(kernel, dtype, poison):
    """Rows of NaN or Inf, and an adapter that overflows, do not change any other row by a single bit."""
    slots = [0, 1, -1, 0, 1, 2, 2, -1, 0, 1] * 3
    adapters = Adapters([5, 17, 8], 63, (40, 15), dtype)
    x, y = torch.randn(len(slots), 63).to(dtype), torch.randn(len(slots), 55).to(dtype)
    wrapper = wrapper_for(slots, 3)
    if not kernel:
        wrapper.kernels = {}
    clean = y.clone()
    wrapper.add_lora_linear(clean, x, adapters.a, adapters.b, 1.0, (40, 15))
    spoiled = torch.tensor([slot == 1 or row in (0, 7) for row, slot in enumerate(slots)])
    for weights in (*adapters.a, *adapters.b):
        weights[1] = weights[1].masked_fill(weights[1] != 0, poison)
    x[0], x[7], y[0] = poison, poison, poison
    found = y.clone()
    again = wrapper_for(slots, 3)
    if not kernel:
        again.kernels = {}
    for _ in range(2):  # the second run meets what the first one left in the kernel's buffers
        found = y.clone()
        again.add_lora_linear(found, x, adapters.a, adapters.b, 1.0, (40, 15))
    assert torch.equal(found[~spoiled], clean[~spoiled])
    assert not found[spoiled & (torch.tensor(slots) == 1)].isfinite().all()
