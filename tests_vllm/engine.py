"""A vLLM engine in a process of its own, on one rank or two: prompts in, tokens and every layer's record out.

python engine.py MODEL RANKS OUT.pt [--compiled]
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from vllm import LLM, SamplingParams

import record

PROMPTS = [
    [3, 4, 5, 6, 7],
    [9, 8, 7, 6, 5, 4, 3, 11, 12, 13, 14, 15],
    [100, 3, 90],
    list(range(10, 58)),
]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("ranks", type=int)
    parser.add_argument("out", type=Path)
    parser.add_argument("--compiled", action="store_true")
    arguments = parser.parse_args()
    llm = LLM(
        arguments.model,
        skip_tokenizer_init=True,
        enforce_eager=not arguments.compiled,
        max_model_len=128,
        max_num_seqs=4,
        max_num_batched_tokens=32,  # shorter than the longest prompt: its prefill is chunked
        dtype="bfloat16",
        tensor_parallel_size=arguments.ranks,
        block_size=32,
        seed=0,
    )
    prompts = [{"prompt_token_ids": ids} for ids in PROMPTS]
    greedy = SamplingParams(max_tokens=8, temperature=0, detokenize=False, prompt_logprobs=3, logprobs=3)
    found: dict[str, object] = {"prompts": PROMPTS}
    if not arguments.compiled:
        found["layers"] = llm.apply_model(record.start)
        llm.apply_model(record.count_reductions)
        alone = [llm.generate([prompt], greedy, use_tqdm=False)[0] for prompt in prompts]
        found["alone"] = [list(o.outputs[0].token_ids) for o in alone]
        found["records_alone"] = llm.apply_model(record.collect)
        found["reductions"] = llm.apply_model(record.reductions)
        llm.reset_prefix_cache()
    together = llm.generate(prompts, greedy, use_tqdm=False)
    found["together"] = [list(o.outputs[0].token_ids) for o in together]
    found["together_logprobs"] = [
        [{t: v.logprob for t, v in p.items()} for p in o.outputs[0].logprobs] for o in together
    ]
    if not arguments.compiled:
        found["records_together"] = llm.apply_model(record.collect)
    found["prompt_logprobs"] = [
        [None if p is None else {t: v.logprob for t, v in p.items()} for p in o.prompt_logprobs] for o in together
    ]
    again = llm.generate(prompts, SamplingParams(max_tokens=8, temperature=0, detokenize=False), use_tqdm=False)
    found["again"] = [list(o.outputs[0].token_ids) for o in again]
    found["cached"] = [o.num_cached_tokens for o in again]
    found["threads"] = llm.apply_model(record.threads)
    torch.save(found, arguments.out)


if __name__ == "__main__":
    main()
