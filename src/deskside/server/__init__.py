"""HTTP APIs: so far only the client."""
