"""The engine: one resident base, adapters as data, every row of every adapter in one forward a step.

engine.py   `build`, `Engine`      worker.py   the thread that owns one      process.py   the process that it may have
"""
