"""Many adapters in one batch on a CPU, correct and near the speed of the base model.

vLLM's own CPU path copies the adapter's weights once per token, pads every rank to the largest allowed, and reads a
base token's index -1 as the last slot, so that a base request batched with an adapter is answered with that adapter.
Here rows are grouped by adapter once per step. Each layer then makes one call into lora.cpp (or, without a compiler,
uses a few torch operators per adapter) at the adapter's own rank. Rows without an adapter stay unchanged. vLLM finds
this class through serve/cpu/plugin.py.
"""

import ctypes
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU
from vllm.utils.torch_utils import direct_register_custom_op

from serve.cpu import kernel
from serve.cpu.kernel import LANES, MAX_SLICES

KERNELS = {torch.bfloat16: "lora_bfloat16", torch.float32: "lora_float32"}


class Groups:
    """Rows of a batch by adapter slot: slots[i] has rows[starts[i] : starts[i + 1]]. Base rows are in no group."""

    def __init__(self, indices: torch.Tensor) -> None:
        """`indices`: the slot of each row, negative for the base."""
        self.n_rows = len(indices)
        order = torch.sort(indices, stable=True)
        n_base = int((indices < 0).sum())
        self.rows = order.indices[n_base:].to(torch.int32)
        slots, counts = torch.unique_consecutive(order.values[n_base:], return_counts=True)
        self.slots = slots.to(torch.int32)
        self.starts = torch.cat([counts.new_zeros(1), counts.cumsum(0)]).to(torch.int32)
        self.present = frozenset(slots.tolist())
        pointers = (self.slots.data_ptr(), self.starts.data_ptr(), self.rows.data_ptr())
        self.for_kernel = kernel.KernelGroups(len(slots), *pointers)
        self.address = ctypes.addressof(self.for_kernel)

    def __iter__(self) -> Iterator[tuple[int, torch.Tensor]]:
        bounds = self.starts.tolist()
        for i, slot in enumerate(self.slots.tolist()):
            yield slot, self.rows[bounds[i] : bounds[i + 1]].long()


class PackedAdapter(NamedTuple):
    """One adapter's weights for one layer at its own rank, as vectors of LANES columns (see _in_vectors).

    a: (vectors, n_in, LANES, 1), with the slices' columns side by side. b, per slice: (vectors, rank, LANES, 1). If the
    kernel multiplies pairs, a is (vectors, n_in / 2 rounded up, LANES, 2).
    """

    a: torch.Tensor
    b: tuple[torch.Tensor, ...]
    ranks: tuple[int, ...]


