"""A scheduler in which adapters take turns in the slots. The CPU platform extends it.

It was never run on a GPU. To try it there: `--vllm-args '--scheduler-cls serve.scheduler.make_scheduler'`.

While other adapters' answers run in every slot, vLLM skips a waiting request and admits newer requests for those
adapters, so next to a few busy adapters another can wait forever. Here an adapter that has waited long enough gets the
slot of the adapter that has held one longest. The answers of that adapter pause until it gets a slot again. They keep
their key-value memory, so nothing is computed twice.

In the step in which an adapter takes a slot, its weights are written and packed and its request's prompt is read, and
every running answer waits. vLLM admits as many adapters per step as slots are free; here one adapter per step takes a
slot. Requests for the base and for adapters in a slot are not delayed.

A request whose scores are not finite, so that no token can be chosen, ends with an error.
"""

import time
from collections import OrderedDict
from typing import Any

from vllm.logger import init_logger
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.interface import SchedulerInterface
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import Request, RequestStatus

from serve.config import ServeConfig
from serve.launch import ADAPTER_WAIT_KEY

logger = init_logger("vllm.counsel.scheduler")


def make_scheduler(*args: Any, **kwargs: Any) -> SchedulerInterface:
    """vLLM calls this as if it were a class. Like vLLM by default, it chooses between the two kinds of scheduler."""
    asynchronous = kwargs["vllm_config"].scheduler_config.async_scheduling
    return (AsyncTurnsScheduler if asynchronous else TurnsScheduler)(*args, **kwargs)


