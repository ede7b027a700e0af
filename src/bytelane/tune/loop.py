"""The training loop: windows of text through teacher and student, AdamW, evaluation with the integer layers.

Runs under Hugging Face Accelerate: one CPU, one GPU, or several processes of `torchrun`, which share a batch.
Windows come in an order drawn from the seed, every one once an epoch, so a step's windows follow from its number alone
and a resumed run sees what the uninterrupted one would have seen.

Weights, scales and everything else learn at three rates: scales are logarithms (a step of 0.01 is one percent), and
few numbers that matter much.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from bytelane.errors import QuantizeError
from bytelane.evaluate import perplexity
from bytelane.tune.loss import hidden_loss, logits_loss
from bytelane.tune.state import check_same, check_state_folder, load_state, read_record, save_state
from bytelane.tune.student import Student, WithCache

Progress = Callable[[str, int, int], None]
"""Called with the stage, the steps done and the steps in all."""


class TuningError(QuantizeError):
    """The training cannot start or go on."""


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

    @property
    def distills(self) -> bool:
        """Whether a teacher is needed."""
        return bool(self.kl_weight or self.hidden_weight)


@dataclass(frozen=True)
class Evaluation:
    """The integer model after some steps: its perplexity over `tokens` predicted tokens."""

    step: int
    perplexity: float
    tokens: int


@dataclass(frozen=True)
class TuneReport:
    """What a tuning did.

    Attributes:
        steps: optimizer steps taken, those before a resumption included.
        tokens: tokens trained on, repetitions counted.
        losses: of every step.
        evaluations: in order, the last one after the last step.
        seconds: wall time of the steps, over all resumed runs; without evaluations.
        peak_bytes: most memory allocated on the accelerator; 0 on a CPU.
    """

    steps: int
    tokens: int
    losses: tuple[float, ...]
    evaluations: tuple[Evaluation, ...]
    seconds: float
    peak_bytes: int

    def to_dict(self) -> dict[str, Any]:
        """The report as plain JSON values."""
        return dataclasses.asdict(self)


def batch_indices(step: int, batch: int, count: int, seed: int) -> list[int]:
    """Which of `count` windows a step trains on: each once an epoch, in an order drawn from the seed and the epoch."""
    found: list[int] = []
    for position in range(step * batch, (step + 1) * batch):
        epoch, place = divmod(position, count)
        generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
        found.append(int(torch.randperm(count, generator=generator)[place]))
    return found


def rate(done: float, warmup: float) -> float:
    """What the learning rates are multiplied by when a share `done` of the run is over: up, then a cosine to 0."""
    if done < warmup:
        return done / warmup
    return 0.5 * (1 + math.cos(math.pi * min((done - warmup) / (1 - warmup), 1.0)))


def make_optimizer(student: nn.Module, settings: TuneSettings) -> torch.optim.AdamW:
    """AdamW with a rate each for weights, scales and the rest; no weight decay."""
    groups: dict[str, list[nn.Parameter]] = {"learning_rate": [], "scale_rate": [], "plain_rate": []}
    for name, parameter in student.named_parameters():
        leaf = name.rpartition(".")[2]
        kind = "scale_rate" if leaf.startswith("log_") else "learning_rate" if parameter.dim() > 1 else "plain_rate"
        groups[kind].append(parameter)
    made = [{"params": p, "lr": getattr(settings, k), "base": getattr(settings, k)} for k, p in groups.items() if p]
    return torch.optim.AdamW(made, betas=(0.9, 0.95), weight_decay=0.0)


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
    teacher: nn.Module | None,
    windows: Sequence[Tensor],
    settings: TuneSettings,
    *,
    evaluation: Sequence[Tensor] = (),
    dtype: torch.dtype | None = None,
    state: Path | None = None,
    resume: bool = False,
    accelerator: Accelerator | None = None,
    progress: Progress | None = None,
) -> TuneReport:
    """Train a student in place.

    Args:
        student: see `prepare`.
        teacher: the float model, or None where the settings need none. It is put on the student's device.
        windows: int64 `[length]` token ids each, all of one length.
        settings: how.
        evaluation: windows to evaluate the integer model on, of other text.
        dtype: of the integer model in evaluations; None for float32.
        state: a folder for the state; None to save none.
        resume: go on from the state there.
        accelerator: device, mixed precision and processes; None for Accelerate's choice without mixed precision.
        progress: called after each step.

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
    if teacher is not None:
        teacher.to(run.device).requires_grad_(False).eval()
    # Accelerate patches the forward pass of what it prepares, so only what it must wrap.
    module: Any = run.prepare_model(student) if run.num_processes > 1 else student
    step = len(losses)
    while step < settings.steps and (settings.max_seconds is None or spent < settings.max_seconds):
        started = time.perf_counter()
        done = step / settings.steps
        if settings.max_seconds is not None:
            done = max(done, spent / settings.max_seconds)
        for group in optimizer.param_groups:
            group["lr"] = group["base"] * rate(done if step else 0.5 / settings.steps, settings.warmup)
        chosen = batch_indices(step, settings.batch, len(windows), settings.seed)
        mine = chosen[run.process_index :: run.num_processes]
        ids = torch.stack([windows[i] for i in mine]).to(run.device)
        loss = _step(run, module, teacher, ids, settings, optimizer)
        if not math.isfinite(loss):
            raise TuningError(f"the loss of step {step} is {loss}; lower the learning rates")
        losses.append(loss)
        step += 1
        spent += time.perf_counter() - started
        if progress is not None:
            progress("tune", step, settings.steps)
        ended = step == settings.steps or (settings.max_seconds is not None and spent >= settings.max_seconds)
        if evaluation and (ended or (settings.evaluate_every and step % settings.evaluate_every == 0)):
            found_perplexity, tokens = evaluate(student, evaluation, dtype=dtype)
            evaluations.append(Evaluation(step, found_perplexity, tokens))
        if state is not None and run.is_main_process and (ended or step % settings.save_every == 0):
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
        peak_bytes=torch.cuda.max_memory_allocated(run.device) if run.device.type == "cuda" else 0,
    )