class Layer:
    """The adapters of one linear layer. Each is packed once, at its first use, whichever slots it gets later."""

    def __init__(
        self, a_stacked: Sequence[torch.Tensor], b_stacked: Sequence[torch.Tensor], n_out: Sequence[int]
    ) -> None:
        """`a_stacked`: (slots, 1, max rank, n_in) per slice; `b_stacked`: (slots, 1, n_out, max rank) per slice."""
        self.a_stacked, self.b_stacked, self.n_out = tuple(a_stacked), tuple(b_stacked), tuple(n_out)
        self.version = -1
        self.in_slots: dict[int, PackedAdapter] = {}
        self.packed = weakref.WeakKeyDictionary[Any, PackedAdapter]()
        self.table = (kernel.Adapter * a_stacked[0].shape[0])()
        self.for_kernel = kernel.KernelLayer(
            a_stacked[0].shape[-1], len(n_out), (ctypes.c_int64 * MAX_SLICES)(*n_out), ctypes.addressof(self.table)
        )
        self.address = ctypes.addressof(self.for_kernel)

    def pack_missing(self, present: frozenset[int], adapter_in: Callable[[int], object]) -> None:
        """Pack what is not packed yet in these slots. `adapter_in`: vLLM's adapter object in a slot, or None."""
        # Before vLLM writes to a slot, it sets the slot's first slice to zero, which increments the tensor's version.
        version = self.a_stacked[0]._version
        if version == self.version and present <= self.in_slots.keys():
            return
        if version != self.version:
            self.in_slots.clear()
            self.version = version
        for slot in present - self.in_slots.keys():
            adapter = adapter_in(slot)
            packed = self.packed.get(adapter) if adapter is not None else None
            if packed is None:
                packed = self._pack(slot)
                if adapter is not None:
                    self.packed[adapter] = packed
            self.in_slots[slot] = packed
            entry = self.table[slot]
            entry.a, entry.columns = packed.a.data_ptr(), len(packed.a) * LANES
            entry.rank[: len(packed.ranks)] = packed.ranks
            entry.b[: len(packed.b)] = [b.data_ptr() for b in packed.b]

    def _pack(self, slot: int) -> PackedAdapter:
        # In numpy, because torch would wake its threads for each of a model's hundreds of slices while answers wait.
        a_used = [_used_rows(_bits(a_all[slot, 0])) for a_all in self.a_stacked]
        ranks = tuple(len(rows) for rows in a_used)
        dtype = self.a_stacked[0].dtype
        a = _in_vectors(np.concatenate(a_used), dtype, kernel.along_k() if dtype is torch.bfloat16 else 1)
        b = tuple(
            _in_vectors(_bits(b_all[slot, 0])[:n_out, :rank], b_all.dtype)
            for b_all, rank, n_out in zip(self.b_stacked, ranks, self.n_out, strict=True)
        )
        return PackedAdapter(a, b, ranks)


def _bits(tensor: torch.Tensor) -> np.ndarray:
    """The same memory as integers of the same size, because numpy has no bfloat16."""
    return tensor.view({2: torch.int16, 4: torch.int32}[tensor.element_size()]).numpy()


