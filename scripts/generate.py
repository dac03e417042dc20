"""Answers a prompt: `python scripts/generate.py --prompt "What is the capital of France?"`."""

import sys

from fusedllm.cli.main import main

sys.exit(main(["generate", *sys.argv[1:]]))
