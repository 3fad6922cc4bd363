"""Turns an engine's options into a plan: devices, rules, sizes, and notes for the user.

deskside uses a GPU only if `devices` names one or another option needs one. Otherwise the CPU
computes everything, which is often faster (docs/GPU.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from deskside.engine.config import EngineConfig
from deskside.errors import DesksideError
from deskside.gguf.roles import Role, role
from deskside.lowering.memory import StepShape
from deskside.lowering.scratch import FEW_PAIRS, expert_bytes, table_bytes
from deskside.lowering.sections import Offload
from deskside.machine.descriptions import this_machine
from deskside.machine.devices import CPU, Machine, choose_devices, parse_size, show_size
from deskside.plan import DoesNotFit, Options, Plan, make_plan, rules
from deskside.plan.remedies import remedies
from deskside.plan.speed import LONG_PROMPT
from deskside.plan.stream import StreamPlan, plan_stream
from deskside.plan.table import ranges
from deskside.tape import Tape

_NO_GPU = "does nothing: there is no GPU to use"


@dataclass(frozen=True)
class ExpertOffload:
    """How the GPU `device` computes experts of the CPU.

    stream: how experts are copied to the GPU for long prompts; None = never.
    min_tokens: fewest tokens of a batch that does so.
    cache_bytes: GPU memory for the experts that are chosen most often.
    """

    device: str
    stream: StreamPlan | None = None
    min_tokens: int = 0
    cache_bytes: int = 0


@dataclass(frozen=True)
class Launch:
    """What to load, and where. plan: None = all on the CPU. notes: lines to show to the user."""

    plan: Plan | None = None
    offload: ExpertOffload | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def over_devices(self) -> bool:
        """Whether the plan uses more than the CPU."""
        return self.plan is not None and self.plan.used not in ((), (CPU,))


def place(tape: Tape, config: EngineConfig, ctx: int, ubatch: int) -> Launch:
    """Plan a model under an engine's options. Loads nothing.

    ctx, ubatch: in tokens, as the engine will use them. DesksideError for bad options, and for
    options that do not fit this machine; then it also says what would fit.
    """
    if not config.placement_options():
        return Launch()
    if config.backend != "cpu":
        raise DesksideError(
            f"--backend {config.backend} uses no other device: leave out --device and the other "
            "placement options"
        )
    unasked = config.devices is None and not _wants_gpu(config)
    machine, wishes, options = planned(
        config,
        this_machine(config.n_threads),
        ctx=ctx,
        ubatch=ubatch,
        parallel=config.parallel,
        devices=["none"] if unasked else None,
    )
    notes: list[str] = []
    if not machine.gpus:
        wishes, notes = _without_gpu(wishes)
    try:
        launch = plan_for(tape, config, machine, wishes, options)
    except DoesNotFit as refusal:
        enough = "; or ".join(r.flags for r in remedies(tape, machine, wishes, options))
        raise DesksideError(f"{refusal}{'; enough would be: ' if enough else ''}{enough}") from None
    launch.notes.extend(notes)
    return launch


def planned(
    config: EngineConfig,
    machine: Machine,
    *,
    ctx: int,
    ubatch: int,
    parallel: int,
    devices: Sequence[str] | None = None,
) -> tuple[Machine, rules.Rules, Options]:
    """The machine, rules and sizes for `plan_for`. DesksideError for a bad option.

    devices: instead of `config.devices`. ctx, ubatch: in tokens. parallel: sequences.
    """
    machine = machine_of(config, machine, devices)
    options = Options(
        ctx=ctx,
        ubatch=ubatch,
        parallel=parallel,
        ctk=config.ctk.lower(),
        ctv=config.ctv.lower(),
        threads=min(config.threads, machine.cores) if config.threads > 0 else machine.cores,
        threads_batch=min(max(0, config.threads_batch), machine.cores),
        mmap=not config.no_mmap,
        mlock=config.mlock,
    )
    return machine, rules_of(config), options


def plan_for(
    tape: Tape, config: EngineConfig, machine: Machine, wishes: rules.Rules, options: Options
) -> Launch:
    """As `place`, for a given machine and rules. DoesNotFit if the model does not fit.

    `-ngl` above the layer count, which includes the head, asks for as much as fits. If not all
    fits, the planner selects, and a note says what stays on the CPU. A smaller number is a rule.
    """
    try:
        return _plan_for(tape, config, machine, wishes, options)
    except DoesNotFit:
        layers = 1 + max(op.layer for op in tape.ops)
        if wishes.gpu_layers is None or wishes.gpu_layers <= layers:
            raise
    launch = _plan_for(tape, config, machine, replace(wishes, gpu_layers=None), options)
    launch.notes.append(
        f"-ngl {config.gpu_layers}: not all of it fits; on the CPU stay {_on_cpu(launch)}"
    )
    return launch


def _on_cpu(launch: Launch) -> str:
    """What a plan leaves on the CPU besides the embedding: "routed experts of layers 0-34"."""
    assert launch.plan is not None
    layers: dict[str, set[int]] = {}
    for name, device in launch.plan.placement.items():
        if device == CPU and launch.plan.kinds[name] != Role.EMBEDDING:
            found = layers.setdefault(launch.plan.kinds[name], set())
            layer = rules.layer_of(name)
            if layer is not None:
                found.add(layer)
    return ", ".join(
        f"{kind} of layers {ranges(sorted(at))}" if at else kind for kind, at in layers.items()
    )


def _plan_for(
    tape: Tape, config: EngineConfig, machine: Machine, wishes: rules.Rules, options: Options
) -> Launch:
    size = parse_size(config.expert_cache, "--expert-cache") if config.expert_cache else 0
    min_tokens = _stream_from(config)
    if not size and min_tokens is None:
        return Launch(make_plan(tape, machine, wishes, options))
    asked = "--expert-cache" if size else "--stream-experts"
    if not machine.gpus:
        plan = make_plan(tape, machine, wishes, options)
        return Launch(plan, notes=[f"{asked} {_NO_GPU}"])
    experts = [op for op in tape.ops if op.kind == "experts"]
    if size and experts:
        one = table_bytes([op.weights[0].shape[2] for op in experts])
        one += max(expert_bytes(op) for op in experts)
        if size < one:
            raise DesksideError(
                f"--expert-cache {config.expert_cache} holds no expert: give at least {one:,} "
                "bytes for this model"
            )
    device = machine.gpus[wishes.main_gpu or 0].name
    cached = replace(
        options, reserved={device: size}, shapes=(StepShape(options.ubatch, _some(device)),)
    )
    plan = make_plan(tape, machine, wishes, cached if size else options)
    if not any(_is_offloaded(name, d) for name, d in plan.placement.items()):
        plan = make_plan(tape, machine, wishes, options)
        return Launch(plan, notes=[f"{asked} does nothing: no routed expert is on the CPU"])
    offload, notes = ExpertOffload(device, cache_bytes=size), list[str]()
    if min_tokens is not None:
        plan, offload, notes = _streaming(plan, offload, min_tokens)
    return Launch(plan, offload if offload.stream or size else None, notes)


def _streaming(
    plan: Plan, offload: ExpertOffload, min_tokens: int
) -> tuple[Plan, ExpertOffload, list[str]]:
    """The plan with room for staging slots on the GPU.

    min_tokens: fewest tokens of a batch that streams. 0 lets `plan_stream` choose that number; then
    the batch is the largest that fits.
    """
    o, device = plan.options, offload.device
    prompt = min(LONG_PROMPT, o.ctx)
    chunk = o.ubatch if min_tokens else prompt
    while True:
        found = plan_stream(
            plan.machine, plan.tape, plan.placement, device=device, prompt=prompt, max_chunk=chunk
        )
        assert found is not None
        if not min_tokens and (found.break_even is None or found.break_even > found.chunk):
            note = (
                f"--stream-experts auto: no batch of up to {chunk} tokens is faster through "
                f"{device} than on the CPU"
            )
            return plan, offload, [note]
        ubatch = o.ubatch if min_tokens else max(o.ubatch, found.chunk)
        first = max(2, min_tokens or found.break_even or 1, FEW_PAIRS // found.top_k + 1)
        small = StepShape(min(first - 1, ubatch), _some(device) if offload.cache_bytes else None)
        large = StepShape(ubatch, Offload(device, all=found.host_below <= 1))
        options = replace(
            o,
            ubatch=ubatch,
            reserved={device: offload.cache_bytes + found.slots * found.slot_bytes},
            shapes=(small, large),
        )
        try:
            made = make_plan(plan.tape, plan.machine, plan.rules, options)
        except DoesNotFit:
            if min_tokens or chunk <= o.ubatch:
                raise
            chunk = max(o.ubatch, chunk // 2)
            continue
        if device not in made.used:  # slots and a large batch take all of its memory
            if chunk > o.ubatch:
                chunk = max(o.ubatch, chunk // 2)
                continue
            return plan, offload, [f"--stream-experts does nothing: {device} has no room for it"]
        return made, replace(offload, stream=found, min_tokens=first), []


def _some(device: str) -> Offload:
    return Offload(device, all=False)


def _is_offloaded(name: str, device: str) -> bool:
    return role(name) is Role.EXPERTS and device == CPU


def _stream_from(config: EngineConfig) -> int | None:
    """Fewest tokens of a batch that streams; 0 = the planner chooses, None = never."""
    text = str(config.stream_experts).lower()
    if text in ("off", "auto"):
        return None if text == "off" else 0
    if not text.isascii() or not text.isdigit() or not 0 < int(text) < 1 << 20:
        raise DesksideError(
            f"--stream-experts {config.stream_experts}: expected a number of tokens, auto or off"
        )
    return int(text)


def lines(launch: Launch) -> list[str]:
    """Lines that tell the user how experts are offloaded."""
    found, offload = list[str](), launch.offload
    if offload is None:
        return found
    if offload.stream:
        s = offload.stream
        below = f"; experts of fewer than {s.host_below} tokens stay" if s.host_below else ""
        found.append(
            f"batches of {offload.min_tokens:,} tokens or more copy the CPU's experts "
            f"({show_size(s.nbytes)}) to {offload.device}, in {s.slots} slots of "
            f"{show_size(s.slot_bytes)}{below}: prefill of long prompts {s.rate:,.0f} tok/s in "
            f"batches of {s.chunk:,} tokens, limited by {s.limit}; {s.cpu_rate:,.0f} on the CPU"
        )
    if offload.cache_bytes:
        found.append(
            f"{show_size(offload.cache_bytes)} of {offload.device} hold the CPU's experts that are "
            "chosen most often (not in the predictions, because how often is not known before)"
        )
    return found


def rules_of(config: EngineConfig) -> rules.Rules:
    """The rules that the options make; DesksideError for a bad one."""
    texts = config.override_tensor
    layers = config.gpu_layers
    return rules.Rules(
        rules.parse_overrides([texts] if isinstance(texts, str) else texts),
        config.cpu_moe,
        config.n_cpu_moe,
        rules.parse_gpu_layers(None if layers is None else str(layers)),
        rules.parse_split(config.tensor_split),
        config.main_gpu,
    )


def machine_of(
    config: EngineConfig, machine: Machine, devices: Sequence[str] | None = None
) -> Machine:
    """`machine` with the devices and the margin that the options say. DesksideError for a bad one.

    devices: instead of `config.devices`.
    """
    asked = devices if devices is not None else config.devices or ()
    if isinstance(asked, str):
        asked = [asked]
    entries = [e for text in asked for e in text.split(",") if e.strip()]
    margin = None if config.margin is None else parse_size(config.margin, "--margin")
    return choose_devices(machine, entries, margin)


def _wants_gpu(config: EngineConfig) -> bool:
    wishes = rules_of(config)
    elsewhere = any(rule.device != CPU for rule in wishes.overrides)
    moe = wishes.cpu_moe or wishes.n_cpu_moe is not None
    layers = wishes.gpu_layers is not None and wishes.gpu_layers > 0
    split = bool(wishes.tensor_split) or wishes.main_gpu is not None
    offloads = config.expert_cache is not None or _stream_from(config) is not None
    return elsewhere or moe or layers or split or offloads


def _without_gpu(wishes: rules.Rules) -> tuple[rules.Rules, list[str]]:
    """The rules without those that need a GPU, and a note that names these.

    So command lines for llama.cpp also work on a machine without a GPU. Overrides that name an
    emulated device stay, and are refused.
    """
    on_gpus = [rule for rule in wishes.overrides if rule.device.startswith("cuda")]
    named = {
        "-ngl": bool(wishes.gpu_layers),
        "--tensor-split": bool(wishes.tensor_split),
        "--main-gpu": wishes.main_gpu is not None,
        **{str(rule): True for rule in on_gpus},
    }
    unused = [flag for flag, given in named.items() if given]
    notes = [f"there is no GPU to use; these change nothing: {', '.join(unused)}"] if unused else []
    kept = tuple(rule for rule in wishes.overrides if rule not in on_gpus)
    return replace(wishes, overrides=kept, gpu_layers=None, tensor_split=(), main_gpu=None), notes
