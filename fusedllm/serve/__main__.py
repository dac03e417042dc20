"""`python -m fusedllm.serve` is `fusedllm serve`."""

import runpy
import sys

# Through the front door: this room is below the command line, and imports nothing of it.
sys.argv.insert(1, "serve")
runpy.run_module("fusedllm", run_name="__main__")
