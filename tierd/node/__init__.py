"""The node daemon: the overlay, its recording, and everything that runs on one GPU node."""
