"""What `karna_ws.py` and `services.py` stand on: small rooms, one idea each, imports one way."""
