"""One operation a file, one public function each, its implementations side by side. Knows no model.

Every operation takes `implementation=None`: `None` picks the best one for the backend, a name asks for that one and
raises `ImplementationError` where it can't run. `"xla"` exists for each, is short, and is what others are tested by.
"""
