"""The command line as people use it: real processes, in a mount namespace of their own."""
