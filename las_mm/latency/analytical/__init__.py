"""The papers' latency model: operators on a device of processing engines and two bandwidths."""
