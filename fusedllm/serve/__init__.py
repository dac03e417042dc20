"""The HTTP face: an OpenAI-compatible server on the engine. The room is here; nothing is in it yet."""
