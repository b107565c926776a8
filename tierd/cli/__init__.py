"""The command line: reads argv and environment, asks, waits, shows. Decides nothing."""
