"""A latency model fitted to measurements on the machine at hand."""
