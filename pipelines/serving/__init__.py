"""The endpoint: our own generation behind an OpenAI-compatible server.

engine.py decodes many requests together, manager.py holds the engine of the moment, app.py speaks HTTP with the shapes
of protocol.py, text.py turns text to tokens and back, metrics.py and ledger.py count.
"""
