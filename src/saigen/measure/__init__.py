"""What a module costs: parameters, multiply-adds, time, memory."""

from saigen.measure.cost import buffers, latency, macs, parameters, peak_memory, speed_ratio

__all__ = ["buffers", "latency", "macs", "parameters", "peak_memory", "speed_ratio"]
