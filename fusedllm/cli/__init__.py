"""The command line, `fusedllm COMMAND`. One file a command; `main.COMMANDS` has them all."""
