"""The scheduler class that serve/cpu_platform.py names: adapters take slots one a step, so that running answers go on.

In the step in which an adapter takes a slot, it is written and packed and its request's prompt is read, and whatever
runs waits for all of that. vLLM lets in at once as many as there are free slots. Here the second comes with the next
step. Adapters that have a slot are not held back, nor is the base.
"""

from collections import OrderedDict
from typing import Any

from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import Request


class OneEntryScheduler(Scheduler):
    """vLLM's scheduler, which here keeps count of the adapters in slots: the most recently used, as in its worker."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.in_slots = OrderedDict[int, None]()
        self.in_step = set[int]()
        self.entered = False

    def schedule(self, throttle_prefills: bool = False) -> SchedulerOutput:
        """As vLLM's, with one entry at most."""
        self.entered = False
        self.in_step.clear()
        for request in self.running:
            if request.lora_request:
                self._take(request.lora_request.lora_int_id)
        return super().schedule(throttle_prefills)

    def _handle_blocked_waiting_request(self, request: Request) -> bool:
        # vLLM asks this of each waiting request before it is admitted; those that must wait keep their place in line.
        if not super()._handle_blocked_waiting_request(request):
            return False
        number = request.lora_request.lora_int_id if request.lora_request else None
        # Where this step needs every slot already, vLLM itself passes over the request.
        if number is None or number in self.in_step or len(self.in_step) == self.lora_config.max_loras:
            return True
        if number not in self.in_slots:
            if self.entered:
                return False
            self.entered = True
        self._take(number)
        return True

    def _take(self, number: int) -> None:
        self.in_step.add(number)
        self.in_slots[number] = None
        self.in_slots.move_to_end(number)
        if len(self.in_slots) > self.lora_config.max_loras:
            self.in_slots.popitem(last=False)
