"""Both ends of the HTTP APIs; so far the client's."""
