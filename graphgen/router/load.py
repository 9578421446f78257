"""The work that one engine has, and what a request would cost there, in seconds of its device.

Owns the counts of the requests that this router sent to the engine; keeps no request. Called by
`graphgen.router.policy`.

Exact are the tokens of the router's own requests. What others sent is in the engine's last report, which tells the
router's own apart: nothing is counted twice. Whose it is is not known: each of the engine's tenants is taken to have an
equal part of it. Prompts often wait for less time than a report is old, so what counts is the mean of the last few
reports.

    work    = prompt tokens to compute * prompt_token_s + output tokens expected yet * output_token_s
    cost    = (work of all + work that goes before the request) / 2 + its own work

Every engine serves its tenants in turns, so of the others' work no more goes before a request than each other tenant
gets while the request's own tenant is served. With one tenant the two are the same. Where a tenant floods every
engine, another's request goes where its own tenant has least to do, and of those to the engine with least work.
"""

from graphgen.ipc.reports import EngineReport
from graphgen.router.records import Capacity, EngineStatus, RoutedRequest

FALLBACK_PROMPT_S, FALLBACK_OUTPUT_S = 27e-6, 110e-6
"""An 8B model on an H200. While no engine has said how fast it is, their ratio is all that matters."""

_REPORT_WEIGHT = 0.25
"""Of the newest report in what others have to do at an engine."""


class Speeds:
    """Seconds of a prompt token, of an output token, and of a step."""

    __slots__ = ("is_known", "output_token_s", "prompt_token_s", "step_s")

    def __init__(self, prompt_token_s: float, output_token_s: float, step_s: float, is_known: bool) -> None:
        self.prompt_token_s = prompt_token_s
        self.output_token_s = output_token_s
        self.step_s = step_s
        self.is_known = is_known


class TenantLoad:
    """What one tenant has at one engine."""

    __slots__ = ("num_open", "output_tokens", "prompt_tokens", "prompts_by_class")

    def __init__(self) -> None:
        self.num_open = 0
        self.prompt_tokens = 0
        self.output_tokens = 0
        self.prompts_by_class: dict[int, int] = {}

    def prompts_from(self, priority: int) -> int:
        """Prompt tokens that are computed before those of a new request of this class."""
        if len(self.prompts_by_class) == 1 and priority in self.prompts_by_class:
            return self.prompt_tokens
        return sum(tokens for other, tokens in self.prompts_by_class.items() if other >= priority)


