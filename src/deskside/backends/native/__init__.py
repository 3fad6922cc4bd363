"""The CPU's backend: a program of native steps on packed weights."""
