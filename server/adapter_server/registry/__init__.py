"""Adapters on disk: which there are, at which version, and whether their files can be trusted. No torch, no web."""