class TurnsScheduler(Scheduler):
    """vLLM's scheduler with turns. `turns` maps each adapter that has one to its start, earliest first."""

    clock = staticmethod(time.monotonic)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # An adapter gets a slot within half of its longest wait. The other half is for reading its prompt.
        self.due_s = self.vllm_config.additional_config.get(ADAPTER_WAIT_KEY, ServeConfig.adapter_wait_s) / 2
        self.turns = dict[int, float]()
        self.without_since = dict[int, float]()
        # The adapters in the worker's slots, most recently used last.
        self.in_slots = OrderedDict[int, None]()
        self.now = 0.0
        self.slot_taken = False
        # The adapter that is due: it has a turn, or gets one once there is room. Other adapters wait for it.
        self.due_adapter: int | None = None
        self.not_finite = frozenset[str]()

    def schedule(self, throttle_prefills: bool = False) -> SchedulerOutput:
        """As vLLM's, but answers of adapters without a turn pause, and at most one adapter enters a slot."""
        self.now, self.slot_taken = self.clock(), False
        self._give_turns()
        paused = [
            (request, request.lora_request)
            for request in self.running
            if (adapter_id := adapter_id_of(request)) is not None and adapter_id not in self.turns
        ]
        for request, _ in paused:
            # vLLM's own way to keep a request out of a step, for tokens that are still in its pipeline.
            request.next_decode_eligible_step = max(request.next_decode_eligible_step, self.current_step + 2)
            # From 0.33 on, vLLM counts the adapters of all that run, so the slot of a paused adapter would not be free.
            request.lora_request = None
        try:
            return super().schedule(throttle_prefills)
        finally:
            for request, lora_request in paused:
                request.lora_request = lora_request

    def _give_turns(self) -> None:
        running = dict.fromkeys(
            adapter_id for request in self.running if (adapter_id := adapter_id_of(request)) is not None
        )
        first_waiting: dict[int, Request] = {}
        for request in self.waiting:
            adapter_id = adapter_id_of(request)
            if adapter_id is not None and request.status in (RequestStatus.WAITING, RequestStatus.PREEMPTED):
                first_waiting.setdefault(adapter_id, request)
        if self.due_adapter in running or self.due_adapter not in first_waiting:
            self.due_adapter = None
        contenders = running | first_waiting
        self.turns = {adapter_id: began for adapter_id, began in self.turns.items() if adapter_id in contenders}
        for adapter_id in running.keys() & self.turns.keys():
            self._use_slot(adapter_id)
        without = {
            adapter_id: self.without_since.get(adapter_id, self.now)
            for adapter_id in contenders
            if adapter_id not in self.turns
        }
        self.without_since = dict(sorted(without.items(), key=lambda item: item[1]))
        for adapter_id, since in list(self.without_since.items()):
            due = self.now - since >= self.due_s
            if adapter_id in running and not self._can_enter(adapter_id):
                break
            if len(self.turns) == self.lora_config.max_loras:
                longest = next(iter(self.turns))
                if not due:
                    break
                another_is_due = self.due_adapter not in (None, adapter_id, *self.turns)
                if adapter_id not in running and (another_is_due or not self._has_room(first_waiting[adapter_id])):
                    # It waits for room. Adapters that have room keep taking turns without it.
                    self.due_adapter = self.due_adapter or adapter_id
                    continue
                # No other adapter gets the room that this one waited for, so it need not also wait for a turn to end.
                if adapter_id != self.due_adapter and self.now - self.turns[longest] < self.due_s:
                    break
                del self.turns[longest]
                self.without_since[longest] = self.now
            # The other waiting adapters begin in the order of the queue, below.
            if adapter_id in running:
                self._start_turn(adapter_id)
                self._use_slot(adapter_id)
            elif due:
                self._start_turn(adapter_id)
                self.due_adapter = adapter_id
                break

    def _handle_blocked_waiting_request(self, request: Request) -> bool:
        # vLLM calls this for each waiting request before it admits it. A request that must wait keeps its place.
        if not super()._handle_blocked_waiting_request(request):
            return False
        adapter_id = adapter_id_of(request)
        if self.due_adapter is not None and adapter_id != self.due_adapter:
            return False
        if adapter_id is None:
            return True
        if adapter_id not in self.turns and len(self.turns) == self.lora_config.max_loras:
            return False
        if not self._can_enter(adapter_id):
            return False
        if adapter_id not in self.turns:
            self._start_turn(adapter_id)
        self._use_slot(adapter_id)
        return True

    def _has_room(self, request: Request) -> bool:
        groups = len(self.kv_cache_config.kv_cache_groups)
        free_tokens = self.kv_cache_manager.block_pool.get_num_free_blocks() * self.block_size // max(groups, 1)
        return len(self.running) < self.max_num_active_reqs and request.num_tokens < free_tokens

    def _start_turn(self, adapter_id: int) -> None:
        self.turns[adapter_id] = self.now
        self.without_since.pop(adapter_id, None)

    def _can_enter(self, adapter_id: int) -> bool:
        return adapter_id in self.in_slots or not self.slot_taken

    def _use_slot(self, adapter_id: int) -> None:
        self.slot_taken = self.slot_taken or adapter_id not in self.in_slots
        self.in_slots[adapter_id] = None
        self.in_slots.move_to_end(adapter_id)
        if len(self.in_slots) > self.lora_config.max_loras:
            self.in_slots.popitem(last=False)

    def update_from_output(self, scheduler_output: SchedulerOutput, model_runner_output: Any) -> Any:
        """As vLLM's, but a request whose scores the runner reports as not finite ends with an error."""
        counts = model_runner_output.num_nans_in_logits or {}
        self.not_finite = frozenset(request_id for request_id, count in counts.items() if count)
        return super().update_from_output(scheduler_output, model_runner_output)

    def _update_request_with_output(
        self, request: Request, new_token_ids: list[int], *args: Any, **kwargs: Any
    ) -> tuple[list[int], bool]:
        if request.request_id not in self.not_finite:
            return super()._update_request_with_output(request, new_token_ids, *args, **kwargs)
        adapter = f"the adapter {request.lora_request.lora_name}" if request.lora_request else "the base"
        logger.error(
            "Request %s ends with an error: %s gives scores that are not finite; its weights overflow in this --dtype",
            request.request_id,
            adapter,
        )
        request.status, request.resumable = RequestStatus.FINISHED_ERROR, False
        return [], True


class AsyncTurnsScheduler(TurnsScheduler, AsyncScheduler):
    """The same on vLLM's asynchronous scheduler, its default on GPUs."""


def adapter_id_of(request: Request) -> int | None:
    """The id of a request's adapter; None for the base."""
    return request.lora_request.lora_int_id if request.lora_request else None
