"""Real components for demo, benchmarks and tests: JuiceFS volumes, model files, load times."""
