"""The HTTP face: an OpenAI-compatible server on the engine. `app.create_app` puts it together."""
