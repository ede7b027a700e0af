"""A vLLM engine in a process of its own: texts in, greedy texts and log-probabilities out, and every layer's record.

python engine_text.py MODEL RANKS DTYPE TOKENS OUT.json RECORDS.pt < PROMPTS.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from vllm import LLM, SamplingParams

import record


def main() -> None:
    model, ranks, dtype, tokens, out, records = sys.argv[1:]
    prompts = json.load(sys.stdin)
    llm = LLM(
        model,
        enforce_eager=True,
        dtype=dtype,
        max_model_len=256,
        max_num_seqs=4,
        tensor_parallel_size=int(ranks),
        block_size=32,
        seed=0,
    )
    assert all(count > 0 for count in llm.apply_model(record.start))
    greedy = SamplingParams(max_tokens=int(tokens), temperature=0, logprobs=0, prompt_logprobs=1)
    found = []
    for answer in llm.generate(prompts, greedy, use_tqdm=False):
        new = answer.outputs[0]
        found.append(
            {
                "prompt_ids": answer.prompt_token_ids,
                "ids": list(new.token_ids),
                "text": new.text,
                "finish": new.finish_reason,
                "logprobs": [row[t].logprob for t, row in zip(new.token_ids, new.logprobs, strict=True)],
                "prompt_logprobs": [
                    None if row is None else {str(t): v.logprob for t, v in row.items()}
                    for row in answer.prompt_logprobs
                ],
            }
        )
    Path(out).write_text(json.dumps(found))
    torch.save(llm.apply_model(record.collect), records)


if __name__ == "__main__":
    main()
