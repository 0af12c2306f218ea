"""The engine: one resident base, adapters as data, every row of every adapter in one forward a step."""

from adapter_server.engine.engine import Engine, Info, build
from adapter_server.engine.process import EngineProcess
from adapter_server.engine.worker import Worker, settled

__all__ = ["Engine", "EngineProcess", "Info", "Worker", "build", "settled"]
