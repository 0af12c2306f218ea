"""What `adapter-server bench` and `benchmarks/` measure, and how."""
