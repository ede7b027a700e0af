"""llama.cpp's side of llama.py: a process in its own environment, which imports nothing of bytelane.

    python llama_worker.py GGUF THREADS CONTEXT

It reads requests line by line and answers each with a line of JSON. `run TOKENS ID ID ...` reads the prompt of those
ids, writes so many tokens greedily, and answers the seconds of both. It calls llama.cpp's C interface and not
llama-cpp-python's `Llama`, whose Python around every token is not llama.cpp's.
"""

from __future__ import annotations

import ctypes
import json
import sys
import time

import llama_cpp
import numpy as np


class Session:
    """A model and a context of one sequence."""

    def __init__(self, file: str, threads: int, context: int) -> None:
        llama_cpp.llama_backend_init()
        silent = llama_cpp.llama_log_callback(lambda level, text, data: None)
        self._silent = silent  # the library keeps the pointer
        llama_cpp.llama_log_set(silent, ctypes.c_void_p(0))
        parameters = llama_cpp.llama_model_default_params()
        self.model = llama_cpp.llama_model_load_from_file(file.encode(), parameters)
        if not self.model:
            sys.exit(f"llama.cpp cannot load {file}")
        wanted = llama_cpp.llama_context_default_params()
        wanted.n_ctx = wanted.n_batch = wanted.n_ubatch = context
        wanted.n_threads = wanted.n_threads_batch = threads
        self.context = llama_cpp.llama_init_from_model(self.model, wanted)
        self.vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))

    def step(self, ids: list[int]) -> int:
        """Read tokens; the likeliest next one."""
        array = (llama_cpp.llama_token * len(ids))(*ids)
        if llama_cpp.llama_decode(self.context, llama_cpp.llama_batch_get_one(array, len(ids))):
            sys.exit("llama.cpp failed to decode")
        logits = llama_cpp.llama_get_logits_ith(self.context, -1)
        return int(np.ctypeslib.as_array(logits, shape=(self.vocabulary,)).argmax())

    def run(self, tokens: int, prompt: list[int]) -> tuple[float, float]:
        """Seconds of the prompt, its first token included, and of each token after that."""
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self.context), True)
        start = time.perf_counter()
        token = self.step(prompt)
        first = time.perf_counter()
        for _ in range(tokens - 1):
            token = self.step([token])
        return first - start, (time.perf_counter() - first) / max(tokens - 1, 1)


def main() -> None:
    file, threads, context = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    session = Session(file, threads, context)
    print(json.dumps({"version": llama_cpp.__version__, "vocabulary": session.vocabulary}), flush=True)
    for line in sys.stdin:
        _, tokens, *prompt = line.split()
        print(json.dumps(session.run(int(tokens), [int(t) for t in prompt])), flush=True)


if __name__ == "__main__":
    main()
