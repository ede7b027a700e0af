"""The next token from logits: greedy or sampled, without sorting a vocabulary.

transformers' processors work on the whole row of logits one after the other: they sort all of a vocabulary of 262144
for `top_p` and draw from a distribution that long, which on two cores takes as long as the model's own layers. Here the
likeliest `top_k` are picked first and everything after that happens among them. The distribution is the same:

    logits of used tokens divided (positive) or multiplied (negative) by repetition_penalty
    divided by temperature                      then the top_k likeliest
    of these, in falling order, token i is kept while the probability of those before it is below top_p
    and while its own is at least min_p times the first's
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig

TOP_K = 50
"""transformers' default where sampling is on and nothing says otherwise."""

_FIRST = 4096
"""Tokens sorted at first when `top_p` comes without `top_k`: nearly always enough."""

_HANDLED = frozenset(
    [
        "do_sample",
        "temperature",
        "top_k",
        "top_p",
        "min_p",
        "repetition_penalty",
        "eos_token_id",
        "bos_token_id",
        "pad_token_id",
        "use_cache",
        "max_length",
        "max_new_tokens",
        "transformers_version",
        "_from_model_config",
    ]
)
_NEUTRAL = {
    "num_beams": 1,
    "num_return_sequences": 1,
    "cache_implementation": "hybrid",
    "disable_compile": True,
    # transformers writes these into configurations it derives from a model's
    "output_attentions": False,
    "output_hidden_states": False,
}


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. None leaves a value to the model's generation configuration.

    Attributes:
        greedy: take the likeliest token; the other values are then ignored.
        temperature: divides the logits.
        top_k: keep the k likeliest tokens; 0 keeps all.
        top_p: keep the likeliest tokens that together reach this probability.
        repetition_penalty: divides the logits of tokens already used.
        seed: of the random choice.
    """

    greedy: bool = False
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    repetition_penalty: float | None = None
    seed: int | None = None

    def arguments(self) -> dict[str, Any]:
        """As keyword arguments of transformers' `generate`."""
        if self.greedy:
            return {"do_sample": False, "temperature": None, "top_k": None, "top_p": None}
        given = {k: v for k, v in asdict(self).items() if k not in ("greedy", "seed") and v is not None}
        if {"temperature", "top_k", "top_p"} & given.keys():
            given["do_sample"] = True
        return given


def unhandled(config: GenerationConfig) -> list[str]:
    """Settings of a generation configuration that `Chooser` does not know: `generate` itself has to run then."""
    changed = config.to_diff_dict()
    return [k for k, v in changed.items() if k not in _HANDLED and v is not None and _NEUTRAL.get(k) != v]


def end_tokens(config: GenerationConfig) -> frozenset[int]:
    """Every token that ends an answer."""
    found = config.eos_token_id
    return frozenset(() if found is None else [found] if isinstance(found, int) else map(int, found))


@dataclass(frozen=True)
class Chooser:
    """Chooses tokens one after the other.

    Attributes:
        sample: draw; otherwise the likeliest token is taken.
        temperature: positive.
        top_k: 0 for all.
        top_p: 1 for all.
        min_p: 0 for all.
        repetition_penalty: 1 for none.
        generator: of the random draws; None for torch's own.
    """

    sample: bool = False
    temperature: float = 1.0
    top_k: int = TOP_K
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    generator: torch.Generator | None = None

    @classmethod
    def of(cls, sampling: Sampling, config: GenerationConfig) -> Chooser:
        """What a request and a model's generation configuration ask for together."""
        asked = sampling.arguments()

        def value(name: str, default: Any) -> Any:
            found = asked.get(name)
            found = getattr(config, name, None) if found is None else found
            return default if found is None else found

        generator = None if sampling.seed is None else torch.Generator().manual_seed(sampling.seed)
        names = [f.name for f in fields(cls) if f.name not in ("sample", "generator")]
        values = {name: value(name, cls.__dataclass_fields__[name].default) for name in names}
        sample = bool(value("do_sample", False)) and values["temperature"] > 0
        return cls(sample=sample, generator=generator, **values)

    def choose(self, logits: Tensor, used: Sequence[int]) -> int:
        """The next token.

        Args:
            logits: `[vocabulary]`, any float dtype.
            used: the tokens so far, prompt included.
        """
        if not self.sample:
            return int(self._penalized(logits, used).argmax())
        tokens, weights = self.distribution(logits, used)
        # by the inverse of the distribution: `multinomial` costs milliseconds over a large vocabulary
        sums = weights.cumsum(0)
        point = torch.rand((), dtype=sums.dtype, generator=self.generator).to(sums.device) * sums[-1]
        drawn = min(int(torch.searchsorted(sums, point, right=True)), len(sums) - 1)
        return drawn if tokens is None else int(tokens[drawn])

    def distribution(self, logits: Tensor, used: Sequence[int]) -> tuple[Tensor | None, Tensor]:
        """What sampling draws from.

        Args:
            logits: as for `choose`.
            used: likewise.

        Returns:
            The candidates in falling order, or None for the whole vocabulary in its own; and their weights, float64,
            not normalized, 0 for those that are out.
        """
        logits = self._penalized(logits, used)
        if not self.top_k and self.top_p >= 1.0 and not self.min_p:
            scaled = logits.to(torch.float32) / self.temperature
            return None, torch.exp(scaled - scaled.max()).to(torch.float64)
        values, tokens, total = self._candidates(logits)
        probabilities = torch.exp(values - total)
        before = probabilities.cumsum(0) - probabilities
        kept = (before < self.top_p) & (probabilities >= self.min_p * probabilities[0])
        kept[0] = True
        return tokens, probabilities.masked_fill(~kept, 0.0)

    def _penalized(self, logits: Tensor, used: Sequence[int]) -> Tensor:
        if self.repetition_penalty == 1.0:
            return logits
        logits = logits.to(torch.float32).clone()
        seen = torch.tensor(sorted(set(used)), device=logits.device)
        values, penalty = logits[seen], self.repetition_penalty
        logits[seen] = torch.where(values < 0, values * penalty, values / penalty)
        return logits

    def _candidates(self, logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Candidates in falling order: logits over temperature, tokens, and the logarithm of their normalizer."""
        size = logits.shape[0]
        if self.top_k:
            values, tokens = logits.topk(min(self.top_k, size))
            values = values.to(torch.float64) / self.temperature
            return values, tokens, values.logsumexp(0)
        total = (logits.to(torch.float32) / self.temperature).to(torch.float64).logsumexp(0)
        for count in (min(_FIRST, size), size):
            values, tokens = logits.topk(count)
            values = values.to(torch.float64) / self.temperature
            probabilities = torch.exp(values - total)
            far = float(probabilities.sum()) >= self.top_p
            if count == size or (self.top_p < 1.0 and far) or bool(probabilities[-1] < self.min_p * probabilities[0]):
                break
        return values, tokens, total
