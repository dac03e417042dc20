"""The command line: `fusedllm generate | serve | perplexity | convert | pull | models`. One file a command."""
