"""The scheduler that serve/launch.py names: adapters take turns in the slots. The CPU platform extends it.

vLLM passes over a waiting request while other adapters' answers run in every slot, and lets newer requests for those
adapters in before it: beside a few busy adapters another may wait for ever. Here an adapter that has waited long enough
gets the slot of the one that has had its own for longest. That one's answers stand still until they get a slot back.
They keep their key-value memory, so nothing is computed twice.

In the step in which an adapter takes a slot, it is written and packed and its request's prompt is read, and whatever
runs waits for all of that. vLLM lets in at once as many as there are free slots. Here the second comes with the next
step. Adapters that have a slot are not held back, nor is the base.

A request whose scores are not finite, which no token can be chosen from, ends with an error.
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
    """vLLM calls this as a class. It has two schedulers, and chooses where it is not told one."""
    asynchronous = kwargs["vllm_config"].scheduler_config.async_scheduling
    return (AsyncTurnsScheduler if asynchronous else TurnsScheduler)(*args, **kwargs)


class TurnsScheduler(Scheduler):
    """vLLM's scheduler with turns. `turns` holds when each adapter's began, the earliest first."""

    clock = staticmethod(time.monotonic)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # A slot is given within half of what an adapter may wait; the other half is for its prompt.
        self.due_s = self.vllm_config.additional_config.get(ADAPTER_WAIT_KEY, ServeConfig.adapter_wait_s) / 2
        self.turns = dict[int, float]()
        self.without_since = dict[int, float]()
        # What the worker holds in its slots: the most recently used.
        self.in_slots = OrderedDict[int, None]()
        self.now = 0.0
        self.entered = False
        # The adapter that was given a turn, or whose turn it is once there is room: others wait for it.
        self.next_in: int | None = None
        self.not_finite = frozenset[str]()

    def schedule(self, throttle_prefills: bool = False) -> SchedulerOutput:
        """As vLLM's, with the answers of adapters without a turn standing still, and with one entry at most."""
        self.now, self.entered = self.clock(), False
        self._give_turns()
        for request in self.running:
            number = adapter_of(request)
            if number is None or number in self.turns:
                continue
            # vLLM keeps a request out of a step so where its last token is still on its way through a pipeline.
            request.next_decode_eligible_step = max(request.next_decode_eligible_step, self.current_step + 2)
        return super().schedule(throttle_prefills)

    def _give_turns(self) -> None:
        running = dict.fromkeys(number for request in self.running if (number := adapter_of(request)) is not None)
        first_in_line: dict[int, Request] = {}
        for request in self.waiting:
            number = adapter_of(request)
            if number is not None and request.status in (RequestStatus.WAITING, RequestStatus.PREEMPTED):
                first_in_line.setdefault(number, request)
        if self.next_in in running or self.next_in not in first_in_line:
            self.next_in = None
        wanting = running | first_in_line
        self.turns = {number: began for number, began in self.turns.items() if number in wanting}
        for number in running.keys() & self.turns.keys():
            self._take(number)
        without = {number: self.without_since.get(number, self.now) for number in wanting if number not in self.turns}
        self.without_since = dict(sorted(without.items(), key=lambda item: item[1]))
        for number, since in list(self.without_since.items()):
            due = self.now - since >= self.due_s
            if number in running and not self._may_enter(number):
                break
            if len(self.turns) == self.lora_config.max_loras:
                longest = next(iter(self.turns))
                if not due:
                    break
                another_waits = self.next_in not in (None, number, *self.turns)
                if number not in running and (another_waits or not self._has_room(first_in_line[number])):
                    # One waits for room, and stops nobody who has it: the slots go round without it.
                    self.next_in = self.next_in or number
                    continue
                # Others are kept out of the room that one waited for: it does not wait for a turn's end as well.
                if number != self.next_in and self.now - self.turns[longest] < self.due_s:
                    break
                del self.turns[longest]
                self.without_since[longest] = self.now
            # Other adapters in line begin in the line's order, below.
            if number in running:
                self._begin(number)
                self._take(number)
            elif due:
                self._begin(number)
                self.next_in = number
                break

    def _handle_blocked_waiting_request(self, request: Request) -> bool:
        # vLLM asks this of each waiting request before it is admitted; those that must wait keep their place in line.
        if not super()._handle_blocked_waiting_request(request):
            return False
        number = adapter_of(request)
        if self.next_in is not None and number != self.next_in:
            return False
        if number is None:
            return True
        if number not in self.turns and len(self.turns) == self.lora_config.max_loras:
            return False
        if not self._may_enter(number):
            return False
        if number not in self.turns:
            self._begin(number)
        self._take(number)
        return True

    def _has_room(self, request: Request) -> bool:
        groups = len(self.kv_cache_config.kv_cache_groups)
        free_tokens = self.kv_cache_manager.block_pool.get_num_free_blocks() * self.block_size // max(groups, 1)
        return len(self.running) < self.max_num_active_reqs and request.num_tokens < free_tokens

    def _begin(self, number: int) -> None:
        self.turns[number] = self.now
        self.without_since.pop(number, None)

    def _may_enter(self, number: int) -> bool:
        return number in self.in_slots or not self.entered

    def _take(self, number: int) -> None:
        self.entered = self.entered or number not in self.in_slots
        self.in_slots[number] = None
        self.in_slots.move_to_end(number)
        if len(self.in_slots) > self.lora_config.max_loras:
            self.in_slots.popitem(last=False)

    def update_from_output(self, scheduler_output: SchedulerOutput, model_runner_output: Any) -> Any:
        """As vLLM's; a request that the runner reports to have no finite scores ends, with an error."""
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
            "Request %s ends: %s gives scores that are not finite numbers; its weights overflow in this --dtype",
            request.request_id,
            adapter,
        )
        request.status, request.resumable = RequestStatus.FINISHED_ERROR, False
        return [], True


class AsyncTurnsScheduler(TurnsScheduler, AsyncScheduler):
    """The same over vLLM's scheduler that is a step ahead, its default on GPUs."""


def adapter_of(request: Request) -> int | None:
    """The number of a request's adapter; None for the base."""
    return request.lora_request.lora_int_id if request.lora_request else None
