"""The CPU: a program of native steps on packed weights."""
