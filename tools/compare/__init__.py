"""Compares deskside with llama.cpp and ik_llama.cpp: `python -m tools.compare.peers`."""
