"""The training loop: windows of text through teacher and student, AdamW, evaluation with the integer layers.

Runs under Hugging Face Accelerate: one CPU, one GPU, or several processes of `torchrun`, which share a batch.
Windows come in an order drawn from the seed, every one once an epoch, so a step's windows follow from its number alone
and a resumed run sees what the uninterrupted one would have seen.

Weights, scales and everything else learn at three rates: scales are logarithms (a step of 0.01 is one percent), and
few numbers that matter much.

On one GPU the step is recorded once and replayed (`bytelane.tune.graph`), and a loss is read while the next step runs.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from bytelane.evaluate import perplexity
from bytelane.tune.graph import CapturedStep, Losses, between_layers, compiled, plain_attention, ready_for_capture
from bytelane.tune.loss import hidden_loss, logits_loss
from bytelane.tune.state import check_same, check_state_folder, load_state, read_record, save_state
from bytelane.tune.student import Student, WithCache, passing_cache
from bytelane.tune.teacher import Teacher, TuningError

Progress = Callable[[str, int, int], None]
"""Called with the stage, the steps done and the steps in all."""


UNLIMITED_STEPS = 10**9
"""More than any run takes: for one that `max_seconds` ends."""


@dataclass(frozen=True)
class TuneSettings:
    """How to train. Frozen, checked, and saved with a state.

    Attributes:
        steps: optimizer steps.
        batch: windows in a step, over all processes.
        accumulate: parts a step is computed in, to save memory; divides the batch of a process.
        learning_rate: of weights, at its highest.
        scale_rate: of the logarithms of scales.
        plain_rate: of what stays float: norms.
        warmup: share of the steps in which the rates rise.
        clip: largest norm of the gradient.
        kl_weight: of the distance to the float model's predictions.
        text_weight: of the text's own next tokens.
        hidden_weight: of the distance to the float model's hidden states.
        keep_teacher: compute the float model's last hidden states once, before the first step, and keep them: two
            bytes a feature and token with mixed precision. For models whose predictions are their head on that state.
        seed: of the order of windows.
        max_seconds: end by then; the rates fall by steps or by time, whichever is further. A run so bounded is not
            the same twice.
        evaluate_every: steps between evaluations; 0 for one at the end only.
        save_every: steps between saved states.
    """

    steps: int = 500
    batch: int = 8
    accumulate: int = 1
    learning_rate: float = 1e-4
    scale_rate: float = 2e-3
    plain_rate: float = 1e-4
    warmup: float = 0.03
    clip: float = 1.0
    kl_weight: float = 1.0
    text_weight: float = 0.0
    hidden_weight: float = 0.0
    keep_teacher: bool = False
    seed: int = 0
    max_seconds: float | None = None
    evaluate_every: int = 0
    save_every: int = 100

    def __post_init__(self) -> None:
        positive = ("steps", "batch", "accumulate", "clip", "save_every")
        for name in (*positive, "learning_rate", "scale_rate", "plain_rate", "evaluate_every"):
            value = getattr(self, name)
            if not math.isfinite(value) or value < 0 or (name in positive and not value):
                raise TuningError(f"{name} must be {'positive' if name in positive else '0 or more'}, found {value}")
        if not 0 <= self.warmup < 1:
            raise TuningError(f"warmup is a share of the steps, 0 to below 1, found {self.warmup}")
        if self.batch % self.accumulate:
            raise TuningError(f"accumulate must divide the batch of {self.batch} windows, found {self.accumulate}")
        if self.max_seconds is not None and not self.max_seconds > 0:
            raise TuningError(f"max_seconds must be positive, found {self.max_seconds}")
        if min(self.kl_weight, self.text_weight, self.hidden_weight) < 0 or not (
            self.kl_weight or self.text_weight or self.hidden_weight
        ):
            raise TuningError("the weights of the loss must be 0 or more, and one of them positive")
        if self.keep_teacher and (self.hidden_weight or not self.kl_weight):
            raise TuningError("keep_teacher keeps what kl_weight needs of the float model, not its other hidden states")

    @property
    def distills(self) -> bool:
        """Whether a teacher is needed."""
        return bool(self.kl_weight or self.hidden_weight)


@dataclass(frozen=True)
class Evaluation:
    """The integer model after some steps and seconds of training: its perplexity over `tokens` predicted tokens."""

    step: int
    perplexity: float
    tokens: int
    seconds: float = 0.0


@dataclass(frozen=True)
class TuneReport:
    """What a tuning did.

    Attributes:
        steps: optimizer steps taken, those before a resumption included.
        tokens: tokens trained on, repetitions counted.
        losses: of every step.
        evaluations: in order, the last one after the last step.
        seconds: wall time of the steps, over all resumed runs; without evaluations.
        start_seconds: before the first step: of keeping the teacher, compiling and recording. Of this run alone.
        recorded: whether steps were replayed from a recording.
        peak_bytes: most memory allocated on the accelerator; 0 on a CPU.
    """

    steps: int
    tokens: int
    losses: tuple[float, ...]
    evaluations: tuple[Evaluation, ...]
    seconds: float
    start_seconds: float
    recorded: bool
    peak_bytes: int

    def to_dict(self) -> dict[str, Any]:
        """The report as plain JSON values."""
        return dataclasses.asdict(self)


def batch_indices(step: int, batch: int, count: int, seed: int) -> list[int]:
    """Which of `count` windows a step trains on: each once an epoch, in an order drawn from the seed and the epoch."""
    found: list[int] = []
    for position in range(step * batch, (step + 1) * batch):
        epoch, place = divmod(position, count)
        found.append(_order(epoch, count, seed)[place])
    return found


@functools.lru_cache(maxsize=2)
def _order(epoch: int, count: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    return torch.randperm(count, generator=generator).tolist()


def rate(done: float, warmup: float) -> float:
    """What the learning rates are multiplied by when a share `done` of the run is over: up, then a cosine to 0."""
    if done < warmup:
        return done / warmup
    return 0.5 * (1 + math.cos(math.pi * min((done - warmup) / (1 - warmup), 1.0)))


def make_optimizer(student: nn.Module, settings: TuneSettings) -> torch.optim.AdamW:
    """AdamW with a rate each for weights, scales and the rest; no weight decay.

    On CUDA its steps are one kernel a group and can be recorded: rates are tensors on the device.
    """
    groups: dict[str, list[nn.Parameter]] = {"learning_rate": [], "scale_rate": [], "plain_rate": []}
    for name, parameter in student.named_parameters():
        leaf = name.rpartition(".")[2]
        kind = "scale_rate" if leaf.startswith("log_") else "learning_rate" if parameter.dim() > 1 else "plain_rate"
        groups[kind].append(parameter)
    device = next(student.parameters()).device
    on_gpu = device.type == "cuda"
    made: list[dict[str, Any]] = []
    for kind, parameters in groups.items():
        base = float(getattr(settings, kind))
        lr = torch.tensor(base, device=device) if on_gpu else base
        if parameters:
            made.append({"params": parameters, "lr": lr, "base": base})
    return torch.optim.AdamW(made, betas=(0.9, 0.95), weight_decay=0.0, fused=on_gpu, capturable=on_gpu)


def _set_rates(optimizer: torch.optim.Optimizer, factor: float) -> None:
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(group["base"] * factor)
        else:
            group["lr"] = group["base"] * factor


def _fingerprint(windows: Sequence[Tensor]) -> str:
    digest = hashlib.sha256()
    for window in windows:
        digest.update(window.to(torch.int64).contiguous().numpy().tobytes())
    return digest.hexdigest()


def evaluate(student: Student, windows: Sequence[Tensor], *, dtype: torch.dtype | None = None) -> tuple[float, int]:
    """Perplexity of the integer model, with its int8 cache where the student has one, and the tokens predicted."""
    frozen = student.freeze(dtype)
    result = perplexity(WithCache(frozen) if student.kv_names else frozen, windows)
    return result.perplexity, result.tokens


def tune(
    student: Student,
    teacher: nn.Module | Teacher | None,
    windows: Sequence[Tensor],
    settings: TuneSettings,
    *,
    evaluation: Sequence[Tensor] = (),
    dtype: torch.dtype | None = None,
    state: Path | None = None,
    resume: bool = False,
    accelerator: Accelerator | None = None,
    eager: bool = False,
    progress: Progress | None = None,
) -> TuneReport:
    """Train a student in place.

    Args:
        student: see `prepare`.
        teacher: the float model, or None where the settings need none. It is put on the student's device. A `Teacher`
            that has kept the states of these windows serves several runs.
        windows: int64 `[length]` token ids each, all of one length.
        settings: how.
        evaluation: windows to evaluate the integer model on, of other text.
        dtype: of the integer model in evaluations; None for float32.
        state: a folder for the state; None to save none.
        resume: go on from the state there.
        accelerator: device, mixed precision and processes; None for Accelerate's choice without mixed precision.
        eager: take the operations of a step one by one where they would be compiled and recorded, on one GPU.
        progress: called after each step; the steps in all are a guess where time ends the run.

    Raises:
        TuningError: no window, windows of unlike length, or a loss that is not finite (the state stays as last saved).
        OutputExistsError, FileFormatError, ConfigError: the state folder cannot be used; see `bytelane.tune.state`.
    """
    if not windows or len({w.shape for w in windows}) > 1 or windows[0].dim() != 1 or windows[0].numel() < 2:
        raise TuningError("tuning needs windows of token ids, all of one length of at least 2")
    if settings.distills and teacher is None:
        raise TuningError("distillation needs the float model; give it as the teacher")
    if state is not None:
        check_state_folder(state, resume=resume)
    elif resume:
        raise TuningError("resuming needs the folder of a state")
    run = accelerator or Accelerator()
    if settings.batch % (settings.accumulate * run.num_processes):
        raise TuningError(
            f"{run.num_processes} processes of {settings.accumulate} parts do not divide {settings.batch} windows"
        )
    student.to(run.device)
    record = {"settings": dataclasses.asdict(settings), "text": _fingerprint(windows), "plan": _describe(student)}
    optimizer = make_optimizer(student, settings)
    losses: list[float] = []
    evaluations: list[Evaluation] = []
    spent = 0.0
    if resume and state is not None:
        found = read_record(state)
        check_same(state, found, record)
        load_state(state, student, optimizer, found["steps"])
        losses, spent = list(found["losses"]), float(found["seconds"])
        evaluations = [Evaluation(**values) for values in found["evaluations"]]
    text = torch.stack(list(windows)).to(run.device)
    # Accelerate patches the forward pass of what it prepares, so only what it must wrap.
    module: Any = run.prepare_model(student) if run.num_processes > 1 else student
    record_it = run.device.type == "cuda" and run.num_processes == 1 and not eager
    fuse = record_it and run.mixed_precision != "no" and not settings.hidden_weight
    started = time.perf_counter()
    parts = between_layers(student.model.get_decoder()) if fuse else []
    with contextlib.ExitStack() as while_tuning:
        if record_it:
            while_tuning.enter_context(compiled(parts))
            while_tuning.enter_context(plain_attention(student.model, getattr(teacher, "model", teacher)))
        given = None
        if teacher is not None:
            given = teacher if isinstance(teacher, Teacher) else Teacher(teacher, run)
            if settings.keep_teacher and given.states is None:
                given.keep(text, settings.batch // (settings.accumulate * run.num_processes))
        one = _Step(run, module, given, settings, optimizer)
        take: Callable[..., Tensor] = one
        step = len(losses)
        if record_it and step < settings.steps:
            ready_for_capture(optimizer)
            first = batch_indices(step, settings.batch, len(windows), settings.seed)
            take = CapturedStep(one.gradients, one.apply, one.forget, *_inputs(text, given, first))
        start_seconds = time.perf_counter() - started
        reading = Losses()
        while step < settings.steps and (settings.max_seconds is None or spent < settings.max_seconds):
            started = time.perf_counter()
            done = step / settings.steps
            if settings.max_seconds is not None:
                done = max(done, spent / settings.max_seconds)
            _set_rates(optimizer, rate(done if step else 0.5 / settings.steps, settings.warmup))
            chosen = batch_indices(step, settings.batch, len(windows), settings.seed)
            reading.add(take(*_inputs(text, given, chosen[run.process_index :: run.num_processes])))
            step += 1
            over = step == settings.steps
            evaluates = bool(evaluation and settings.evaluate_every and step % settings.evaluate_every == 0)
            saves = state is not None and step % settings.save_every == 0
            losses += _finite(reading.read(everything=over or evaluates or saves), len(losses))
            spent += time.perf_counter() - started
            if progress is not None:
                progress("tune", step, _expected(step, spent, settings))
            if settings.max_seconds is not None and spent >= settings.max_seconds:
                over = True
                losses += _finite(reading.read(everything=True), len(losses))
            if evaluation and (over or evaluates):
                found_perplexity, tokens = evaluate(student, evaluation, dtype=dtype)
                evaluations.append(Evaluation(step, found_perplexity, tokens, round(spent, 3)))
            if state is not None and run.is_main_process and (over or saves):
                values = [dataclasses.asdict(e) for e in evaluations]
                about = {"steps": step, "losses": losses, "seconds": spent, "evaluations": values}
                save_state(state, student, optimizer, {**record, **about})
    student.eval()
    return TuneReport(
        steps=step,
        tokens=step * settings.batch * windows[0].numel(),
        losses=tuple(losses),
        evaluations=tuple(evaluations),
        seconds=round(spent, 3),
        start_seconds=round(start_seconds, 3),
        recorded=isinstance(take, CapturedStep),
        peak_bytes=torch.cuda.max_memory_allocated(run.device) if run.device.type == "cuda" else 0,
    )


def _expected(step: int, spent: float, settings: TuneSettings) -> int:
    """How many steps the run will have, as it goes so far."""
    if settings.max_seconds is None or not spent:
        return settings.steps
    return max(step, min(settings.steps, round(step * settings.max_seconds / spent)))


def _inputs(text: Tensor, teacher: Teacher | None, chosen: list[int]) -> tuple[Tensor, ...]:
    """Of the chosen windows the ids, and what is kept of the teacher's states."""
    index = torch.tensor(chosen)
    if text.is_cuda:
        index = index.pin_memory().to(text.device, non_blocking=True)  # waits for nothing on the GPU
    kept = () if teacher is None or teacher.states is None else (teacher.states[index],)
    return (text[index], *kept)


