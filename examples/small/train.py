"""Train the small model: a float stage, then a quantized stage that learns from the float model.

    python examples/small/train.py DATA OUT --float-steps 1500 --steps 2500      # DATA: see corpus.py
    python examples/small/train.py DATA OUT --toy --float-steps 20 --steps 20 --batch 4

The quantized stage's loss is half cross entropy and half the Kullback-Leibler divergence from the float model. Seeds
are fixed; a stage ends at its steps or its seconds, whichever comes first, and its learning rate follows the one that
is further. The state is saved as safetensors now and then; `--resume` goes on from it. OUT gets `float.*` and
`quantized.*` (weights and scales, in files below 16 MB), `log.jsonl`, and at the end a sample.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoTokenizer, Gemma4ForCausalLM

from model import ROW, build, calibrate, config, masks, scales, set_quantizing

FILE_BYTES = 14_000_000
PROMPTS = ("Tell me a story about a fox.", "Tell me a short story about a red kite.", "Who are you?", "What is a bear?")


class Log:
    """Lines of JSON, printed and kept."""

    def __init__(self, path: Path) -> None:
        self.path, self.start = path, time.perf_counter()

    def __call__(self, **values: Any) -> None:
        """Write one line."""
        line = json.dumps({"seconds": round(time.perf_counter() - self.start, 1), **values})
        print(line, flush=True)
        with self.path.open("a") as file:
            file.write(line + "\n")


def batches(tokens: np.ndarray, size: int, device: str, seed: int) -> Iterator[Tensor]:
    """Shuffled rows without end, each epoch in another order."""
    rows = torch.from_numpy(tokens.astype(np.int32)).to(device)
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(len(rows), generator=generator).to(device)
        for start in range(0, len(order) - size + 1, size):
            yield rows[order[start : start + size]].long()


def save_model(model: nn.Module, folder: Path, stem: str, dtype: torch.dtype) -> None:
    """Every parameter and buffer, in files of at most `FILE_BYTES`."""
    part: dict[str, Tensor] = {}
    parts = [part]
    for name, tensor in model.state_dict().items():
        value = tensor.detach().to("cpu", dtype if tensor.is_floating_point() else tensor.dtype).contiguous().clone()
        if sum(t.nbytes for t in part.values()) + value.nbytes > FILE_BYTES and part:
            part = {}
            parts.append(part)
        part[name] = value
    for index, found in enumerate(parts):
        save_file(found, folder / f"{stem}.{index}.safetensors")


def load_model(model: nn.Module, folder: Path, stem: str) -> None:
    """The inverse of `save_model`."""
    found: dict[str, Tensor] = {}
    for path in sorted(folder.glob(f"{stem}.*.safetensors")):
        found.update(load_file(path))
    model.load_state_dict(found)


def optimizer(model: nn.Module, rate: float, scale_rate: float, device: str) -> torch.optim.AdamW:
    """AdamW; norms and scales do not decay, and scales have a rate of their own."""
    learned = {id(p) for p in scales(model)}
    others = [p for p in model.parameters() if id(p) not in learned]
    groups = [
        {"params": [p for p in others if p.dim() >= 2], "lr": rate, "weight_decay": 0.05},
        {"params": [p for p in others if p.dim() < 2], "lr": rate, "weight_decay": 0.0},
        {"params": list(scales(model)), "lr": scale_rate, "weight_decay": 0.0},
    ]
    for group in groups:
        group["peak"] = group["lr"]
    return torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-10, fused=device == "cuda")


def _state(path: Path, model: nn.Module, adam: torch.optim.AdamW, step: int) -> None:
    names = {p: n for n, p in model.named_parameters()}
    held = {f"model.{n}": p.detach().contiguous() for n, p in model.named_parameters()}
    for parameter, state in adam.state.items():
        held |= {f"{key}.{names[parameter]}": value for key, value in state.items()}
    partial = path.with_suffix(".partial")
    save_file({k: v.cpu() for k, v in held.items()}, partial, metadata={"step": str(step)})
    partial.rename(path)


def _resume(path: Path, model: nn.Module, adam: torch.optim.AdamW) -> int:
    held, step = load_file(path), 0
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(held[f"model.{name}"])
            keys = ("step", "exp_avg", "exp_avg_sq")
            if f"step.{name}" in held:
                adam.state[parameter] = {k: held[f"{k}.{name}"].to(parameter.device) for k in keys}
                step = int(held[f"step.{name}"])
    return step


def stage(
    name: str, model: nn.Module, loss_of: Callable[[Tensor], tuple[Tensor, Tensor]], adam: torch.optim.AdamW,
    data: Iterator[Tensor], steps: int, seconds: float, until: float, log: Log, folder: Path, save_seconds: float,
    resume: bool,
) -> None:  # fmt: skip
    """Train until `steps` or `seconds` are over, or the clock says `until`; the first step, which compiles, is free."""
    path = folder / f"state-{name}.safetensors"
    step = _resume(path, model, adam) if resume and path.exists() else 0
    for _ in range(step):
        next(data)
    *weights, learned = (group["params"] for group in adam.param_groups)
    weights = [p for group in weights for p in group]
    start = saved = shown = time.perf_counter()
    seen, warm = 0, False
    while step < steps and time.perf_counter() - start < seconds:
        done = min(1.0, max(step / steps, (time.perf_counter() - start) / max(seconds, 1e-9)))
        factor = min(1.0, (step + 1) / 50) * (0.02 + 0.98 * (1 + math.cos(math.pi * done)) / 2)
        for group in adam.param_groups:
            group["lr"] = group["peak"] * factor
        ids = next(data)
        loss, entropy = loss_of(ids)
        loss.backward()
        nn.utils.clip_grad_norm_(weights, 1.0)  # apart: a scale's gradient is a sum over a whole tensor
        if learned[0].grad is not None:
            nn.utils.clip_grad_norm_(learned, 1.0)
        adam.step()
        adam.zero_grad(set_to_none=True)
        loss.item()  # the clock below is the device's
        step, seen = step + 1, seen + ids.numel()
        now = time.perf_counter()
        if not warm:
            warm, start, seconds = True, now, min(seconds, until - now)
        if step <= 3 or now - shown > 10:
            log(stage=name, step=step, loss=round(loss.item(), 4), entropy=round(entropy.item(), 4),
                rate=round(seen / (time.perf_counter() - shown)))  # fmt: skip
            shown, seen = time.perf_counter(), 0
        if now - saved > save_seconds:
            _state(path, model, adam, step)
            saved = time.perf_counter()
    log(stage=name, steps=step, done=True)


@torch.no_grad()
def evaluate(logits_of: Callable[[Tensor], Tensor], rows: np.ndarray, size: int, device: str) -> float:
    """Mean cross entropy, in nats a token."""
    total, count = 0.0, 0
    for start in range(0, len(rows), size):
        ids = torch.from_numpy(rows[start : start + size].astype(np.int64)).to(device)
        if len(ids) < size and start:
            break
        total += float(functional.cross_entropy(logits_of(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten()))
        count += 1
    return total / count


@torch.no_grad()
def sample(model: Gemma4ForCausalLM, tokenizer: Any, prompt: str, device: str, count: int = 160) -> str:
    """A greedy answer, without a cache."""
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
    )
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids.to(device)
    first = ids.shape[1]
    for _ in range(count):
        mask = masks(ids.shape[1], model.config.sliding_window, device)
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, -1]
        ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], 1)
        if int(ids[0, -1]) in (1, 4):
            break
    return str(tokenizer.decode(ids[0, first:], skip_special_tokens=True))


def main() -> None:
    """Train as the command line says."""
    parser = argparse.ArgumentParser(description="Train the small model.")
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--float-steps", type=int, default=1500)
    parser.add_argument("--steps", type=int, default=2500)
    parser.add_argument("--float-seconds", type=float, default=math.inf)
    parser.add_argument("--seconds", type=float, default=math.inf)
    parser.add_argument(
        "--total-seconds", type=float, default=math.inf, help="since the start; shortens the last stage"
    )
    parser.add_argument("--batch", type=int, default=128, help="rows of 512 tokens")
    parser.add_argument("--rate", type=float, default=4e-3)
    parser.add_argument("--quantized-rate", type=float, default=2e-3)
    parser.add_argument("--scale-rate", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save-seconds", type=float, default=120)
    parser.add_argument("--toy", action="store_true")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--resume", action="store_true")
    arguments = parser.parse_args()
    out: Path = arguments.out
    out.mkdir(parents=True, exist_ok=True)
    log = Log(out / "log.jsonl")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_float32_matmul_precision("high")
    tokenizer = AutoTokenizer.from_pretrained(arguments.data / "tokenizer")
    train, held = np.load(arguments.data / "train.npy"), np.load(arguments.data / "heldout.npy")
    model = build(config(len(tokenizer), toy=arguments.toy), arguments.seed).to(device)
    log(parameters=sum(p.numel() for p in model.parameters()),
        device=torch.cuda.get_device_name() if device == "cuda" else "cpu",
        rows=len(train), torch=torch.__version__)  # fmt: skip
    mask = masks(ROW, model.config.sliding_window, device)

    def logits_of(which: nn.Module, ids: Tensor) -> Tensor:
        with torch.autocast(device, torch.bfloat16):
            return which(input_ids=ids, attention_mask=mask, use_cache=False).logits.float()

    def float_loss(ids: Tensor) -> tuple[Tensor, Tensor]:
        loss = functional.cross_entropy(logits_of(model, ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
        return loss, loss

    def maybe(function: Callable[..., Any]) -> Callable[..., Any]:
        return torch.compile(function, dynamic=False) if arguments.compile else function

    common = {
        "until": log.start + arguments.total_seconds,
        "log": log,
        "folder": out,
        "save_seconds": arguments.save_seconds,
        "resume": arguments.resume,
    }
    finished = list(out.glob("float.*.safetensors"))
    if arguments.resume and finished:
        load_model(model, out, "float")
    else:
        adam = optimizer(model, arguments.rate, 0.0, device)
        stage("float", model, maybe(float_loss), adam, batches(train, arguments.batch, device, arguments.seed),
              arguments.float_steps, arguments.float_seconds, **common)  # fmt: skip
        save_model(model, out, "float", torch.bfloat16)
        load_model(model, out, "float")  # as a run that goes on from here has it
    size = min(arguments.batch, 32)
    log(stage="float", heldout=evaluate(lambda ids: logits_of(model, ids), held, size, device))

    teacher = copy.deepcopy(model).eval().requires_grad_(False)
    first = torch.from_numpy(train[: min(16, len(train)), :-1].astype(np.int64)).to(device)
    calibrate(model, lambda: logits_of(model, first))
    set_quantizing(model, True)
    log(stage="rounded", heldout=evaluate(lambda ids: logits_of(model, ids), held, size, device))

    def quantized_loss(ids: Tensor) -> tuple[Tensor, Tensor]:
        logits = logits_of(model, ids[:, :-1]).flatten(0, 1)
        with torch.no_grad():
            wanted = logits_of(teacher, ids[:, :-1]).flatten(0, 1).log_softmax(-1)
        entropy = functional.cross_entropy(logits, ids[:, 1:].flatten())
        away = functional.kl_div(logits.log_softmax(-1), wanted, log_target=True, reduction="batchmean")
        return 0.5 * entropy + 0.5 * away, entropy

    adam = optimizer(model, arguments.quantized_rate, arguments.scale_rate, device)
    stage("quantized", model, maybe(quantized_loss), adam, batches(train, arguments.batch, device, arguments.seed + 1),
          arguments.steps, arguments.seconds, **common)  # fmt: skip
    save_model(model, out, "quantized", torch.float32)
    log(stage="quantized", heldout=evaluate(lambda ids: logits_of(model, ids), held, size, device))
    for prompt in PROMPTS:
        with torch.autocast(device, torch.bfloat16):
            log(prompt=prompt, answer=sample(model, tokenizer, prompt, device))


if __name__ == "__main__":
    main()