def _describe(student: Student) -> list[str]:
    """What a state must agree on with the plan: every module's scheme, and the quantized caches."""
    modules = [f"{m.name} {m.scheme.label} {m.scheme.weight.granularity}" for m in student.plan.modules]
    return [*modules, *(f"{name} kv8" for name in student.kv_names)]


def _step(
    run: Accelerator,
    student: Any,
    teacher: nn.Module | None,
    ids: Tensor,
    settings: TuneSettings,
    optimizer: torch.optim.Optimizer,
) -> float:
    """One optimizer step on windows `[batch, length]`; returns the mean loss over all processes."""
    student.train()
    wants_hidden = settings.hidden_weight > 0
    total = torch.zeros((), device=ids.device)
    optimizer.zero_grad(set_to_none=True)
    for part in ids.chunk(settings.accumulate):
        with run.autocast():
            output = student(part, output_hidden_states=wants_hidden)
            given: Any = None
            if teacher is not None and settings.distills:
                with torch.no_grad():
                    given = teacher(input_ids=part, use_cache=False, output_hidden_states=wants_hidden)
        # Every position's prediction is compared with the teacher's; the last one has no next token in the window.
        student_logits = output.logits[:, :-1].flatten(0, 1)
        loss = torch.zeros((), device=ids.device)
        if settings.kl_weight or settings.text_weight:
            loss = logits_loss(
                student_logits,
                None if given is None else given.logits[:, :-1].flatten(0, 1),
                part[:, 1:].flatten(),
                kl_weight=settings.kl_weight,
                text_weight=settings.text_weight,
            )
        if wants_hidden:
            loss = loss + settings.hidden_weight * hidden_loss(output.hidden_states, given.hidden_states)
        run.backward(loss / settings.accumulate)
        total += loss.detach() / settings.accumulate
    run.clip_grad_norm_(student.parameters(), settings.clip)
    optimizer.step()
    return float(run.reduce(total, reduction="mean"))