def _finite(losses: Iterable[float], before: int) -> list[float]:
    """Losses, refused where one is not a number to go on with; `before` it there were so many."""
    found = list(losses)
    for place, loss in enumerate(found):
        if not math.isfinite(loss):
            raise TuningError(f"the loss of step {before + place} is {loss}; lower the learning rates")
    return found


def _describe(student: Student) -> list[str]:
    """What a state must agree on with the plan: every module's scheme, and the quantized caches."""
    modules = [f"{m.name} {m.scheme.label} {m.scheme.weight.granularity}" for m in student.plan.modules]
    return [*modules, *(f"{name} kv8" for name in student.kv_names)]


@dataclass
class _Step:
    """One optimizer step: its gradients, and their application."""

    run: Accelerator
    student: Any
    teacher: Teacher | None
    settings: TuneSettings
    optimizer: torch.optim.Optimizer

    def __call__(self, ids: Tensor, *states: Tensor) -> Tensor:
        """Take a step on windows `[batch, length]`; returns the mean loss over all processes."""
        self.forget()
        loss = self.gradients(ids, *states)
        self.apply()
        return loss

    def forget(self) -> None:
        """Leave the parameters without gradients."""
        self.optimizer.zero_grad(set_to_none=True)

    def apply(self) -> None:
        """Clip and descend."""
        self.run.clip_grad_norm_(self.student.parameters(), self.settings.clip)
        self.optimizer.step()

    def gradients(self, ids: Tensor, *states: Tensor) -> Tensor:
        """Add to the gradients; returns the loss."""
        settings, student = self.settings, self.student
        student.train()
        hidden = settings.hidden_weight > 0
        total = torch.zeros((), device=ids.device)
        parts = [i.chunk(settings.accumulate) for i in (ids, *states)]
        for part, *kept in zip(*parts, strict=True):
            given: Any = None
            with self.run.autocast():
                output = student(part, output_hidden_states=hidden)
                if self.teacher is not None and settings.distills:
                    more = passing_cache(self.teacher.model) if _capturing(part) else {"use_cache": False}
                    given = self.teacher.predict(part, kept[0] if kept else None, output_hidden_states=hidden, **more)
            loss = torch.zeros((), device=ids.device)
            if settings.kl_weight or settings.text_weight:
                # Every position's prediction is compared with the teacher's; the last one has no next token here.
                following = torch.nn.functional.pad(part[:, 1:], (0, 1), value=-1)
                loss = logits_loss(
                    output.logits.flatten(0, 1),
                    None if given is None else given.logits.flatten(0, 1),
                    following.flatten(),
                    kl_weight=settings.kl_weight,
                    text_weight=settings.text_weight,
                )
            if hidden:
                loss = loss + settings.hidden_weight * hidden_loss(output.hidden_states, given.hidden_states)
            self.run.backward(loss / settings.accumulate)
            total += loss.detach() / settings.accumulate
        return cast(Tensor, self.run.reduce(total, reduction="mean"))


def _capturing(ids: Tensor) -> bool:
    return ids.is_cuda and torch.cuda.is_current_stream_capturing()
