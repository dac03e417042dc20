"""The command line: `fusedllm generate | perplexity | convert | pull | models`. One file a command."""
