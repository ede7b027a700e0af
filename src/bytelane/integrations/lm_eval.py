"""bytelane as a model of EleutherAI's lm-evaluation-harness, under the name `bytelane` in its registry.

Importing this module registers it; `bytelane eval MODEL --tasks ...` does so and runs the harness. From Python:

    import lm_eval
    import bytelane.integrations.lm_eval
    lm_eval.simple_evaluate("bytelane", {"pretrained": "demo-model", "numerics": "integer"}, tasks=["arc_easy"])

The harness's own Hugging Face class does the work on the model that `bytelane.load_model` gives it, so prompts,
batching, truncation and scoring are the harness's, and figures compare with those of its `hf` model.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lm_eval import simple_evaluate
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from bytelane.decoder import FloatOps
from bytelane.errors import ConfigError, QuantizeError
from bytelane.generation import load_tokenizer
from bytelane.models import load_model, resolve_checkpoint

NAME = "bytelane"


@register_model(NAME)
class BytelaneLM(HFLM):
    """The harness's Hugging Face model on a wNa8o8 checkpoint."""

    def __init__(
        self,
        pretrained: str,
        *,
        numerics: str = "integer",
        dtype: Any = None,
        device: str | None = "cpu",
        float_ops: FloatOps = "auto",
        overrides: str | None = None,
        trust_remote_code: bool = False,
        batch_size: int = 1,
        max_batch_size: int | None = None,
        max_length: int | None = None,
    ) -> None:
        """Load a checkpoint.

        Args:
            pretrained: a folder or hub id.
            numerics: `"integer"` or `"emulated"`.
            dtype: a torch dtype of activations; None for the checkpoint's own.
            device: where the model goes.
            float_ops: as for `bytelane.load_model`.
            overrides: a JSON file of scales the checkpoint lacks.
            trust_remote_code: allow the checkpoint's own code to run.
            batch_size: sequences at a time.
            max_batch_size: accepted, since the harness passes it; batches have one size here.
            max_length: of a sequence; None for the model's own limit.

        Raises:
            CheckpointError: the checkpoint is refused.
        """
        directory = resolve_checkpoint(pretrained)
        model = load_model(
            directory,
            numerics=numerics,
            dtype=dtype,
            device=device or "cpu",
            float_ops=float_ops,
            text_only=True,
            overrides=overrides,
            trust_remote_code=trust_remote_code,
        )
        tokenizer = load_tokenizer(directory, trust_remote_code=trust_remote_code)
        # The harness warns that a model object takes no loading arguments; it gets none.
        logging.getLogger("lm_eval.models.huggingface").setLevel(logging.ERROR)
        super().__init__(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, max_length=max_length)


@dataclass(frozen=True)
class TaskScore:
    """One figure of one task.

    Attributes:
        task: its name.
        metric: the harness's name of the figure, with its filter where it has one: `acc`, `exact_match,strict`.
        value: the figure.
        standard_error: the harness's; None where it gives none.
        higher_is_better: as the task says, or None.
    """

    task: str
    metric: str
    value: float
    standard_error: float | None
    higher_is_better: bool | None


@dataclass(frozen=True)
class Tasks:
    """Tasks of the harness that were found.

    Attributes:
        names: as the harness knows them, patterns resolved.
        manager: the harness's index that they are in.
    """

    names: tuple[str, ...]
    manager: TaskManager


def find_tasks(tasks: Sequence[str], *, include: Sequence[Path] = ()) -> Tasks:
    """Look tasks up, once for any number of models.

    Args:
        tasks: names or patterns the harness knows, or that files under `include` define.
        include: folders with task files.

    Raises:
        QuantizeError: a task that the harness does not know.
    """
    paths = [str(path) for path in include]
    # The harness's own index is thousands of files, a quarter of a minute: tasks that all come from `include` do
    # without it.
    manager = TaskManager(include_path=paths, include_defaults=False) if paths else None
    if manager is None or not all(manager.match_tasks([task]) for task in tasks):
        manager = TaskManager(include_path=paths or None)
    known = manager.match_tasks(list(tasks))
    unknown = [task for task in tasks if not manager.match_tasks([task])]
    if unknown or not known:
        raise QuantizeError(f"lm-eval knows no task called {', '.join(unknown)}; give its file's folder with --include")
    return Tasks(tuple(known), manager)


def evaluate_tasks(
    model: str,
    tasks: Tasks,
    *,
    registered: str = NAME,
    arguments: dict[str, Any] | None = None,
    few_shot: int | None = None,
    limit: int | None = None,
    batch_size: int = 1,
) -> tuple[TaskScore, ...]:
    """Run tasks of the harness.

    Args:
        model: a folder or hub id.
        tasks: from `find_tasks`.
        registered: the model's name in the harness's registry: `bytelane`, or `hf` for a float model.
        arguments: further arguments of the registered class.
        few_shot: examples in a prompt; None for the task's own.
        limit: read at most this many documents of a task.
        batch_size: sequences at a time.

    Raises:
        CheckpointError: the checkpoint is refused.
    """
    found = simple_evaluate(
        model=registered,
        model_args={"pretrained": model, **(arguments or {})},
        tasks=list(tasks.names),
        num_fewshot=few_shot,
        batch_size=batch_size,
        limit=limit,
        log_samples=False,
        bootstrap_iters=1000,
        task_manager=tasks.manager,
    )
    if found is None:
        raise ConfigError("the harness gave no result on this process", tensor=model)
    return tuple(_scores(found))


def _scores(found: Any) -> list[TaskScore]:
    scores = []
    for task, figures in found["results"].items():
        better = found.get("higher_is_better", {}).get(task, {})
        for key, value in figures.items():
            metric, _, kind = key.partition(",")
            if metric.endswith("_stderr") or not isinstance(value, int | float) or not kind:
                continue
            error = figures.get(f"{metric}_stderr,{kind}")
            scores.append(
                TaskScore(
                    task,
                    metric if kind == "none" else key,
                    float(value),
                    float(error) if isinstance(error, int | float) else None,
                    better.get(metric),
                )
            )
    return scores