def _in_vectors(rows: np.ndarray, dtype: torch.dtype, along_k: int = 1) -> torch.Tensor:
    """(columns, k) -> (columns / LANES, k / along_k, LANES, along_k), both rounded up.

    The weights that are multiplied by the same input, or the same `along_k` inputs, become adjacent.
    """
    n_columns, k = rows.shape
    n_vectors, n_steps = -(-n_columns // LANES), -(-k // along_k)
    filled = np.zeros((n_vectors * LANES, n_steps * along_k), rows.dtype)
    filled[:n_columns, :k] = rows
    vectors = filled.reshape(n_vectors, LANES, n_steps, along_k).transpose(0, 2, 1, 3)
    return torch.from_numpy(np.ascontiguousarray(vectors)).view(dtype)


def _used_rows(a: np.ndarray) -> np.ndarray:
    """The rows up to the adapter's own rank. The rows after it are zero."""
    used = np.flatnonzero(a.any(axis=1))
    return a[: used[-1] + 1 if len(used) else 0]


class GroupedPunicaWrapper(PunicaWrapperCPU):
    """vLLM's interface to LoRA arithmetic, computed group by group.

    `layers` maps a layer's address to the layer, for calls that pass all its tensors. Compiled code passes one address
    only, without a wrapper: it looks up `_LAYERS`, which holds the layers of all wrappers.
    """

    def __init__(self, max_num_batched_tokens: int, max_batches: int, device: torch.device | str, **kwargs: Any):
        super().__init__(max_num_batched_tokens, max_batches, device, **kwargs)
        library = kernel.library()
        self.kernels = {dtype: getattr(library, name) for dtype, name in KERNELS.items()} if library else {}
        self.tokens = self.samples = Groups(torch.empty(0, dtype=torch.long))
        self.layers: dict[int, Layer] = {}
        # vLLM's adapter object for an id; set by serve/cpu/worker.py. Without it, every write to a slot counts as new.
        self.adapter_of: Callable[[int], object] = lambda _adapter_id: None
        self.adapter_ids: list[int | None] = []

    def register_layer(
        self, a_stacked: Sequence[torch.Tensor], b_stacked: Sequence[torch.Tensor], n_out: Sequence[int]
    ) -> Layer:
        """Register the addresses of one layer's adapters, which compiled code does not pass."""
        address = a_stacked[0].data_ptr()
        layer = self.layers[address] = Layer(a_stacked, b_stacked, n_out)
        _LAYERS[address] = self, layer
        return layer

    def update_metadata(self, mapping: Any, lora_index_to_id: list[int | None], *args: Any, **kwargs: Any) -> None:
        """Group the rows of the next step. vLLM calls this only after the mapping or a slot changed."""
        super().update_metadata(mapping, lora_index_to_id, *args, **kwargs)
        self.adapter_ids = lora_index_to_id
        self.tokens, self.samples = Groups(self.token_lora_indices), Groups(self.sampler_indices)

    def add_lora_linear(
        self,
        y: torch.Tensor,
        x: torch.Tensor,
        lora_a_stacked: tuple[torch.Tensor, ...],
        lora_b_stacked: tuple[torch.Tensor, ...],
        scale: float,
        output_slices: tuple[int, ...],
        **kwargs: Any,
    ) -> None:
        """y[:, slice] += x A B for every row with an adapter. B includes the scale since it was loaded."""
        assert scale == 1.0
        if torch.compiler.is_compiling():
            torch.ops.vllm.counsel_lora_linear(y, x, lora_a_stacked[0])
        elif self.tokens.present:
            layer = self.layers.get(lora_a_stacked[0].data_ptr())
            self._add(self.tokens, layer or self.register_layer(lora_a_stacked, lora_b_stacked, output_slices), y, x)

    def add_lora_logits(
        self,
        y: torch.Tensor,
        x: torch.Tensor,
        lora_a_stacked: torch.Tensor,
        lora_b_stacked: torch.Tensor,
        scale: float,
        **kwargs: Any,
    ) -> None:
        """The same for the vocabulary projection, whose rows are the sampled rows or one request's prompt rows."""
        assert scale == 1.0
        y, x = y.view(-1, y.shape[-1]), x.view(-1, x.shape[-1])
        groups = self._logits_groups(x)
        if groups.present:
            layer = self.layers.get(lora_a_stacked.data_ptr())
            n_out = min(y.shape[1], lora_b_stacked.shape[-2])
            self._add(groups, layer or self.register_layer((lora_a_stacked,), (lora_b_stacked,), (n_out,)), y, x)

    def add_lora_embedding(
        self, y: torch.Tensor, x: torch.Tensor, lora_b_stacked: torch.Tensor, add_inputs: bool = True, **kwargs: Any
    ) -> None:
        """y += x B, where x already holds each token's row of A."""
        self.add_expand(y, (x,), (lora_b_stacked,), (y.shape[-1],), add_inputs=add_inputs)

    def add_shrink(
        self,
        y: tuple[torch.Tensor, ...] | torch.Tensor,
        x: torch.Tensor,
        lora_a_stacked: tuple[torch.Tensor, ...],
        scale: float,
        **kwargs: Any,
    ) -> None:
        """y[i] = scale * x A[i]. Rows without an adapter stay unchanged."""
        x = x.view(-1, x.shape[-1])
        for into, a_all in zip(y, lora_a_stacked, strict=True):
            flat = into.view(-1, into.shape[-1])
            for slot, rows in self.tokens:
                a = a_all[slot, 0]
                flat[rows, : a.shape[0]] = (scale * (x[rows].float() @ a.float().t())).to(flat.dtype)

    def add_expand(
        self,
        y: torch.Tensor,
        x: tuple[torch.Tensor, ...] | torch.Tensor,
        lora_b_stacked: tuple[torch.Tensor, ...],
        output_slices: tuple[int, ...],
        offset_start: int = 0,
        add_inputs: bool = True,
        **kwargs: Any,
    ) -> None:
        """y[:, slice i] += x[i] B[i], or = if `add_inputs` is false. Rows without an adapter stay unchanged."""
        y = y.view(-1, y.shape[-1])
        for slot, rows in self.tokens:
            at = offset_start
            for h, b_all, n_out in zip(x, lora_b_stacked, output_slices, strict=True):
                h = h.view(-1, h.shape[-1])
                delta = h[rows].float() @ b_all[slot, 0, :n_out].float().t()
                old = y[rows, at : at + n_out].float() if add_inputs else 0.0
                y[rows, at : at + n_out] = (old + delta).to(y.dtype)
                at += n_out

    def _adapter_in(self, slot: int) -> object:
        adapter_id = self.adapter_ids[slot]
        return None if adapter_id is None else self.adapter_of(adapter_id)

    def _logits_groups(self, x: torch.Tensor) -> Groups:
        # For sampled rows vLLM passes a copy. For prompt log-probabilities it passes a slice of the step's hidden
        # states, one request at a time; the start of the slice shows which rows they are.
        if x.untyped_storage().nbytes() > x.nbytes or len(x) != len(self.sampler_indices):
            first = x.storage_offset() // x.shape[-1]
            return Groups(self.token_lora_indices[first : first + len(x)])
        return self.samples

    def _add(self, groups: Groups, layer: Layer, y: torch.Tensor, x: torch.Tensor) -> None:
        layer.pack_missing(groups.present, self._adapter_in)
        kernel = self.kernels.get(x.dtype)
        if kernel is None or not x.dtype == y.dtype == layer.a_stacked[0].dtype:
            return _with_torch(groups, layer, y, x)
        # The kernel does not check its arguments.
        (n_x, _), (n_y, _) = x.shape, y.shape
        (x_stride, x_step), (y_stride, y_step) = x.stride(), y.stride()
        assert x_step == y_step == 1, "rows must be dense"
        assert n_x >= groups.n_rows <= n_y, "the mapping belongs to another step"
        kernel(layer.address, x.data_ptr(), x_stride, y.data_ptr(), y_stride, groups.address)
        return None


def _with_torch(groups: Groups, layer: Layer, y: torch.Tensor, x: torch.Tensor) -> None:
    """The same as the kernel, with torch operators."""
    for slot, rows in groups:
        packed = layer.in_slots[slot]
        h = x[rows].float() @ _as_matrix(packed.a)[: x.shape[1]]
        h_at = y_at = 0
        for b, rank, n_out in zip(packed.b, packed.ranks, layer.n_out, strict=True):
            if rank:
                delta = h[:, h_at : h_at + rank] @ _as_matrix(b)[:, :n_out]
                y[rows, y_at : y_at + n_out] = (y[rows, y_at : y_at + n_out].float() + delta).to(y.dtype)
            h_at, y_at = h_at + rank, y_at + n_out


def _as_matrix(vectors: torch.Tensor) -> torch.Tensor:
    """(vectors, steps, LANES, along_k) -> (k, columns) in float32."""
    return vectors.float().permute(1, 3, 0, 2).flatten(0, 1).flatten(1)


# torch.compile cannot trace the grouping, so compiled code calls one operator per layer. The operator finds the layer
# and its wrapper by the address of the one tensor it gets; passing all of a layer's tensors would double its cost.
_LAYERS: dict[int, tuple[GroupedPunicaWrapper, Layer]] = {}


def _lora_linear(y: torch.Tensor, x: torch.Tensor, a: torch.Tensor) -> None:
    wrapper, layer = _LAYERS[a.data_ptr()]
    if wrapper.tokens.present:
        wrapper._add(wrapper.tokens, layer, y, x)


def _lora_linear_fake(y: torch.Tensor, x: torch.Tensor, a: torch.Tensor) -> None:
    return None


direct_register_custom_op("counsel_lora_linear", _lora_linear, mutates_args=["y"], fake_impl=_lora_linear_fake)