class EngineLoad:
    """One engine: its state, its speed, and what it has to do."""

    __slots__ = (
        "capacity",
        "engine_id",
        "epoch",
        "heard_s",
        "is_draining",
        "is_warming",
        "num_open",
        "num_steps",
        "number",
        "others_output",
        "others_prompt",
        "output_tokens",
        "prompt_tokens",
        "report",
        "requests",
        "speeds",
        "status",
        "status_s",
        "stepped_s",
        "tenants",
        "unbegun",
    )

    def __init__(self, engine_id: str, number: int, capacity: Capacity, epoch: int, speeds: Speeds, now_s: float):
        self.engine_id = engine_id
        self.number = number
        self.capacity = capacity
        self.epoch = epoch
        self.speeds = speeds
        self.status: EngineStatus = "serving"
        self.status_s = now_s  # since when
        self.is_draining = False
        self.is_warming = True
        self.report: EngineReport | None = None
        self.heard_s = now_s
        self.stepped_s = now_s
        self.num_steps = 0
        self.requests: dict[int, None] = {}
        """Those of this router that are open here."""
        self.unbegun: dict[int, int] = {}
        """Of these: those without a token from here, and when their pages were touched, the earliest first."""
        self.num_open = 0
        self.prompt_tokens = 0
        self.output_tokens = 0
        self.tenants: dict[str, TenantLoad] = {}
        self.others_prompt = 0.0
        self.others_output = 0.0

    @property
    def num_others(self) -> int:
        """Requests of others that are open here, by its last report."""
        return 0 if self.report is None else self.report.num_others

    @property
    def open_work_s(self) -> float:
        speeds = self.speeds
        prompt = (self.prompt_tokens + self.others_prompt) * speeds.prompt_token_s
        return prompt + (self.output_tokens + self.others_output) * speeds.output_token_s

    def take_report(self, report: EngineReport) -> None:
        """What others sent, as the engine tells it."""
        self.report = report
        if not report.num_others:
            self.others_prompt = self.others_output = 0.0
            return
        self.others_prompt += _REPORT_WEIGHT * (report.others_prompt_tokens - self.others_prompt)
        self.others_output += _REPORT_WEIGHT * (report.others_output_tokens - self.others_output)

    def forget_report(self, now_s: float) -> None:
        """It has a new life, which has not reported yet."""
        self.report = None
        self.others_prompt = self.others_output = 0.0
        self.heard_s = self.stepped_s = now_s

    def open(self, request_id: int, tenant: str, priority: int, prompt_tokens: int, output_tokens: int) -> None:
        """A request is sent here that has so much to do."""
        self.requests[request_id] = None
        self.num_open += 1
        load = self.tenants.get(tenant)
        if load is None:
            load = self.tenants[tenant] = TenantLoad()
        load.num_open += 1
        self.change(tenant, priority, prompt_tokens, output_tokens)

    def change(self, tenant: str, priority: int, prompt_tokens: int, output_tokens: int) -> None:
        """A request of the tenant has so much more to do."""
        self.prompt_tokens += prompt_tokens
        self.output_tokens += output_tokens
        load = self.tenants[tenant]
        load.prompt_tokens += prompt_tokens
        load.output_tokens += output_tokens
        if prompt_tokens:
            of_class = load.prompts_by_class.get(priority, 0) + prompt_tokens
            if of_class:
                load.prompts_by_class[priority] = of_class
            else:
                del load.prompts_by_class[priority]

    def close(self, request_id: int, tenant: str, priority: int, prompt_tokens: int, output_tokens: int) -> None:
        """A request leaves with so much undone."""
        del self.requests[request_id]
        self.unbegun.pop(request_id, None)
        self.num_open -= 1
        self.change(tenant, priority, -prompt_tokens, -output_tokens)
        load = self.tenants[tenant]
        load.num_open -= 1
        if not load.num_open:
            del self.tenants[tenant]

    # --- what a request would cost here --------------------------------------------------------------------------

    def cost_s(self, request: RoutedRequest, missing: int, num_outputs: int) -> float:
        """missing: tokens it has to compute before its next one. num_outputs: tokens it is expected to draw."""
        speeds = self.speeds
        own_s = missing * speeds.prompt_token_s + num_outputs * speeds.output_token_s
        all_s = self.open_work_s
        num_tenants = self._num_tenants(request.tenant)
        if num_tenants == 1:
            return all_s + own_s
        tenant_prompt, tenant_output = self.others_prompt / num_tenants, self.others_output / num_tenants
        load = self.tenants.get(request.tenant)
        if load is not None:
            tenant_prompt += load.prompt_tokens
            tenant_output += load.output_tokens
        tenant_s = tenant_prompt * speeds.prompt_token_s + tenant_output * speeds.output_token_s
        before_s = tenant_s + min(all_s - tenant_s, (num_tenants - 1) * (tenant_s + own_s))
        return (all_s + before_s) / 2 + own_s

    def _num_tenants(self, tenant: str) -> int:
        """With open requests here, if one of this tenant's were."""
        num_known = len(self.tenants) + (tenant not in self.tenants)
        return num_known if self.report is None else max(num_known, self.report.num_tenants)

    def first_token_s(self, request: RoutedRequest, missing: int) -> float:
        """Until its next token, if tenants and classes are served as engines do; 0 where the speed is not known. Of
        several tenants, others sent nothing for its own."""
        speeds = self.speeds
        if not speeds.is_known:
            return 0.0
        num_tenants = self._num_tenants(request.tenant)
        load = self.tenants.get(request.tenant)
        own = 0 if load is None else load.prompts_from(request.priority)
        others = self.prompt_tokens + self.others_prompt - (0 if load is None else load.prompt_tokens)
        if num_tenants > 1:
            others = min(others, (num_tenants - 1) * (own + missing))
        tokens = own + others + missing
        num_open = self.num_open + self.num_others
        decodes = min(num_open, self.capacity.num_slots) / self.capacity.token_budget  # rows that prompts do not get
        wait_s = tokens * speeds.prompt_token_s * (1.0 + decodes) + speeds.step_s
        if num_open >= self.capacity.num_slots and (own or num_tenants == 1):
            # A slot becomes free when the next of those that run ends.
            outputs_s = (self.output_tokens + self.others_output) * speeds.output_token_s
            wait_s += outputs_s * (num_open - self.capacity.num_slots + 1) / num_open
        return wait_s
